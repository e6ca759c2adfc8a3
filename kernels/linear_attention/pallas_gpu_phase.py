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
from linscale.kernels.linear_attention.pallas_gpu_blocks import Blocks
from linscale.kernels.linear_attention.pallas_gpu_spans import chain
from linscale.kernels.linear_attention.reference import document_starts
from linscale.kernels.remat import kept

SURVIVES = 4  # the row of docs


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def on_chip(tokens, spans, q, k, v, phase, initial_state, segment_ids, docs):
    """out and the state after `tokens` tokens, by one block of threads a walk of `Blocks` and span; docs as in
    pallas_gpu_scalar or None.

    The kernels hold the state as X = sum k cos(s theta) v and Y = sum k sin(s theta) v, positions s counted from 1. Of a
    state after t tokens the even half is cos(t theta) X + sin(t theta) Y and the odd one sin(t theta) X - cos(t theta) Y.
    """
    return _on_chip_forward(tokens, spans, q, k, v, phase, initial_state, segment_ids, docs)[0]


def _on_chip_forward(tokens, spans, *args):
    from linscale.kernels.linear_attention.pallas_gpu_phase_kernels import phased_keys
    from linscale.kernels.linear_attention.pallas_gpu_phase_states import phased_states

    learned = () if getattr(args[3], "perturbed", False) else None
    args = jax.tree.map(lambda x: getattr(x, "value", x), args, is_leaf=lambda x: hasattr(x, "perturbed"))
    q, k, v, phase, initial_state, _, docs = args
    blocks = Blocks.of(q.shape[-1], v.shape[-1])
    angles, start = turns(phase.reshape(-1, blocks.width)), None
    q, k, v = blocks.split(q, k, v)
    if initial_state is not None:
        even, odd = _halves(initial_state, blocks)
        start = jnp.stack([even, -odd], axis=2)
    asked = {"blocks": blocks, "spans": spans}
    if spans == 1:
        start = None if start is None else start[:, None]
    else:
        start = _before_spans(start, phased_states(k, v, angles, docs, **asked), docs)
    out, state = phased_keys(q, k, v, angles, start, docs, **asked)
    x, y = state[:, -1, :, 0], state[:, -1, :, 1]
    cos, sin = _after(phase, tokens, blocks)
    state = _whole(cos * x + sin * y, sin * x - cos * y, blocks)
    return (blocks.join_values(out), state), (*args, kept(start), learned)


def _on_chip_backward(tokens, spans, residuals, cotangents):
    from linscale.kernels.linear_attention.pallas_gpu_phase_kernels import phased_keys, phased_values
    from linscale.kernels.linear_attention.pallas_gpu_phase_states import phased_states

    q, k, v, phase, initial_state, segment_ids, docs, start, learned = residuals
    d_out, d_state = cotangents
    d_out = jnp.zeros(v.shape, v.dtype) if isinstance(d_out, SymbolicZero) else d_out.astype(v.dtype)
    blocks, end = Blocks.of(q.shape[-1], v.shape[-1]), None
    angles = turns(phase.reshape(-1, blocks.width))
    if not isinstance(d_state, SymbolicZero):
        even, odd = _halves(d_state, blocks)
        cos, sin = _after(phase, tokens, blocks)
        end = jnp.stack([cos * even + sin * odd, sin * even - cos * odd], axis=2)
    sines = learned is not None and initial_state is None and end is None
    qs, ks, vs, ds = blocks.split(q, k, v, d_out)
    asked = {"blocks": blocks, "spans": spans}
    if spans == 1:
        end = None if end is None else end[:, None]
    else:
        end = _before_spans(end, phased_states(qs, ds, angles, docs, reverse=True, **asked), docs, reverse=True)
    dv, before = phased_keys(ks, qs, ds, angles, end, docs, reverse=True, **asked)
    swapped = blocks.swapped
    asked = {"blocks": swapped, "spans": spans, "sines": sines}
    dq, _, *q_sines = phased_values(ds, vs, ks, angles, blocks.turned(start), docs, **asked)
    dk, _, *k_sines = phased_values(vs, ds, qs, angles, blocks.turned(end), docs, reverse=True, **asked)
    dq, dk, *sines_of_both = (swapped.join_values(x) for x in (dq, dk, *q_sines, *k_sines))
    d_initial = None
    if initial_state is not None:
        d_initial = _whole(before[:, 0, :, 0], -before[:, 0, :, 1], blocks)
    d_phase = None
    if sines:
        d_phase = _phase_gradient(q, k, *sines_of_both, segment_ids)
    elif learned is not None:
        q, k, v, d_out = (x[:, :tokens] for x in (q, k, v, d_out))
        ids = None if segment_ids is None else segment_ids[:, :tokens]
        cotangents = d_out, None if isinstance(d_state, SymbolicZero) else d_state
        d_phase = _phase_gradient_by_xla(phase, q, k, v, initial_state, ids, cotangents)
    return dq, dk, blocks.join_values(dv), d_phase, d_initial, None, None


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


def _before_spans(state, added, docs, reverse=False):
    """The state before each span [B,N,walks,2,K,V], with `reverse` after it, from what they add."""
    flat = lambda x: None if x is None else x.reshape(*x.shape[:-3], -1, x.shape[-1])  # noqa: E731
    B, spans, walks = added.shape[:3]
    survives = jnp.ones((1, spans, walks))
    if docs is not None:
        survives = docs[:, :, SURVIVES, 0].reshape(B, spans, -1).min(-1)
        survives = jnp.broadcast_to(survives[..., None], (B, spans, walks))
    return chain(flat(state), flat(added), survives, reverse=reverse).reshape(added.shape)


def _halves(state, blocks):
    """[B,H,2K,V] -> two of [B,walks,K,V]."""
    return [blocks.split_state(half) for half in jnp.split(state, 2, axis=2)]


def _whole(even, odd, blocks):
    return jnp.concatenate([blocks.join_state(half) for half in (even, odd)], axis=2)


def _after(phase, tokens, blocks):
    """cos and sin of tokens x theta for each walk's states, [walks,K,1]."""
    theta = jnp.repeat(phase.reshape(-1, blocks.width), blocks.values, axis=0)
    angle = (jnp.int32(tokens) * turns(theta)).astype(jnp.float32) * (2 * math.pi / 2**32)
    return jnp.cos(angle)[..., None], jnp.sin(angle)[..., None]


def turns(theta):
    """theta as a fraction of a turn in 32 bits, int32, whose overflow is the wanted remainder of whole turns.

    t theta in float32 would be off by 0.01 at t = 100,000.
    """
    theta = theta.astype(jnp.float32)
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
    return unit.view(jnp.int32)


def _phase_gradient_by_xla(phase, q, k, v, initial_state, segment_ids, cotangents):
    """[H,K] float32; cotangents of out and state, None for zero."""
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))  # in bfloat16 the gradient of phase is off by 1e-2
    run = lambda p: chunked.chunked(q, k, v, None, p, initial_state, segment_ids)  # noqa: E731
    outputs, pullback = jax.vjp(run, phase)
    dense = [jnp.zeros_like(x) if d is None else d.astype(x.dtype) for d, x in zip(cotangents, outputs)]
    return pullback(tuple(dense))[0]
