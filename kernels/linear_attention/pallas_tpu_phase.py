"""Linear attention with a phase (cosFormer2) on TPUs: Pallas Mosaic TPU, forward and backward.

A query and a key meet as sum_c q_c k_c cos((t-s) theta_c), which is plain linear attention of twice the key channels:
the features x cos(i theta) and x sin(i theta), i the place in the chunk. They are formed on chip from tables of C rows
that are read once per row of blocks. The state [D, cos 128 | sin 128], value channels first, is held as the chunk's
first token sees it, so that the same features serve for pairs inside the chunk and for the state; from chunk to chunk it
turns by C theta. After the last chunk it is given back as that chunk's first token sees it: a turn to the chunk's end
and back would leave in the gradient of theta the rounding of C times what cancels. Turning it to where callers want it is
left to XLA, outside (pallas_tpu.py).

Blocks, columns and the two walks of the backward pass are those of pallas_tpu_scalar.

Letters: B batch, T tokens, W columns of 128 lanes, N blocks of a row, C tokens of a chunk.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from linscale.kernels.linear_attention.pallas_tpu_products import (
    F32,
    LANES,
    NN,
    NT,
    across,
    apart,
    dot,
    scale,
    times,
)
from linscale.kernels.linear_attention.pallas_tpu_scalar import DOCUMENT_ROWS, UNROLLED, Plan, call, in_turn, weights


def tables(plan, theta):
    """[2,C+8,W*128] float32: cos and sin of i theta for i = 0..C, from theta [W*128]; the last 7 rows are not used.

    C is a power of two. Angles of 1, 2, 4, .. theta are exact, the others come by adding angles: closer than cosines of
    rounded products i theta, and a compiler that unrolls cosines has C / log C times less to do.
    """
    powers = 2.0 ** jnp.arange(plan.chunk.bit_length(), dtype=F32)[:, None] * theta
    power_cos, power_sin = jnp.cos(powers), jnp.sin(powers)
    cos, sin = jnp.ones_like(theta)[None], jnp.zeros_like(theta)[None]
    for a, b in zip(power_cos[:-1], power_sin[:-1]):
        cos, sin = jnp.concatenate([cos, cos * a - sin * b]), jnp.concatenate([sin, sin * a + cos * b])
    last = [jnp.broadcast_to(x[-1], (8, theta.size)) for x in (power_cos, power_sin)]
    return jnp.stack([jnp.concatenate([cos, last[0]]), jnp.concatenate([sin, last[1]])])


def both(cos, sin):
    return jnp.concatenate([cos, sin], axis=1)


def parts(x):
    return x[:, :LANES], x[:, LANES:]


def features(x, cos, sin):
    """[C,256] in the dtype of x."""
    wide = x.astype(F32)
    return both((wide * cos).astype(x.dtype), (wide * sin).astype(x.dtype))


def folded(d_features, cos, sin):
    """Gradient of x from that of its features."""
    of_cos, of_sin = parts(d_features)
    return of_cos * cos + of_sin * sin


def turning(x, d_x):
    """Gradient of a turn of features or states x, in float32.

    To be given the x that the products had: a pair's query and key then contribute the same with opposite signs, and the
    pair counts with the tokens between them. With unrounded ones, what rounding leaves would count with places up to C.
    """
    (even, odd), (d_even, d_odd) = parts(x.astype(F32)), parts(d_x)
    return even * d_odd - odd * d_even


def along(x):
    return jnp.sum(x, axis=0, keepdims=True)


def turn(state, cos, sin):
    """The state seen from an angle further on; with -sin, its gradient seen from where it was."""
    even, odd = parts(state)
    return both(cos * even + sin * odd, cos * odd - sin * even)


def through_documents(weight):
    return None if weight.through is None else both(weight.through, weight.through)


def load_tables(table_ref, w, C):
    """cos and sin [C,128] of the places in a chunk, and [1,128] of a whole chunk."""
    cols = pl.ds(w * LANES, LANES)
    return [table_ref[n, pl.ds(0, C), cols] for n in (0, 1)], [table_ref[n, pl.ds(C, 1), cols] for n in (0, 1)]


def forward(plan: Plan, q, k, v, theta, initial, docs, *, save: bool):
    """(out, the state after all tokens, the states before the blocks if `save`).

    As pallas_tpu_scalar.forward, but states are [...,D,256], value channels first; theta [W*128] float32.
    """
    batch, padded, width = q.shape
    columns, dtype, C, heads = plan.columns, q.dtype, plan.chunk, plan.heads

    def body(*refs):
        refs = list(refs)
        q_ref, k_ref, v_ref, table_ref = refs[:4]
        del refs[:4]
        initial_ref = refs.pop(0) if initial is not None else None
        docs_ref = refs.pop(0) if docs is not None else None
        out_ref, final_ref = refs.pop(0), refs.pop(0)
        saved_ref = refs.pop(0) if save else None
        (state,) = refs
        t = pl.program_id(2)

        @pl.when(t == 0)
        def _():
            state[...] = jnp.zeros_like(state) if initial_ref is None else initial_ref[0]

        if save:
            saved_ref[0, :, 0] = state[...]

        def chunk(c, _):
            rows = pl.ds(pl.multiple_of(c * C, C), C)

            def column(w):
                at = (0, rows, pl.ds(w * LANES, LANES))
                weight = weights(plan, None, None, docs_ref, t, c, w, 0)
                here, chunk_on = load_tables(table_ref, w, C)
                queries, keys, v = features(q_ref[at], *here), features(k_ref[at], *here), v_ref[at]
                scores = (dot(queries, apart(keys, heads), NT) * weight.inside).astype(dtype)
                yield
                read = times(dot(queries, apart(state[w].astype(dtype), heads), NT), weight.q_in)
                added = across(v, scale(keys, weight.k_out), heads)
                yield
                out_ref[at] = (read + dot(scores, apart(v, heads), NN)).astype(dtype)
                state[w] = turn(times(state[w], through_documents(weight)) + added, *chunk_on)

            in_turn(column, columns)
            return 0

        lax.fori_loop(0, plan.chunks, chunk, 0)

        @pl.when(t == pl.num_programs(2) - 1)
        def _():
            for w in range(columns):
                cos, sin = load_tables(table_ref, w, C)[1]
                final_ref[0, w] = turn(state[w], cos, -sin)

    one = (batch, width // LANES, LANES // heads, 2 * LANES)
    inputs = [("tokens", q), ("tokens", k), ("tokens", v), ("table", tables(plan, theta))]
    inputs += [("state", initial)] if initial is not None else []
    inputs += [("docs", docs)] if docs is not None else []
    outputs = [("tokens", q.shape, dtype), ("state", one, F32)]
    outputs += [("states", (*one[:2], padded // plan.block, *one[2:]), F32)] * save
    scratch = [pltpu.VMEM((columns, *one[2:]), F32)]
    out, final, *saved = call(
        plan, columns, body, inputs, outputs, scratch, q, reverse=False, name="linear_attention_forward"
    )
    return out, final, saved[0] if save else None


def backward(plan: Plan, q, k, v, theta, docs, saved, d_out, d_final, *, learn: bool):
    """(dq, dk, dv, the state's gradient before the first token [B,W,D,256], d theta [W*128] if `learn`)."""
    batch, _, width = q.shape
    columns, dtype, C, heads = plan.columns_backward, q.dtype, plan.chunk, plan.heads

    def body(*refs):
        refs = list(refs)
        q_ref, k_ref, v_ref, d_out_ref, saved_ref, table_ref = refs[:6]
        del refs[:6]
        d_final_ref = refs.pop(0) if d_final is not None else None
        docs_ref = refs.pop(0) if docs is not None else None
        dq_ref, dk_ref, dv_ref, d_initial_ref = refs[:4]
        del refs[:4]
        d_theta_ref = refs.pop(0) if learn else None
        d_state, state, states = refs
        step = pl.program_id(2)
        t = pl.num_programs(2) - 1 - step

        @pl.when(step == 0)
        def _():
            for w in range(columns):
                after = jnp.zeros(d_state.shape[1:], F32) if d_final_ref is None else d_final_ref[0, w]
                d_state[w] = turn(after, *load_tables(table_ref, w, C)[1])
            if learn:
                d_theta_ref[...] = jnp.zeros_like(d_theta_ref)

        state[...] = saved_ref[0, :, 0]

        def load(c, w):
            at = (0, pl.ds(pl.multiple_of(c * C, C), C), pl.ds(w * LANES, LANES))
            return at, weights(plan, None, None, docs_ref, t, c, w, 0), *load_tables(table_ref, w, C)

        def onward(c, _):
            def column(w):
                at, weight, here, chunk_on = load(c, w)
                states[w, c] = state[w].astype(dtype)
                added = across(v_ref[at], scale(features(k_ref[at], *here), weight.k_out), heads)
                yield
                state[w] = turn(times(state[w], through_documents(weight)) + added, *chunk_on)

            in_turn(column, columns)
            return 0

        def back(i, _):
            c = plan.chunks - 1 - i

            def column(w):
                at, weight, here, (cos, sin) = load(c, w)
                turned = weights(plan, None, None, docs_ref, t, c, w, 0, turned=True)
                q, k, v, d_out = (ref[at] for ref in (q_ref, k_ref, v_ref, d_out_ref))
                queries, keys = features(q, *here), features(k, *here)
                keys_out = scale(keys, weight.k_out)
                after, d_outs = turn(d_state[w], cos, -sin), apart(d_out, heads)
                low = apart(after.astype(dtype), heads)
                d_scores = (dot(d_out, apart(v, heads), NT) * weight.inside).astype(dtype)  # [queries, keys]
                scores = (dot(keys, apart(queries, heads), NT) * turned.inside).astype(dtype)  # [keys, queries]
                d_queries_in = times(dot(d_out, apart(states[w, c], heads), NN), weight.q_in)
                yield
                d_keys_out = dot(v, low, NN)
                dv_out = dot(keys_out, low, NT)
                added = across(d_out, scale(queries, weight.q_in), heads)
                d_queries = dot(d_scores, apart(keys, heads), NN) + d_queries_in
                dq_ref[at] = folded(d_queries, *here).astype(dtype)
                dv_ref[at] = (dot(scores, d_outs, NN) + dv_out).astype(dtype)
                d_keys = across(d_scores, queries, heads) + times(d_keys_out, weight.k_out)
                dk_ref[at] = folded(d_keys, *here).astype(dtype)
                if learn:
                    # The turn: states before the chunk and keys of the chunk, as its first token sees them.
                    carried = times(along(turning(states[w, c], after)), weight.through)
                    carried += along(turning(keys_out, d_keys_out))
                    place = lax.broadcasted_iota(jnp.int32, (C, 1), 0).astype(F32)
                    learned = along(place * (turning(queries, d_queries) + turning(keys, d_keys)))
                    turned_by = jnp.where((step == 0) & (i == 0), 0.0, float(C))  # not after the last chunk
                    d_theta_ref[0, w, :1] += learned - turned_by * carried
                d_state[w] = times(after, through_documents(weight)) + added

            in_turn(column, columns)
            return 0

        lax.fori_loop(0, plan.chunks, onward, 0, unroll=plan.chunks <= UNROLLED)
        lax.fori_loop(0, plan.chunks, back, 0)

        @pl.when(t == 0)
        def _():
            d_initial_ref[0] = d_state[...]

    one = (batch, width // LANES, LANES // heads, 2 * LANES)
    inputs = [("tokens", x) for x in (q, k, v, d_out)] + [("states", saved), ("table", tables(plan, theta))]
    inputs += [("state", d_final)] if d_final is not None else []
    inputs += [("docs", docs)] if docs is not None else []
    outputs = [("tokens", q.shape, dtype)] * 3 + [("state", one, F32)]
    outputs += [("rows", (*one[:2], DOCUMENT_ROWS, LANES), F32)] * learn
    small = pltpu.VMEM((columns, *one[2:]), F32)
    scratch = [small, small, pltpu.VMEM((columns, plan.chunks, *one[2:]), dtype)]
    dq, dk, dv, d_initial, *d_theta = call(
        plan, columns, body, inputs, outputs, scratch, q, reverse=True, name="linear_attention_backward"
    )
    return dq, dk, dv, d_initial, d_theta[0][:, :, 0].sum(0).reshape(-1) if learn else None
