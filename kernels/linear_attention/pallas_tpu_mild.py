"""Mild chunks of vector decay on TPUs: all pairs of tokens in one matrix product.

A chunk is mild if the log decays of either half of its tokens sum to at least FLOOR in every channel that a grid step
works on. Then the product of gates between the chunk's middle and a token has an inverse like any other number:
with `around`, the log of that product, rising along the tokens, queries are weighted with exp(-around), keys with
exp(around), and one product with a causal mask gives all scores, a token with itself among them. Weights lie within
e^50 of one, so that rounding stays relative; what overflows belongs to keys after their query, and is cut out by bits.
Every other chunk, stronger gates, closed ones, NaN and a document's first token, is halved (pallas_tpu_vector). Which a
chunk is, it finds out on chip: results are as exact for any gate, their time depends on the gates.

Arrays of float32 are always halved: sums of log decays would cost them digits that products of gates keep.

Letters: C tokens of a chunk.
"""

import functools

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from linscale.kernels.linear_attention.pallas_tpu_levels import kept, onward_sums, places
from linscale.kernels.linear_attention.pallas_tpu_products import (
    F32,
    NN,
    NT,
    across,
    apart,
    dot,
    dots,
    parts_of,
)

FLOOR = -50.0  # e^-50 of a gradient of 1e-16 is still a float32 number
STARTS = 4  # row of the documents' array: 1 where a document begins


def table_shapes(C, heads, chunks, dtype):
    """Which chunks of a block are mild; pairs as words that hold two rows: [query, key] and [key, query]. float32: none."""
    if dtype == F32:
        return []
    return [pltpu.SMEM((chunks,), jnp.int32), pltpu.VMEM((2, C // 2, heads * C), jnp.int32)]


def fill_table(told, C, heads):
    if not told:
        return
    row, col = places(C, heads)
    for i, met in enumerate((lambda r: r >= col, lambda r: r <= col)):
        words = jnp.where(met(2 * row), 0xFFFF, 0) | jnp.where(met(2 * row + 1), -0x10000, 0)
        told[1][i] = words[: C // 2]


def tell(told, g_ref, docs_ref, c, C):
    """Writes whether chunk c of the block is mild. g_ref [1,tokens,lanes]; docs_ref as in pallas_tpu_vector, or None."""
    halves = g_ref[0, pl.ds(pl.multiple_of(c * C, C), C)].astype(F32).reshape(2, C // 2, -1).sum(1)
    strong = jnp.max(jnp.where(halves >= FLOOR, 0.0, 1.0))  # NaN is strong
    if docs_ref is not None:
        strong = jnp.maximum(strong, jnp.max(docs_ref[0, c, STARTS : STARTS + 1]))
    told[0][c] = jnp.where(strong > 0.0, 0, 1)


def either(told, c, run):
    """run(True) where chunk c is mild, run(False) where it is not or where chunks are not told apart."""
    if not told:
        run(False)
        return
    for way in (True, False):
        pl.when(told[0][c] == int(way))(functools.partial(run, way))


def weigh(q, k, g, later, split, dtype):
    """Generator of (queries, keys, their weights, products of the first and of the second half's gates [1,128])."""
    C = q.shape[0]
    after = dots([later], parts_of(g, dtype, split), NN)  # sums of later tokens' log decays
    yield
    second = after[C // 2 - 1 : C // 2]
    first = after[:1] + g[:1] - second
    of_keys = jnp.exp(after - second)
    of_queries = jnp.exp(second - after)
    queries, keys = (q * of_queries).astype(dtype), (k * of_keys).astype(dtype)
    return queries, keys, of_queries, of_keys, jnp.exp(first), jnp.exp(second)


def walk(q, k, v, g, state, later, order, heads, split):
    """As pallas_tpu_vector.walk, g: log gates float32."""
    dtype = v.dtype
    queries, keys, _, _, first, second = yield from weigh(q, k, g, later, split, dtype)
    scores = kept(dot(queries, apart(keys, heads), NT).astype(dtype), order[0])
    yield
    low = state * first
    out = dot(queries, apart(low.astype(dtype), heads), NT) + dot(scores, apart(v, heads), NN)
    return out, (low + across(v, keys, heads)) * second


def walk_back(q, k, v, d_out, g, state, d_after, later, order, heads, split):
    """As pallas_tpu_vector.walk_back, g: log gates float32."""
    dtype = v.dtype
    queries, keys, of_queries, of_keys, first, second = yield from weigh(q, k, g, later, split, dtype)
    d_outs, each = apart(d_out, heads), apart(queries, heads)
    d_scores = kept(dot(d_out, apart(v, heads), NT).astype(dtype), order[0])
    d_turned = kept(dot(v, d_outs, NT).astype(dtype), order[1])
    scores = kept(dot(keys, each, NT).astype(dtype), order[1])
    yield
    # Between the chunk and the state.
    d_middle = d_after * second
    low = apart(d_middle.astype(dtype), heads)
    before = (state.astype(F32) * first).astype(dtype)
    dk_out = dot(v, low, NN)
    d_queries = dot(d_scores, apart(keys, heads), NN) + dot(d_out, apart(before, heads), NN)
    d_keys = dot(d_turned, each, NN) + dk_out
    dv = dot(scores, d_outs, NN) + dot(keys, low, NT)
    d_before = (d_middle + across(d_out, queries, heads)) * first
    yield
    keys = keys.astype(F32)
    base = jnp.sum(keys * dk_out, axis=0, keepdims=True)
    base = base + first * jnp.sum(state.astype(F32) * d_middle, axis=0, keepdims=True)
    net = queries.astype(F32) * d_queries - keys * d_keys
    return d_queries * of_queries, d_keys * of_keys, dv, onward_sums(net, base), d_before
