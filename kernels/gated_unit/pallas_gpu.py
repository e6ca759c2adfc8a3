"""Both gradients of a gated unit on Hopper GPUs in one pass over memory: Pallas Mosaic GPU."""

import jax

from linscale.kernels.hopper_rows import Blocks, sigmoid, write

WIDTH = 1024  # of the rows as which arrays of any shape are read


def backward(up, gate, gradient, activation):
    """The gradients of up and gate, given that of up * f(gate); all of one shape and dtype, a multiple of WIDTH in size."""
    flat = [x.reshape(-1, WIDTH) for x in (up, gate, gradient)]
    blocks = Blocks(flat[0])

    def body(up_g, gate_g, gradient_g, d_up_g, d_gate_g):
        at = blocks.own()
        up, gate, gradient = (blocks.read_sum([x], at) for x in (up_g, gate_g, gradient_g))
        value, slope = gate, 1.0
        if activation == "silu":
            open_ = sigmoid(gate)
            value, slope = gate * open_, open_ * (1.0 + gate * (1.0 - open_))
        write(d_up_g.at[at], (gradient * value).astype(d_up_g.dtype))
        write(d_gate_g.at[at], (gradient * up * slope).astype(d_gate_g.dtype))

    out_type = [jax.ShapeDtypeStruct(flat[0].shape, up.dtype)] * 2
    return [x.reshape(up.shape) for x in blocks.call(body, "gated_unit_gradient", out_type)(*flat)]
