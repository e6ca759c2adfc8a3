"""Chunks halved recursively, for vector decay on TPUs: which pairs meet at each level, and products of gates.

Letters: C tokens of a chunk.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from linscale.kernels.linear_attention.pallas_tpu_products import F32, LANES

TILE = 8  # sublanes: blocks of this many tokens and more are whole registers


def levels_of(C):
    return [1 << n for n in range(C.bit_length() - 1)]


def table_shapes(C, heads, dtype, *, backward):
    """Masks of all levels, of which the backward pass also needs one as bits; and there, which tokens are later."""
    levels, packing = len(levels_of(C)), 4 // jnp.dtype(dtype).itemsize
    more = [pltpu.VMEM((levels, C // packing, heads * C), jnp.int32)]
    return [pltpu.VMEM((levels, C, heads * C), F32), pltpu.VMEM((C, C), dtype)] + more * backward


def places(C, heads):
    """Token of each row and of each column of a column's pairs [C,heads*C]."""
    row, col = (lax.broadcasted_iota(jnp.int32, (C, heads * C), d) for d in (0, 1))
    return row, col % C


def fill_later(later):
    """later [t,s]: whether token s is after t."""
    row, col = (lax.broadcasted_iota(jnp.int32, later.shape, d) for d in (0, 1))
    later[...] = (col > row).astype(F32).astype(later.dtype)


def fill_tables(C, heads, masks, bits=None):
    """masks: which pairs meet at each level, those of a block of 2h tokens that are in different halves: [query, key],
    and with `bits`, [key, query]. bits: the same in both orders, as words that hold one or two rows."""
    row, col = places(C, heads)
    for i, h in enumerate(levels_of(C)):
        meet = (row ^ col) // h == 1
        masks[i] = (meet & (row > col if bits is None else row < col)).astype(F32)
    if bits is not None:
        first, last, ones = (row, row, (-1, -1)) if bits.shape[1] == C else (2 * row, 2 * row + 1, (0xFFFF, -0x10000))
        for i, h in enumerate(levels_of(C)):
            word = [jnp.where((r ^ col) // h == 1, one, 0) for r, one in zip((first, last), ones)]
            bits[i] = (word[0] | word[1])[: bits.shape[1]]


def kept(x, bits):
    """x [C,heads*C] where the bits are ones, else zero: half a masked product's work in bfloat16."""
    return pltpu.bitcast(pltpu.bitcast(x, jnp.int32) & bits, x.dtype)


def halves(x, h):
    """Rows of lower and of upper halves of blocks of 2h rows, h >= TILE: two of [C/2, .]."""
    C, lanes = x.shape
    x = x.reshape(C // (2 * h), 2, h, lanes)
    return x[:, 0].reshape(C // 2, lanes), x[:, 1].reshape(C // 2, lanes)


def joined(lower, upper, h):
    """The inverse of `halves`."""
    half, lanes = lower.shape
    both = [x.reshape(half // h, 1, h, lanes) for x in (lower, upper)]
    return jnp.concatenate(both, axis=1).reshape(2 * half, lanes)


def add_to_half(x, which, y, h):
    """x with y [C/2,.] added to the rows of lower (0) or upper (1) halves."""
    parts = list(halves(x, h))
    parts[which] = parts[which] + y
    return joined(*parts, h)


def gate_products(a):
    """From gates [C,128] float32: level by level (h, weight); last (C, ((to, after) of the whole chunk, its total [1,128])).

    weight: in upper halves of blocks of 2h tokens, the product of the gates from the half's first token to each token;
    in lower halves, of those after each token up to the half's last.
    """
    C = a.shape[0]
    tiles = (C // TILE, TILE, LANES)
    to, after, total = a.reshape(tiles), jnp.ones(tiles, F32), a.reshape(tiles)  # within blocks of h tokens
    flat = lambda x: x.reshape(C, LANES)  # noqa: E731
    h = 1
    while h < TILE:
        upper = upper_rows(h, tiles)
        yield h, flat(jnp.where(upper, to, after))
        other = pltpu.roll(total, h, 1)  # total of the other half
        if 2 * h < TILE:
            other = jnp.where(upper, other, pltpu.roll(total, TILE - h, 1))
        to = jnp.where(upper, to * other, to)
        after = jnp.where(upper, after, after * other)
        total = total * other
        h *= 2
    while h < C:
        split = lambda x, h=h: x.reshape(C // (2 * h), 2, -1, TILE, LANES)  # noqa: E731
        lower, upper = (split(after)[:, :1], split(to)[:, 1:])
        yield h, flat(jnp.concatenate([lower, upper], axis=1))
        of_lower, of_upper = (split(total)[:, i] for i in (0, 1))  # [blocks, 1, 8, 128]
        to = jnp.concatenate([split(to)[:, :1], upper * of_lower[:, None]], axis=1).reshape(tiles)
        after = jnp.concatenate([lower * of_upper[:, None], split(after)[:, 1:]], axis=1).reshape(tiles)
        total = of_lower * of_upper
        h *= 2
    yield C, ((flat(to), flat(after)), total.reshape(TILE, LANES)[:1])


def upper_rows(h, shape):
    return lax.broadcasted_iota(jnp.int32, shape, 1 if len(shape) == 3 else 0) // h % 2 == 1


def onward_sums(x, after):
    """Sums of each row of x [C,128], all later ones and `after` [1,128]; as a product they would keep matrix units busy."""
    tiles = x.reshape(-1, TILE, x.shape[1])
    for h in (1, 2, 4):
        row = lax.broadcasted_iota(jnp.int32, tiles.shape, 1)
        tiles = tiles + jnp.where(row < TILE - h, pltpu.roll(tiles, TILE - h, 1), 0.0)
    sums = []
    for tile in reversed(range(tiles.shape[0])):
        sums.append(tiles[tile] + after)
        after = sums[-1][:1]
    return jnp.concatenate(sums[::-1])
