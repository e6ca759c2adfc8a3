"""Linear attention with phase on Hopper GPUs: gradients and states around the kernels of pallas_gpu_phase_kernels.

Where batch x heads would leave most of the chip idle, `as_two_heads` serves instead: each head becomes two without decay,
one of cosines and one of sines, whose outputs add, and the kernel for no decay cuts the sequence into spans. Its factors
are formed by XLA and pass through memory, about four times the traffic.

Letters: B batch, T tokens, H heads, K key channels, V value channels, C tokens of a chunk.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from linscale.kernels.linear_attention import chunked
from linscale.kernels.linear_attention.reference import document_starts

C = 64


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def on_chip(tokens, q, k, v, phase, initial_state, segment_ids, docs):
    """out and the state after `tokens` tokens, by one block of threads a head; docs as in pallas_gpu_scalar or None.

    The kernels hold the state as cosines X and minus sines Y of the angles to each chunk's end.
    """
    return _on_chip_forward(tokens, q, k, v, phase, initial_state, segment_ids, docs)[0]


def _on_chip_forward(tokens, *args):
    from linscale.kernels.linear_attention.pallas_gpu_phase_kernels import turned_keys

    learned = () if getattr(args[3], "perturbed", False) else None
    args = jax.tree.map(lambda x: getattr(x, "value", x), args, is_leaf=lambda x: hasattr(x, "perturbed"))
    q, k, v, phase, initial_state, _, docs = args
    start = None
    if initial_state is not None:
        start = jnp.stack(
            [*_halves(initial_state * jnp.repeat(jnp.array([1.0, -1.0]), phase.shape[1])[:, None])], axis=2
        )
    out, state = turned_keys(q, k, v, *_tables(phase), start, docs)
    x, y = state[:, :, 0], state[:, :, 1]
    cos, sin = _angle(phase, -tokens % C)  # how far the last chunk's end is past the last token
    return (out, jnp.concatenate([cos * x - sin * y, -cos * y - sin * x], axis=2)), (*args, start, learned)


def _on_chip_backward(tokens, residuals, cotangents):
    from linscale.kernels.linear_attention.pallas_gpu_phase_kernels import turned_keys, turned_values

    q, k, v, phase, initial_state, segment_ids, docs, start, learned = residuals
    d_out, d_state = cotangents
    d_out = jnp.zeros(v.shape, v.dtype) if isinstance(d_out, SymbolicZero) else d_out.astype(v.dtype)
    end = None
    if not isinstance(d_state, SymbolicZero):
        even, odd = _halves(d_state)
        cos, sin = _angle(phase, -tokens % C + 1)
        end = jnp.stack([cos * even - sin * odd, sin * even + cos * odd], axis=2)
    turned = lambda x: None if x is None else jnp.swapaxes(x, -1, -2)  # noqa: E731
    table, turn = _tables(phase)
    backwards = table[:, :, ::-1], turn
    sines = learned is not None and start is None and end is None
    dq, _, *q_sines = turned_values(d_out, v, k, table, turn, turned(start), docs, sines=sines)
    dk, _, *k_sines = turned_values(v, d_out, q, *backwards, turned(end), docs, reverse=True, sines=sines)
    dv, before = turned_keys(k, q, d_out, *backwards, end, docs, reverse=True)
    d_initial = None
    if initial_state is not None:
        (cos, sin), x, y = _angle(phase, 1), before[:, :, 0], before[:, :, 1]
        d_initial = jnp.concatenate([cos * x + sin * y, cos * y - sin * x], axis=2)
    d_phase = None
    if sines:
        d_phase = _phase_gradient(q, k, *q_sines, *k_sines, segment_ids)
    elif learned is not None:
        q, k, v, d_out = (x[:, :tokens] for x in (q, k, v, d_out))
        ids = None if segment_ids is None else segment_ids[:, :tokens]
        cotangents = d_out, None if end is None else d_state
        d_phase = _phase_gradient_by_xla(phase, q, k, v, initial_state, ids, cotangents)
    return dq, dk, dv, d_phase, d_initial, None, None


def _phase_gradient(q, k, q_sines, k_sines, segment_ids):
    """[H,K] float32, without states before and after.

    Of cos((t-s) theta) the derivative is -(t-s) sin((t-s) theta): t times what dq would be with sines, and s times what
    dk would be. Only t-s counts, so that each document may count its tokens from its own middle, which rounds least.
    """
    t_BT = jnp.arange(q.shape[1], dtype=jnp.float32)[None]
    first, last = 0, q.shape[1] - 1
    if segment_ids is not None:
        starts = document_starts(segment_ids, q)
        ends = jnp.pad(starts[:, 1:], ((0, 0), (0, 1)), constant_values=True)
        first = jax.lax.cummax(jnp.where(starts, t_BT, 0), axis=1)
        last = jax.lax.cummin(jnp.where(ends, t_BT, jnp.inf), axis=1, reverse=True)
    t_BT = t_BT - (first + last) / 2
    q, k, q_sines, k_sines = (x.astype(jnp.float32) for x in (q, k, q_sines, k_sines))
    return jnp.sum(t_BT[..., None, None] * (k * k_sines - q * q_sines), axis=(0, 1))


on_chip.defvjp(_on_chip_forward, _on_chip_backward, symbolic_zeros=True)


def _halves(state):
    return jnp.split(state, 2, axis=2)


def _tables(phase):
    """Factors of a chunk's tokens, [2,H,C,K] bfloat16, cosines and sines of 1 to C times theta; the last in float32."""
    cos, sin = (x[0] for x in _features(phase, C))
    table = jnp.stack([jnp.swapaxes(x, 0, 1) for x in (cos, sin)])
    return table.astype(jnp.bfloat16), jnp.stack([cos[-1], sin[-1]], axis=1)


