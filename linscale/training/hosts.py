"""Several processes, one run: how they find each other, take turns, wait, and end when one is lost.

jax's own distributed runtime does it all. `start` begins it where more than one process is asked for:

  JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID   plain processes, and GPUs under Kubernetes
  srun with several tasks                                     SLURM, detected by jax
  TPU_WORKER_HOSTNAMES with several, MEGASCALE_NUM_SLICES     TPUs under GKE, detected by jax
  LINSCALE_DISTRIBUTED=auto                                   wherever jax detects a cluster, as on the VMs of a TPU slice

A process that dies takes its fellows with it within HEARTBEAT seconds, within JOIN seconds if it dies before all have
come together: they end with exit code 75, and whoever started them starts all of them again.
"""

import contextlib
import ctypes
import itertools
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import jax

from linscale.config import ConfigError
from linscale.training import metrics, stopping

JOIN = 300  # seconds that a process waits at its start for all others
HEARTBEAT = 60  # seconds without a sign of life after which a process counts as lost
TURN = 24 * 3600  # seconds that others wait for the first, which may have a corpus to tokenise
_EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_LOST = ("gloo", "nccl", "coordination", "socket closed", "connection reset", "unavailable", "heartbeat", "barrier")
_barriers = itertools.count()
T = TypeVar("T")


def start() -> None:
    """Joins the other processes of this run, if there are any; before anything else asks jax for devices.

    ConfigError: variables that contradict each other, or processes that do not come together.
    """
    arguments = asked(os.environ)
    if arguments is None or jax.distributed.is_initialized():
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Before joining, too: where the others do not come, jax does not raise but aborts.
    ctypes.CDLL(None).signal(signal.SIGABRT, _when_lost)
    seconds = {"heartbeat_timeout_seconds": HEARTBEAT, "shutdown_timeout_seconds": HEARTBEAT}
    try:
        jax.distributed.initialize(**arguments, **seconds, initialization_timeout=JOIN)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"the processes of this run do not come together: {error}") from error
    metrics.speaks = is_first()


def asked(environment: Mapping[str, str]) -> dict | None:
    """Arguments of jax.distributed.initialize, empty for what jax detects itself; None: this is the only process."""
    explicit = {name: environment[name] for name in _EXPLICIT if environment.get(name)}
    if len(explicit) == len(_EXPLICIT):
        address, count, own = (explicit[name] for name in _EXPLICIT)
        if not (count.isdecimal() and own.isdecimal() and 0 <= int(own) < int(count)):
            raise ConfigError(
                f"JAX_PROCESS_ID is {own!r} and JAX_NUM_PROCESSES {count!r}; they must be whole numbers, the first below "
                "the second."
            )
        if not address.rpartition(":")[2].isdecimal() or ":" not in address:
            raise ConfigError(f"JAX_COORDINATOR_ADDRESS is {address!r}; it must be HOST:PORT of the first process.")
        if int(count) == 1:
            return None
        # jax would look for a cluster for what is left open here, the devices: they are all that the process sees.
        deactivated = {"cluster_detection_method": "deactivate"}
        return {"coordinator_address": address, "num_processes": int(count), "process_id": int(own)} | deactivated
    if "JAX_NUM_PROCESSES" in explicit or "JAX_PROCESS_ID" in explicit:
        missing = ", ".join(name for name in _EXPLICIT if name not in explicit)
        raise ConfigError(f"{', '.join(explicit)} set but not {missing}; set all three, or none.")
    if environment.get("LINSCALE_DISTRIBUTED") == "auto":
        return {}
    if "SLURM_STEP_NODELIST" in environment and _number(environment, "SLURM_NTASKS") > 1:
        if environment["SLURM_NTASKS"] == environment.get("SLURM_STEP_NUM_NODES"):
            # One task a node has all GPUs of its node; jax would give it the first alone.
            gpus = _number(environment, "SLURM_GPUS_ON_NODE")
            return {"local_device_ids": list(range(gpus))} if gpus > 1 else {}
        return {}
    workers = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES", "")
    if "," in workers or _number(environment, "MEGASCALE_NUM_SLICES") > 1:
        return {}
    return None


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    return int(text) if text.isdecimal() else 0


def is_first() -> bool:
    """Whether this process writes what one process writes: metrics, config.json, DONE.json, what is said."""
    return jax.process_index() == 0


def wait_for_all(seconds: float = HEARTBEAT * 10) -> None:
    """Returns when every process has come here. Asks the coordinator, not the devices."""
    if jax.process_count() > 1:
        from orbax.checkpoint import multihost

        multihost.get_barrier_sync_fn()(key=f"linscale-{next(_barriers)}", timeout_ms=int(seconds * 1000))


def in_turn(action: Callable[[], T]) -> T:
    """The first process does it alone, then all others, who find on the shared disk what the first has made.

    Where it raises, it raises on all.
    """
    if jax.process_count() == 1:
        return action()
    if is_first():
        try:
            return action()
        finally:
            wait_for_all(TURN)
    wait_for_all(TURN)
    return action()


@contextlib.contextmanager
def ended_with_the_others() -> Iterator[None]:
    """An error in the block that comes of a lost process ends this one at once, without waiting for it anywhere."""
    try:
        yield
    except (ValueError, RuntimeError) as error:  # collectives and the coordinator raise both
        if jax.process_count() > 1 and any(word in str(error).lower() for word in _LOST):
            stopping.end("another process of this run is lost.")
        raise


def whole(tree):
    """Arrays cut over processes -> numpy arrays on each."""
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(tree, tiled=True)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _when_lost(signum: int) -> None:
    """jax's runtime aborts the process, from a thread of its own, when another is lost; that would exit with 134."""
    stopping.end(f"another process of this run is lost, or did not come within {JOIN} s.")
