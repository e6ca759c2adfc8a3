"""Linear attention over a mesh: batch and heads apart, and context parallelism over the tokens.

Along the sequence axis every device holds a span of the tokens. It first sums what its keys and values add to the
state at the end of the span, and how the span carries on a state from before; `hand_on` makes of these the state
before each span, and the local implementation starts from it. So documents, strong gates and gradients are those of
the local implementation, and what is communicated is the state, [B,H,K,V], whatever the number of tokens.

Letters: B batch, T tokens of this device, H heads, K key channels, V value channels.
"""

import jax
import jax.numpy as jnp

from linscale.kernels.axes import Axes, over_mesh
from linscale.kernels.handing_on import documents, hand_on
from linscale.kernels.linear_attention.chunked import product, turn

BLOCK = 64  # tokens; angles of a phase are formed from those of blocks and those inside a block


def sharded(mesh, axes: Axes, local, q, k, v, log_decay, phase, initial_state, segment_ids):
    """Arguments and results as `api.linear_attention`; local(q, k, v, **others) is run on every device's part."""
    arrays = {"q": q, "k": k, "v": v, "log_decay": log_decay, "phase": phase}
    arrays |= {"initial_state": initial_state, "segment_ids": segment_ids}
    vector = log_decay is not None and log_decay.ndim == 4
    dims = dict.fromkeys(("q", "k", "v"), "BTHK") | {"log_decay": "BTHK" if vector else "H", "phase": "HK"}
    dims |= {"initial_state": "BHKL", "segment_ids": "BT"}

    def on_device(arrays):
        if mesh.shape[axes.sequence] == 1:
            return local(**arrays)
        initial = arrays.pop("initial_state")
        before, after = _states(arrays, initial, axes.sequence)
        out, _ = local(**arrays, initial_state=before)
        return out, after

    return over_mesh(on_device, mesh, axes, arrays, dims, ("BTHK", "BHKL"))


def _states(arrays, initial, axis):
    """The state before this device's span, and after the last one."""
    segment_ids = arrays["segment_ids"]
    begins, reaches, survives = (None,) * 3 if segment_ids is None else documents(segment_ids, axis)
    added, factor = _summary(arrays, reaches, survives)
    if arrays["phase"] is None:
        advance = lambda state, factor: factor[..., None] * state  # noqa: E731
        join = jnp.multiply
    else:
        advance, join = turn, _join_turns
    initial = None if initial is None else initial.astype(added.dtype)
    before, after = hand_on(added, factor, initial, axis, advance, join)
    return before if begins is None else jnp.where(begins[:, None, None, None], 0, before), after


def _summary(arrays, reaches, survives):
    """What a span adds to the state [B,H,K,V] ([B,H,2K,V] with phase), and the factor by which it carries one on.

    The factor is [B,H,K], or [B,H,1], or with phase [B,H,K,2]: the cosine and sine by which the state turns; B is 1
    where rows do not differ.
    """
    log_decay = arrays["log_decay"]
    dtype = arrays["q"].dtype
    accumulate = jnp.promote_types(jnp.float32, dtype)
    wide = lambda x: None if x is None else x.astype(accumulate)  # noqa: E731

    @jax.checkpoint  # keeps the inputs alone, which the local implementation keeps anyway
    def sums(k, v, log_decay, phase):
        k, v, log_decay, phase = map(wide, (k, v, log_decay, phase))
        if log_decay is not None and log_decay.ndim == 4:
            k = -jnp.expm1(log_decay) if k is None else k
            from_token = jax.lax.cumsum(log_decay, axis=1, reverse=True)
            k *= jnp.exp(jnp.pad(from_token[:, 1:], ((0, 0), (0, 1), (0, 0), (0, 0))))
            factor = jnp.exp(from_token[:, 0])
        elif phase is not None:
            cos, sin = _angles(phase, k.shape[1])
            k = jnp.concatenate([k * cos[-2::-1], k * sin[-2::-1]], axis=-1)
            factor = jnp.stack([cos[-1:], sin[-1:]], axis=-1)
        else:
            rate = jnp.zeros(k.shape[2], accumulate) if log_decay is None else log_decay
            rate = jnp.maximum(rate, -1e4)  # as in chunked: minus infinity times an age of 0 would be NaN
            age = jnp.arange(k.shape[1] - 1, -1, -1, dtype=accumulate)
            k *= jnp.exp(rate * age[:, None])[..., None]
            factor = jnp.exp(rate * k.shape[1])[None, :, None]
        if reaches is not None:
            k *= reaches[..., None, None]
            factor *= survives.reshape(-1, *(1,) * (factor.ndim - 1))
        k, v = jnp.moveaxis(k, 2, 1), jnp.moveaxis(v, 2, 1)
        return product("bhtk,bhtv->bhkv", k, v, dtype), factor

    return sums(arrays["k"], arrays["v"], log_decay, arrays["phase"])


def _angles(theta_HK, tokens):
    """Cosines and sines [T+1,H,K] of 0, theta, .., T theta: products of a table of blocks and one inside a block."""
    blocks = _turns(theta_HK, BLOCK * jnp.arange(tokens // BLOCK + 1))
    inside = _turns(theta_HK, jnp.arange(BLOCK))
    both = _join_turns(blocks[:, None], inside)
    both = both.reshape(-1, *both.shape[2:])[: tokens + 1]
    return both[..., 0], both[..., 1]


def _turns(theta_HK, positions_P):
    """[P,H,K,2]: cosine and sine of position times theta.

    theta is taken in parts of 8 bits, whose products with positions below 2^16 are exact: a product rounded at 1e5
    radians would be off by 4e-3.
    """
    turns = None
    rest = theta_HK
    for last in (False, False, True):
        part = rest if last else jax.lax.stop_gradient(jax.lax.reduce_precision(rest, 8, 7))
        angle = positions_P[:, None, None].astype(theta_HK.dtype) * part
        now = jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=-1)
        turns = now if turns is None else _join_turns(turns, now)
        rest -= part
    return turns


def _join_turns(a, b):
    """The turn by both angles; [...,2] cosine and sine."""
    return jnp.stack([a[..., 0] * b[..., 0] - a[..., 1] * b[..., 1], a[..., 1] * b[..., 0] + a[..., 0] * b[..., 1]], -1)
