"""Checkpoints of a run: training state and data position together, written in the background and kept by a policy.

A checkpoint is a folder named by its step; orbax writes it under a temporary name and renames it when it is whole, so
a killed process leaves either a whole checkpoint or rubbish that the next start removes. The state of the data
iterator is small JSON and lies in the checkpoint's own metadata: one cannot exist without the other.

Integrity is checked from end to end. The storage format notices a truncated file but reads flipped bits
without complaint (60 of 60 tried), so a 32-bit sum of every array is taken on the device before it is saved, kept in
the metadata, and taken again of what was restored. It does not depend on the sharding, so the mesh may change between.
A checkpoint that fails is named and passed over for the one before it, and moved to the folder `damaged` once that one
has been read whole.
"""

import contextlib
import dataclasses
import errno
import functools
import json
import logging
import math
import os
import shutil
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint.experimental import v1 as ocp

from linscale import sharding
from linscale.config import Config, ConfigError
from linscale.training import hosts, run_folder
from linscale.training.metrics import say
from linscale.training.step import TrainState, init

Checkpointer = ocp.training.Checkpointer
_UNFINISHED = "*.orbax-checkpoint-tmp*"
_FULL = os.strerror(errno.ENOSPC)


@contextlib.contextmanager
def open_folder(folder: Path, config: Config) -> Iterator[Checkpointer]:
    """Leaving it waits for the save in progress. Names and removes what was half-written. OSError: it cannot be written."""
    for path in sorted(folder.glob(_UNFINISHED)):
        say(f"{folder}: checkpoint {path.name.split('.')[0]} was not finished when its process ended; removed")
    policies = ocp.training.preservation_policies
    keep = [
        policies.LatestN(config.train.checkpoint_keep),
        policies.CustomSteps(list(run_folder.milestones(config).values())),
    ]
    if config.train.checkpoint_keep_every:
        keep.append(policies.EveryNSteps(config.train.checkpoint_keep_every))
    context = ocp.Context()
    # Both cost a third of a small save and are replaced by the sums of this file.
    context.array.saving.enable_post_merge_validation = False
    context.array.saving.enable_write_sharding_file = False
    with _raised_and_not_printed():
        with _writing(folder):
            checkpointer = Checkpointer(
                folder.absolute(),
                context=context,
                save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(
                    1
                ),  # the loop decides when
                preservation_policy=policies.AnyPreservationPolicy(keep),
                cleanup_tmp_directories=True,
            )
        try:
            yield checkpointer
        except BaseException:
            if jax.process_count() == 1:  # of several, the others may not come to where this would wait for them
                with contextlib.suppress(Exception):  # a save that fails beside is not what ends the run
                    checkpointer.close()
            raise
        with _writing(folder):
            checkpointer.close()


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Errors of background writes arrive wrapped, as ValueError or RuntimeError, their number lost; here as OSError."""
    try:
        yield
    except Exception as error:
        chain = [error]
        while inner := chain[-1].__cause__ or chain[-1].__context__:
            chain.append(inner)
        if any(getattr(one, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or _FULL in str(one) for one in chain):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error
        if any(isinstance(one, OSError) or "os_error_code" in str(one) for one in chain):
            raise OSError(f"{folder}: a checkpoint cannot be written: {chain[-1]}") from error
        raise


@contextlib.contextmanager
def _raised_and_not_printed() -> Iterator[None]:
    """The storage libraries raise what fails in the background, but before that every one of their threads prints it."""

    def not_of_storage(record: logging.LogRecord) -> bool:
        return record.levelno < logging.ERROR or f"{os.sep}orbax{os.sep}" not in record.pathname

    def hook(found) -> None:
        code = getattr(found.object, "cr_code", None)  # reads that nobody waits for once the first one has failed
        late = str(found.exc_value) == "Event loop is closed"  # reads and writes that end after that
        if not late and not (code and f"{os.sep}orbax{os.sep}" in code.co_filename):
            before(found)

    logger, before = logging.getLogger("absl"), sys.unraisablehook
    logger.addFilter(not_of_storage)
    if getattr(before, "__qualname__", "") != hook.__qualname__:
        sys.unraisablehook = hook  # stays: the last of those writes may end with the process
    try:
        yield
    finally:
        logger.removeFilter(not_of_storage)


def save(checkpointer: Checkpointer, step: int, state: TrainState, data: dict) -> None:
    """Starts saving and returns once the arrays are copied, so that the caller may donate them.

    Raises OSError where this save cannot begin, or the one before has failed.
    """
    content = {"data": data, "sums": sums(state), "shapes": _shapes(state)}
    with _writing(Path(checkpointer.directory)):
        checkpointer.save_checkpointables_async(
            step, {"state": state}, custom_metadata=content | {"crc32": _crc32(content)}
        )


def wait(checkpointer: Checkpointer) -> None:
    """Returns when all saves and deletions are done. OSError: one has failed."""
    with _writing(Path(checkpointer.directory)):
        checkpointer.wait()


def save_alone(path: Path, state: TrainState) -> None:
    """One checkpoint outside any run's series, whole when this returns. `read` reads it."""
    content = {"data": {}, "sums": sums(state), "shapes": _shapes(state)}
    metadata = content | {"crc32": _crc32(content)}
    with _writing(path):
        ocp.save_checkpointables(path.absolute(), {"state": state}, custom_metadata=metadata)


