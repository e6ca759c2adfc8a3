"""Recurrent states handed along the devices of a mesh axis, each of which holds one span of the tokens.

A span turns the state before it into advance(state, factor) + added. Both are small and do not grow with the tokens;
they alone are communicated, in log2(n) + 1 rounds for n devices, and so are their gradients in the backward pass.
"""

import jax
import jax.numpy as jnp


def hand_on(added, factor, initial, axis: str, advance, join):
    """The states before and after every device's span, inside jax.shard_map (or jax.vmap with an axis name).

    Args:
      added: [B,...] the state that this device's span leaves when it starts from zero.
      factor: array(s) with which the span carries on the state before it.
      initial: like added, equal on all devices: the state before the first span. None: zero.
      axis: the mesh axis over which spans follow each other.
      advance: (state, factor) -> the state after a span that adds nothing.
      join: (factor, factor of the span before it) -> the factor of both spans as one.

    Returns:
      The state before this device's span; the state after the last span, equal on all devices.
    """
    devices, index = jax.lax.axis_size(axis), jax.lax.axis_index(axis)

    def from_earlier(x, distance):
        """x of the device so many before this one; zeros where there is none."""
        return jax.tree.map(lambda a: jnp.where(index >= distance, _from_before(a, axis, distance), 0), x)

    state = added
    if initial is not None:
        state += jnp.where(index == 0, advance(initial, factor), 0)
    distance = 1
    while distance < devices:  # `state` and `factor` cover the last `distance` spans, then twice as many
        state += advance(from_earlier(state, distance), factor)
        if 2 * distance < devices:
            factor = join(factor, from_earlier(factor, distance))
        distance *= 2
    before = from_earlier(state, 1)
    if initial is not None:
        before += jnp.where(index == 0, initial, 0)
    return before, jax.lax.psum(jnp.where(index == devices - 1, state, 0), axis)


def _from_before(x, axis, distance):
    devices = jax.lax.axis_size(axis)
    return jax.lax.ppermute(x, axis, [(i, (i + distance) % devices) for i in range(devices)])


def documents(segment_ids, axis: str):
    """Where documents lie in this device's span, from its part [B,T] of the segment ids.

    Returns:
      begins [B]: the first token begins a document, its id being another than the last of the span before.
      reaches [B,T]: no document begins after the token, so that it reaches the span's end.
      survives [B]: no document begins in the span at all: the state before it passes.
    """
    index = jax.lax.axis_index(axis)
    last_of_previous = _from_before(segment_ids[:, -1], axis, 1)
    begins = (segment_ids[:, 0] != last_of_previous) & (index > 0)
    starts = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    begun = jnp.cumsum(starts, axis=1)
    return begins, begun == begun[:, -1:], ~begins & (begun[:, -1] == 0)
