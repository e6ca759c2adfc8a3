"""Small programs on 8 devices whose communication is known; run as a script, it writes their compiled HLO to a folder.

The mesh is data 1, fsdp 2, sequence 2, tensor 2; each device holds 1024 float32 numbers of the argument, 4096 bytes.
"""

import os
import sys
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

MESH = {"data": 1, "fsdp": 2, "sequence": 2, "tensor": 2}
SHARD = 1024  # float32 elements of a device: 4096 bytes
MESH_OF = jax.make_mesh(tuple(MESH.values()), tuple(MESH), axis_types=(jax.sharding.AxisType.Auto,) * 4)


def gather(x):
    return jax.lax.all_gather(x, "fsdp", tiled=True).sum(keepdims=True)


def scatter(x):
    return jax.lax.psum_scatter(x, "sequence", tiled=True)


def reduce(x):
    return jax.lax.psum(x, "tensor")


def reduce_over_two(x):
    return jax.lax.psum(x, ("fsdp", "tensor"))


def exchange(x):
    return jax.lax.all_to_all(x.reshape(2, -1), "sequence", 0, 0)


def rotate(x):
    return jax.lax.ppermute(x, "sequence", [(0, 1), (1, 0)])


def in_a_loop(x):
    """3 trips of (one gather, 5 trips of a sum)."""

    def inner(y, _):
        return jax.lax.psum(jnp.sin(y), "tensor"), None

    def outer(x, _):
        y = jax.lax.all_gather(x, "fsdp", tiled=True)[: x.shape[0]]
        return jax.lax.scan(inner, y * x, None, length=5)[0], None

    return jax.lax.scan(outer, x, None, length=3)[0]


def backwards(x):
    """The gradient through 7 trips: one sum a trip in each direction."""

    def body(y, _):
        return jax.lax.psum(jnp.sin(y), "tensor"), None

    return jax.grad(lambda x: jax.lax.scan(body, x, None, length=7)[0].sum())(x)


def counted(x):
    return jax.lax.fori_loop(2, 8, lambda i, y: jax.lax.psum(jnp.sin(y) * i, "fsdp"), x)


PROGRAMS = (gather, scatter, reduce, reduce_over_two, exchange, rotate, in_a_loop, backwards, counted)


def text(program, mesh=MESH_OF, shard=SHARD) -> str:
    """The compiled program, each device given `shard` float32 numbers."""
    every = PartitionSpec(tuple(MESH))
    x = jax.ShapeDtypeStruct((8 * shard,), jnp.float32, sharding=NamedSharding(mesh, every))
    mapped = jax.shard_map(program, mesh=mesh, in_specs=every, out_specs=every, check_vma=False)
    return jax.jit(mapped).lower(x).compile().as_text()


if __name__ == "__main__":
    for program in PROGRAMS:
        (Path(sys.argv[1]) / f"{program.__name__}.hlo").write_text(text(program))