def restore(checkpointer: Checkpointer, abstract: TrainState) -> tuple[int, TrainState, dict] | None:
    """The newest whole checkpoint as (step, state, data), or None where there is none at all.

    `abstract` gives shapes, dtypes and shardings. Raises ConfigError if there are checkpoints and none can be read.
    """
    folder = Path(checkpointer.directory)
    steps = [checkpoint.step for checkpoint in checkpointer.checkpoints]
    unfinished = sorted(set(steps_in(folder)) - set(steps))  # without the mark that orbax sets last
    for bad in unfinished:
        say(f"{folder}: checkpoint {bad} was not finished when its process ended; put aside")
    found, damaged = None, []
    if steps:
        *found, damaged = read_newest(folder, steps, abstract)
    for bad in (*damaged, *unfinished):
        if hosts.is_first():
            aside = folder.parent / "damaged" / str(bad)
            shutil.rmtree(aside, ignore_errors=True)
            aside.parent.mkdir(exist_ok=True)
            (folder / str(bad)).rename(aside)
    if damaged or unfinished:
        hosts.wait_for_all()
        checkpointer.reload()
    return tuple(found) if found else None


def read_newest(folder: Path, steps: list[int], abstract: Any) -> tuple[int, Any, dict, list[int]]:
    """(step, tree, data, damaged steps) of the newest checkpoint among `steps` that can be read whole.

    Changes nothing on disk, so that the folder may be another run's. Raises ConfigError if none can be read, or if they
    are of another model.
    """
    damaged = []
    for step in sorted(steps, reverse=True):
        reason = ""
        try:
            tree, data = read(folder / str(step), abstract)
        except ConfigError:  # whole, but of another model, as those before it are
            raise
        except Exception as error:  # what storage libraries raise on damaged files is open-ended
            reason = " ".join(str(error).split())[:300] or type(error).__name__
        if _all(not reason):
            return step, tree, data, damaged
        say(
            f"{folder}: checkpoint {step} is damaged ({reason or 'another host cannot read it'}); trying the one before"
        )
        damaged.append(step)
    raise ConfigError(
        f"{folder} has {len(steps)} checkpoints, and none can be read (reasons above); restore the folder from a copy, "
        "or remove it to begin again."
    )


def read(path: Path, abstract: Any) -> tuple[Any, dict]:
    """(tree, data) of one checkpoint folder. abstract: a TrainState, or a dict of some of its fields.

    Raises ConfigError where it is of another model, whatever the storage does on damaged files, and ValueError where
    what was read is not what was saved.
    """
    content = dict(ocp.checkpointables_metadata(path.absolute()).custom_metadata)
    if content.pop("crc32", None) != _crc32(content):
        raise ValueError("its metadata are not what was saved")
    there = content.get("shapes", {})  # checkpoints of earlier versions have none
    for name, shape in _shapes(abstract).items() if there else ():
        if there.get(name) != shape:
            has = f"its {name} has the shape {there[name]}" if name in there else f"it has no {name}"
            raise ConfigError(
                f"{path} is the checkpoint of another model: {has}, and this config makes it {shape}; give the config "
                "it was trained with, or choose another folder."
            )
    context = ocp.Context()
    context.pytree.loading.partial_load = isinstance(abstract, dict)
    with context:
        tree = ocp.load_checkpointables(path.absolute(), {"state": abstract})["state"]
    if not all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(tree)):
        raise ValueError("it lacks arrays of this config")
    wrong = [name for name, total in sums(tree).items() if content["sums"].get(name) != total]
    if wrong:
        raise ValueError(f"{len(wrong)} arrays are not what was saved, {wrong[0]} the first")
    return tree, content["data"]


def steps_in(folder: Path) -> list[int]:
    """Steps of the finished checkpoints in a folder, sorted."""
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit() and path.is_dir())


def abstract_state(config: Config, mesh: jax.sharding.Mesh) -> TrainState:
    """Shapes, dtypes and shardings of a run's training state on a mesh."""
    shapes = jax.eval_shape(functools.partial(init, config))
    lie = sharding.shardings(mesh, shapes)
    if config.optimizer.offload:
        lie = dataclasses.replace(lie, opt_state=sharding.shardings(mesh, shapes.opt_state, sharding.HOST))
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, lie)


def _shapes(tree: Any) -> dict[str, list[int]]:
    """Path of every array -> its shape."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): list(leaf.shape) for path, leaf in leaves}


def sums(tree: Any) -> dict[str, int]:
    """Path of every array -> sum of its bits, each element times an odd number of its place, modulo 2^32.

    One flipped bit changes it always; a sum of integers does not depend on the order, so neither on the sharding.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    arrays = [leaf for _, leaf in leaves]
    found = jax.device_get(_summed(_everywhere(arrays[0].sharding))(arrays))
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    return {name: int(total) for name, total in zip(names, found)}


def _everywhere(found: jax.sharding.Sharding) -> jax.sharding.Sharding:
    return sharding.replicated(found.mesh) if isinstance(found, jax.sharding.NamedSharding) else found


@functools.cache
def _summed(out: jax.sharding.Sharding):
    return jax.jit(lambda leaves: jnp.stack([_sum(leaf) for leaf in leaves]), out_shardings=out)


def _sum(x: jax.Array) -> jax.Array:
    x = jax.device_put(x, jax.memory.Space.Device)  # it may lie in the host's memory
    x = x.astype(jnp.uint8) if x.dtype == bool else x
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
    strides = [math.prod(x.shape[axis + 1 :]) % 2**32 for axis in range(x.ndim)]
    # Axis by axis, so that a sharded array is summed without its places ever being whole on one device.
    place = sum(jax.lax.broadcasted_iota(jnp.uint32, x.shape, a) * jnp.uint32(s) for a, s in enumerate(strides))
    return jnp.sum(bits * (place * jnp.uint32(2_654_435_762) + 1), dtype=jnp.uint32)  # even times place, plus 1: odd


def _crc32(content: dict) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _all(good: bool) -> bool:
    """Whether it is true on every host, so that all choose the same checkpoint."""
    if jax.process_count() == 1:
        return good
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.array(good)).all())
