"""The elementwise part of a gated linear unit.

Letters: B batch, T tokens, F channels.
"""

import functools

import jax
import jax.numpy as jnp

from linscale.kernels.axes import Axes, mesh_for, over_mesh
from linscale.kernels.hopper import choose, on_hopper
from linscale.kernels.remat import kept

ACTIVATIONS = {"none": lambda x: x, "silu": jax.nn.silu}


def gated_unit(
    up: jax.Array, gate: jax.Array, *, activation: str, implementation: str | None = None, axes: Axes | None = None
) -> jax.Array:
    """up * f(gate), [B,T,F] in the dtype of up (GLU variants, arXiv 2002.05202).

    On Hopper GPUs a kernel forms both gradients in one pass over memory, and the policies of jax.checkpoint that keep
    attention keep the result; XLA would form it again, or else read what it has in common twice.

    Args:
      up, gate: [B,T,F]; float32 or bfloat16.
      activation: f, "none" or "silu".
      implementation: "xla", "pallas_gpu", or None: the kernel wherever it serves.
      axes: how the mesh in context (jax.set_mesh) splits batch, tokens and, over axes.heads, channels.

    Raises:
      ValueError: up and gate differ; another activation; an implementation that cannot serve.
    """
    if (up.shape, up.dtype) != (gate.shape, gate.dtype):
        raise ValueError(f"up {up.shape} {up.dtype} and gate {gate.shape} {gate.dtype} must be alike.")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is none of {', '.join(map(repr, ACTIVATIONS))}.")
    if choose("gated unit", implementation, refusal(up, axes)) == "xla":
        return up * ACTIVATIONS[activation](gate)
    return _on_hopper(up, gate, activation, axes)


def refusal(x, axes: Axes | None = None) -> str | None:
    """Why the kernel cannot serve, as a sentence without its stop; None if it can."""
    if not on_hopper():
        return "it needs a Hopper GPU (compute capability 9.0) and jax >= 0.11"
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"x has dtype {x.dtype}, it takes float32 or bfloat16"
    mesh = mesh_for(axes)
    devices = 1 if mesh is None else mesh.size
    if x.size % (1024 * devices):
        return f"it takes multiples of 1,024 elements on each device, x has {x.size:,} on {devices}"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _on_hopper(up, gate, activation, axes):
    return up * ACTIVATIONS[activation](gate)


def _forward(up, gate, activation, axes):
    return kept(up * ACTIVATIONS[activation](gate)), (up, gate)


def _backward(activation, axes, residuals, gradient):
    from linscale.kernels.gated_unit.pallas_gpu import backward

    arrays = dict(zip(("up", "gate", "gradient"), (*residuals, gradient)))
    local = lambda arrays: backward(**arrays, activation=activation)  # noqa: E731
    mesh = mesh_for(axes)
    if mesh is None:
        return tuple(local(arrays))
    return tuple(over_mesh(local, mesh, axes, arrays, dict.fromkeys(arrays, "BTH"), ["BTH", "BTH"]))


_on_hopper.defvjp(_forward, _backward)
