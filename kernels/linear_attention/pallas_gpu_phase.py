"""Linear attention with phase on Hopper GPUs: gradients and states around the kernels of pallas_gpu_phase_kernels.

Letters: B batch, T tokens, H heads, K key channels, V value channels, N spans, C tokens of a chunk.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from linscale.kernels.linear_attention import chunked
from linscale.kernels.linear_attention.pallas_gpu_spans import chain, chunks_of_a_span

C = 64
SURVIVES = 4  # the row of docs


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def on_chip(tokens, spans, q, k, v, phase, initial_state, docs):
    """out and the state after `tokens` tokens, by one block of threads a head and span; docs as in pallas_gpu_scalar or
    None.

    The kernels hold the state as cosines X and minus sines Y of the angles to each chunk's end.
    """
    return _on_chip_forward(tokens, spans, q, k, v, phase, initial_state, docs)[0]


def _on_chip_forward(tokens, spans, *args):
    from linscale.kernels.linear_attention.pallas_gpu_phase_kernels import turned_keys, turned_states

    args = jax.tree.map(lambda x: getattr(x, "value", x), args, is_leaf=lambda x: hasattr(x, "perturbed"))
    q, k, v, phase, initial_state, docs = args
    factors, start = _tables(phase), None
    if initial_state is not None:
        start = jnp.stack(
            [*_halves(initial_state * jnp.repeat(jnp.array([1.0, -1.0]), phase.shape[1])[:, None])], axis=2
        )
    if spans == 1:
        start = None if start is None else start[:, None]
    else:
        start = _chain_turned(start, turned_states(k, v, *factors, docs, spans=spans), tokens, phase, docs)
    out, state = turned_keys(q, k, v, *factors, start, docs, spans=spans)
    x, y = state[:, -1, :, 0], state[:, -1, :, 1]
    cos, sin = _angle(phase, _past_the_end(tokens, spans))
    return (out, jnp.concatenate([cos * x - sin * y, -cos * y - sin * x], axis=2)), (*args, start)


def _on_chip_backward(tokens, spans, residuals, cotangents):
    from linscale.kernels.linear_attention.pallas_gpu_phase_kernels import turned_keys, turned_states, turned_values

    q, k, v, phase, initial_state, docs, start = residuals
    d_out, d_state = cotangents
    d_out = jnp.zeros(v.shape, v.dtype) if isinstance(d_out, SymbolicZero) else d_out.astype(v.dtype)
    end = None
    if not isinstance(d_state, SymbolicZero):
        even, odd = _halves(d_state)
        cos, sin = _angle(phase, _past_the_end(tokens, spans) + 1)
        end = jnp.stack([cos * even - sin * odd, sin * even + cos * odd], axis=2)
    turned = lambda x: None if x is None else jnp.swapaxes(x, -1, -2)  # noqa: E731
    table, turn = _tables(phase)
    backwards = table[:, :, ::-1], turn
    if spans == 1:
        end = None if end is None else end[:, None]
    else:
        added = turned_states(q, d_out, *backwards, docs, spans=spans, reverse=True)
        end = _chain_turned(end, added, tokens, phase, docs, reverse=True)
    dq, _ = turned_values(d_out, v, k, table, turn, turned(start), docs, spans=spans)
    dk, _ = turned_values(v, d_out, q, *backwards, turned(end), docs, spans=spans, reverse=True)
    dv, before = turned_keys(k, q, d_out, *backwards, end, docs, spans=spans, reverse=True)
    d_initial = None
    if initial_state is not None:
        (cos, sin), x, y = _angle(phase, 1), before[:, 0, :, 0], before[:, 0, :, 1]
        d_initial = jnp.concatenate([cos * x + sin * y, cos * y - sin * x], axis=2)
    return dq, dk, dv, None, d_initial, None


on_chip.defvjp(_on_chip_forward, _on_chip_backward, symbolic_zeros=True)


def _past_the_end(tokens, spans):
    """How far the last chunk's end is past the last token."""
    return chunks_of_a_span(tokens, spans) * spans * C - tokens


def _chain_turned(state, added, tokens, phase, docs, reverse=False):
    """The state before each span [B,N,H,2,K,V] (with `reverse` after it); a state X + iY is turned by e^-i angle."""
    spans = added.shape[1]
    cos, sin = _angle(phase, chunks_of_a_span(tokens, spans) * C)
    kept = (cos - 1j * sin)[None, None, :, :, 0]  # [1,1,H,K]
    if docs is not None:
        survives = docs[:, :, SURVIVES, 0].reshape(docs.shape[0], spans, -1).min(-1)
        kept = kept * survives[..., None, None]
    kept = jnp.broadcast_to(kept, (kept.shape[0], spans, *kept.shape[2:]))
    whole = lambda x: None if x is None else jax.lax.complex(x[..., 0, :, :], x[..., 1, :, :])  # noqa: E731
    states = chain(whole(state), whole(added), kept, reverse=reverse)
    return jnp.stack([states.real, states.imag], axis=-3)


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
    return (x[0, 0, :, :, None] for x in _features(phase, 1, first=steps))


def _features(phase_HK, tokens, first=1):
    """cos and sin of t theta for `tokens` tokens t from `first` on, [1,T,H,K] float32.

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
    t = jnp.arange(first, first + tokens, dtype=jnp.uint32)
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


learn.defvjp(_learn_forward, _learn_backward, symbolic_zeros=True)


def _dense(d, like):
    return jnp.zeros(like.shape, like.dtype) if isinstance(d, SymbolicZero) else d.astype(like.dtype)
