"""Whether the kernels for Hopper GPUs can run here, and what they know of the chip."""

import functools
import logging

import jax

_log = logging.getLogger("linscale.kernels")
MULTIPROCESSORS = 132  # of an H100 or H200


@functools.cache
def on_hopper() -> bool:
    """Compute capability 9.0, and jax >= 0.11, whose Mosaic GPU they are written for."""
    if tuple(int(x) for x in jax.__version__.split(".")[:2]) < (0, 11):
        return False
    return jax.default_backend() == "gpu" and getattr(jax.devices()[0], "compute_capability", "") == "9.0"


def choose(operator: str, implementation: str | None, reason: str | None) -> str:
    """ "xla" or "pallas_gpu", told to the log once; reason: why the kernels cannot serve, a sentence without its stop.

    Raises ValueError: an implementation that is neither nor None, or one that cannot serve.
    """
    if implementation not in (None, "xla", "pallas_gpu"):
        raise ValueError(f"implementation={implementation!r} is none of None, 'xla', 'pallas_gpu'.")
    if implementation == "pallas_gpu" and reason:
        raise ValueError(f"implementation='pallas_gpu' cannot serve: {reason}. None or 'xla' can.")
    chosen = "xla" if implementation == "xla" or reason else "pallas_gpu"
    _announce(operator, chosen, reason)
    return chosen


@functools.cache
def _announce(operator, chosen, reason):
    _log.info(
        "%s: implementation %r on %s%s", operator, chosen, jax.default_backend(), f", as {reason}" if reason else ""
    )
