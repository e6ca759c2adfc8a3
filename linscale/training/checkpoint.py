"""Checkpoints of a run: training state and data position together, written in the background, the newest k kept.

A checkpoint is a folder named by its step; orbax writes it under a temporary name and renames it when it is whole, so
a killed process leaves either a whole checkpoint or rubbish that the next start removes. The state of the data
iterator is small JSON and lies in the checkpoint's own metadata: one cannot exist without the other.
"""

from pathlib import Path

import jax
from orbax.checkpoint.experimental import v1 as ocp

from linscale.training.step import TrainState

Checkpointer = ocp.training.Checkpointer


def open_folder(folder: Path, keep: int) -> Checkpointer:
    """A context manager; leaving it waits for the save in progress."""
    return Checkpointer(
        folder.absolute(),
        save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),  # the loop decides when
        preservation_policy=ocp.training.preservation_policies.LatestN(keep),
        cleanup_tmp_directories=True,
    )


def save(checkpointer: Checkpointer, step: int, state: TrainState, data: dict) -> None:
    """Starts saving and returns once the arrays are copied, so that the caller may donate them."""
    checkpointer.save_checkpointables_async(step, {"state": state}, custom_metadata={"data": data})


def restore(checkpointer: Checkpointer, abstract: TrainState) -> tuple[int, TrainState, dict] | None:
    """The newest whole checkpoint as (step, state, data), or None. `abstract` gives shapes, dtypes and shardings."""
    newest = checkpointer.latest
    if newest is None:
        return None
    state = checkpointer.load_checkpointables(newest.step, {"state": abstract})["state"]
    data = checkpointer.metadata(newest.step).custom_metadata["data"]
    return newest.step, state, data


def abstract_like(shapes: TrainState, sharding: jax.sharding.Sharding) -> TrainState:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)
