"""The gradient of the state along the sequence and of the values, for one decay per token and channel on Hopper GPUs:
Pallas Mosaic GPU.

The backward pass is two kernels. `carry` walks the chunks from the end with D [K,V], the gradient of the state, on chip;
it makes the gradient of the values and leaves D behind each chunk in memory. With the states before each chunk, which the
forward kernel leaves, the other gradients need nothing from other chunks (`pallas_gpu_vector_within`).

Letters: B batch, T tokens, H heads, K key channels, V value channels, N spans, C tokens of a chunk.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from linscale.kernels.linear_attention import pallas_gpu_mild as milds
from linscale.kernels.linear_attention import pallas_gpu_rows as rows
from linscale.kernels.linear_attention import pallas_gpu_scores as on_scores
from linscale.kernels.linear_attention.pallas_gpu_gates import SHARED, SLICE, constant, gates, products, tiles
from linscale.kernels.linear_attention.pallas_gpu_scalar import BF, F32, C, Walk, along_rows, call, load, ring


def carry(q, k, do, log_decay, scores, after, *, blocks, spans=1, documents=False, stages=2):
    """dv [B,T,walks,V], the gradient of the state after each chunk [B,chunks,walks,K,V] bfloat16 and of the state before
    each span [B,N,walks,K,V] float32.

    k may be None: 1 - exp(log_decay), in which first tokens are marked if there are `documents`. scores
    [B,chunks,walks,C,C] from the forward kernel; after [B,N,walks,K,V] or None: the gradient of the state after each span.
    Each computing warpgroup weights half of the key channels, those of a mild chunk at once, and owns half of the value
    channels.
    """
    (B, T, _, K), V = q.shape, do.shape[-1]
    walks = q.shape[2] * blocks.values
    half = V // 2
    walk = Walk(T, spans)
    tied, end_state, parts = k is None, after is not None, K // 2 // SLICE
    g_type = log_decay.dtype
    tells = milds.tells_mild(log_decay)
    per_stage = C * (K * (2 if tied else 4) + 2 * V + K * jnp.dtype(g_type).itemsize) + 2 * C * C
    fixed = 2 * C * K * tied + 2 * K * V + 2 * C * V + K * 16 + 2 * 4 * SLICE * 4 + 2 * C * C * tells
    stages = max(1, min(stages, walk.chunks, (SHARED - fixed) // per_stage))

    def body(*refs):
        refs = list(refs)
        q_g = refs.pop(0)
        k_g = None if tied else refs.pop(0)
        do_g, g_g, scores_g = (refs.pop(0) for _ in range(3))
        after_g = refs.pop(0) if end_state else None
        dv_g, states_g, before_g, *refs = refs
        q_s, k_s, do_s, g_s, p_s, d_s, dv_s, whole_s, total_s, full, empty, ready, free, *refs = refs
        upto_s, mild_s = refs if tells else (None, None)
        b, span, h, wg = (lax.axis_index(a) for a in ("b", "n", "h", "wg"))

        def weigh(slot):
            @pl.loop(0, parts)
            def _part(part):
                mine = pl.ds(wg * (K // 2) + part * SLICE, SLICE)
                keys = (k_s if tied else k_s.at[slot]).at[:, mine]
                queries = q_s.at[slot, :, mine]
                a, k = gates(load(g_s.at[slot, :, mine]).astype(F32), documents, tied, short=tells)
                k = k if tied else load(keys).astype(F32)
                query, key, whole = products(load(queries).astype(F32) * a, k, a, whole_s.at[wg, part])
                queries[...] = query.astype(BF)
                keys[...] = key.astype(BF)
                rows.put_tile_rows(whole, total_s.at[:, mine])

        def weigh_mild(slot, to_token, whole, k):
            mine = pl.ds(wg * (K // 2), K // 2)
            keys = (k_s if tied else k_s.at[slot]).at[:, mine]
            queries = q_s.at[slot, :, mine]
            queries[...] = (load(queries).astype(F32) * milds.product(to_token)).astype(BF)
            keys[...] = (k * milds.product(whole - to_token)).astype(BF)
            rows.put_tile_rows(milds.product(whole), total_s.at[:, mine])

        @pl.when(wg < 2)
        def _compute():
            plgpu.set_max_registers(232, action="increase")
            values = pl.ds(wg * half, half)
            D = rows.load_state(after_g.at[b, span, h, :, values], (K, half)) if end_state else constant(0.0, (K, half))
            d_s.at[wg][...] = D.astype(BF)
            if tells:
                upto_s[...] = on_scores.order_masks("upto")
            plgpu.commit_smem()
            plgpu.barrier_arrive(free)

            def chunk(t, D):
                slot = lax.rem(t, jnp.int32(stages))
                n = span * walk.chunks + walk.chunks - 1 - t
                plgpu.copy_smem_to_gmem(d_s.at[wg], states_g.at[b, n, h, :, values])
                plgpu.barrier_wait(full.at[slot])
                if tells:
                    mine = pl.ds(wg * (K // 2), K // 2)
                    keys = None if tied else k_s.at[slot, :, mine]
                    read = milds.read(g_s.at[slot, :, mine], keys, K // 2, upto_s, mild_s.at[wg])
                plgpu.barrier_wait(free)  # the other has read what is now written over
                if tells:
                    mild = mild_s[wg, 0] == 1
                    pl.when(mild)(lambda: weigh_mild(slot, *read))
                    pl.when(jnp.logical_not(mild))(lambda: weigh(slot))
                else:
                    weigh(slot)
                plgpu.commit_smem()
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
    if tells:
        scratch += [plgpu.SMEM((C, C), BF, **low), plgpu.SMEM((2, 1), jnp.int32)]
    out_type = [
        jax.ShapeDtypeStruct((B, T, walks, V), BF),
        jax.ShapeDtypeStruct((B, spans * walk.chunks, walks, K, V), BF),
        jax.ShapeDtypeStruct((B, spans, walks, K, V), F32),
    ]
    inputs = [x for x in (q, k, do, log_decay, scores, after) if x is not None]
    return call(body, "linear_attention_vector_carry", out_type, scratch, (B, spans, walks))(*inputs)
