"""Floating point operations of a traced program: its matrix products, loops by their trips, kernels by their grids.

What the hardware does, rematerialisation and the additional work of chunked kernels included, over all devices; the
counts in linscale.scaling.flops are what the model asks for. Element-wise work is not counted.
"""

import math

import jax
import jax.extend


def matrix_flops(jaxpr) -> float:
    """Of a ClosedJaxpr or Jaxpr. Branches of a conditional: the dearest. Loops of unknown length: one trip."""
    return sum(map(_flops, getattr(jaxpr, "jaxpr", jaxpr).eqns))


def _flops(eqn) -> float:
    name = eqn.primitive.name
    if name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        shape = eqn.invars[0].aval.shape
        return 2.0 * eqn.outvars[0].aval.size * math.prod(shape[i] for i in contracted)
    inner = [matrix_flops(jaxpr) for jaxpr in _inner(eqn)]
    if name == "scan":
        return eqn.params["length"] * sum(inner)
    if name == "cond":
        return max(inner, default=0.0)
    if name == "pallas_call":
        grid = [n for n in eqn.params["grid_mapping"].grid if isinstance(n, int)]
        return math.prod(grid) * _computed(str(eqn.params["name"]), grid) * sum(inner)
    if name == "shard_map":
        mesh, manual = eqn.params["mesh"], eqn.params.get("manual_axes") or eqn.params["mesh"].axis_names
        return math.prod(mesh.shape[axis] for axis in manual) * sum(inner)
    return sum(inner)


def _computed(kernel: str, grid: list[int]) -> float:
    """The part of a kernel's grid that computes: splash attention, causal and with square tiles here, skips those above
    the diagonal."""
    return (grid[-1] + 1) / (2 * grid[-1]) if "splash" in kernel else 1.0


def _inner(eqn):
    for value in eqn.params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if isinstance(getattr(one, "jaxpr", one), jax.extend.core.Jaxpr):
                yield one