def _angle(phase, steps):
    """cos and sin of steps x theta, [H,K,1]."""
    if steps == 0:
        return jnp.ones(()), jnp.zeros(())
    return (x[0, -1, :, :, None] for x in _features(phase, steps))


def as_two_heads(q, k, v, phase, initial_state, without_decay):
    """out and state; without_decay(q, k, v, initial_state) is the kernel for no decay."""
    cos, sin = _features(phase, q.shape[1])
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
    return out, jnp.concatenate([cos * even + sin * odd, sin * even - cos * odd], axis=2)


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
def learn(out, state, phase, q, k, v, initial_state, segment_ids):
    """(out, state), through which alone the gradient of phase flows: by XLA, and only where it is asked for."""
    return out, state


def _learn_forward(*args):
    out, state, *rest = jax.tree.map(lambda x: x.value, args, is_leaf=lambda x: hasattr(x, "perturbed"))
    return (out, state), rest if args[2].perturbed else None


def _learn_backward(residuals, cotangents):
    d_out, d_state = (None if isinstance(d, SymbolicZero) else d for d in cotangents)
    d_phase = None
    if residuals is not None:
        d_phase = _phase_gradient_by_xla(*residuals, (d_out, d_state))
    return d_out, d_state, d_phase, None, None, None, None, None


learn.defvjp(_learn_forward, _learn_backward, symbolic_zeros=True)


def _phase_gradient_by_xla(phase, q, k, v, initial_state, segment_ids, cotangents):
    """[H,K] float32; cotangents of out and state, None for zero."""
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))  # in bfloat16 the gradient of phase is off by 1e-2
    run = lambda p: chunked.chunked(q, k, v, None, p, initial_state, segment_ids)  # noqa: E731
    outputs, pullback = jax.vjp(run, phase)
    dense = [jnp.zeros_like(x) if d is None else d.astype(x.dtype) for d, x in zip(cotangents, outputs)]
    return pullback(tuple(dense))[0]
