"""What each span of a sequence adds to the state, for one decay per token and channel on Hopper GPUs: Pallas Mosaic GPU.

Keys (or their mirror in the backward pass) weighted to the end of their chunk meet the values; no query, no scores, no
output. Each computing warpgroup owns 64 key channels of the state and weights just those, so that they never wait for each
other.

Letters: B batch, T tokens, H heads, K key channels, V value channels, N spans, C tokens of a chunk.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from linscale.kernels.linear_attention import pallas_gpu_rows as rows
from linscale.kernels.linear_attention.pallas_gpu_gates import SHARED, SLICE, constant, gates, products, tiles
from linscale.kernels.linear_attention.pallas_gpu_scalar import BF, F32, ROWS, C, Walk, call, load, ring


def states(k, v, log_decay, *, blocks, spans, reverse=False, documents=False, stages=4):
    """What each span adds to a state that enters it as zero [B,N,walks,K,V], and what is left of that one [B,N,walks,K].

    Both are float32. Forward: k [B,T,H blocks,K] or None (1 - exp(log_decay)) and v. Reverse, with (q, do) for (k, v): the gradient of the state
    before each span. `documents`: first tokens are marked in log_decay.
    """
    (B, T, _, K), V, part = log_decay.shape, v.shape[-1], 64
    walks = log_decay.shape[2] * blocks.values
    pieces = K // part
    walk = Walk(T, spans)
    tied, g_type = k is None, log_decay.dtype
    per_stage = C * (2 * V + K * (jnp.dtype(g_type).itemsize + 2 * (not tied)))
    stages = max(1, min(stages, walk.chunks, (SHARED - 2 * C * K - pieces * 8 * SLICE * 16) // per_stage))

    def body(*refs):
        refs = list(refs)
        k_g = None if tied else refs.pop(0)
        v_g, g_g, added_g, kept_g, v_s, g_s, x_s, whole_s, total_s, kept_s, full, empty, *k_s = refs
        b, span, h, wg = (lax.axis_index(a) for a in ("b", "n", "h", "wg"))
        own = pl.ds(wg * part, part)

        @pl.when(wg < pieces)
        def _compute():
            plgpu.set_max_registers(232, action="increase")

            def weigh(slot):
                """This warpgroup's keys, and the gates' products over the chunk, in shared memory."""

                @pl.loop(0, part // SLICE)
                def _slice(s):
                    here, there = pl.ds(wg * part + s * SLICE, SLICE), pl.ds(s * SLICE, SLICE)
                    a, key = gates(load(g_s.at[slot, :, here]).astype(F32), documents, tied)
                    key = key if tied else load(k_s[0].at[slot, :, here]).astype(F32)
                    if reverse:
                        key, _, whole = products(key * a, None, a, whole_s.at[wg, s])
                    else:
                        _, key, whole = products(None, key, a, whole_s.at[wg, s])
                    x_s.at[wg, :, there][...] = key.astype(BF)
                    rows.put_tile_rows(whole, total_s.at[wg, :, there])

                plgpu.commit_smem()

            def chunk(t, state):
                S, kept = state
                slot = lax.rem(t, jnp.int32(stages))
                plgpu.barrier_wait(full.at[slot])
                weigh(slot)
                total = load(total_s.at[wg, 0], ROWS.reduce(1))
                S = S * plgpu.layout_cast(lax.broadcast_in_dim(total, (part, V), (0,)), ROWS)

                def update(acc):
                    plgpu.wgmma(acc, x_s.at[wg].transpose((1, 0)), v_s.at[slot])

                S = pl.run_state(update)(plgpu.ACC.init(S))
                plgpu.barrier_arrive(empty.at[slot])
                return S, kept * total

            ones = plgpu.layout_cast(jnp.full((part,), 1.0, F32), ROWS.reduce(1))
            S, kept = lax.fori_loop(0, walk.chunks, chunk, (constant(0.0, (part, V)), ones))
            added_g.at[b, span, h, own][...] = S
            kept_s.at[wg][...] = kept
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(kept_s.at[wg], kept_g.at[b, span, h, own])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == pieces)
        def _producer():
            _, key, value = blocks.places(h)

            def fetch(t, slot):
                at = pl.ds(walk.start(span, t, reverse), C)
                for g, s, place in ((g_g, g_s, key), (v_g, v_s, value), *([] if tied else [(k_g, k_s[0], key)])):
                    plgpu.copy_gmem_to_smem(g.at[b, at, place], s.at[slot], full.at[slot])

            ring(fetch, walk.chunks, stages, empty)

    scratch = [
        plgpu.SMEM((stages, C, V), BF, transforms=tiles()),
        plgpu.SMEM((stages, C, K), g_type, transforms=tiles(g_type)),
        plgpu.SMEM((pieces, C, part), BF, transforms=tiles()),
        plgpu.SMEM((pieces, part // SLICE, 4, SLICE), F32),
        plgpu.SMEM((pieces, 4, part), F32),
        plgpu.SMEM((pieces, part), F32),
        plgpu.Barrier(num_arrivals=2 if tied else 3, num_barriers=stages),
        plgpu.Barrier(num_arrivals=pieces, num_barriers=stages),
    ]
    if not tied:
        scratch.append(plgpu.SMEM((stages, C, K), BF, transforms=tiles()))
    out_type = [jax.ShapeDtypeStruct((B, spans, walks, *x), F32) for x in ((K, V), (K,))]
    inputs = [x for x in (k, v, log_decay) if x is not None]
    return call(body, "linear_attention_vector_states", out_type, scratch, (B, spans, walks), pieces)(*inputs)
