"""Checkpoints of a run: training state and data position together, written in the background and kept by a policy.

A checkpoint is a folder named by its step. A state up to 64 MiB in one process is one safetensors file in it
(small_state.py), any other one is written by orbax. Both write under a temporary name and rename it when it is whole,
so a killed process leaves either a whole checkpoint or rubbish that the next start removes; which of the two it is
shows in the folder, so a run may change its number of processes between. The state of the data iterator is small JSON
and lies in the checkpoint's own metadata: one cannot exist without the other.

Integrity is checked from end to end. orbax's format notices a truncated file but reads flipped bits without complaint
(60 of 60 tried), so a 32-bit sum of every array is taken on the device before it is saved, kept in the metadata, and
taken again of what was restored. It does not depend on the sharding, so the mesh may change between. A checkpoint that
fails is named and passed over for the one before it, and moved to the folder `damaged` once that one has been read
whole.
"""

import contextlib
import dataclasses
import errno
import functools
import json
import logging
import os
import shutil
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint.experimental import v1 as ocp

from linscale import sharding
from linscale.config import Config, ConfigError, Restart
from linscale.training import hosts, run_folder, small_state
from linscale.training.metrics import say
from linscale.training.small_state import sums
from linscale.training.step import TrainState, init

_UNFINISHED = "*[0-9].*-tmp*"
_REMOVED = ".old-tmp"  # its removal had begun
_FULL = os.strerror(errno.ENOSPC)


