"""What the kernels for one decay per token and channel share: products of gates inside a chunk, by recursive halving.

Exact for any gate: here exponents above zero, and quotients of gates, are never formed (mild gates take a shorter way,
which forms them within bounds: `pallas_gpu_mild`). A chunk of 64 tokens is halved six times; where a query in an upper
half meets a key in the lower half, the query is weighted with the product of gates from the boundary to itself, the key
with the product from behind itself to the boundary. The products are built bottom up, one multiplication a level, from
one exponential per element.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from linscale.kernels.linear_attention import pallas_gpu_rows as rows
from linscale.kernels.linear_attention.pallas_gpu_scalar import BF, F32, ROWS

SLICE = 32  # channels weighted at a time: what registers hold
TILE = 16
LEVELS = 6
SHARED = 232448 - 4096  # what small buffers and their alignment leave


def tiles(dtype=BF):
    """The shared-memory form of matrices that are written a slice at a time."""
    return (plgpu.TilingTransform((8, SLICE)), plgpu.SwizzleTransform(SLICE * jnp.dtype(dtype).itemsize))


def index(shape, dimension):
    return plgpu.broadcasted_iota(jnp.int32, shape, dimension, layout=ROWS)


def constant(value, shape):
    return plgpu.layout_cast(jnp.full(shape, value, F32), ROWS)


LEAST = -112.0  # exp of it is 0 in float32
MARK = 2.0**96
FAINT = 2.0**-89  # a first token's log decay counts as at most minus this, so that the marked one is at most -128


def mark(log_decay, first):
    """log_decay times MARK where `first`, [B,T], says that a document's first token is; the others are at least LEAST.

    The gate of a marked log decay is 0 like any other's of its size, and a chunk that has one is not mild.
    """
    flat = log_decay.reshape(*first.shape, -1)  # by heads, XLA would not fuse it with what forms the log decays
    faint, times, least = (jnp.asarray(x, flat.dtype) for x in (-FAINT, MARK, LEAST))
    marked = jnp.minimum(flat, faint) * times
    return jnp.where(first[..., None], marked, jnp.maximum(flat, least)).reshape(log_decay.shape)


def gates(x, documents, tied, short=False):
    """(gates, keys 1 - exp(log decay) if `tied`) of log decays x, in which `documents` says whether first tokens are marked.

    A first token's gate is closed, so that nothing of earlier documents passes; its key is its log decay's all the same.
    `short`: keys near zero by a shorter series, to 5e-5 of themselves, for kernels that are bound by arithmetic.
    """
    if not tied:
        return jnp.exp(x), None
    g = jnp.where(x < LEAST, x * (1.0 / MARK), x) if documents else x
    a = jnp.exp(g)
    closed = jnp.where(x < LEAST, 0.0, a) if documents else a
    # Near zero the difference would lose digits.
    if short:
        return closed, jnp.where(g > -0.004, g * (-1.0 - 0.5 * g), 1.0 - a)
    return closed, jnp.where(g > -0.02, -g * (1.0 + g * (0.5 + g * (1.0 / 6.0))), 1.0 - a)


def products(to_token, after_token, whole, whole_s, visit=None):
    """Multiplies in the gates of a chunk [C,SLICE]; each array comes with what its own token contributes (float32).

    to_token: gains the gates of all tokens before in the chunk. after_token: those of all tokens behind; either may be
    None. whole: the product of all. Before each of the six times that neighbouring blocks of `size` tokens are joined,
    visit(level, size, to_token, after_token) sees the products inside the blocks. whole_s [4,SLICE] is shared memory
    for the exchange between warps, this call's own until the warps have met again.
    """
    size = 1
    for level in range(LEVELS):
        if visit is not None:
            visit(level, size, to_token, after_token)
        if size < TILE:
            partner = rows.partner_rows(whole, size)
        elif size == TILE:
            rows.put_tile_rows(whole, whole_s)
            plgpu.commit_smem()
            partner = rows.get_tile_rows(whole_s, 1, SLICE)
        else:
            partner = rows.get_tile_rows(whole_s, 2, SLICE) * rows.get_tile_rows(whole_s, 3, SLICE)
        if to_token is not None:
            to_token = rows.pick(size, to_token * partner, to_token)
        if after_token is not None:
            after_token = rows.pick(size, after_token, after_token * partner)
        whole = whole * partner
        size *= 2
    return to_token, after_token, whole


def crossing(size):
    """[C,TILE] of ones where row and column of a tile lie in two joined blocks of `size` tokens."""
    i, j = _in_tile()
    block, pair = jnp.int32(size), jnp.int32(2 * size)
    same = jnp.where(lax.div(i, pair) == lax.div(j, pair), 1, 0)
    return same * jnp.where(lax.div(i, block) == lax.div(j, block), 0, 1)


def spanned(size):
    """[t,i] of ones [C,TILE]: in an odd block of `size` i from t on, in an even block i before t: what meets across t.

    A contribution of row i at this level belongs to a pair of tokens on either side of the boundary next to its block.
    """
    upper = lax.rem(lax.div(index((64, TILE), 0), jnp.int32(size)), jnp.int32(2)) == 1
    t, i = _in_tile()
    same = jnp.where(lax.div(t, jnp.int32(size)) == lax.div(i, jnp.int32(size)), 1.0, 0.0)
    return same * jnp.where(upper, jnp.where(i >= t, 1.0, 0.0), jnp.where(i < t, 1.0, 0.0))


def _in_tile():
    """Numbers of row and column within their tile, [C,TILE]."""
    return lax.rem(index((64, TILE), 0), jnp.int32(TILE)), index((64, TILE), 1)
