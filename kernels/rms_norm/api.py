"""RMS norm without parameters, and what goes on beside it.

Letters: B batch, T tokens, D width, N rows.
"""

import functools

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from linscale.kernels.axes import Axes, mesh_for, over_mesh
from linscale.kernels.hopper import choose, on_hopper
from linscale.kernels.remat import kept

WIDEST = 8192


def rms_norm(
    x: jax.Array,
    added: jax.Array | None = None,
    *,
    epsilon: float,
    uses: int = 1,
    implementation: str | None = None,
    axes: Axes | None = None,
    split: bool = False,
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """s / RMS(s) over the last axis, s = x + added, with statistics in float32; and s, with which a residual stream goes on.

    Where gradients are to come, a kernel for Hopper GPUs does this in one pass over memory, and another adds up all
    gradients in the one pass that the norm's own takes. That one is formed from the normed s as it was rounded; the
    policies of jax.checkpoint that keep attention keep it too, and then need no s.

    Args:
      x, added: [B,T,D]; float32 or bfloat16.
      epsilon: added to the mean square.
      uses: how many times the normed s is returned. A product of each with its own matrix leaves it to the norm's
        gradient to add theirs.
      implementation: "xla", "pallas_gpu", or None: the kernels wherever they serve.
      axes: how the mesh in context (jax.set_mesh) splits batch and tokens. None, or no mesh: one device's work.
      split: whether D, too, is split, over axes.heads; such a norm is XLA's.

    Returns:
      the normed s, `uses` times, and s; all [B,T,D] in the dtype of x.

    Raises:
      ValueError: x and added differ; an implementation that cannot serve.
    """
    if _choose(x, added, implementation, axes if split else None) == "xla":
        return _plain(x, added, epsilon, uses)
    mesh = mesh_for(axes)
    if mesh is not None and mesh.shape[axes.heads] > 1:
        # Gradients of uses are sums over that axis: added up, then sent.
        (normed,), s = _on_hopper(x, added, epsilon, 1, axes)
        return (normed,) * uses, s
    return _on_hopper(x, added, epsilon, uses, axes)


def gated_rms_norm(
    x: jax.Array, gate: jax.Array, *, epsilon: float, implementation: str | None = None, axes: Axes | None = None
) -> jax.Array:
    """x / RMS(x) * sigmoid(gate), [B,T,D] in the dtype of x; statistics in float32.

    As `rms_norm`, with D split over axes.heads. What jax.checkpoint's policies keep of the kernels is the result.

    Raises:
      ValueError: x and gate differ; an implementation that cannot serve.
    """
    if _choose(x, gate, implementation, axes) == "xla":
        return _plain(x, None, epsilon, 1)[0][0] * jax.nn.sigmoid(gate)
    return _gated_on_hopper(x, gate, epsilon, axes)


def _choose(x, other, implementation, split_over):
    if other is not None and (x.shape, x.dtype) != (other.shape, other.dtype):
        raise ValueError(f"x {x.shape} {x.dtype} and {other.shape} {other.dtype} beside it must be alike.")
    return choose("rms norm", implementation, refusal(x, split_over))


def refusal(x, split_over: Axes | None = None) -> str | None:
    """Why the kernels cannot serve, as a sentence without its stop; None if they can."""
    if not on_hopper():
        return "it needs a Hopper GPU (compute capability 9.0) and jax >= 0.11"
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"x has dtype {x.dtype}, it takes float32 or bfloat16"
    if x.shape[-1] % 256 or x.shape[-1] > WIDEST:
        return f"it takes widths in steps of 256 up to {WIDEST}, x has {x.shape[-1]}"
    mesh = mesh_for(split_over)
    if mesh is not None and mesh.shape[split_over.heads] > 1:
        return f"x has its last axis split over the mesh axis {split_over.heads!r}"
    return None


def _plain(x, added, epsilon, uses):
    x = x if added is None else x + added
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    return (normed.astype(x.dtype),) * uses, x


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _on_hopper(x, added, epsilon, uses, axes):
    return _plain(x, added, epsilon, uses)  # where no gradient is to come, XLA does as well


def _forward(x, added, epsilon, uses, axes):
    from linscale.kernels.rms_norm.pallas_gpu import forward

    arrays = {"x": x.value, "added": None if added is None else added.value}
    results = {"normed": "BTD", "scale": "BT"} | ({} if added is None else {"sum": "BTD"})
    found = _by_rows(functools.partial(forward, epsilon=epsilon), axes, arrays, results)
    normed, scale = kept((found["normed"], found["scale"]))
    return ((normed,) * uses, found.get("sum", x.value)), (normed, scale, None if added is None else ())


def _backward(epsilon, uses, axes, residuals, cotangents):
    from linscale.kernels.rms_norm.pallas_gpu import backward

    normed, scale, added = residuals
    of_normed, beside = jax.tree.map(
        lambda c: None if isinstance(c, SymbolicZero) else c, cotangents, is_leaf=lambda c: isinstance(c, SymbolicZero)
    )
    of_normed = {f"gradient{i}": g for i, g in enumerate(of_normed) if g is not None}
    if of_normed:
        arrays = {"normed": normed, "scale": scale, "beside": beside} | of_normed
        d_sum = _by_rows(backward, axes, arrays, {"sum": "BTD"})["sum"]
    else:
        d_sum = jnp.zeros_like(normed) if beside is None else beside
    return d_sum, None if added is None else d_sum


_on_hopper.defvjp(_forward, _backward, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _gated_on_hopper(x, gate, epsilon, axes):
    return _plain(x, None, epsilon, 1)[0][0] * jax.nn.sigmoid(gate)


def _gated_forward(x, gate, epsilon, axes):
    from linscale.kernels.rms_norm.pallas_gpu import gated_forward

    kernel = functools.partial(gated_forward, epsilon=epsilon)
    found = kept(_by_rows(kernel, axes, {"x": x, "gate": gate}, {"out": "BTD", "scale": "BT"}))
    return found["out"], (x, gate, found["scale"])


def _gated_backward(epsilon, axes, residuals, gradient):
    from linscale.kernels.rms_norm.pallas_gpu import gated_backward

    x, gate, scale = residuals
    arrays = {"x": x, "gate": gate, "scale": scale, "gradient": gradient}
    found = _by_rows(gated_backward, axes, arrays, {"x": "BTD", "gate": "BTD"})
    return found["x"], found["gate"]


_gated_on_hopper.defvjp(_gated_forward, _gated_backward)


def _by_rows(kernel, axes, arrays, results):
    """kernel over the rows [N,D] of each device's arrays; results: the dimensions of each, in letters."""

    def local(arrays):
        shape = next(iter(arrays.values())).shape
        flat = {name: x if x is None else x.reshape(-1, *x.shape[2:]) for name, x in arrays.items()}
        return {name: x.reshape(*shape[:2], *x.shape[1:]) for name, x in kernel(**flat).items()}

    mesh = mesh_for(axes)
    if mesh is None:
        return local(arrays)
    dims = {name: "BTD"[: x.ndim] for name, x in arrays.items() if x is not None}
    return over_mesh(local, mesh, axes, arrays, dims, results)
