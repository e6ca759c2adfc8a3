"""Gradients of queries, keys and gates, for one decay per token and channel on Hopper GPUs: Pallas Mosaic GPU.

With the state before each chunk and its gradient behind it in memory (`pallas_gpu_vector`, `pallas_gpu_vector_backward`)
no chunk needs another: one block of threads a chunk and half of the key channels, all side by side.

The gradient of a token's log decay is the sum over all pairs of tokens on either side of it (query from it on, key
before it) of their share of the output's gradient. It is summed as just that, level by level of the halving, and not as
a difference of two long sums, whose rounding would drown it. In a mild chunk (`pallas_gpu_mild`) it is such a difference
all the same, query times its gradient less key times its own, from the token on: but of the very numbers that met in the
products, so that pairs on one side of the token cancel, and handed to the tensor cores as two bfloat16 terms.

Letters: B batch, T tokens, H heads, K key channels, V value channels, C tokens of a chunk.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from linscale.kernels.linear_attention import pallas_gpu_mild as milds
from linscale.kernels.linear_attention import pallas_gpu_rows as rows
from linscale.kernels.linear_attention import pallas_gpu_scores as on_scores
from linscale.kernels.linear_attention.pallas_gpu_gates import (
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
from linscale.kernels.linear_attention.pallas_gpu_scalar import BF, F32, PARAMS, ROWS, C, along_columns, load
from linscale.kernels.linear_attention.pallas_gpu_scalar import tiles as wide_tiles


def within(q, k, v, do, log_decay, states, grads, *, blocks, documents=False):
    """dq, dk (None if k is) [B,T,walks,K] and the gradient of log_decay, in its dtype.

    states, grads [B,chunks,walks,K,V]: the state before and its gradient after each chunk. With k None the gradient of
    log_decay includes the way through the key.
    """
    (B, T, _, K), V = q.shape, v.shape[-1]
    walks = q.shape[2] * blocks.values
    part = min(64, K)  # key channels of a block: two blocks fit a multiprocessor
    chunks, tied, g_type = math.ceil(T / C), k is None, log_decay.dtype
    tells = milds.tells_mild(log_decay)

    def body(*refs):
        refs = list(refs)
        q_g = refs.pop(0)
        k_g = None if tied else refs.pop(0)
        v_g, do_g, g_g, states_g, grads_g, dq_g, dg_g = (refs.pop(0) for _ in range(7))
        dk_g = None if tied else refs.pop(0)
        q_s, g_s, v_s, do_s, states_s, grads_s, sym_s, reads_s, whole_s, through_s, *refs = refs
        k_s = None if tied else refs.pop(0)
        writes_s = g_s if g_type == BF else refs.pop(0)
        pairs_in, gates_in, states_in, *refs = refs
        mild_s = refs.pop(0) if tells else None
        b, n, h, piece = (lax.axis_index(a) for a in ("b", "n", "h", "k"))
        _, key, value = blocks.places(h)
        at, channels = pl.ds(n * C, C), pl.ds(piece * part, part)
        for source, target in ((v_g, v_s), (do_g, do_s)):
            plgpu.copy_gmem_to_smem(source.at[b, at, value], target, pairs_in)
        for source, target in ((g_g, g_s), (q_g, q_s), *([] if tied else [(k_g, k_s)])):
            plgpu.copy_gmem_to_smem(source.at[b, at, key, channels], target, gates_in)
        for source, target in ((states_g, states_s), (grads_g, grads_s)):
            plgpu.copy_gmem_to_smem(source.at[b, n, h, channels], target, states_in)

        if tells:
            plgpu.barrier_wait(gates_in)
            milds.tell(g_s, part, mild_s)
        # What each pair of tokens contributes to the gradient of its score, do v^T, for query below key and mirrored.
        plgpu.barrier_wait(pairs_in)

        def meet(forth, back):
            plgpu.wgmma(forth, do_s, v_s.transpose((1, 0)))
            plgpu.wgmma(back, v_s, do_s.transpose((1, 0)))
            return forth[...], back[...]

        forth, back = pl.run_scoped(meet, plgpu.ACC((C, C), F32), plgpu.ACC((C, C), F32))

        def prepare():
            plgpu.barrier_wait(states_in)
            through = constant(0.0, (part, 64))
            for first in range(0, V, 64):
                columns = pl.ds(first, 64)
                through += load(states_s.at[:, columns]).astype(F32) * load(grads_s.at[:, columns]).astype(F32)
            through_s[...] = jnp.sum(through, axis=1)
            if not tells:
                plgpu.barrier_wait(gates_in)
            plgpu.commit_smem()

        zero, one = (constant(x, (C, SLICE)) for x in (0.0, 1.0))

        def outside(reads, writes, mine):
            plgpu.wgmma(reads, do_s, states_s.at[mine].transpose((1, 0)))
            plgpu.wgmma(writes, v_s, grads_s.at[mine].transpose((1, 0)))

        def leave(mine, dq, dk, dg):
            plgpu.commit_smem()  # all warps have read what is now written over
            q_s.at[:, mine][...] = dq.astype(BF)
            g_s.at[:, mine][...] = dg.astype(g_type)
            if not tied:
                k_s.at[:, mine][...] = dk.astype(BF)

        def slice_at_once(s):
            mine = pl.ds(s * SLICE, SLICE)
            to_token, whole = milds.sums(g_s.at[:, mine], SLICE)
            a, k = gates(load(g_s.at[:, mine]).astype(F32), False, tied, short=True)
            k = k if tied else load(k_s.at[:, mine]).astype(F32)
            q = load(q_s.at[:, mine]).astype(F32)
            forth, back, whole = milds.weights(to_token, whole)
            query, key = (q * forth).astype(BF), (k * back).astype(BF)
            q_s.at[:, mine][...] = query
            reads_s.at[:, mine][...] = key
            plgpu.commit_smem()

            def meet(dq, dk, writes):  # a query weighted from the chunk's start reads the state and the keys alike
                plgpu.wgmma(dq, sym_s.at[0], reads_s.at[:, mine])
                plgpu.wgmma(dk, sym_s.at[1], q_s.at[:, mine])
                outside(dq, writes, mine)
                return dq[...], dk[...], writes[...]

            dq, dk, writes = pl.run_scoped(meet, *[plgpu.ACC((C, SLICE), F32)] * 3)
            writes = writes * (back * whole)
            # Queries and keys as rounded for the products: then what a pair on one side of a token gives cancels.
            met, writing = query.astype(F32) * dq - key.astype(F32) * dk, k * writes
            dq, dk = dq * forth, dk * back + writes
            high = met.astype(BF)
            plgpu.commit_smem()  # all warps have read what is now written over
            q_s.at[:, mine][...] = high
            reads_s.at[:, mine][...] = (met - high.astype(F32)).astype(BF)
            writes_s.at[:, mine][...] = writing.astype(BF)
            plgpu.commit_smem()
            above, below = on_scores.order_masks("above"), on_scores.order_masks("below")

            def gather(acc):
                plgpu.wgmma(acc, above, q_s.at[:, mine])
                plgpu.wgmma(acc, above, reads_s.at[:, mine])
                plgpu.wgmma(acc, below, writes_s.at[:, mine])

            dg = whole * along_columns(through_s.at[mine], (C, SLICE))
            dg = pl.run_state(gather)(plgpu.ACC.init(dg - a * dk if tied else dg))
            leave(mine, dq, dk, dg)

        def slice_by_levels(s, same_token, tile):
            mine = pl.ds(s * SLICE, SLICE)
            a, k = gates(load(g_s.at[:, mine]).astype(F32), documents, tied, short=tells)
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

            def from_outside(reads, writes):
                outside(reads, writes, mine)
                return reads[...], writes[...]

            reads, writes = pl.run_scoped(from_outside, plgpu.ACC((C, SLICE), F32), plgpu.ACC((C, SLICE), F32))
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
            leave(mine, dq, dk, dg)

        def at_once():
            sym_s.at[0][...] = on_scores.causal(forth).astype(BF)
            sym_s.at[1][...] = on_scores.causal(back, reverse=True).astype(BF)
            prepare()
            pl.loop(0, part // SLICE)(slice_at_once)

        def by_levels():
            for level in range(2):
                sym_s.at[level][...] = on_scores.across_tiles(forth, back, TILE << level).astype(BF)
            diagonal, mirrored = on_scores.diagonal_tiles(forth), on_scores.diagonal_tiles(back)
            i, j = lax.rem(index((C, TILE), 0), jnp.int32(TILE)), index((C, TILE), 1)
            same_token = jnp.sum(jnp.where(i == j, diagonal, 0.0), axis=1)
            same_token = plgpu.layout_cast(lax.broadcast_in_dim(same_token, (C, SLICE), (0,)), ROWS)
            tile = jnp.where(i > j, diagonal, mirrored)
            prepare()
            pl.loop(0, part // SLICE)(lambda s: slice_by_levels(s, same_token, tile))

        if tells:
            mild = mild_s[0] == 1
            pl.when(mild)(at_once)
            pl.when(jnp.logical_not(mild))(by_levels)
        else:
            by_levels()
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
    if tells:
        scratch.append(plgpu.SMEM((1,), jnp.int32))
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
