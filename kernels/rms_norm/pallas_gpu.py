"""RMS norm on Hopper GPUs, each direction one pass over memory: Pallas Mosaic GPU.

XLA reads what a norm's gradient needs twice, once to reduce the rows and once to use the sums. Here a block of threads
holds whole rows in registers. It keeps the normed rows and one number a row for the gradient, not the rows it was given.

Letters: N rows, D width.
"""

import jax
from jax import lax

from linscale.kernels.hopper_rows import F32, Blocks, read, sigmoid, write


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
