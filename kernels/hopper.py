"""Whether the kernels for Hopper GPUs can run here, and what they know of the chip."""

import functools

import jax

MULTIPROCESSORS = 132  # of an H100 or H200


@functools.cache
def on_hopper() -> bool:
    """Compute capability 9.0, and jax >= 0.11, whose Mosaic GPU they are written for."""
    if tuple(int(x) for x in jax.__version__.split(".")[:2]) < (0, 11):
        return False
    return jax.default_backend() == "gpu" and getattr(jax.devices()[0], "compute_capability", "") == "9.0"
