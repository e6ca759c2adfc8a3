"""A small state as one safetensors file: what a checkpoint costs where a step takes milliseconds.

orbax takes 20 to 60 ms of processor time a save, however small the state; this takes 1 to 9 (experiments/faults has the
figures). The loop waits until one program that copies and sums the state is under way; all else happens in whatever
thread calls `write`. The folder is written under another name and renamed once its file is on disk.

In the file's metadata lies the same content as in those of an orbax checkpoint; see linscale/training/checkpoint.py.
"""

import functools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from linscale import sharding
from linscale.config import ConfigError
from linscale.interop import safetensors

FILE = "state.safetensors"
_MOST = 2**26  # bytes; above, orbax's fixed price no longer counts, and a second copy on the device may not fit


def serves(arrays: dict[str, jax.Array]) -> bool:
    """Whether a state is written this way: it is small, and this process holds all of it."""
    return jax.process_count() == 1 and sum(x.size * x.dtype.itemsize for x in arrays.values()) <= _MOST


def named(tree: Any) -> dict[str, Any]:
    """Path of every leaf -> the leaf."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def sums(tree: Any) -> dict[str, int]:
    """Path of every array -> sum of its bits, each element times an odd number of its place, modulo 2^32.

    One flipped bit changes it always; a sum of integers does not depend on the order, so neither on the sharding.
    """
    arrays = named(tree)
    leaves = list(arrays.values())
    return _of_names(arrays, _summed(_everywhere(leaves[0].sharding))(leaves))


def snapshot(arrays: dict[str, jax.Array]) -> tuple[dict[str, jax.Array], jax.Array]:
    """(copies of the arrays, their sums), in flight on the device, so that the caller may donate the arrays."""
    leaves = list(arrays.values())
    copies, totals = _copied(_everywhere(leaves[0].sharding))(leaves)
    return dict(zip(arrays, copies)), totals


def write(path: Path, taken: tuple[dict[str, jax.Array], jax.Array], describe) -> None:
    """Writes the folder `path` from a snapshot, whole or not at all. describe: (sums) -> content of the metadata, JSON."""
    copies, totals = taken
    text = json.dumps(describe(_of_names(copies, totals)))
    part = path.with_name(f"{path.name}.linscale-tmp")
    part.mkdir()
    try:
        safetensors.write(part / FILE, jax.device_get(copies), {"linscale": text})
        part.rename(path)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)  # on a full disk, so that others may go on
        raise


def content(path: Path) -> dict:
    """What describe gave. Raises ValueError where it cannot be read."""
    try:
        return json.loads(safetensors.metadata(path / FILE)["linscale"])
    except (ConfigError, KeyError, TypeError) as error:
        raise ValueError(f"its metadata cannot be read: {error}") from error


def read(path: Path, abstract: Any) -> Any:
    """The arrays of `abstract`, a tree of shapes, dtypes and shardings. Raises ValueError where the file lacks some."""
    try:
        arrays = safetensors.read(path / FILE)
    except ConfigError as error:
        raise ValueError(str(error)) from error
    wanted = named(abstract)
    if missing := [name for name, leaf in wanted.items() if name not in arrays or not _alike(arrays[name], leaf)]:
        raise ValueError(f"it lacks {len(missing)} arrays of this config, {missing[0]} the first")
    return jax.tree.unflatten(jax.tree.structure(abstract), [_put(arrays[name], leaf) for name, leaf in wanted.items()])


def _alike(array: np.ndarray, leaf: jax.ShapeDtypeStruct) -> bool:
    return array.shape == leaf.shape and array.dtype == leaf.dtype


def _put(array: np.ndarray, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    if jax.process_count() == 1:
        return jax.device_put(array, leaf.sharding, may_alias=False)  # the file may be removed and the array donated
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: np.array(array[index]))


def _of_names(arrays: dict[str, Any], totals: jax.Array) -> dict[str, int]:
    return {name: int(total) for name, total in zip(arrays, jax.device_get(totals))}


def _everywhere(found: jax.sharding.Sharding) -> jax.sharding.Sharding:
    return sharding.replicated(found.mesh) if isinstance(found, jax.sharding.NamedSharding) else found


@functools.cache
def _summed(out: jax.sharding.Sharding):
    return jax.jit(lambda leaves: jnp.stack([_sum(leaf) for leaf in leaves]), out_shardings=out)


@functools.cache
def _copied(out: jax.sharding.Sharding):
    """Replicated copies, which each process can read whole, and sums."""
    return jax.jit(
        lambda leaves: ([jnp.copy(_on_device(leaf)) for leaf in leaves], jnp.stack([_sum(leaf) for leaf in leaves])),
        out_shardings=out,
    )


def _on_device(x: jax.Array) -> jax.Array:
    return jax.device_put(x, jax.memory.Space.Device)  # it may lie in the host's memory


def _sum(x: jax.Array) -> jax.Array:
    x = _on_device(x)
    x = x.astype(jnp.uint8) if x.dtype == bool else x
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
    strides = [math.prod(x.shape[axis + 1 :]) % 2**32 for axis in range(x.ndim)]
    # Axis by axis, so that a sharded array is summed without its places ever being whole on one device.
    place = sum(jax.lax.broadcasted_iota(jnp.uint32, x.shape, a) * jnp.uint32(s) for a, s in enumerate(strides))
    return jnp.sum(bits * (place * jnp.uint32(2_654_435_762) + 1), dtype=jnp.uint32)  # even times place, plus 1: odd
