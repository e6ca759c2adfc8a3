"""Gradients for one decay per token and channel on Hopper GPUs, in two kernels: Pallas Mosaic GPU.

`carry` walks the chunks from the end with D [K,V], the gradient of the state, on chip; it makes the gradient of the
values and leaves D behind each chunk in memory. With the states before each chunk, which the forward kernel leaves,
the gradients of queries, keys and gates then need nothing from other chunks: `within` makes them, one block of threads
a chunk and half of the key channels, all side by side.

The gradient of a token's log decay is the sum over all pairs of tokens on either side of it (query from it on, key
before it) of their share of the output's gradient. It is summed as just that, level by level of the halving, and not as
a difference of two long sums, whose rounding would drown it.

Letters: B batch, T tokens, H heads, K key channels, V value channels, N spans, C tokens of a chunk.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from linscale.kernels.linear_attention import pallas_gpu_rows as rows
from linscale.kernels.linear_attention import pallas_gpu_scores as on_scores
from linscale.kernels.linear_attention.pallas_gpu_gates import (
    SHARED,
    SLICE,
    TILE,
    constant,
    crossing,
    gates,
    index,
    products,
    spanned,
    tiles,
)
from linscale.kernels.linear_attention.pallas_gpu_scalar import (
    BF,
    F32,
    PARAMS,
    ROWS,
    C,
    Walk,
    along_columns,
    along_rows,
    call,
    load,
    ring,
)
from linscale.kernels.linear_attention.pallas_gpu_scalar import tiles as wide_tiles


def carry(q, k, do, log_decay, scores, after, *, blocks, spans=1, documents=False, stages=2):
    """dv [B,T,walks,V], the gradient of the state after each chunk [B,chunks,walks,K,V] bfloat16 and of the state before
    each span [B,N,walks,K,V] float32.

    k may be None: 1 - exp(log_decay), in which first tokens are marked if there are `documents`. scores
    [B,chunks,walks,C,C] from the forward kernel; after [B,N,walks,K,V] or None: the gradient of the state after each span. Each computing warpgroup weights half of the key channels and owns half of
    the value channels.
    """
    (B, T, _, K), V = q.shape, do.shape[-1]
    walks = q.shape[2] * blocks.values
    half = V // 2
    walk = Walk(T, spans)
    tied, end_state, parts = k is None, after is not None, K // 2 // SLICE
    g_type = log_decay.dtype
    per_stage = C * (K * (2 if tied else 4) + 2 * V + K * jnp.dtype(g_type).itemsize) + 2 * C * C
    fixed = 2 * C * K * tied + 2 * K * V + 2 * C * V + K * 16 + 2 * 4 * SLICE * 4
    stages = max(1, min(stages, walk.chunks, (SHARED - fixed) // per_stage))

    def body(*refs):
        refs = list(refs)
        q_g = refs.pop(0)
        k_g = None if tied else refs.pop(0)
        do_g, g_g, scores_g = (refs.pop(0) for _ in range(3))
        after_g = refs.pop(0) if end_state else None
        dv_g, states_g, before_g, q_s, k_s, do_s, g_s, p_s, d_s, dv_s, whole_s, total_s, full, empty, ready, free = refs
        b, span, h, wg = (lax.axis_index(a) for a in ("b", "n", "h", "wg"))

        def weigh(slot):
            @pl.loop(0, parts)
            def _part(part):
                mine = pl.ds(wg * (K // 2) + part * SLICE, SLICE)
                keys = (k_s if tied else k_s.at[slot]).at[:, mine]
                queries = q_s.at[slot, :, mine]
                a, k = gates(load(g_s.at[slot, :, mine]).astype(F32), documents, tied)
                k = k if tied else load(keys).astype(F32)
                query, key, whole = products(load(queries).astype(F32) * a, k, a, whole_s.at[wg, part])
                queries[...] = query.astype(BF)
                keys[...] = key.astype(BF)
                rows.put_tile_rows(whole, total_s.at[:, mine])

            plgpu.commit_smem()

        @pl.when(wg < 2)
        def _compute():
            plgpu.set_max_registers(232, action="increase")
            values = pl.ds(wg * half, half)
            D = rows.load_state(after_g.at[b, span, h, :, values], (K, half)) if end_state else constant(0.0, (K, half))
            d_s.at[wg][...] = D.astype(BF)
            plgpu.commit_smem()
            plgpu.barrier_arrive(free)

            def chunk(t, D):
                slot = lax.rem(t, jnp.int32(stages))
                n = span * walk.chunks + walk.chunks - 1 - t
                plgpu.copy_smem_to_gmem(d_s.at[wg], states_g.at[b, n, h, :, values])
                plgpu.barrier_wait(full.at[slot])
                plgpu.barrier_wait(free)  # the other has read what is now written over
                weigh(slot)
                plgpu.barrier_arrive(ready)
                plgpu.barrier_wait(ready)
                D = D * along_rows(total_s.at[0], (K, half))

                def update(refs):
                    acc, dacc = refs
                    plgpu.wgmma(acc, p_s.at[slot].transpose((1, 0)), do_s.at[slot, wg])
                    plgpu.wgmma(acc, k_s if tied else k_s.at[slot], d_s.at[wg])
                    plgpu.wgmma(dacc, q_s.at[slot].transpose((1, 0)), do_s.at[slot, wg])

                zero = constant(0.0, (C, half))
                dv, D = pl.run_state(update)((plgpu.ACC.init(zero), plgpu.ACC.init(D)))
                plgpu.barrier_arrive(empty.at[slot])
                plgpu.barrier_arrive(free)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                dv_s.at[wg][...] = dv.astype(BF)
                d_s.at[wg][...] = D.astype(BF)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(dv_s.at[wg], dv_g.at[b, pl.ds(n * C, C), h, values])
                return D

            D = lax.fori_loop(0, walk.chunks, chunk, D)
            before_g.at[b, span, h, :, values][...] = D
            plgpu.barrier_wait(free)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == 2)
        def _producer():
            _, key, value = blocks.places(h)

            def fetch(t, slot):
                start = walk.start(span, t, reverse=True)
                at = pl.ds(start, C)
                for source, target in ((g_g, g_s), (q_g, q_s), *([] if tied else [(k_g, k_s)])):
                    plgpu.copy_gmem_to_smem(source.at[b, at, key], target.at[slot], full.at[slot])
                for w in range(2):
                    source = do_g.at[b, at, value, pl.ds(w * half, half)]
                    plgpu.copy_gmem_to_smem(source, do_s.at[slot, w], full.at[slot])
                plgpu.copy_gmem_to_smem(scores_g.at[b, start // C, h], p_s.at[slot], full.at[slot])

            ring(fetch, walk.chunks, stages, empty)

    low = {"transforms": tiles()}
    scratch = [
        plgpu.SMEM((stages, C, K), BF, **low),
        plgpu.SMEM((C, K) if tied else (stages, C, K), BF, **low),
        plgpu.SMEM((stages, 2, C, half), BF, **low),
        plgpu.SMEM((stages, C, K), g_type, transforms=tiles(g_type)),
        plgpu.SMEM((stages, C, C), BF, **low),
        plgpu.SMEM((2, K, half), BF, **low),
        plgpu.SMEM((2, C, half), BF, **low),
        plgpu.SMEM((2, parts, 4, SLICE), F32),
        plgpu.SMEM((4, K), F32),
        plgpu.Barrier(num_arrivals=5 if tied else 6, num_barriers=stages),
        plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        plgpu.Barrier(num_arrivals=2),
        plgpu.Barrier(num_arrivals=2),
    ]
    out_type = [
        jax.ShapeDtypeStruct((B, T, walks, V), BF),
        jax.ShapeDtypeStruct((B, spans * walk.chunks, walks, K, V), BF),
        jax.ShapeDtypeStruct((B, spans, walks, K, V), F32),
    ]
    inputs = [x for x in (q, k, do, log_decay, scores, after) if x is not None]
    return call(body, "linear_attention_vector_carry", out_type, scratch, (B, spans, walks))(*inputs)


def within(q, k, v, do, log_decay, states, grads, *, blocks, documents=False):
    """dq, dk (None if k is) [B,T,walks,K] and the gradient of log_decay, in its dtype.

    states, grads [B,chunks,walks,K,V]: the state before and its gradient after each chunk. With k None the gradient of
    log_decay includes the way through the key.
    """
    (B, T, _, K), V = q.shape, v.shape[-1]
    walks = q.shape[2] * blocks.values
    part = min(64, K)  # key channels of a block: two blocks fit a multiprocessor
    chunks, tied, g_type = math.ceil(T / C), k is None, log_decay.dtype

    def body(*refs):
        refs = list(refs)
        q_g = refs.pop(0)
        k_g = None if tied else refs.pop(0)
        v_g, do_g, g_g, states_g, grads_g, dq_g, dg_g = (refs.pop(0) for _ in range(7))
        dk_g = None if tied else refs.pop(0)
        q_s, g_s, v_s, do_s, states_s, grads_s, sym_s, reads_s, whole_s, through_s, *refs = refs
        k_s = None if tied else refs.pop(0)
        writes_s = g_s if g_type == BF else refs.pop(0)
        pairs_in, gates_in, states_in = refs
        b, n, h, piece = (lax.axis_index(a) for a in ("b", "n", "h", "k"))
        _, key, value = blocks.places(h)
        at, channels = pl.ds(n * C, C), pl.ds(piece * part, part)
        for source, target in ((v_g, v_s), (do_g, do_s)):
            plgpu.copy_gmem_to_smem(source.at[b, at, value], target, pairs_in)
        for source, target in ((g_g, g_s), (q_g, q_s), *([] if tied else [(k_g, k_s)])):
            plgpu.copy_gmem_to_smem(source.at[b, at, key, channels], target, gates_in)
        for source, target in ((states_g, states_s), (grads_g, grads_s)):
            plgpu.copy_gmem_to_smem(source.at[b, n, h, channels], target, states_in)

        # What each pair of tokens contributes to the gradient of its score, do v^T, for query below key and mirrored.
        plgpu.barrier_wait(pairs_in)

        def meet(forth, back):
            plgpu.wgmma(forth, do_s, v_s.transpose((1, 0)))
            plgpu.wgmma(back, v_s, do_s.transpose((1, 0)))
            return forth[...], back[...]

        forth, back = pl.run_scoped(meet, plgpu.ACC((C, C), F32), plgpu.ACC((C, C), F32))
        for level in range(2):
            sym_s.at[level][...] = on_scores.across_tiles(forth, back, TILE << level).astype(BF)
        forth, back = on_scores.diagonal_tiles(forth), on_scores.diagonal_tiles(back)
        i, j = lax.rem(index((C, TILE), 0), jnp.int32(TILE)), index((C, TILE), 1)
        same_token = jnp.sum(jnp.where(i == j, forth, 0.0), axis=1)
        same_token = plgpu.layout_cast(lax.broadcast_in_dim(same_token, (C, SLICE), (0,)), ROWS)
        tile = jnp.where(i > j, forth, back)
        plgpu.barrier_wait(states_in)
        through = constant(0.0, (part, 64))
        for first in range(0, V, 64):
            columns = pl.ds(first, 64)
            through += load(states_s.at[:, columns]).astype(F32) * load(grads_s.at[:, columns]).astype(F32)
        through_s[...] = jnp.sum(through, axis=1)
        plgpu.barrier_wait(gates_in)
        plgpu.commit_smem()

        zero, one = (constant(x, (C, SLICE)) for x in (0.0, 1.0))

        @pl.loop(0, part // SLICE)
        def _slice(s):
            mine = pl.ds(s * SLICE, SLICE)
            a, k = gates(load(g_s.at[:, mine]).astype(F32), documents, tied)
            q = load(q_s.at[:, mine]).astype(F32)
            k = k if tied else load(k_s.at[:, mine]).astype(F32)
            sums = {"q": k * same_token, "k": q * same_token, "g": zero}

            def learn(level, size, to_token, after_token, mine=mine, q=q, k=k, sums=sums):
                x = rows.pick(size, q * to_token, k * after_token)
                if size < TILE:
                    pairs = jnp.where(crossing(size) == 1, tile, 0.0).astype(BF)
                    dx = rows.tile_apply(zero, pairs, x.astype(BF))
                else:
                    x_s = (q_s if size == TILE else reads_s).at[:, mine]
                    x_s[...] = x.astype(BF)
                    plgpu.commit_smem()

                    def apply(acc):
                        plgpu.wgmma(acc, sym_s.at[0 if size == TILE else 1], x_s)
                        return acc[...]

                    dx = pl.run_scoped(apply, plgpu.ACC((C, SLICE), F32))
                sums["q"] = rows.pick(size, sums["q"] + dx * to_token, sums["q"])
                sums["k"] = rows.pick(size, sums["k"], sums["k"] + dx * after_token)
                met = x * dx
                if size == 1:
                    sums["g"] = rows.pick(size, met, zero)
                elif size <= TILE:
                    sums["g"] = rows.tile_apply(sums["g"], spanned(size).astype(BF), met.astype(BF))
                else:
                    q_s.at[:, mine][...] = met.astype(BF)

            to_token, after_token, whole = products(a, one, a, whole_s, learn)

            def outside(reads, writes, mine=mine):
                plgpu.wgmma(reads, do_s, states_s.at[mine].transpose((1, 0)))
                plgpu.wgmma(writes, v_s, grads_s.at[mine].transpose((1, 0)))
                return reads[...], writes[...]

            reads, writes = pl.run_scoped(outside, plgpu.ACC((C, SLICE), F32), plgpu.ACC((C, SLICE), F32))
            reads, writes = reads * to_token, writes * after_token
            plgpu.commit_smem()  # all warps have read what is now written over
            reads_s.at[:, mine][...] = (q * reads).astype(BF)
            writes_s.at[:, mine][...] = (k * writes).astype(BF)
            dq, dk = sums["q"] + reads, sums["k"] + writes
            dg = sums["g"] + whole * along_columns(through_s.at[mine], (C, SLICE))
            plgpu.commit_smem()

            def gather(acc, mine=mine):  # (1 - k is the gate)
                plgpu.wgmma(acc, on_scores.order_masks("joined"), q_s.at[:, mine])
                plgpu.wgmma(acc, on_scores.order_masks("above"), reads_s.at[:, mine])
                plgpu.wgmma(acc, on_scores.order_masks("below"), writes_s.at[:, mine])

            dg = pl.run_state(gather)(plgpu.ACC.init(dg - (1.0 - k) * dk if tied else dg))
            plgpu.commit_smem()  # all warps have read what is now written over
            q_s.at[:, mine][...] = dq.astype(BF)
            g_s.at[:, mine][...] = dg.astype(g_type)
            if not tied:
                k_s.at[:, mine][...] = dk.astype(BF)

        plgpu.commit_smem()
        for source, target in ((q_s, dq_g), (g_s, dg_g), *([] if tied else [(k_s, dk_g)])):
            plgpu.copy_smem_to_gmem(source, target.at[b, at, h, channels])
        plgpu.wait_smem_to_gmem(0)

    low = {"transforms": tiles()}
    scratch = [
        plgpu.SMEM((C, part), BF, **low),
        plgpu.SMEM((C, part), g_type, transforms=tiles(g_type)),
        plgpu.SMEM((C, V), BF, transforms=wide_tiles(V)),
        plgpu.SMEM((C, V), BF, transforms=wide_tiles(V)),
        plgpu.SMEM((part, V), BF, transforms=wide_tiles(V)),
        plgpu.SMEM((part, V), BF, transforms=wide_tiles(V)),
        plgpu.SMEM((2, C, C), BF, **low),
        plgpu.SMEM((C, part), BF, **low),
        plgpu.SMEM((4, SLICE), F32),
        plgpu.SMEM((part,), F32),
        *[plgpu.SMEM((C, part), BF, **low)] * ((not tied) + (g_type != BF)),
        plgpu.Barrier(num_arrivals=2),
        plgpu.Barrier(num_arrivals=2 if tied else 3),
        plgpu.Barrier(num_arrivals=2),
    ]
    out_type = [jax.ShapeDtypeStruct((B, T, walks, K), x) for x in (BF, g_type, *([] if tied else [BF]))]
    body.__name__ = "linear_attention_vector_within"
    kernel = plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch,
        grid=(B, chunks, walks, K // part),
        grid_names=("b", "n", "h", "k"),
        compiler_params=plgpu.CompilerParams(**PARAMS),
    )
    dq, dg, *dk = kernel(*(x for x in (q, k, v, do, log_decay, states, grads) if x is not None))
    return dq, None if tied else dk[0], dg
