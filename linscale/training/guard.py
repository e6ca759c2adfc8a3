"""Bad steps are skipped: an update whose gradient is not finite, or is a spike, never reaches the parameters.

A spike is a gradient norm more than `sigma` standard deviations above the mean of the last 128. A spike enters the window
as the limit it went beyond: one leaves hardly a trace, but where norms rise for good the limit follows within a few
steps, which would otherwise all be skipped. The window is part of the training state, so that a resumed run judges as an
undisturbed one would, and all of this happens on the device: nothing waits for the host. Steps go on counting through
skipped ones, so the data move on.

Once `limit` steps in a row are bad, every further update is refused. The host learns of it some steps later, and still
finds the parameters as they were before the first of them.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from linscale.config import Config

WINDOW = 128  # finite norms; until there are so many, only what is not finite is bad


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Guard:
    norms: jax.Array  # float32 [WINDOW]: the last finite gradient norms, cut to the limits of their steps, a ring
    entered: jax.Array  # int32: norms that have entered the ring so far
    skipped: jax.Array  # int32: skipped steps so far
    in_a_row: jax.Array  # int32: skipped steps since the last that was not


def init() -> Guard:
    return Guard(jnp.zeros(WINDOW, jnp.float32), jnp.int32(0), jnp.int32(0), jnp.int32(0))


def judge(config: Config, guard: Guard, loss: jax.Array, norm: jax.Array) -> tuple[jax.Array, Guard, dict]:
    """(whether to accept the update, the guard after it, metrics) for a step's loss and gradient norm, float32 scalars.

    Metrics: skipped and in_a_row (int32, this step included), norm_limit (float32, infinite where there is none).
    """
    sigma = config.train.spike_sigma
    limit = jnp.mean(guard.norms) + sigma * jnp.std(guard.norms)
    limit = jnp.where((guard.entered >= WINDOW) & (sigma > 0), limit, jnp.inf)
    finite, going_on = jnp.isfinite(loss) & jnp.isfinite(norm), guard.in_a_row < config.train.skip_limit
    good, enters = finite & (norm <= limit) & going_on, finite & going_on
    after = Guard(
        norms=jnp.where(enters, guard.norms.at[guard.entered % WINDOW].set(jnp.minimum(norm, limit)), guard.norms),
        entered=guard.entered + enters,
        skipped=guard.skipped + ~good,
        in_a_row=jnp.where(good, 0, guard.in_a_row + 1),
    )
    return good, after, {"skipped": after.skipped, "in_a_row": after.in_a_row, "norm_limit": limit}


def choose(good: jax.Array, new: Any, old: Any) -> Any:
    """new where the update is accepted, else old. Counters go on, so that a schedule follows the step."""

    def leaf(new, old):
        return jnp.where(good, new, old) if jnp.issubdtype(new.dtype, jnp.inexact) else new

    return jax.tree.map(leaf, new, old)
