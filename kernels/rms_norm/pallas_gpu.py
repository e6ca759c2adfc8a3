"""RMS norm on Hopper GPUs, each direction one pass over memory: Pallas Mosaic GPU.

XLA reads what a norm's gradient needs twice, once to reduce the rows and once to use the sums. Here a block of threads
holds whole rows in registers. It keeps the normed rows and one number a row for the gradient, not the rows it was given.

Letters: N rows, D width, R rows of a block.
"""

import math

import jax
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


def forward(x, added, epsilon):
    """normed: s / RMS(s) [N,D] of s = x + added, scale: 1 / RMS(s) [N] float32, and, where added is not None, sum: s."""
    blocks = Blocks(x)
    given = [x] if added is None else [x, added]
    out_type = {"normed": jax.ShapeDtypeStruct(x.shape, x.dtype), "scale": jax.ShapeDtypeStruct(x.shape[:1], F32)}
    if added is not None:
        out_type["sum"] = out_type["normed"]

    def body(*refs):
        refs_in, refs_out = refs[: len(given)], dict(zip(out_type, refs[len(given) :]))
        at = blocks.own()
        s = blocks.read_sum(refs_in, at)
        if added is not None:
            rounded = s.astype(x.dtype)
            write(refs_out["sum"].at[at], rounded)
            s = rounded.astype(F32)
        scale = lax.rsqrt(blocks.mean(s * s) + epsilon)
        write(refs_out["normed"].at[at], (s * blocks.along(scale)).astype(x.dtype))
        write(refs_out["scale"].at[at], scale)

    return dict(zip(out_type, blocks.call(body, "rms_norm", list(out_type.values()))(*given)))


def backward(normed, scale, beside, **gradients):
    """sum: the gradient of s [N,D] of which `normed` and `scale` came, given those of uses of the normed s, and of s."""
    blocks = Blocks(normed)
    given = [normed, scale, *gradients.values()] + ([] if beside is None else [beside])

    def body(*refs):
        normed_g, scale_g, *gradients_g, out_g = refs
        at = blocks.own()
        beside_g = [] if beside is None else [gradients_g.pop()]
        normed, gradient = blocks.read_sum([normed_g], at), blocks.read_sum(gradients_g, at)
        scale = blocks.along(read(scale_g.at[at], blocks.layout.reduce(1)))
        ds = scale * (gradient - normed * blocks.along(blocks.mean(gradient * normed)))
        if beside_g:
            ds += blocks.read_sum(beside_g, at)
        write(out_g.at[at], ds.astype(out_g.dtype))

    out_type = jax.ShapeDtypeStruct(normed.shape, normed.dtype)
    return {"sum": blocks.call(body, "rms_norm_gradient", out_type)(*given)}


def gated_forward(x, gate, epsilon):
    """out: x / RMS(x) * sigmoid(gate) [N,D], and scale: 1 / RMS(x) [N] float32."""
    blocks = Blocks(x)

    def body(x_g, gate_g, out_g, scale_g):
        at = blocks.own()
        x, gate = blocks.read_sum([x_g], at), blocks.read_sum([gate_g], at)
        scale = lax.rsqrt(blocks.mean(x * x) + epsilon)
        write(out_g.at[at], (x * blocks.along(scale) * sigmoid(gate)).astype(out_g.dtype))
        write(scale_g.at[at], scale)

    out_type = [jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct(x.shape[:1], F32)]
    return dict(zip(("out", "scale"), blocks.call(body, "gated_rms_norm", out_type)(x, gate)))


def gated_backward(x, gate, scale, gradient):
    """x, gate: the gradients of x and gate [N,D]."""
    blocks = Blocks(x)

    def body(x_g, gate_g, scale_g, gradient_g, dx_g, d_gate_g):
        at = blocks.own()
        scale = blocks.along(read(scale_g.at[at], blocks.layout.reduce(1)))
        normed, gate = blocks.read_sum([x_g], at) * scale, sigmoid(blocks.read_sum([gate_g], at))
        gradient = blocks.read_sum([gradient_g], at) * gate
        product = gradient * normed
        write(d_gate_g.at[at], (product * (1.0 - gate)).astype(d_gate_g.dtype))
        write(dx_g.at[at], (scale * (gradient - normed * blocks.along(blocks.mean(product)))).astype(dx_g.dtype))

    out_type = [jax.ShapeDtypeStruct(x.shape, x.dtype)] * 2
    return dict(zip(("x", "gate"), blocks.call(body, "gated_rms_norm_gradient", out_type)(x, gate, scale, gradient)))
