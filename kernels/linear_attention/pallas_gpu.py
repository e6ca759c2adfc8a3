"""Linear attention on Hopper GPUs: which kernel serves, spans of a sequence, documents, and the gradients.

The kernels (`pallas_gpu_scalar`, `_vector`, `_phase_kernels`) walk a sequence chunk by chunk with the float32 state on
chip. Where batch x heads would leave most of the chip idle, the sequence is cut into spans: one more pass finds what each
span adds to the state, a few small operations give the state before each span, and all spans then run side by side.

Letters: B batch, T tokens, H heads, K key channels, V value channels, N spans, C tokens of a chunk.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from linscale.kernels.hopper import MULTIPROCESSORS, on_hopper
from linscale.kernels.linear_attention import chunked, pallas_gpu_phase
from linscale.kernels.linear_attention.pallas_gpu_blocks import Blocks
from linscale.kernels.linear_attention.pallas_gpu_spans import chain, choose_spans, chunks_of_a_span
from linscale.kernels.linear_attention.reference import document_starts
from linscale.kernels.remat import kept

CHANNELS = (64, 128, 256)  # of keys and of values; 256 in two blocks of 128


def refusal(q, k, v, log_decay, phase=None) -> str | None:
    """Why these kernels cannot serve the call, as a sentence without its stop; None if they can."""
    if not on_hopper():
        device = jax.devices()[0].device_kind
        return f"it needs a Hopper GPU (compute capability 9.0) and jax >= 0.11, this is {device} and {jax.__version__}"
    return unsupported(q, k, v, log_decay, phase)


def unsupported(q, k, v, log_decay, phase=None) -> str | None:
    if q.dtype != jnp.bfloat16:
        return f"q, k and v have dtype {q.dtype}, it takes bfloat16"
    if q.shape[-1] not in CHANNELS or v.shape[-1] not in CHANNELS:
        return f"it takes 64, 128 or 256 channels a head, q has {q.shape[-1]} and v {v.shape[-1]}"
    if log_decay is not None and log_decay.ndim == 4 and log_decay.dtype not in (jnp.float32, jnp.bfloat16):
        return f"log_decay has dtype {log_decay.dtype}, it takes float32 or bfloat16"
    return None


def pallas_gpu(q, k, v, log_decay, phase, initial_state, segment_ids):
    """Arguments and results as `api.linear_attention`.

    The kernels are written for tokens in eights and for keys and values in blocks of as many channels; the copies cost
    time, not exactness.
    """
    tokens, K, V = q.shape[1], q.shape[-1], v.shape[-1]
    blocks = Blocks.of(K, V)
    widen = lambda x: _pad(x, [(0, 0), (0, -tokens % 8), (0, 0), (0, -x.shape[-1] % blocks.width)])  # noqa: E731
    q, v = widen(q), widen(v)
    k = None if k is None else widen(k)
    wide_K, wide_V = q.shape[-1], v.shape[-1]
    parts = 1 if phase is None else 2
    if initial_state is not None:
        state = initial_state.astype(jnp.float32).reshape(*initial_state.shape[:2], parts, K, V)
        state = _pad(state, [(0, 0), (0, 0), (0, 0), (0, wide_K - K), (0, wide_V - V)])
        initial_state = state.reshape(*state.shape[:2], parts * wide_K, wide_V)
    if segment_ids is not None:
        segment_ids = _pad(segment_ids, [(0, 0), (0, -tokens % 8)], mode="edge")
    if phase is not None:
        phase = _pad(phase, [(0, 0), (0, wide_K - K)])
        spans = _spans("phase", q, blocks)
        docs = _documents(segment_ids, q, spans)
        out, state = pallas_gpu_phase.on_chip(tokens, spans, q, k, v, phase, initial_state, segment_ids, docs)
    elif log_decay is not None and log_decay.ndim == 4:
        first = None if segment_ids is None else document_starts(segment_ids, q)
        out, state = _vector(q, k, v, widen(log_decay), initial_state, first)
    else:
        decays = log_decay is not None or _streams(q, blocks)
        log_decay = jnp.zeros(q.shape[2], jnp.float32) if log_decay is None else log_decay
        out, state = _scalar(tokens, decays, q, k, v, log_decay, initial_state, segment_ids)
    state = state.reshape(*state.shape[:2], parts, wide_K, wide_V)[..., :K, :V]
    return out[:, :tokens, :, :V], state.reshape(*state.shape[:2], parts * K, V)


def _pad(x, widths, **kw):
    return jnp.pad(x, widths, **kw) if any(w != (0, 0) for w in widths) else x


def _streams(q, blocks):
    """Whether every multiprocessor streams heads of one block of 128 channels, at the memory's pace.

    Without decay a chunk is up to 18 % faster if nothing is weighted, but memory then serves up to 2 % slower, as measured
    (experiments/kernels/reports/2026-11-27_h200_kernels.md): what has no decay is then weighted with ones.
    """
    walks = q.shape[0] * q.shape[2] * _spans("scalar", q, blocks)
    return blocks.number == 1 and blocks.width == 128 and walks >= 0.95 * MULTIPROCESSORS


def _spans(kind, q, blocks):
    return choose_spans(kind, q.shape[0] * q.shape[2] * blocks.number, q.shape[1], blocks.width)


@jax.custom_vjp
def _vector(q, k, v, log_decay, initial_state, first):
    return _vector_values(q, k, v, _marked(log_decay, first), initial_state, first is not None, save=False)[:2]


def _marked(log_decay, first):
    from linscale.kernels.linear_attention.pallas_gpu_gates import mark

    return log_decay if first is None else mark(log_decay, first)


def _vector_values(q, k, v, log_decay, initial_state, documents, save):
    """out, the last state, and what the backward pass needs: states before each chunk and scores."""
    from linscale.kernels.linear_attention.pallas_gpu_vector import forward
    from linscale.kernels.linear_attention.pallas_gpu_vector_states import states

    blocks = Blocks.of(q.shape[-1], v.shape[-1])
    named = {"blocks": blocks, "spans": _spans("vector", q, blocks), "documents": documents}
    q, k, v, log_decay = blocks.split(q, k, v, log_decay)
    initial_state = blocks.split_state(initial_state)
    before = None if initial_state is None else initial_state[:, None]
    if named["spans"] > 1:
        before = chain(initial_state, *states(k, v, log_decay, **named))
    out, after, *saved = forward(q, k, v, log_decay, before, save=save, **named)
    return blocks.join_values(out), blocks.join_state(after[:, -1]), saved


def _vector_forward(q, k, v, log_decay, initial_state, first):
    log_decay, documents = _marked(log_decay, first), first is not None
    out, after, saved = _vector_values(q, k, v, log_decay, initial_state, documents, save=True)
    states, scores, log_decay = kept((*saved, log_decay))  # gates cost their models many operations
    flags = tuple(() if present else None for present in (initial_state is not None, documents))
    return (out, after), (q, k, v, log_decay, states, scores, flags)


def _vector_backward(residuals, cotangents):
    from linscale.kernels.linear_attention.pallas_gpu_vector_backward import carry
    from linscale.kernels.linear_attention.pallas_gpu_vector_states import states as span_states
    from linscale.kernels.linear_attention.pallas_gpu_vector_within import within

    q, k, v, log_decay, states, scores, flags = residuals
    given, documents = (flag is not None for flag in flags)
    d_out, d_state = cotangents
    blocks = Blocks.of(q.shape[-1], v.shape[-1])
    named = {"blocks": blocks, "spans": _spans("vector", q, blocks), "documents": documents}
    q, k, v, log_decay, d_out = blocks.split(q, k, v, log_decay, d_out)
    d_state = blocks.split_state(d_state)
    d_after = d_state[:, None]
    if named["spans"] > 1:
        d_after = chain(d_state, *span_states(q, d_out, log_decay, reverse=True, **named), reverse=True)
    dv, grads, before = carry(q, k, d_out, log_decay, scores, d_after, **named)
    of_keys = within(q, k, v, d_out, log_decay, states, grads, blocks=blocks, documents=documents)
    dq, dk, d_log_decay = map(blocks.join_keys, of_keys)
    return dq, dk, blocks.join_values(dv), d_log_decay, blocks.join_state(before[:, 0]) if given else None, None


_vector.defvjp(_vector_forward, _vector_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scalar(tokens, decays, q, k, v, log_decay, initial_state, segment_ids):
    return _scalar_values(tokens, decays, q, k, v, log_decay, initial_state, segment_ids)[:2]


def _scalar_values(tokens, decays, q, k, v, log_decay, initial_state, segment_ids):
    """out, the last state, and the state before each span by walks (None where it is zero)."""
    from linscale.kernels.linear_attention import pallas_gpu_scalar as kernels

    rate = _rate(log_decay)
    blocks = Blocks.of(q.shape[-1], v.shape[-1])
    spans = _spans("scalar", q, blocks)
    q, k, v = blocks.split(q, k, v)
    docs = _documents(segment_ids, q, spans)
    initial_state = blocks.split_state(initial_state)
    before = None if initial_state is None else initial_state[:, None]
    named = {"blocks": blocks, "decays": decays, "tokens": tokens, "spans": spans}
    if spans > 1:
        added = kernels.states(k, v, rate, docs, **named)
        before = chain(initial_state, added, _survival(rate, docs, tokens, spans, blocks))
    out, after = kernels.forward(q, k, v, rate, before, docs, **named)
    return blocks.join_values(out), blocks.join_state(after[:, -1]), before


def _scalar_forward(tokens, decays, *args):
    q, k, v, log_decay, initial_state, segment_ids = jax.tree.map(
        lambda x: x.value, args, is_leaf=lambda x: hasattr(x, "perturbed")
    )
    learned = args[3].perturbed
    out, state, before = _scalar_values(tokens, decays, q, k, v, log_decay, initial_state, segment_ids)
    return (out, state), (q, k, v, log_decay, initial_state, segment_ids, kept(before), () if learned else None)


def _scalar_backward(tokens, decays, residuals, cotangents):
    from linscale.kernels.linear_attention import pallas_gpu_scalar as kernels
    from linscale.kernels.linear_attention.pallas_gpu_scalar_backward import backward_kv

    q, k, v, log_decay, initial_state, segment_ids, before, learned = residuals
    d_out, d_state = cotangents
    d_out = jnp.zeros(v.shape, v.dtype) if isinstance(d_out, SymbolicZero) else d_out.astype(v.dtype)
    d_state = None if isinstance(d_state, SymbolicZero) else d_state
    rate = _rate(log_decay)
    blocks = Blocks.of(q.shape[-1], v.shape[-1])
    spans = _spans("scalar", q, blocks)
    qs, ks, vs, ds = blocks.split(q, k, v, d_out)
    docs = _documents(segment_ids, q, spans)
    named = {"decays": decays, "tokens": tokens, "spans": spans}

    swapped = blocks.swapped
    dq, _ = kernels.forward(ds, vs, ks, rate, blocks.turned(before), docs, blocks=swapped, final=False, **named)

    d_after = blocks.split_state(d_state)
    d_after = None if d_after is None else jnp.swapaxes(d_after, -1, -2)
    if spans == 1:
        d_after = None if d_after is None else d_after[:, None]
    else:
        added = swapped.in_order(kernels.states(ds, qs, rate, docs, blocks=swapped, reverse=True, **named))
        d_after = chain(d_after, added, _survival(rate, docs, tokens, spans, blocks), reverse=True)
    dk, dv, d_before = backward_kv(
        qs, ks, vs, ds, rate, d_after, docs, blocks=blocks, initial=initial_state is not None, **named
    )
    d_initial = None if initial_state is None else blocks.join_state(jnp.swapaxes(d_before[:, 0], -1, -2))

    d_log_decay = None
    if learned is not None:  # TNL's decay is fixed; where it is learned, its gradient goes through XLA
        ids = None if segment_ids is None else segment_ids[:, :tokens]
        q, k, v, d_out = (x[:, :tokens].astype(jnp.float32) for x in (q, k, v, d_out))  # bfloat16: off by 1e-2
        (_, state), pullback = jax.vjp(lambda g: chunked.chunked(q, k, v, g, None, initial_state, ids), log_decay)
        (d_log_decay,) = pullback((d_out, jnp.zeros_like(state) if d_state is None else d_state))
    dq, dk, dv = swapped.join_values(dq), blocks.join_keys(dk), blocks.join_values(dv)
    return dq, dk, dv, d_log_decay, d_initial, None


_scalar.defvjp(_scalar_forward, _scalar_backward, symbolic_zeros=True)


def _rate(log_decay):
    """log2 of the decay a token; bounded, because minus infinity times an age of 0 would be NaN."""
    return jnp.maximum(log_decay.astype(jnp.float32), -1e4) * math.log2(math.e)


def _documents(segment_ids, q, spans):
    """What the kernels need to know of documents, [B,chunks,5,C] float32, in the order of pallas_gpu_scalar."""
    if segment_ids is None:
        return None
    C = 64
    B, T = segment_ids.shape
    chunks = chunks_of_a_span(T, spans) * spans
    begun = jnp.cumsum(document_starts(segment_ids, q), axis=1)
    begun = jnp.pad(begun, ((0, 0), (0, chunks * C - T)), mode="edge").reshape(B, chunks, C)
    last = begun[..., -1:]
    before = jnp.pad(last[:, :-1], ((0, 0), (1, 0), (0, 0)))  # the first token starts no document
    earlier = begun[..., None, :] < begun[..., :, None]
    rows = (
        earlier.sum(-1),
        C - 1 - jnp.swapaxes(earlier, -1, -2).sum(-1),
        begun == before,
        begun == last,
        jnp.broadcast_to(before == last, begun.shape),
    )
    return jnp.stack([r.astype(jnp.float32) for r in rows], axis=2)


def _survival(rate, docs, tokens, spans, blocks):
    """What is left of a state across each span: [B or 1,N,walks]."""
    length = chunks_of_a_span(tokens, spans) * 64
    here = jnp.clip(tokens - length * jnp.arange(spans), 0, length).astype(jnp.float32)
    left = jnp.exp2(rate * here[:, None])[None]
    if docs is not None:
        left = left * docs[:, :, 4, 0].reshape(docs.shape[0], spans, -1).min(-1)[..., None]
    return jnp.repeat(left, blocks.number, axis=2)
