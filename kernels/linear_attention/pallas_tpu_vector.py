"""Linear attention with one decay per token and channel on TPUs: Pallas Mosaic TPU, forward and backward.

Exact for any gate: exponents above zero, and quotients of gates, are never formed. A chunk of C tokens is halved
recursively; where a query in an upper half meets a key in the lower half, both carry products of gates up to the
boundary between them. The products are built bottom up, one multiplication a level, from one exponential an element;
zero (a gate of minus infinity, a document's first token) is a value like any other. Every level is one matrix product
with a mask; from 8 tokens on only the rows of upper halves are multiplied. Chunks whose gates are mild need none of
this: pallas_tpu_mild takes them in one product.

The gradient of the log gates sums, for each token, what the pairs across it contribute: sum over later queries of
q dq minus sum over later keys of k dk. Pairs on one side of the token drop out of the difference exactly, since both
terms are made of the same rounded factors; the sums run in float32.

The state is held transposed, [value channels, key channels], so that gates lie along lanes. Blocks, columns and the two
walks of the backward pass are those of pallas_tpu_scalar.

Letters: B batch, T tokens, W columns of 128 lanes, N blocks of a row, C tokens of a chunk.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from linscale.kernels.linear_attention import pallas_tpu_mild as mild
from linscale.kernels.linear_attention.pallas_tpu_levels import (
    TILE,
    add_to_half,
    fill_later,
    fill_tables,
    gate_products,
    halves,
    joined,
    kept,
    levels_of,
    onward_sums,
    places,
    table_shapes,
    upper_rows,
)
from linscale.kernels.linear_attention.pallas_tpu_products import (
    F32,
    LANES,
    NN,
    NT,
    across,
    apart,
    by_head,
    dot,
    dots,
    only,
    parts_of,
)
from linscale.kernels.linear_attention.pallas_tpu_scalar import UNROLLED, Plan, call, in_turn

FORGET = -16384.0  # log of a gate of zero; a power of two, exact in bfloat16


def weighted(q, k, weight, h, dtype):
    """Queries of upper halves and keys of lower halves in one array [C,128], each with its weight."""
    both = jnp.where(upper_rows(h, q.shape), q, k) if h < TILE else joined(halves(k, h)[0], halves(q, h)[1], h)
    return (both * weight).astype(dtype)


def times(x, weight, dtype):
    return (x * weight).astype(dtype)


def gates_and_keys(g, k, starts):
    """(log gates, gates, the derivative of tied keys' gates or None, keys), float32 [C,128]."""
    g = jnp.maximum(g.astype(F32), FORGET)
    a = jnp.exp(g)
    # 1 - a would lose digits near zero
    tied = lambda: jnp.where(g > -0.02, -g * (1.0 + g * (0.5 + g * (1.0 / 6.0))), 1.0 - a)  # noqa: E731
    keys = tied() if k is None else k.astype(F32)
    if starts is None:
        return g, a, a, keys
    return jnp.where(starts > 0.0, FORGET, g), jnp.where(starts > 0.0, 0.0, a), a, keys


def head_sums(x, heads):
    """Sum over the lanes of each token's head: [C,1], or with two heads [C,128], on all lanes of the head."""
    if heads == 1:
        return jnp.sum(x, axis=1, keepdims=True)
    return by_head([jnp.sum(only(x, g, heads), axis=1, keepdims=True) + jnp.zeros_like(x) for g in range(heads)], heads)


def walk(q, k, v, a, state, masks, heads):
    """One chunk: (what queries read [C,128] float32, the state after). q, k, a float32; v in its own dtype."""
    dtype, C, levels = v.dtype, q.shape[0], gate_products(a)
    scores = jnp.zeros((C, heads * C), F32)
    for mask, (h, weight) in zip(range(len(levels_of(C))), levels):
        both = weighted(q, k, weight, h, dtype)
        if h < TILE:
            scores = scores + dot(both, apart(both, heads), NT) * masks[mask]
        else:
            queries = packed_halves(both, q * weight, h)[1]
            met = dot(queries, apart(both, heads), NT) * halves(masks[mask], h)[1]
            scores = add_to_half(scores, 1, met, h)
        yield
    _, ((to_all, after_all), total) = next(levels)
    out = dot(times(q, to_all, dtype), apart(state.astype(dtype), heads), NT)
    out = out + dot(scores.astype(dtype), apart(v, heads), NN)
    out = out + head_sums(q * k, heads) * v.astype(F32)
    return out, state * total + across(v, times(k, after_all, dtype), heads)


def packed_halves(both, exact, h):
    """Lower and upper rows of `both`; packed rows come in pairs of registers, so below 16 from the unrounded array."""
    if h * both.dtype.itemsize >= TILE * 4:
        return halves(both, h)
    return tuple(x.astype(both.dtype) for x in halves(exact, h))


def gathered(met):
    """(d queries, minus d keys, queries d queries minus keys d keys) of all levels, a register's rows at a time."""
    C, lanes = met[0][1].shape
    tiles = []
    for row in range(0, C, TILE):
        dq = minus_dk = net = jnp.zeros((TILE, lanes), F32)
        for h, weight, both, d_both in met:
            rows = slice(row, row + TILE)
            net = net + both[rows].astype(F32) * d_both[rows]
            new = d_both[rows] * weight[rows]
            if h < TILE:  # both in minus_dk, till it is known which
                dq, minus_dk = dq + jnp.where(upper_rows(h, new.shape), new, 0.0), minus_dk + new
                if 2 * h == TILE:
                    minus_dk = minus_dk - dq
            elif row // h % 2:
                dq = dq + new
            else:
                minus_dk = minus_dk + new
        tiles.append((dq, minus_dk, net))
    return [jnp.concatenate(x) for x in zip(*tiles)]


def walk_back(q, k, v, d_out, a, state, d_after, masks, bits, heads):
    """One chunk, backwards: (dq, dk, dv, d log gate, the gradient of the state before), float32 [C,128] and [D,128].

    state: before the chunk, in the dtype of v; d_after: gradient of the state after the chunk, float32.
    """
    dtype, C, levels = v.dtype, q.shape[0], gate_products(a)
    row, col = places(C, heads)
    d_outs = apart(d_out, heads)
    below, above = dot(d_out, apart(v, heads), NT), dot(v, d_outs, NT)
    # Gradient of the score of each pair, at [query, key] and, with a minus, at [key, query].
    d_pairs = jnp.where(row > col, below, -above).astype(dtype)
    scores = jnp.zeros((C, heads * C), F32)  # [keys, queries]

    # The order of products is for schedules: one of the state's here, and scores before gradients, each save 4 % on v6e.
    dq_in = dot(d_out, apart(state, heads), NN)
    met = []  # level by level: (h, weight, both, its gradient)
    for mask, (h, weight) in zip(range(len(levels_of(C))), levels):
        both = weighted(q, k, weight, h, dtype)
        each = apart(both, heads)
        if h < TILE:
            scores = scores + dot(both, each, NT) * masks[mask]
        else:
            keys = packed_halves(both, k * weight, h)[0]
            scores = add_to_half(scores, 0, dot(keys, each, NT) * halves(masks[mask], h)[0], h)
        met.append((h, weight, both, dot(kept(d_pairs, bits[mask]), each, NN)))  # minus d keys
        yield
    dq, minus_dk, net = gathered(met)

    # Between the chunk and the state.
    _, ((to_all, after_all), total) = next(levels)
    low = apart(d_after.astype(dtype), heads)
    queries, keys = times(q, to_all, dtype), times(k, after_all, dtype)
    dk_out = dot(v, low, NN)
    dv = dot(keys, low, NT)
    dq, minus_dk = dq + dq_in * to_all, minus_dk - dk_out * after_all
    of_keys = keys.astype(F32) * dk_out
    net = net + queries.astype(F32) * dq_in - of_keys
    base = jnp.sum(of_keys, axis=0, keepdims=True)
    base = base + total * jnp.sum(state.astype(F32) * d_after, axis=0, keepdims=True)
    d_before = d_after * total + across(d_out, queries, heads)

    # A token with itself.
    d_same = head_sums(d_out.astype(F32) * v.astype(F32), heads)
    dq, dk = dq + d_same * k, d_same * q - minus_dk
    dv = dv + dot(scores.astype(dtype), d_outs, NN)
    dv = dv + head_sums(q * k, heads) * d_out.astype(F32)
    return dq, dk, dv, onward_sums(net, base), d_before


def _starts(docs_ref, c, C):
    return None if docs_ref is None else docs_ref[0, c].T[:C, mild.STARTS : mild.STARTS + 1]


def forward(plan: Plan, q, k, v, log_decay, initial, docs, *, save: bool):
    """As pallas_tpu_scalar.forward, with log_decay [B,T,W*128] and k None where it is tied to it.

    States are [value channels, key channels of each head].
    """
    batch, padded, width = q.shape
    columns, dtype, C, heads = plan.columns, q.dtype, plan.chunk, plan.heads
    exact = dtype in (F32, log_decay.dtype)

    def body(*refs):
        refs = list(refs)
        q_ref, v_ref, g_ref = refs[:3]
        del refs[:3]
        k_ref = refs.pop(0) if k is not None else None
        initial_ref = refs.pop(0) if initial is not None else None
        docs_ref = refs.pop(0) if docs is not None else None
        out_ref, final_ref = refs.pop(0), refs.pop(0)
        saved_ref = refs.pop(0) if save else None
        state, masks, later, *told = refs
        t = pl.program_id(2)

        @pl.when(t == 0)
        def _():
            state[...] = jnp.zeros_like(state) if initial_ref is None else initial_ref[0]
            fill_tables(C, heads, masks)
            fill_later(later)
            mild.fill_table(told, C, heads)

        if save:
            saved_ref[0, :, 0] = state[...]

        if told:
            mild.tell(told, g_ref, docs_ref, 0, C)

        def chunk(c, _):
            rows = pl.ds(pl.multiple_of(c * C, C), C)

            def run(gentle):
                starts = None if gentle else _starts(docs_ref, c, C)  # a mild chunk has none

                def column(w):
                    at = (0, rows, pl.ds(w * LANES, LANES))
                    g, a, _, keys = gates_and_keys(g_ref[at], None if k is None else k_ref[at], starts)
                    q, v = q_ref[at].astype(F32), v_ref[at]
                    if gentle:
                        out, state[w] = yield from mild.walk(
                            q, keys, v, g, state[w], later[...], told[1], heads, not exact
                        )
                    else:
                        out, state[w] = yield from walk(q, keys, v, a, state[w], masks, heads)
                    out_ref[at] = out.astype(dtype)

                if told:  # the next chunk's kind: here its wait is covered by products
                    mild.tell(told, g_ref, docs_ref, jnp.minimum(c + 1, plan.chunks - 1), C)
                in_turn(column, columns, 1 if heads == 1 and not gentle else columns)

            mild.either(told, c, run)
            return 0

        lax.fori_loop(0, plan.chunks, chunk, 0)

        @pl.when(t == pl.num_programs(2) - 1)
        def _():
            final_ref[0] = state[...]

    one = (batch, width // LANES, LANES // heads, LANES)
    inputs = [("tokens", q), ("tokens", v), ("tokens", log_decay)]
    inputs += [("tokens", k)] if k is not None else []
    inputs += [("state", initial)] if initial is not None else []
    inputs += [("docs", docs)] if docs is not None else []
    outputs = [("tokens", q.shape, dtype), ("state", one, F32)]
    outputs += [("states", (*one[:2], padded // plan.block, *one[2:]), F32)] * save
    scratch = [pltpu.VMEM((columns, *one[2:]), F32), *table_shapes(C, heads, dtype, backward=False)]
    scratch += mild.table_shapes(C, heads, plan.chunks, dtype)
    out, final, *saved = call(
        plan, columns, body, inputs, outputs, scratch, q, reverse=False, name="linear_attention_forward"
    )
    return out, final, saved[0] if save else None


def backward(plan: Plan, q, k, v, log_decay, docs, saved, d_out, d_final):
    """(dq, dk or None where tied, dv, d log_decay, the state's gradient before the first token)."""
    batch, _, width = q.shape
    columns, dtype, C, heads = plan.columns_backward, q.dtype, plan.chunk, plan.heads
    exact = dtype in (F32, log_decay.dtype)
    tied = k is None

    def body(*refs):
        refs = list(refs)
        q_ref, v_ref, g_ref, d_out_ref, saved_ref = refs[:5]
        del refs[:5]
        k_ref = None if tied else refs.pop(0)
        d_final_ref = refs.pop(0) if d_final is not None else None
        docs_ref = refs.pop(0) if docs is not None else None
        dq_ref, dv_ref, dg_ref = refs[:3]
        del refs[:3]
        dk_ref = None if tied else refs.pop(0)
        d_initial_ref, d_state, state, states, masks, later, bits, *told = refs
        step = pl.program_id(2)

        @pl.when(step == 0)
        def _():
            d_state[...] = jnp.zeros_like(d_state) if d_final_ref is None else d_final_ref[0]
            fill_tables(C, heads, masks, bits)
            fill_later(later)
            mild.fill_table(told, C, heads)

        state[...] = saved_ref[0, :, 0]
        for c in range(plan.chunks) if told else ():
            mild.tell(told, g_ref, docs_ref, c, C)

        def load(c, w, gentle=False):
            at = (0, pl.ds(pl.multiple_of(c * C, C), C), pl.ds(w * LANES, LANES))
            starts = None if gentle else _starts(docs_ref, c, C)  # a mild chunk has none
            return at, starts, gates_and_keys(g_ref[at], None if tied else k_ref[at], starts)

        def onward(c, _):
            def column(w):
                at, _, (g, _, _, keys) = load(c, w)
                after = dots([later[...]], parts_of(g, later.dtype, not exact), NN)
                yield
                states[w, c] = state[w].astype(dtype)
                added = across(v_ref[at], times(keys, jnp.exp(after), dtype), heads)
                yield
                state[w] = state[w] * jnp.exp(after[:1] + g[:1]) + added

            in_turn(column, columns, 1)
            return 0

        def back(i, _):
            c = plan.chunks - 1 - i

            def run(gentle):
                def column(w):
                    at, starts, (g, a, derivative, keys) = load(c, w, gentle)
                    q, v, d_out = q_ref[at].astype(F32), v_ref[at], d_out_ref[at]
                    before, after = states[w, c], d_state[w]
                    if gentle:
                        walked = mild.walk_back(
                            q, keys, v, d_out, g, before, after, later[...], told[1], heads, not exact
                        )
                    else:
                        walked = walk_back(q, keys, v, d_out, a, before, after, masks, bits, heads)
                    dq, dk, dv, dg, d_state[w] = yield from walked
                    if starts is not None:
                        dg = jnp.where(starts > 0.0, 0.0, dg)
                    if tied:
                        dg = dg - dk * derivative
                    else:
                        dk_ref[at] = dk.astype(dtype)
                    dq_ref[at], dv_ref[at], dg_ref[at] = dq.astype(dtype), dv.astype(dtype), dg.astype(dg_ref.dtype)

                in_turn(column, columns, columns if gentle else heads)

            mild.either(told, c, run)
            return 0

        lax.fori_loop(0, plan.chunks, onward, 0, unroll=plan.chunks <= UNROLLED)
        lax.fori_loop(0, plan.chunks, back, 0)

        @pl.when(step == pl.num_programs(2) - 1)
        def _():
            d_initial_ref[0] = d_state[...]

    one = (batch, width // LANES, LANES // heads, LANES)
    inputs = [("tokens", x) for x in (q, v, log_decay, d_out)] + [("states", saved)]
    inputs += [] if tied else [("tokens", k)]
    inputs += [("state", d_final)] if d_final is not None else []
    inputs += [("docs", docs)] if docs is not None else []
    outputs = [("tokens", q.shape, dtype)] * 2 + [("tokens", q.shape, log_decay.dtype)]
    outputs += [] if tied else [("tokens", q.shape, dtype)]
    outputs += [("state", one, F32)]
    small = pltpu.VMEM((columns, *one[2:]), F32)
    scratch = [
        small,
        small,
        pltpu.VMEM((columns, plan.chunks, *one[2:]), dtype),
        *table_shapes(C, heads, dtype, backward=True),
        *mild.table_shapes(C, heads, plan.chunks, dtype),
    ]
    dq, dv, dg, *dk, d_initial = call(
        plan, columns, body, inputs, outputs, scratch, q, reverse=True, name="linear_attention_backward"
    )
    return dq, dk[0] if dk else None, dv, dg, d_initial
