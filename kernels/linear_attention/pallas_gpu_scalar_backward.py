"""Gradients of keys and values for no decay or one decay per head on Hopper GPUs: see pallas_gpu_scalar.

Letters: B batch, T tokens, H heads, K key channels, V value channels, N spans, C tokens of a chunk.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from linscale.kernels.linear_attention import pallas_gpu_rows as rows
from linscale.kernels.linear_attention import pallas_gpu_scores as on_scores
from linscale.kernels.linear_attention.pallas_gpu_scalar import (
    BF,
    F32,
    LAST,
    REACHES,
    READS,
    ROWS,
    SURVIVES,
    C,
    Walk,
    Zero,
    along_columns,
    along_rows,
    call,
    iota,
    load,
    ring,
    same_document,
    tiles,
)


def backward_kv(q, k, v, do, rate, final, docs, *, blocks, decays=True, tokens=None, spans=1, initial=True, stages=2):
    """dk, dv [B,T,walks,.] and, if `initial`, the gradient of the state before each span, transposed [B,N,walks,V,K].

    One sweep from the end. G [V,K] = sum of decay do q^T over later tokens serves both: dk reads G, dv its transpose.
    Warpgroup 0 makes dk, warpgroup 1 dv; each keeps half of G's columns, and two barriers a chunk order the shared
    copy. final [B,N,walks,V,K]: the gradient of the state after each span, transposed, or None.
    """
    (B, T, _, K), V = q.shape, v.shape[-1]
    walks = q.shape[2] * blocks.values
    half = K // 2
    walk = Walk(tokens or T, spans)
    stages = min(stages, walk.chunks)
    documents, end_state = docs is not None, final is not None
    weighs = decays or documents

    def body(*refs):
        refs = list(refs)
        q_g, k_g, v_g, do_g, rate_g = (refs.pop(0) for _ in range(5))
        final_g = refs.pop(0) if end_state else None
        docs_g = refs.pop(0) if documents else None
        dk_g, dv_g = refs.pop(0), refs.pop(0)
        initial_g = refs.pop(0) if initial else None
        q_s, k_s, v_s, do_s, qs_s, g_s, dk_s, dv_s, m_s, full, empty, gread, gwrote, *docs_s = refs
        b, span, h, wg = (lax.axis_index(a) for a in ("b", "n", "h", "wg"))

        def compute(w):  # w is a Python int: each warpgroup has its own code
            width = (K, V)[w] // 2  # the output is made in two halves
            plgpu.set_max_registers(232, action="increase")
            r = rate_g[blocks.places(h)[0]]
            if weighs:
                age = iota((C, C), 1) - iota((C, C), 0)
                m_s[...] = jnp.where(age >= 0, jnp.exp2(r * jnp.maximum(age, 0.0)), 0.0)  # both write the same values
            mine = pl.ds(w * half, half)
            if end_state:
                G = rows.load_state(final_g.at[b, span, h, :, mine], (V, half))
            else:
                G = plgpu.layout_cast(jnp.zeros((V, half), F32), ROWS)
            g_s.at[w][...] = G.astype(BF)
            plgpu.commit_smem()
            plgpu.barrier_arrive(gwrote)

            def chunk(t, state):
                G, zero = state
                slot = lax.rem(t, jnp.int32(stages))
                start = walk.start(span, t, reverse=True)
                plgpu.barrier_wait(full.at[slot])
                plgpu.barrier_wait(gwrote)  # both halves of G are in shared memory

                def scores(acc, o0, o1):
                    A = (v_s, k_s)[w].at[slot]
                    plgpu.wgmma(acc, A, (do_s, q_s)[w].at[slot].transpose((1, 0)))
                    if w == 0:  # dk = v G
                        plgpu.wgmma(o0, A, g_s.at[zero])
                        plgpu.wgmma(o1, A, g_s.at[zero + 1])
                    else:  # dv = k G^T, the sum over K in two halves
                        for i in range(2):
                            part = A.at[:, pl.ds(i * half, half)]
                            plgpu.wgmma(o0, part, g_s.at[zero + i, pl.ds(0, width)].transpose((1, 0)))
                            plgpu.wgmma(o1, part, g_s.at[zero + i, pl.ds(width, width)].transpose((1, 0)))
                    if weighs:
                        weight = jnp.exp2(r * (iota((C, half), 0) + 1.0))
                        if documents:
                            weight = weight * along_rows(docs_s[0].at[slot, READS - LAST], (C, half))
                        qs_s.at[zero + w][...] = (load(q_s.at[slot, :, mine]).astype(F32) * weight).astype(BF)
                    p = plgpu.wgmma_accumulator_load(acc, wait_n=2 if w == 0 else 4)
                    p = p * load(m_s) if weighs else on_scores.causal(p, reverse=True)
                    if documents:
                        p = p * same_document(docs_s[0].at[slot], transposed=True)
                    return p.astype(BF), o0[...], o1[...]

                p, o0, o1 = pl.run_scoped(
                    scores, plgpu.ACC((C, C), F32), plgpu.ACC((C, width), F32), plgpu.ACC((C, width), F32)
                )
                plgpu.barrier_arrive(gread)
                if weighs:
                    weight = jnp.exp2(r * walk.to_end(start, (C, width)))
                    G = G * jnp.exp2(r * walk.length(start))
                    if documents:
                        weight = weight * along_rows(docs_s[0].at[slot, REACHES - LAST], (C, width))
                        G = G * along_columns(docs_s[0].at[slot, SURVIVES - LAST, pl.ds(0, half)], (V, half))
                    o0, o1 = o0 * weight, o1 * weight
                plgpu.commit_smem()

                def update(refs):
                    a0, a1, gacc = refs
                    X = (q_s, do_s)[w].at[slot]
                    plgpu.wgmma(a0, p, X.at[:, pl.ds(0, width)])
                    plgpu.wgmma(a1, p, X.at[:, pl.ds(width, width)])
                    reads = qs_s.at[zero + w] if weighs else q_s.at[slot, :, mine]
                    plgpu.wgmma(gacc, do_s.at[slot].transpose((1, 0)), reads)

                o0, o1, G = pl.run_state(update)((plgpu.ACC.init(o0), plgpu.ACC.init(o1), plgpu.ACC.init(G)))
                plgpu.barrier_arrive(empty.at[slot])
                plgpu.barrier_wait(gread)
                g_s.at[w][...] = G.astype(BF)
                plgpu.commit_smem()
                plgpu.barrier_arrive(gwrote)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                out_s = (dk_s, dv_s)[w]
                out_s.at[:, pl.ds(0, width)][...] = o0.astype(BF)
                out_s.at[:, pl.ds(width, width)][...] = o1.astype(BF)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out_s, (dk_g, dv_g)[w].at[b, pl.ds(start, C), h])
                return G, Zero.next(zero, t)

            G, _ = lax.fori_loop(0, walk.chunks, chunk, (G, Zero.start(r)))
            if initial:
                initial_g.at[b, span, h, :, mine][...] = G
            plgpu.barrier_wait(gwrote)
            plgpu.wait_smem_to_gmem(0)

        for w in range(2):
            pl.when(wg == w)(functools.partial(compute, w))

        @pl.when(wg == 2)
        def _producer():
            _, key, value = blocks.places(h)

            def fetch(t, slot):
                start = walk.start(span, t, reverse=True)
                for g, s, n in ((v_g, v_s, value), (do_g, do_s, value), (k_g, k_s, key), (q_g, q_s, key)):
                    plgpu.copy_gmem_to_smem(g.at[b, pl.ds(start, C), n], s.at[slot], full.at[slot])
                if documents:
                    source = docs_g.at[b, start // C, pl.ds(LAST, 4)]  # without FIRST: shared memory is full
                    plgpu.copy_gmem_to_smem(source, docs_s[0].at[slot], full.at[slot])

            ring(fetch, walk.chunks, stages, empty)

    def ring_of(columns):
        return plgpu.SMEM((stages, C, columns), BF, transforms=tiles(half))

    out_type = [jax.ShapeDtypeStruct((B, T, walks, x), BF) for x in (K, V)]
    if initial:
        out_type.append(jax.ShapeDtypeStruct((B, spans, walks, V, K), F32))
    scratch = [
        *(ring_of(K), ring_of(K), ring_of(V), ring_of(V)),
        plgpu.SMEM((2, C, half), BF, transforms=tiles(half)),
        plgpu.SMEM((2, V, half), BF, transforms=tiles(half)),
        plgpu.SMEM((C, K), BF, transforms=tiles(half)),
        plgpu.SMEM((C, V), BF, transforms=tiles(half)),
        plgpu.SMEM((C, C), F32, transforms=tiles(C, F32)),
        plgpu.Barrier(num_arrivals=4 + documents, num_barriers=stages),
        plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        plgpu.Barrier(num_arrivals=2),
        plgpu.Barrier(num_arrivals=2),
    ]
    if documents:
        scratch.append(plgpu.SMEM((stages, 4, C), F32))
    inputs = [x for x in (q, k, v, do, rate, final, docs) if x is not None]
    out = call(body, "linear_attention_backward", out_type, scratch, (B, spans, walks))(*inputs)
    return out[0], out[1], out[2] if initial else None
