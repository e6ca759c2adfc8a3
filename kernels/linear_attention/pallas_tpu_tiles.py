"""Tile sizes of the TPU kernels by generation, chosen from static schedules (experiments/kernels/tpu_schedule.py).

chunk: tokens of a masked product; 256 fills the 256 x 256 matrix units from v6e on. block: tokens that one grid step
reads; the forward pass leaves one state per block for the backward pass. columns: how many 128-lane columns one grid
step works on, forward and backward: more give the scheduler more independent work, and cost on-chip memory and time to
compile; float32 takes half as many. pair: the chunk where a column holds two heads, whose scores lie side by side; where
that leaves pairs of tokens more lanes than one head's have, half as many columns are taken.
"""

from typing import NamedTuple

import jax


class Tiles(NamedTuple):
    chunk: int
    block: int
    forward: int
    backward: int
    pair: int


SCALAR = {
    "v4": Tiles(128, 512, 8, 4, 64),
    "v5e": Tiles(128, 512, 8, 8, 64),
    "v5p": Tiles(128, 512, 8, 8, 64),
    "v6e": Tiles(256, 512, 8, 8, 128),
    "tpu7x": Tiles(256, 512, 8, 8, 128),
}
VECTOR = {
    "v4": Tiles(128, 512, 4, 2, 64),
    "v5e": Tiles(128, 512, 4, 4, 64),
    "v5p": Tiles(128, 512, 4, 4, 64),
    "v6e": Tiles(128, 512, 8, 4, 128),
    "tpu7x": Tiles(128, 512, 8, 4, 128),
}
PHASE = {
    "v4": Tiles(128, 512, 4, 2, 64),
    "v5e": Tiles(128, 512, 4, 2, 64),
    "v5p": Tiles(128, 512, 4, 2, 64),
    "v6e": Tiles(256, 512, 4, 2, 128),
    "tpu7x": Tiles(256, 512, 4, 2, 128),
}


# Bytes of on-chip memory that a kernel may take: half of what a core has, all where that is little; on tpu7x, of whose 64 MiB
# the backward pass of scalar decay takes 34, more.
MEMORY = {"v4": 16 << 20, "v5e": 64 << 20, "v5p": 32 << 20, "v6e": 64 << 20, "tpu7x": 40 << 20}


def table(kind: str) -> dict[str, Tiles]:
    """By generation; kind: none, scalar, phase, vector or tied."""
    return {"phase": PHASE, "vector": VECTOR, "tied": VECTOR}.get(kind, SCALAR)


_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
}


def target(x=None) -> str | None:
    """The device kind that the program being traced is for, if it is a TPU.

    The mesh in context decides (jax.set_mesh, jax.shard_map), then the mesh that `x` is laid out on, and both may be of
    a topology that this process does not hold; without a mesh, the default backend.
    """
    meshes = [jax.sharding.get_abstract_mesh()]
    if x is not None:
        meshes.append(getattr(jax.typeof(x).sharding, "mesh", None))
    for mesh in meshes:
        device = getattr(mesh, "abstract_device", None)
        if device is not None:
            return device.device_kind if device.device_kind.startswith("TPU") else None
    return jax.devices()[0].device_kind if jax.default_backend() == "tpu" else None


def generation(kind: str | None) -> str:
    """v4, v5e, v5p, v6e or tpu7x; a kind that is not known takes the newest row."""
    return "v5e" if kind is None else _KINDS.get(kind, "tpu7x")
