"""Linear attention with one decay per token and channel on Hopper GPUs, forward: Pallas Mosaic GPU, state on chip.

Scores inside a chunk by recursive halving (`pallas_gpu_gates`): levels inside 16 tokens stay in registers and use the
warps' own matrix product, the two levels above use wgmma. A chunk of mild gates has its scores from one product instead
(`pallas_gpu_mild`), if its gates are mild in all channels.

Each of the two computing warpgroups weights half of the key channels, and owns half of the value channels and of the
state. Twice a chunk they wait for each other.

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
from linscale.kernels.linear_attention.pallas_gpu_gates import SHARED, SLICE, TILE, gates, products, tiles
from linscale.kernels.linear_attention.pallas_gpu_scalar import (
    BF,
    F32,
    ROWS,
    C,
    Walk,
    Zero,
    along_rows,
    call,
    load,
    ring,
)


def forward(q, k, v, log_decay, initial, *, blocks, spans=1, save=False, documents=False, stages=2):
    """out [B,T,walks,V], the state after each span [B,N,walks,K,V]; with `save` what the backward pass needs, else None
    twice: the state before each chunk [B,chunks,walks,K,V] and the scores [B,chunks,walks,C,C], bfloat16.

    q, k, v [B,T,H blocks,.] and walks as in `Blocks`. k may be None: 1 - exp(log_decay). log_decay float32 or bfloat16,
    with first tokens marked if there are `documents`; initial [B,N,walks,K,V] or None.
    """
    (B, T, _, K), V = q.shape, v.shape[-1]
    walks = q.shape[2] * blocks.values
    half = V // 2
    walk = Walk(T, spans)
    start_state = initial is not None
    tied, parts = k is None, K // 2 // SLICE
    g_type = log_decay.dtype
    tells = milds.tells_mild(log_decay)
    per_stage = C * (K * (2 if tied else 4) + 2 * V + K * jnp.dtype(g_type).itemsize)
    fixed = (
        2 * C * K * (3 if tied else 2)
        + 2 * K * V
        + 2 * C * V
        + 2 * C * TILE * 4
        + K * 4
        + 2 * 4 * SLICE * 4
        + 2 * C * C * (save + tells)
    )
    stages = max(1, min(stages, walk.chunks, (SHARED - fixed) // per_stage))

    def body(*refs):
        refs = list(refs)
        q_g = refs.pop(0)
        k_g = None if tied else refs.pop(0)
        v_g, g_g = refs.pop(0), refs.pop(0)
        initial_g = refs.pop(0) if start_state else None
        o_g, final_g = refs.pop(0), refs.pop(0)
        states_g, scores_g = (refs.pop(0), refs.pop(0)) if save else (None, None)
        q_s, v_s, g_s, k_s, x16_s, x32_s, s_s, o_s, tile_s, whole_s, total_s, full, empty, ready, free, *refs = refs
        p_s = refs.pop(0) if save else None
        upto_s, mild_s = refs if tells else (None, None)
        b, span, h, wg = (lax.axis_index(a) for a in ("b", "n", "h", "wg"))
        _, key, value = blocks.places(h)

        def weigh(slot, wg, zero):
            """Weights this warpgroup's channels; returns its share of the scores inside tiles of 16, [64,16]."""

            def one(part, levels):
                levels = list(levels)
                mine = pl.ds(wg * (K // 2) + part * SLICE, SLICE)
                keys = k_s.at[zero if tied else slot]
                a, k = gates(load(g_s.at[slot, :, mine]).astype(F32), documents, tied, short=tells)
                q = load(q_s.at[slot, :, mine]).astype(F32)
                k = k if tied else load(keys.at[:, mine]).astype(F32)
                levels[0] = rows.tile_products(levels[0], q.astype(BF), k.astype(BF))

                def weighted(level, size, query, key, mine=mine):
                    x = rows.pick(size, query, key).astype(BF)
                    if size < TILE:
                        levels[1 + level] = rows.tile_products(levels[1 + level], x, x)
                    else:
                        (x16_s if size == TILE else x32_s).at[zero, :, mine][...] = x

                query, key, whole = products(q * a, k, a, whole_s.at[wg, part], weighted)
                q_s.at[slot, :, mine][...] = query.astype(BF)
                keys.at[:, mine][...] = key.astype(BF)
                rows.put_tile_rows(whole, total_s.at[:, mine])
                return tuple(levels)

            none = plgpu.layout_cast(jnp.zeros((C, TILE), F32), ROWS)
            # A loop here and in the other kernels: unrolled it is no faster and takes twice as long to lower.
            return on_scores.select_levels(lax.fori_loop(0, parts, one, (none,) * 5))

        def weigh_mild(slot, wg, zero, to_token, whole, k):
            """Weights this warpgroup's channels of a mild chunk; x32_s gets the keys that meet queries of the chunk."""
            mine = pl.ds(wg * (K // 2), K // 2)
            keys = k_s.at[zero if tied else slot]
            forth, back, whole = milds.weights(to_token, whole)
            query, key = load(q_s.at[slot, :, mine]).astype(F32) * forth, k * back
            x32_s.at[zero, :, mine][...] = key.astype(BF)
            q_s.at[slot, :, mine][...] = query.astype(BF)
            keys.at[:, mine][...] = (key * whole).astype(BF)
            rows.put_tile_rows(whole, total_s.at[:, mine])

        @pl.when(wg < 2)
        def _compute():
            plgpu.set_max_registers(232, action="increase")
            values = pl.ds(wg * half, half)
            if start_state:
                S = rows.load_state(initial_g.at[b, span, h, :, values], (K, half))
            else:
                S = plgpu.layout_cast(jnp.zeros((K, half), F32), ROWS)
            s_s.at[wg][...] = S.astype(BF)
            if tells:
                upto_s.at[0][...] = on_scores.order_masks("upto")
            plgpu.commit_smem()
            if not tells:
                plgpu.barrier_arrive(free)

            def chunk(t, state):
                S, zero = state
                here = wg + zero
                slot = lax.rem(t, jnp.int32(stages))
                n = span * walk.chunks + t
                if save:
                    plgpu.copy_smem_to_gmem(s_s.at[wg], states_g.at[b, n, h, :, values])
                plgpu.barrier_wait(full.at[slot])
                if tells:  # before the wait, which then tells what the other has found as well
                    mine = pl.ds(wg * (K // 2), K // 2)
                    keys = None if tied else k_s.at[slot, :, mine]
                    read = milds.read(g_s.at[slot, :, mine], keys, K // 2, upto_s.at[zero], mild_s.at[wg])
                    plgpu.barrier_arrive(free)
                plgpu.barrier_wait(free)  # the other has read what is now written over
                mild = mild_s[0, 0] + mild_s[1, 0] == 2 if tells else None

                def weigh_any():
                    tile_s.at[wg][...] = weigh(slot, wg, zero)

                if tells:
                    pl.when(mild)(lambda: weigh_mild(slot, wg, zero, *read))
                    pl.when(jnp.logical_not(mild))(weigh_any)
                else:
                    weigh_any()
                plgpu.commit_smem()
                plgpu.barrier_arrive(ready)
                plgpu.barrier_wait(ready)

                def scores_at_once(acc, oacc):
                    plgpu.wgmma(acc, q_s.at[slot], x32_s.at[zero].transpose((1, 0)))
                    plgpu.wgmma(oacc, q_s.at[slot], s_s.at[here])
                    return on_scores.causal(plgpu.wgmma_accumulator_load(acc, wait_n=1)).astype(BF), oacc[...]

                def scores(acc16, acc32, oacc):
                    plgpu.wgmma(acc16, x16_s.at[zero], x16_s.at[zero].transpose((1, 0)))
                    plgpu.wgmma(acc32, x32_s.at[zero], x32_s.at[zero].transpose((1, 0)))
                    plgpu.wgmma(oacc, q_s.at[slot], s_s.at[here])
                    tile = load(tile_s.at[0]) + load(tile_s.at[1])
                    near, far = (plgpu.wgmma_accumulator_load(a, wait_n=n) for a, n in ((acc16, 2), (acc32, 1)))
                    p = on_scores.assemble_scores(tile, near, far)
                    return p.astype(BF), oacc[...]

                def by_levels():
                    square = plgpu.ACC((C, C), F32)
                    return pl.run_scoped(scores, square, square, plgpu.ACC((C, half), F32))

                def at_once():
                    return pl.run_scoped(scores_at_once, plgpu.ACC((C, C), F32), plgpu.ACC((C, half), F32))

                p, o = lax.cond(mild, at_once, by_levels) if tells else by_levels()
                S = S * along_rows(total_s.at[0], (K, half))

                def update(refs):
                    oacc, sacc = refs
                    plgpu.wgmma(oacc, p, v_s.at[slot, wg])
                    plgpu.wgmma(sacc, k_s.at[zero if tied else slot].transpose((1, 0)), v_s.at[slot, wg])

                o, S = pl.run_state(update)((plgpu.ACC.init(o), plgpu.ACC.init(S)))
                plgpu.barrier_arrive(empty.at[slot])
                if not tells:
                    plgpu.barrier_arrive(free)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                o_s.at[wg][...] = o.astype(BF)
                s_s.at[here][...] = S.astype(BF)
                if save:

                    @pl.when(wg == 0)
                    def _():
                        p_s[...] = p

                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(o_s.at[wg], o_g.at[b, pl.ds(n * C, C), h, values])
                if save:

                    @pl.when(wg == 0)
                    def _():
                        plgpu.copy_smem_to_gmem(p_s, scores_g.at[b, n, h])

                return S, Zero.next(zero, t)

            start = Zero.start(g_g[b, 0, key, 0].astype(F32))
            S, _ = lax.fori_loop(0, walk.chunks, chunk, (S, start))
            final_g.at[b, span, h, :, values][...] = S
            if not tells:
                plgpu.barrier_wait(free)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == 2)
        def _producer():
            def fetch(t, slot):
                at = pl.ds(walk.start(span, t), C)
                plgpu.copy_gmem_to_smem(g_g.at[b, at, key], g_s.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(q_g.at[b, at, key], q_s.at[slot], full.at[slot])
                if not tied:
                    plgpu.copy_gmem_to_smem(k_g.at[b, at, key], k_s.at[slot], full.at[slot])
                for w in range(2):
                    source = v_g.at[b, at, value, pl.ds(w * half, half)]
                    plgpu.copy_gmem_to_smem(source, v_s.at[slot, w], full.at[slot])

            ring(fetch, walk.chunks, stages, empty)

    low = {"transforms": tiles()}
    scratch = [
        plgpu.SMEM((stages, C, K), BF, **low),
        plgpu.SMEM((stages, 2, C, half), BF, **low),
        plgpu.SMEM((stages, C, K), g_type, transforms=tiles(g_type)),
        plgpu.SMEM((1 if tied else stages, C, K), BF, **low),
        plgpu.SMEM((1, C, K), BF, **low),
        plgpu.SMEM((1, C, K), BF, **low),
        plgpu.SMEM((2, K, half), BF, **low),
        plgpu.SMEM((2, C, half), BF, **low),
        plgpu.SMEM((2, C, TILE), F32, transforms=(plgpu.TilingTransform((8, TILE)), plgpu.SwizzleTransform(64))),
        plgpu.SMEM((2, parts, 4, SLICE), F32),
        plgpu.SMEM((4, K), F32),
        plgpu.Barrier(num_arrivals=4 if tied else 5, num_barriers=stages),
        plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        plgpu.Barrier(num_arrivals=2),
        plgpu.Barrier(num_arrivals=2),
    ]
    out_type = [jax.ShapeDtypeStruct((B, T, walks, V), BF), jax.ShapeDtypeStruct((B, spans, walks, K, V), F32)]
    if save:
        out_type += [jax.ShapeDtypeStruct((B, spans * walk.chunks, walks, *x), BF) for x in ((K, V), (C, C))]
        scratch.append(plgpu.SMEM((C, C), BF, **low))
    if tells:
        scratch += [plgpu.SMEM((1, C, C), BF, **low), plgpu.SMEM((2, 1), jnp.int32)]
    inputs = [x for x in (q, k, v, log_decay, initial) if x is not None]
    out = call(body, "linear_attention_vector_forward", out_type, scratch, (B, spans, walks))(*inputs)
    return *out[:2], *(out[2:] if save else (None, None))
