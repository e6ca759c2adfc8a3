"""Linear attention with phase on Hopper GPUs, cosines and sines formed on chip: Pallas Mosaic GPU (wgmma, TMA).

cos((t - s) theta) = cos(t theta) cos(s theta) + sin(t theta) sin(s theta), so that an operator with phase is one without
decay whose state has twice the rows: X = sum_s k_s cos(s theta) v_s and Y = sum_s k_s sin(s theta) v_s give out_t =
sum_c q_tc (cos(t theta) X + sin(t theta) Y). Positions count from the row's first token, 1, so that the state is only
ever added to, in either direction of time and by spans as well; each chunk has factors of its own
(`pallas_gpu_phase_factors`).

Two kernels serve values and all gradients, each walking the sequence either way:
- `phased_keys`: out_t = sum_s (sum_c q_tc k_sc cos((t-s) theta_c)) v_s. Forward; backwards in time with (k, q, do): dv.
- `phased_values`: out_tc = sum_s (a_t . b_s) w_sc cos((t-s) theta_c). With (do, v, k): dq; backwards with (v, do, q): dk.
  If asked, the same with sines as well, of which the gradient of theta is made.

Letters: B batch, T tokens, H heads, K channels that have a phase, V channels that have none, C tokens of a chunk.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from linscale.kernels.linear_attention import pallas_gpu_rows as rows
from linscale.kernels.linear_attention import pallas_gpu_scores as on_scores
from linscale.kernels.linear_attention.pallas_gpu_phase_factors import Factors
from linscale.kernels.linear_attention.pallas_gpu_scalar import (
    BF,
    F32,
    LAST,
    ROWS,
    C,
    Walk,
    Zero,
    call,
    load,
    tiles,
)

# Rows of `docs` here: the first position of each token's document in the chunk, backwards in time the last; the others.
EDGE, READS, REACHES, SURVIVES = range(4)


def across(vector, shape, dimension):
    """A vector along `dimension` of shape, repeated along the other."""
    x = load(vector, ROWS.reduce(1 - dimension)).astype(F32)
    return plgpu.layout_cast(lax.broadcast_in_dim(x, shape, (dimension,)), ROWS)


def _causal(scores, reverse, doc_s):
    """scores [C,C] bfloat16, 0 where the row's token does not see the column's."""
    if doc_s is None:
        return on_scores.causal(scores, reverse).astype(BF)
    return on_scores.within(scores, load(doc_s.at[EDGE], ROWS.reduce(1)).astype(F32), reverse).astype(BF)


def _sweep(q, k, v, turns, initial, docs, blocks, spans, reverse, stages, make, sines=False):
    """What both kernels share: arguments, the ring of q, k, v, that of factors, and the state in two parts X, Y.

    make(refs, barriers, warpgroup, (X, Y), reverse, factors, release, cut) -> out, X, Y of one chunk; factors as from
    `Factors.of`. It calls `release` once it has work running, to give back the place of the output before, and `cut`
    after the scores, for what the chunk reads of the state, what it adds, and what is left of it; it writes X for the next
    chunk. With `sines` it returns (out, the same with sines) for out.
    """
    B, T = q.shape[:2]
    walks, V = q.shape[2] * blocks.values, v.shape[-1]
    of_keys = make is _keys_chunk
    half = V // 2
    height = k.shape[-1]  # of each part of the state
    walk = Walk(T, spans)
    chunks = walk.chunks
    stages = min(stages, chunks)
    tables = Factors(2, 2 if of_keys else 3)  # values are read for the last time late
    documents, start_state = docs is not None, initial is not None

    def body(*refs):
        refs = list(refs)
        q_g, k_g, v_g, turns_g = (refs.pop(0) for _ in range(4))
        initial_g = refs.pop(0) if start_state else None
        docs_g = refs.pop(0) if documents else None
        o_g, final_g = refs.pop(0), refs.pop(0)
        sine_g = refs.pop(0) if sines else None
        both, docs_s = (refs.pop(), refs.pop()) if documents else (None, None)
        q_s, k_s, v_s, x_s, y_s, *refs, full, empty, ready, free = refs
        tables_s, more_s = refs[:4], refs[4:]
        b, span, h, wg = (lax.axis_index(a) for a in ("b", "n", "h", "wg"))
        _, key, value = blocks.places(h)
        turns_g = turns_g.at[key if of_keys else value]
        mine = pl.ds(wg * half, half)

        @pl.when(wg < 2)
        def _compute():
            plgpu.set_max_registers(232, action="increase")
            if start_state:
                X, Y = (rows.load_state(initial_g.at[b, span, h, part, :, mine], (height, half)) for part in range(2))
            else:
                X, Y = (plgpu.layout_cast(jnp.zeros((height, half), F32), ROWS) for _ in range(2))
            x_s.at[wg][...] = X.astype(BF)
            y_s.at[wg][...] = Y.astype(BF)
            plgpu.commit_smem()
            if of_keys:
                plgpu.barrier_arrive(free)

            def chunk(t, state):
                slot = lax.rem(t, jnp.int32(stages))
                start = walk.start(span, t, reverse)
                *state, zero = state
                plgpu.barrier_wait(full.at[slot])
                doc_s = docs_s.at[slot] if documents else None
                survives = docs_g[b, start // C, SURVIVES, 0].astype(F32) if documents else None

                def release():  # the output before has left its place in the ring
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

                    @pl.when(t > 0)
                    def _():
                        plgpu.barrier_arrive(empty.at[lax.rem(t + stages - 1, jnp.int32(stages))])

                def cut(state, *rows_of):
                    if not documents:
                        return state
                    _cut(doc_s, survives, wg + zero, both, rows_of)
                    nothing = plgpu.layout_cast(jnp.zeros((height, half), F32), ROWS)
                    return lax.cond(survives < 0.5, lambda: [nothing] * 2, lambda: [*state])

                ring_s = q_s.at[slot], k_s.at[slot], v_s.at[slot]
                own_s = (s.at[zero] for s in more_s)
                refs = (*ring_s, x_s, y_s, doc_s, *own_s)
                factors = tables.of(tables_s, t, wg + zero)
                out, X, Y = make(refs, (ready, free), wg + zero, state, reverse, factors, release, cut)
                plgpu.commit_smem()  # all warps have read what is now written over
                if sines:  # its place is read no more in this chunk
                    out, sine = out
                    sine_s = more_s[0].at[zero, wg]
                    sine_s[...] = sine.astype(BF)
                v_s.at[slot, wg][...] = out.astype(BF)
                y_s.at[wg][...] = Y.astype(BF)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(v_s.at[slot, wg], o_g.at[b, pl.ds(start, C), h, mine])
                if sines:
                    plgpu.copy_smem_to_gmem(sine_s, sine_g.at[b, pl.ds(start, C), h, mine])
                return X, Y, Zero.next(zero, t)

            X, Y, _ = lax.fori_loop(0, chunks, chunk, (X, Y, Zero.start(turns_g[0].astype(F32) * 2.0**-31)))
            final_g.at[b, span, h, 0, :, mine][...] = X
            final_g.at[b, span, h, 1, :, mine][...] = Y
            if of_keys:
                plgpu.barrier_wait(free)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == 2)
        def _producer():
            def fetch(t, slot):
                start = walk.start(span, t, reverse)
                at = pl.ds(start, C)
                plgpu.copy_gmem_to_smem(q_g.at[b, at, key], q_s.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(k_g.at[b, at, key], k_s.at[slot], full.at[slot])
                for w in range(2):
                    source = v_g.at[b, at, value, pl.ds(w * half, half)]
                    plgpu.copy_gmem_to_smem(source, v_s.at[slot, w], full.at[slot])
                if documents:
                    plgpu.copy_gmem_to_smem(docs_g.at[b, start // C], docs_s.at[slot], full.at[slot])

            def form(t):
                tables.form(tables_s, turns_g, t, walk.start(span, t, reverse) + 1)

            tables.feed(fetch, form, chunks, stages, empty)

    matrix = lambda *shape: plgpu.SMEM(shape, BF, transforms=tiles(half))  # noqa: E731
    scratch = [
        *(matrix(stages, C, height), matrix(stages, C, height), matrix(stages, 2, C, half)),
        *(matrix(2, height, half), matrix(2, height, half), *tables.scratch(half)),
        *([matrix(1, C, height), matrix(1, C, height)] if of_keys else [matrix(1, 2, C, half)]),
        plgpu.Barrier(num_arrivals=4 + documents, num_barriers=stages),
        plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        plgpu.Barrier(num_arrivals=2),
        plgpu.Barrier(num_arrivals=2),
    ]
    if documents:
        scratch += [plgpu.SMEM((stages, 4, C), BF), plgpu.Barrier(num_arrivals=2)]
    out = jax.ShapeDtypeStruct((B, T, walks, V), BF)
    out_type = [out, jax.ShapeDtypeStruct((B, spans, walks, 2, height, V), F32), *([out] if sines else [])]
    docs = rows_read(docs, reverse)
    inputs = [x for x in (q, k, v, turns, initial, docs) if x is not None]
    name = "linear_attention_phased_" + ("keys" if of_keys else "values")
    return call(body, name, out_type, scratch, (B, spans, walks))(*inputs)


def _cut(doc_s, survives, wg, both, rows_of):
    """Where a document begins in the chunk: each (matrix in shared memory, row of docs) times that row, token by token.

    Both warpgroups read the matrices whole until then, and each weighs half of the columns. Most chunks have no such
    place and go on at once.
    """

    @pl.when(survives < 0.5)
    def _():
        plgpu.barrier_arrive(both)
        plgpu.barrier_wait(both)
        for matrix, row in rows_of:
            half = matrix.shape[1] // 2
            mine = matrix.at[:, pl.ds(wg * half, half)]
            mine[...] = load(mine) * across(doc_s.at[row], (C, half), 0).astype(BF)
        plgpu.commit_smem()
        plgpu.barrier_arrive(both)
        plgpu.barrier_wait(both)


def rows_read(docs, reverse):
    """Whole numbers up to 63, and only what is read: shared memory is full."""
    if docs is None:
        return None
    return (docs[:, :, LAST:] if reverse else jnp.delete(docs, LAST, axis=2)).astype(BF)


def phased_keys(q, k, v, turns, initial, docs, *, blocks, spans=1, reverse=False, stages=2):
    """out [B,T,walks,V] and the state after each span [B,N,walks,2,K,V] (before each with `reverse`).

    q, k, v bfloat16, [B,T,H blocks,.], and walks as in `Blocks`; turns [H blocks,K] int32: see pallas_gpu_phase.turns;
    initial [B,N,walks,2,K,V] float32 or None; docs [B,chunks,5,C] float32 or None.
    """
    return _sweep(q, k, v, turns, initial, docs, blocks, spans, reverse, stages, _keys_chunk)


def phased_values(a, b, w, turns, initial, docs, *, blocks, spans=1, reverse=False, sines=False, stages=2):
    """out [B,T,walks,K] and the state [B,N,walks,2,V,K]; a and b have V channels, w has K. Otherwise as `phased_keys`.

    sines: a third result like out, with sin(|t-s| theta_c) for the cosine.
    """
    make = functools.partial(_values_chunk, sines=sines)
    return _sweep(a, b, w, turns, initial, docs, blocks, spans, reverse, stages, make, sines)


def _keys_chunk(refs, barriers, wg, state, reverse, factors, release, cut):
    """The two warpgroups multiply half of the channels each with their factors, and own half of the values' channels."""
    q_s, k_s, v_s, x_s, y_s, doc_s, q_sin_s, k_sin_s = refs
    ready, free = barriers
    half, K = v_s.shape[-1], q_s.shape[-1]
    channels = pl.ds(wg * (K // 2), K // 2)
    *tables, wait, done = factors
    wait()
    cos, sin = (load(s) for s in tables)
    done()
    plgpu.barrier_wait(free)  # the other has read what is now written over
    for x_in, x_sin in ((q_s, q_sin_s), (k_s, k_sin_s)):
        x = load(x_in.at[:, channels])
        x_sin.at[:, channels][...] = x * sin
        x_in.at[:, channels][...] = x * cos
    plgpu.commit_smem()
    plgpu.barrier_arrive(ready)
    plgpu.barrier_wait(ready)

    def scores(acc, oacc):
        plgpu.wgmma(acc, q_s, k_s.transpose((1, 0)))
        plgpu.wgmma(acc, q_sin_s, k_sin_s.transpose((1, 0)))
        plgpu.wgmma(oacc, q_s, x_s.at[wg])
        plgpu.wgmma(oacc, q_sin_s, y_s.at[wg])
        release()
        return _causal(plgpu.wgmma_accumulator_load(acc, wait_n=2), reverse, doc_s), oacc[...]

    p, o = pl.run_scoped(scores, plgpu.ACC((C, C), F32), plgpu.ACC((C, half), F32))
    reads, writes = (REACHES, READS) if reverse else (READS, REACHES)
    if doc_s is not None:
        o = o * across(doc_s.at[reads], (C, half), 0)
    X, Y = cut(state, (k_s, writes), (k_sin_s, writes))
    plgpu.commit_smem()  # all warps have read X as it was

    def update(refs):
        oacc, xacc, yacc = refs
        plgpu.wgmma(xacc, k_s.transpose((1, 0)), v_s.at[wg])
        plgpu.wgmma(oacc, p, v_s.at[wg])
        plgpu.wgmma(yacc, k_sin_s.transpose((1, 0)), v_s.at[wg])
        x_s.at[wg][...] = plgpu.wgmma_accumulator_load(xacc, wait_n=2).astype(BF)

    o, X, Y = pl.run_state(update)((plgpu.ACC.init(o), plgpu.ACC.init(X), plgpu.ACC.init(Y)))
    plgpu.barrier_arrive(free)
    return o, X, Y


def _values_chunk(refs, barriers, wg, state, reverse, factors, release, cut, sines=False):
    """Each warpgroup owns half of the channels that have a phase; the two wait for each other in `cut` alone."""
    a_s, b_s, w_s, x_s, y_s, doc_s, sin_w_s = refs
    cos_s, sin_s, wait, done = factors
    w_cos, w_sin = w_s.at[wg], sin_w_s.at[wg]

    def scores(acc):
        plgpu.wgmma(acc, a_s, b_s.transpose((1, 0)))
        wait()
        w = load(w_cos)
        if sines:  # the place of w_sin is an output's too
            release()
        w_sin[...] = w * load(sin_s)
        w_cos[...] = w * load(cos_s)
        if not sines:
            release()
        return _causal(acc[...], reverse, doc_s)

    p = pl.run_scoped(scores, plgpu.ACC((C, C), F32))
    plgpu.commit_smem()
    reads, writes = (REACHES, READS) if reverse else (READS, REACHES)
    X, Y = cut(state, (a_s, reads), (b_s, writes))

    def part(state, before_s, w, finished=None):
        """What the chunk reads of cosines or of sines [C,half], and that part of the state after it."""

        def update(refs):
            plgpu.wgmma(refs[0], a_s, before_s)
            plgpu.wgmma(refs[0], p, w)
            plgpu.wgmma(refs[1], b_s.transpose((1, 0)), w)
            if finished is not None:
                x_s.at[wg][...] = finished.astype(BF)

        zero = plgpu.layout_cast(jnp.zeros(w.shape, F32), ROWS)
        return pl.run_state(update)((plgpu.ACC.init(zero), plgpu.ACC.init(state)))

    # One part after the other, the first rounded and put where its w was: registers hold no more.
    of_cos, X = part(X, x_s.at[wg], w_cos)
    plgpu.commit_smem()  # all warps have read what is now written over
    w_cos[...] = of_cos.astype(BF)
    plgpu.commit_smem()
    of_sin, Y = part(Y, y_s.at[wg], w_sin, finished=X)
    of_cos, cos, sin = (load(s).astype(F32) for s in (w_cos, cos_s, sin_s))
    done()
    out = of_cos * cos + of_sin * sin
    if sines:  # of the angle from the earlier token to the later
        sine = of_sin * cos - of_cos * sin if reverse else of_cos * sin - of_sin * cos
        return (out, sine), X, Y
    return out, X, Y
