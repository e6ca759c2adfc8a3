"""What a span of linear attention with phase adds to its state, on Hopper GPUs: the kernel between spans.

Letters as in pallas_gpu_phase_kernels.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from linscale.kernels.linear_attention.pallas_gpu_phase_factors import Factors
from linscale.kernels.linear_attention.pallas_gpu_phase_kernels import REACHES, READS, SURVIVES, across, rows_read
from linscale.kernels.linear_attention.pallas_gpu_scalar import BF, F32, ROWS, C, Walk, call, load, tiles


def phased_states(k, v, turns, docs, *, blocks, spans, reverse=False, stages=4):
    """What each span adds to a state that enters it as zero [B,N,walks,2,K,V]; arguments as for `phased_keys`.

    Each computing warpgroup owns 64 key channels, so that they never wait for each other.
    """
    (B, T, _, K), V, part = k.shape, v.shape[-1], 64
    walks = k.shape[2] * blocks.values
    pieces = K // part
    walk = Walk(T, spans)
    stages = min(stages, walk.chunks)
    documents = docs is not None
    tables = Factors(pieces, 2 * pieces)

    def body(*refs):
        refs = list(refs)
        k_g, v_g, turns_g = (refs.pop(0) for _ in range(3))
        docs_g = refs.pop(0) if documents else None
        added_g, k_s, v_s, sin_k_s, *tables_s, full, empty = refs[:10]
        docs_s = refs[10:]
        b, span, h, wg = (lax.axis_index(a) for a in ("b", "n", "h", "wg"))
        own = pl.ds(wg * part, part)

        @pl.when(wg < pieces)
        def _compute():
            plgpu.set_max_registers(232, action="increase")

            def chunk(t, state):
                X, Y = state
                slot = lax.rem(t, jnp.int32(stages))
                plgpu.barrier_wait(full.at[slot])
                k_cos, k_sin = k_s.at[slot, :, own], sin_k_s.at[wg]
                k = load(k_cos)
                if documents:
                    writes, survives = docs_s[0].at[slot, READS if reverse else REACHES], docs_s[0].at[slot, SURVIVES]
                    k = k * across(writes, (C, part), 0).astype(BF)
                    X, Y = (x * across(survives, x.shape, 0) for x in (X, Y))
                cos_s, sin_s, wait, done = tables.of(tables_s, t, wg)
                wait()
                plgpu.commit_smem()  # all warps have read the sines before
                k_sin[...] = k * load(sin_s)
                k_cos[...] = k * load(cos_s)
                done()
                plgpu.commit_smem()

                def update(refs):
                    plgpu.wgmma(refs[0], k_cos.transpose((1, 0)), v_s.at[slot])
                    plgpu.wgmma(refs[1], k_sin.transpose((1, 0)), v_s.at[slot])

                X, Y = pl.run_state(update)((plgpu.ACC.init(X), plgpu.ACC.init(Y)))
                plgpu.barrier_arrive(empty.at[slot])
                return X, Y

            zero = plgpu.layout_cast(jnp.zeros((part, V), F32), ROWS)
            for i, x in enumerate(lax.fori_loop(0, walk.chunks, chunk, (zero, zero))):
                added_g.at[b, span, h, i, own][...] = x

        @pl.when(wg == pieces)
        def _producer():
            _, key, value = blocks.places(h)

            def fetch(t, slot):
                start = walk.start(span, t, reverse)
                for g, s, place in ((k_g, k_s, key), (v_g, v_s, value)):
                    plgpu.copy_gmem_to_smem(g.at[b, pl.ds(start, C), place], s.at[slot], full.at[slot])
                if documents:
                    plgpu.copy_gmem_to_smem(docs_g.at[b, start // C], docs_s[0].at[slot], full.at[slot])

            def form(t):
                tables.form(tables_s, turns_g.at[key], t, walk.start(span, t, reverse) + 1)

            tables.feed(fetch, form, walk.chunks, stages, empty)

    matrix = lambda *shape: plgpu.SMEM(shape, BF, transforms=tiles(part))  # noqa: E731
    scratch = [
        *(matrix(stages, C, K), matrix(stages, C, V), matrix(pieces, C, part), *tables.scratch(part)),
        plgpu.Barrier(num_arrivals=2 + documents, num_barriers=stages),
        plgpu.Barrier(num_arrivals=pieces, num_barriers=stages),
    ]
    if documents:
        scratch.append(plgpu.SMEM((stages, 4, C), BF))
    out_type = jax.ShapeDtypeStruct((B, spans, walks, 2, K, V), F32)
    inputs = [x for x in (k, v, turns, rows_read(docs, reverse)) if x is not None]
    return call(body, "linear_attention_phased_states", out_type, scratch, (B, spans, walks), pieces)(*inputs)