class Series:
    """The checkpoints of a folder. One save at a time runs in the background; then what the policy does not keep goes.

    The policy of config.train: the newest checkpoint_keep, every checkpoint_keep_every-th step, and the milestones.
    """

    def __init__(self, folder: Path, config: Config):
        self.folder = folder.absolute()
        self._newest, self._regular = config.train.checkpoint_keep, config.train.checkpoint_keep_every
        self._named = set(run_folder.milestones(config).values())
        self._thread, self._error = None, None

    def steps(self) -> list[int]:
        """Of the whole checkpoints, sorted."""
        return [step for step in steps_in(self.folder) if _whole(self.folder / str(step))]

    def save(self, step: int, state: TrainState, data: dict, before: Callable[[], None]) -> None:
        """See `save`."""
        self.wait()
        finish = _begin(self.folder / str(step), state, data, before)
        # Not of a pool: those are waited for at exit, and of several processes the others may never come.
        self._thread = threading.Thread(target=self._finish, args=(finish,), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Returns when the save in progress and its removals are done; raises what it raised."""
        if self._thread:
            self._thread.join()
        error, self._thread, self._error = self._error, None, None
        if error:
            raise error

    def _finish(self, finish: Callable[[], None]) -> None:
        try:
            finish()
            if hosts.is_first():
                self._remove()
        except BaseException as error:
            self._error = error

    def _remove(self) -> None:
        steps = self.steps()
        for step in steps[: -self._newest]:
            if step not in self._named and not (self._regular and step % self._regular == 0):
                going = self.folder / f"{step}{_REMOVED}"  # so that a kill leaves no half of a checkpoint
                (self.folder / str(step)).rename(going)
                shutil.rmtree(going)


@contextlib.contextmanager
def open_folder(folder: Path, config: Config) -> Iterator[Series]:
    """Leaving it waits for the save in progress. Names and removes what was half-written. OSError: it cannot be written."""
    with _writing(folder):
        hosts.in_turn(lambda: _clear(folder))
    series = Series(folder, config)
    with _raised_and_not_printed():
        try:
            yield series
        except BaseException:
            if jax.process_count() == 1:  # of several, the others may not come to where this would wait for them
                with contextlib.suppress(Exception):  # a save that fails beside is not what ends the run
                    series.wait()
            raise
        wait(series)


def _clear(folder: Path) -> None:
    if not hosts.is_first():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.glob(_UNFINISHED)):
        if not path.name.endswith(_REMOVED):
            say(f"{folder}: checkpoint {path.name.split('.')[0]} was not finished when its process ended; removed")
        shutil.rmtree(path, ignore_errors=True)
    for step in steps_in(folder):
        if not _whole(folder / str(step)):
            say(f"{folder}: checkpoint {step} was not finished when its process ended; put aside")
            _put_aside(folder, step)


def _whole(path: Path) -> bool:
    """orbax sets its mark last; a small state's folder gets its name last."""
    return (path / "commit_success.txt").exists() or (path / small_state.FILE).exists()


def _put_aside(folder: Path, step: int) -> None:
    aside = folder.parent / "damaged" / str(step)
    shutil.rmtree(aside, ignore_errors=True)
    aside.parent.mkdir(exist_ok=True)
    (folder / str(step)).rename(aside)


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
        late = late or isinstance(found.exc_value, Restart)  # SIGTERM within a callback; stopping.py remembers it
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


def save(series: Series, step: int, state: TrainState, data: dict, before: Callable[[], None] = lambda: None) -> None:
    """Starts saving and returns once the arrays are copied, or their copy is under way, so that they may be donated.

    before: called, in whatever thread, before anything is written. Raises OSError where this save cannot begin, or the one before has failed.
    """
    with _writing(series.folder):
        series.save(step, state, data, before)


def wait(series: Series) -> None:
    """Returns when all saves and removals are done. OSError: one has failed."""
    with _writing(series.folder):
        series.wait()


def save_alone(path: Path, state: TrainState) -> None:
    """One checkpoint outside any run's series, whole when this returns. `read` reads it."""
    with _writing(path):
        _begin(path.absolute(), state, {}, lambda: None)()


def _begin(path: Path, state: TrainState, data: dict, before: Callable[[], None]) -> Callable[[], None]:
    """Copies, or has the device copy, what is to be written; the function that it returns ends the writing."""
    arrays = small_state.named(state)
    shapes = {name: list(array.shape) for name, array in arrays.items()}

    def describe(sums: dict) -> dict:
        content = {"data": data, "sums": sums, "shapes": shapes}
        return content | {"crc32": _crc32(content)}

    if small_state.serves(arrays):
        taken = small_state.snapshot(arrays)

        def finish() -> None:
            before()
            small_state.write(path, taken, describe)

        return finish
    before()
    context = ocp.Context()
    # Both cost a third of a small save and are replaced by the sums of this file.
    context.array.saving.enable_post_merge_validation = False
    context.array.saving.enable_write_sharding_file = False
    with context:
        return ocp.save_checkpointables_async(path, {"state": state}, custom_metadata=describe(sums(state))).result


def restore(series: Series, abstract: TrainState) -> tuple[int, TrainState, dict] | None:
    """The newest whole checkpoint as (step, state, data), or None where there is none at all.

    `abstract` gives shapes, dtypes and shardings. Raises ConfigError if there are checkpoints and none can be read.
    """
    if not (steps := series.steps()):
        return None
    *found, damaged = read_newest(series.folder, steps, abstract)
    if damaged:
        if hosts.is_first():
            for bad in damaged:
                _put_aside(series.folder, bad)
        hosts.wait_for_all()
    return tuple(found)


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
    small = (path / small_state.FILE).exists()
    content = (
        small_state.content(path) if small else dict(ocp.checkpointables_metadata(path.absolute()).custom_metadata)
    )
    if content.pop("crc32", None) != _crc32(content):
        raise ValueError("its metadata are not what was saved")
    there = content.get("shapes", {})  # checkpoints of earlier versions have none
    for name, leaf in small_state.named(abstract).items() if there else ():
        if there.get(name) != (shape := list(leaf.shape)):
            has = f"its {name} has the shape {there[name]}" if name in there else f"it has no {name}"
            raise ConfigError(
                f"{path} is the checkpoint of another model: {has}, and this config makes it {shape}; give the config "
                "it was trained with, or choose another folder."
            )
    tree = small_state.read(path, abstract) if small else _read_large(path, abstract)
    wrong = [name for name, total in sums(tree).items() if content["sums"].get(name) != total]
    if wrong:
        raise ValueError(f"{len(wrong)} arrays are not what was saved, {wrong[0]} the first")
    return tree, content["data"]


def _read_large(path: Path, abstract: Any) -> Any:
    context = ocp.Context()
    context.pytree.loading.partial_load = isinstance(abstract, dict)
    with context:
        tree = ocp.load_checkpointables(path.absolute(), {"state": abstract})["state"]
    if not all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(tree)):
        raise ValueError("it lacks arrays of this config")
    return tree


def steps_in(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder, sorted."""
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit() and path.is_dir())


def abstract_state(config: Config, mesh: jax.sharding.Mesh) -> TrainState:
    """Shapes, dtypes and shardings of a run's training state on a mesh."""
    shapes = jax.eval_shape(functools.partial(init, config))
    lie = sharding.shardings(mesh, shapes)
    if config.optimizer.offload:
        lie = dataclasses.replace(lie, opt_state=sharding.shardings(mesh, shapes.opt_state, sharding.HOST))
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, lie)


def _crc32(content: dict) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _all(good: bool) -> bool:
    """Whether it is true on every host, so that all choose the same checkpoint."""
    if jax.process_count() == 1:
        return good
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.array(good)).all())
