"""Softmax cross-entropy of rows of logits, with its gradient, on Hopper GPUs: Pallas Mosaic GPU.

XLA reads the float32 logits twice, once for the sums and once for the gradient. Here each multiprocessor walks rows, and
a row stays in its shared memory between the two passes; as the second is done with a tile of it, the copy engine brings
that tile of the next row. What of a longer row does not fit is read twice, the second time perhaps from the cache.

The warpgroups of a block share its row, each with tiles of its own. In its pass over them every place of a vector of
LANES has its own greatest logit and sum, so that threads need each other only once a row.

Letters: N rows, V vocabulary.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from linscale.kernels.hopper import MULTIPROCESSORS

F32 = jnp.float32
LOG2E = math.log2(math.e)
NOTHING = float(jnp.finfo(F32).min)
SHARED = 224 * 1024  # bytes of shared memory for tiles and sums
BARRIERS = 32  # the most that Mosaic indexes
VECTOR = 4
LANES = 128 * VECTOR  # what a warpgroup reads at once, 16 bytes a thread
SPREAD = plgpu.Layout.TILED(plgpu.Tiling(((LANES,), (32 * VECTOR,), (VECTOR,))), (-3,), (-2,), -1)
EACH_WARP = plgpu.Layout.TILED(plgpu.Tiling(((32 * VECTOR,), (VECTOR,))), (plgpu.Replicated(4),), (-2,), -1)


def exp(x):
    return jnp.exp2(x * LOG2E)


def losses(logits, labels, weights, *, warpgroups=2, vectors=4, held=None):
    """Negative log-likelihoods [N] float32 without weights, and d_logits [N,V] bfloat16, (softmax - one-hot) * weight.

    logits [N,V] float32, V a multiple of 8 and at least a tile, `vectors` vectors; labels [N] int32 in [0, V); weights
    [N] float32. held: how many tiles of a warpgroup stay in shared memory; at least 1; None: as many as fit.
    """
    rows, vocabulary = logits.shape
    tile = vectors * LANES
    tiles = math.ceil(vocabulary / (warpgroups * tile))  # of a warpgroup
    if held is None:
        held = min(tiles, (SHARED // (4 * warpgroups) - 2 * LANES) // tile, BARRIERS // warpgroups)
    blocks = min(rows, MULTIPROCESSORS)
    turns = math.ceil(rows / blocks)

    def body(logits_g, labels_g, weights_g, losses_g, d_logits_g, sums_s, tiles_s, met, full):
        block, wg = lax.axis_index("block"), lax.axis_index("wg")
        lanes, places = (plgpu.broadcasted_iota(jnp.int32, (n,), 0, layout=SPREAD) for n in (LANES, tile))

        def row_of(turn):  # at the end the last row again, with the same numbers
            return jnp.minimum(turn * blocks + block, rows - 1)

        def bounds(i):
            """Where tile i begins, and the first entry of it that no tile before has: the last goes back to fit."""
            first = (i * warpgroups + wg) * tile
            return jnp.minimum(first, vocabulary - tile), first

        def fetch(turn, i):
            slot = wg * held + i
            source = logits_g.at[row_of(turn), pl.ds(bounds(i)[0], tile)]
            inside = plgpu.OOBFillMode.PROMISE_IN_BOUNDS
            plgpu.copy_gmem_to_smem(source, tiles_s.at[slot], full.at[slot], oob_mode=inside)

        def meet():
            plgpu.barrier_arrive(met)
            plgpu.barrier_wait(met)

        def one_row(turn, _):
            row = row_of(turn)
            label, weight = labels_g[row], weights_g[row]

            def read(i, is_held, at, size):
                if is_held:
                    return plgpu.load(tiles_s.at[wg * held + i, pl.ds(at, size)], layout=SPREAD)
                return plgpu.load(logits_g.at[row, pl.ds(bounds(i)[0] + at, size)], layout=SPREAD, optimized=False)

            def add(i, sums, is_held, is_last=False):
                if is_held:
                    plgpu.barrier_wait(full.at[wg * held + i])
                xs = [read(i, is_held, n * LANES, LANES) for n in range(vectors)]
                if is_last:
                    start, first = bounds(i)
                    xs = [jnp.where(lanes >= first - start - n * LANES, x, NOTHING) for n, x in enumerate(xs)]
                before, total = sums
                greatest = functools.reduce(jnp.maximum, xs, before)
                return greatest, sum((exp(x - greatest) for x in xs), total * exp(before - greatest))

            sums = tuple(plgpu.layout_cast(jnp.full((LANES,), x, F32), SPREAD) for x in (NOTHING, 0.0))
            sums = lax.fori_loop(0, min(held, tiles - 1), functools.partial(add, is_held=True), sums)
            sums = lax.fori_loop(held, tiles - 1, functools.partial(add, is_held=False), sums)
            sums = add(tiles - 1, sums, is_held=held == tiles, is_last=True)
            for n, x in enumerate(sums):
                sums_s.at[wg, n][...] = x
            meet()
            parts = [[plgpu.load(sums_s.at[w, n], layout=EACH_WARP) for n in range(2)] for w in range(warpgroups)]
            meet()  # before the next row's come
            greatest = jnp.max(functools.reduce(jnp.maximum, (m for m, _ in parts)))
            total = jnp.sum(sum(s * exp(m - greatest) for m, s in parts))
            scale = weight / total
            of_label = logits_g[row, label]  # used at the end: it takes its time

            def give(i, is_held):
                start, _ = bounds(i)
                p = exp(read(i, is_held, 0, tile) - greatest) * scale
                d = jnp.where(places == label - start, p - weight, p)
                d_logits_g.at[row, pl.ds(start, tile)][...] = d.astype(d_logits_g.dtype)

            def give_held(i, _):
                give(i, is_held=True)

                @pl.when(turn + 1 < turns)
                def _next():
                    fetch(turn + 1, i)

            # Backwards: what was read last may still be in the cache.
            lax.fori_loop(0, tiles - held, lambda n, _: give(tiles - 1 - n, is_held=False), None)
            lax.fori_loop(0, held, give_held, None)
            losses_g[row] = jnp.log(total) + (greatest - of_label)

        lax.fori_loop(0, held, lambda i, _: fetch(0, i), None)
        lax.fori_loop(0, turns, one_row, None)

    scratch = [
        plgpu.SMEM((warpgroups, 2, LANES), F32),
        plgpu.SMEM((warpgroups * held, tile), F32),
        plgpu.Barrier(num_arrivals=warpgroups),
        plgpu.Barrier(num_barriers=warpgroups * held),
    ]
    body.__name__ = "cross_entropy"  # what profilers show
    return plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct((rows,), F32), jax.ShapeDtypeStruct(logits.shape, jnp.bfloat16)],
        scratch_types=scratch,
        grid=(blocks,),
        grid_names=("block",),
        num_threads=warpgroups,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(logits, labels, weights)
