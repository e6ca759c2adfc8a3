"""Softmax cross-entropy of rows of logits, with its gradient, on Hopper GPUs: Pallas Mosaic GPU.

XLA reads the float32 logits twice, once for the sums and once for the gradient. Here each multiprocessor walks rows, and
a row stays in its shared memory between the two passes; as the second is done with a tile of it, the copy engine brings
that tile of the next row. Rows that are too long for that are read twice too.

The warpgroups of a block share its row. Each keeps a greatest logit and a sum for every place of a vector of LANES, so
that threads need each other only once a row.

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
SHARED = 224 * 1024  # bytes of shared memory for the row and the warpgroups' sums
VECTOR = 4
LANES = 128 * VECTOR  # what a warpgroup reads at once, 16 bytes a thread
SPREAD = plgpu.Layout.TILED(plgpu.Tiling(((LANES,), (32 * VECTOR,), (VECTOR,))), (-3,), (-2,), -1)
EACH_WARP = plgpu.Layout.TILED(plgpu.Tiling(((32 * VECTOR,), (VECTOR,))), (plgpu.Replicated(4),), (-2,), -1)


def exp(x):
    return jnp.exp2(x * LOG2E)


def losses(logits, labels, weights, *, warpgroups=2, vectors=4, held=None):
    """Negative log-likelihoods [N] float32 without weights, and d_logits [N,V] bfloat16, (softmax - one-hot) * weight.

    logits [N,V] float32, V a multiple of 8 and at least `tile`; labels [N] int32; weights [N] float32. A tile is `vectors`
    vectors of one warpgroup; held: whether rows stay in shared memory, None: if they fit.
    """
    rows, vocabulary = logits.shape
    tile = vectors * LANES
    tiles = math.ceil(vocabulary / (warpgroups * tile))  # of a warpgroup
    if held is None:
        held = 4 * warpgroups * (tiles * tile + 2 * LANES) <= SHARED
    blocks = min(rows, MULTIPROCESSORS)
    rounds = math.ceil(rows / blocks)

    def body(logits_g, labels_g, weights_g, losses_g, d_logits_g, sums_s, met, *held_s):
        block, wg = lax.axis_index("block"), lax.axis_index("wg")
        places = plgpu.broadcasted_iota(jnp.int32, (LANES,), 0, layout=SPREAD)

        def row_of(turn):  # at the end the last row again, with the same numbers
            return jnp.minimum(turn * blocks + block, rows - 1)

        def bounds(i):
            """Where a tile begins, and the first entry of it that no tile before has: the last goes back to fit."""
            first = (i * warpgroups + wg) * tile
            return jnp.minimum(first, vocabulary - tile), first

        def fetch(turn, i):
            tiles_s, full = held_s
            slot = wg * tiles + i
            source = logits_g.at[row_of(turn), pl.ds(bounds(i)[0], tile)]
            inside = plgpu.OOBFillMode.PROMISE_IN_BOUNDS
            plgpu.copy_gmem_to_smem(source, tiles_s.at[slot], full.at[slot], oob_mode=inside)

        def read(row, i):
            for n in range(vectors):
                if held:
                    yield plgpu.load(held_s[0].at[wg * tiles + i, pl.ds(n * LANES, LANES)], layout=SPREAD)
                else:
                    ref = logits_g.at[row, pl.ds(bounds(i)[0] + n * LANES, LANES)]
                    yield plgpu.load(ref, layout=SPREAD, optimized=False)

        def meet():
            plgpu.barrier_arrive(met)
            plgpu.barrier_wait(met)

        def one_row(turn, _):
            row = row_of(turn)

            def add(i, sums, last=False):
                if held:
                    plgpu.barrier_wait(held_s[1].at[wg * tiles + i])
                before, total = sums
                xs = list(read(row, i))
                if last:
                    start, first = bounds(i)
                    xs = [jnp.where(places >= first - start - n * LANES, x, NOTHING) for n, x in enumerate(xs)]
                greatest = functools.reduce(jnp.maximum, xs, before)
                return greatest, sum((exp(x - greatest) for x in xs), total * exp(before - greatest))

            nothing = [plgpu.layout_cast(jnp.full((LANES,), x, F32), SPREAD) for x in (NOTHING, 0.0)]
            sums = add(tiles - 1, lax.fori_loop(0, tiles - 1, add, tuple(nothing)), last=True)
            for n, x in enumerate(sums):
                sums_s.at[wg, n][...] = x
            meet()
            parts = [[plgpu.load(sums_s.at[w, n], layout=EACH_WARP) for n in range(2)] for w in range(warpgroups)]
            meet()  # before the next row's come
            greatest = jnp.max(functools.reduce(jnp.maximum, (m for m, _ in parts)))
            total = jnp.sum(sum(s * exp(m - greatest) for m, s in parts))

            label, weight = labels_g[row], weights_g[row]
            losses_g[row] = jnp.log(total) + (greatest - logits_g[row, label])
            scale = weight / total

            def give(n, _):
                i = n if held else tiles - 1 - n  # what was read last may still be in the cache
                start, _ = bounds(i)
                for n, x in enumerate(read(row, i)):
                    at = start + n * LANES
                    p = exp(x - greatest) * scale
                    d = jnp.where(places == label - at, p - weight, p)
                    d_logits_g.at[row, pl.ds(at, LANES)][...] = d.astype(d_logits_g.dtype)
                if held:

                    @pl.when(turn + 1 < rounds)
                    def _next():
                        fetch(turn + 1, i)

            lax.fori_loop(0, tiles, give, None)

        if held:

            @pl.loop(0, tiles)
            def _first(i):
                fetch(0, i)

        lax.fori_loop(0, rounds, one_row, None)

    scratch = [plgpu.SMEM((warpgroups, 2, LANES), F32), plgpu.Barrier(num_arrivals=warpgroups)]
    if held:
        scratch += [plgpu.SMEM((warpgroups * tiles, tile), F32), plgpu.Barrier(num_barriers=warpgroups * tiles)]
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
