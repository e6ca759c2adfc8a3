"""Operators over a mesh of devices: which mesh axes split which dimension, and how a local operator runs per device."""

import dataclasses
import math

import jax
from jax.sharding import AxisType, PartitionSpec


@dataclasses.dataclass(frozen=True)
class Axes:
    """Names of the mesh axes over which operators split batch, tokens, heads and vocabulary."""

    batch: tuple[str, ...] = ("data", "fsdp")
    sequence: str = "sequence"
    heads: str = "tensor"
    vocabulary: str = "tensor"

    def of(self, letter: str) -> tuple[str, ...]:
        """The mesh axes of a dimension: B batch, T tokens, H heads, V vocabulary; none of any other letter."""
        return {"B": self.batch, "T": (self.sequence,), "H": (self.heads,), "V": (self.vocabulary,)}.get(letter, ())

    def spec(self, dims: str) -> PartitionSpec:
        """PartitionSpec of an array with a letter for each dimension."""
        return PartitionSpec(*(self.of(letter) or None for letter in dims))


def mesh_for(axes: Axes | None):
    """The mesh in context (jax.set_mesh) over which an operator must spread; None where it runs as on one device.

    None without axes, without a mesh or with one of a single device, and inside jax.shard_map, where arrays are local.
    Raises ValueError for an axis that the mesh lacks.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if axes is None or mesh.empty or mesh.size == 1 or AxisType.Manual in mesh.axis_types:
        return None
    for name in (*axes.batch, axes.sequence, axes.heads, axes.vocabulary):
        if name not in mesh.axis_names:
            raise ValueError(f"axes names the mesh axis {name!r}; the mesh in context has {mesh.axis_names}.")
    return mesh


def over_mesh(local, mesh, axes: Axes, arrays: dict, dims: dict[str, str], results):
    """local(arrays) on every device with its own part of each array, results put together.

    arrays: by name; None stands for an argument that is not given and stays None. dims: a letter for each dimension of
    each array, as `Axes.of` reads them. results: such letters for each result of `local`, as a pytree.

    Outside, replicated arguments and results are differentiated as single arrays: gradients are summed over devices.

    Raises:
      ValueError: a dimension that its mesh axes do not divide.
    """
    given = {name: x for name, x in arrays.items() if x is not None}
    for name, x in given.items():
        for size, letter in zip(x.shape, dims[name], strict=True):
            parts = math.prod(mesh.shape[axis] for axis in axes.of(letter))
            if size % parts:
                over = " x ".join(repr(axis) for axis in axes.of(letter))
                raise ValueError(
                    f"{name} has shape {x.shape}: {size} does not divide over {parts} devices of mesh axis {over}; "
                    f"use a multiple of {parts}, or a smaller axis."
                )
    return jax.shard_map(
        lambda given: local(dict.fromkeys(arrays) | given),
        mesh=mesh,
        in_specs=({name: axes.spec(dims[name]) for name in given},),
        out_specs=jax.tree.map(axes.spec, results),
        check_vma=False,  # Pallas kernels do not say over which axes their results vary
    )(given)
