"""Linear attention with phase on Hopper GPUs, as two heads without decay: one of cosines, one of sines.

cos((t - s) theta) = cos(t theta) cos(s theta) + sin(t theta) sin(s theta), so each head becomes two whose outputs add.
The features are formed by XLA and do pass through memory: about four times the traffic of a kernel that forms them on
chip, which is not written yet.

Letters: B batch, T tokens, H heads, K key channels, V value channels.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from linscale.kernels.linear_attention import chunked


def with_phase(q, k, v, phase, initial_state, segment_ids, without_decay):
    """Arguments and results as `api.linear_attention`; without_decay(q, k, v, initial_state) is the scalar kernel."""
    fixed = jax.lax.stop_gradient(phase)
    cos, sin = _features(fixed, q.shape[1])
    stack = lambda x: jnp.concatenate([(x * cos).astype(x.dtype), (x * sin).astype(x.dtype)], axis=2)  # noqa: E731
    before = None
    if initial_state is not None:  # odd rows sum sin((t - s) theta): of opposite sign to the features at t = 0
        even, odd = jnp.split(initial_state, 2, axis=2)
        before = jnp.concatenate([even, -odd], axis=1)
    out, state = without_decay(stack(q), stack(k), jnp.concatenate([v, v], axis=2), before)
    with_cos, with_sin = jnp.split(out, 2, axis=2)
    out = (with_cos.astype(jnp.float32) + with_sin.astype(jnp.float32)).astype(v.dtype)

    even, odd = jnp.split(state, 2, axis=1)
    cos, sin = (x[0, -1, :, :, None] for x in (cos, sin))
    state = jnp.concatenate([cos * even + sin * odd, sin * even - cos * odd], axis=2)
    return _learn(out, state, phase, q, k, v, initial_state, segment_ids)


def _features(phase_HK, tokens):
    """cos and sin of (t+1) theta, [1,T,H,K] float32.

    The angle is kept as a fraction of a turn in 32 bits, whose overflow is the wanted remainder: t theta in float32
    would be off by 0.01 at t = 100,000.
    """
    theta = phase_HK.astype(jnp.float32)
    high = lambda x: (jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFFF000)).view(jnp.float32)  # noqa: E731
    turn = 1 / (2 * math.pi)
    a = np.float32(turn)
    rest = np.float32(turn - float(a))
    product = theta * a
    a1, t1 = high(jnp.asarray(a)), high(theta)
    error = ((t1 * a1 - product) + t1 * (a - a1) + (theta - t1) * a1) + (theta - t1) * (a - a1)
    part = product - jnp.trunc(product)
    unit = (jnp.abs(part) * 2.0**32).astype(jnp.uint32)
    unit = jnp.where(part < 0, jnp.uint32(0) - unit, unit)
    unit = unit + jnp.round((error + theta * rest) * 2.0**32).astype(jnp.int32).view(jnp.uint32)
    t = jnp.arange(1, tokens + 1, dtype=jnp.uint32)
    angle = (t[:, None, None] * unit).view(jnp.int32).astype(jnp.float32) * (2 * math.pi / 2**32)
    return jnp.cos(angle)[None], jnp.sin(angle)[None]


@functools.partial(jax.custom_vjp)
def _learn(out, state, phase, q, k, v, initial_state, segment_ids):
    """(out, state), through which alone the gradient of phase flows: by XLA, and only where it is asked for."""
    return out, state


def _learn_forward(*args):
    out, state, *rest = jax.tree.map(lambda x: x.value, args, is_leaf=lambda x: hasattr(x, "perturbed"))
    return (out, state), rest if args[2].perturbed else None


def _learn_backward(residuals, cotangents):
    d_out, d_state = cotangents
    d_phase = None
    if residuals is not None:
        phase, q, k, v, initial_state, segment_ids = residuals
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))  # in bfloat16 the gradient of phase is off by 1e-2
        run = lambda p: chunked.chunked(q, k, v, None, p, initial_state, segment_ids)  # noqa: E731
        outputs, pullback = jax.vjp(run, phase)
        (d_phase,) = pullback(tuple(_dense(d, x) for d, x in zip(cotangents, outputs)))
    d_out, d_state = (None if isinstance(d, SymbolicZero) else d for d in (d_out, d_state))
    return d_out, d_state, d_phase, None, None, None, None, None


_learn.defvjp(_learn_forward, _learn_backward, symbolic_zeros=True)


def _dense(d, like):
    return jnp.zeros(like.shape, like.dtype) if isinstance(d, SymbolicZero) else d.astype(like.dtype)
