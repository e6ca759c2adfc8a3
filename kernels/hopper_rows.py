"""Rows of arrays held by blocks of threads on Hopper GPUs: Pallas Mosaic GPU, for kernels that pass over memory once.

Letters: N rows, D width, R rows of a block.
"""

import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

F32 = jnp.float32
THREADS = 128
ELEMENTS = 4096  # of a block in each array, 32 a thread


def layout(width, dtype):
    """Rows [R,D] spread over all threads, which read up to 16 bytes at a time."""
    most = 16 // jnp.dtype(dtype).itemsize
    vector = math.gcd(width // THREADS, most)
    tiling = plgpu.Tiling(((1, THREADS * vector), (32 * vector,), (vector,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)


def read(ref, layout):
    return plgpu.load(ref, layout=layout, optimized=False)


def write(ref, x):
    """jax 0.12 demands whole sectors of memory of a plain assignment, which one number a row does not fill."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, x, optimized=False)
    else:
        ref[...] = x


def sigmoid(x):
    return 1.0 / (1.0 + jnp.exp(-x))


class Blocks:
    """Which rows a block takes, and how it reads, reduces and writes them."""

    def __init__(self, x):
        self.rows, self.width = x.shape
        self.height = min(max(1, ELEMENTS // self.width), self.rows)
        self.number = math.ceil(self.rows / self.height)
        self.layout = layout(self.width, x.dtype)

    def own(self):
        """The last block goes back to have all its rows; those that two blocks share get the same numbers twice."""
        return pl.ds(jnp.minimum(lax.axis_index("block") * self.height, self.rows - self.height), self.height)

    def read_sum(self, refs, at):
        return sum(read(ref.at[at], self.layout).astype(F32) for ref in refs)

    def along(self, column):
        wide = lax.broadcast_in_dim(column, (self.height, self.width), (0,))
        return plgpu.layout_cast(wide, self.layout)

    def mean(self, x):
        return jnp.sum(x, axis=1) * (1.0 / self.width)

    def call(self, body, name, out_type):
        body.__name__ = name  # what profilers show
        return plgpu.kernel(
            body,
            out_type=out_type,
            grid=(self.number,),
            grid_names=("block",),
            compiler_params=plgpu.CompilerParams(),
        )
