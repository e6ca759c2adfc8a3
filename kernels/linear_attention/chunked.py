"""Linear attention over chunks of tokens in plain XLA: exact for every decay, memory linear in the tokens.

Inside a chunk of C tokens, attention is a masked C x C product; between chunks only the state [K,V] travels
(arXiv 2405.17381, algorithms 5 and 6). Chunks are worked on side by side in spans of up to 32; a scan carries the
state from span to span. The backward pass keeps the inputs and the state at the start of each span and recomputes the
rest, span by span from the end, so that neither a [T,T] array nor a state per token or chunk is ever kept.

Vector decay is exact for any gate because no exponent above zero is formed: a chunk is halved recursively, and a
query in an upper half meets a key in the lower half through the boundary between them, so that both factors are
products of gates. The sums of log gates are built bottom up by additions of numbers of one sign; differences of long
sums, which lose digits, never occur, in the values or in the gradients.

Letters: B batch, T tokens, H heads, K key channels, V value channels, N chunks of a span, C tokens of a chunk.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from linscale.kernels.linear_attention.reference import document_starts

CHUNK = 64
TILE = 16  # halves smaller than this share one masked product, since small matrix products are slow everywhere
SPAN = 32  # chunks


def chunked(q, k, v, log_decay, phase, initial_state, segment_ids):
    """Arguments and results as `api.linear_attention`."""
    batch, tokens, heads, channels = q.shape
    accumulate = jnp.promote_types(jnp.float32, q.dtype)
    vector = log_decay is not None and log_decay.ndim == 4
    if initial_state is None:
        rows = channels if phase is None else 2 * channels
        # Behind a barrier: XLA's CPU compiler (jaxlib 0.10 to 0.12) gets products with a constant of zeros wrong.
        initial_state = jax.lax.optimization_barrier(jnp.zeros((batch, heads, rows, v.shape[-1]), accumulate))

    chunk = min(CHUNK, tokens)
    if vector:  # halving wants a power of two of at least a tile
        chunk = max(TILE, 1 << (chunk - 1).bit_length())
    chunks = -(-tokens // chunk)
    spans = -(-chunks // SPAN)
    chunks = -(-chunks // spans) * spans
    lengths = np.clip(tokens - chunk * np.arange(chunks), 0, chunk).reshape(spans, -1)

    def to_spans(x, mode="constant"):
        """[B,T,...] -> [spans,B,N,C,...], padded at the end."""
        x = jnp.pad(x, [(0, 0), (0, chunks * chunk - tokens)] + [(0, 0)] * (x.ndim - 2), mode=mode)
        return jnp.moveaxis(x.reshape(batch, spans, chunks // spans, chunk, *x.shape[2:]), 1, 0)

    inputs = {"q": to_spans(q), "v": to_spans(v)}
    if k is not None:
        inputs["k"] = to_spans(k)
    constants = {}
    if vector:
        inputs["log_decay"] = to_spans(log_decay)
    elif log_decay is not None:
        constants["log_decay"] = log_decay
    if phase is not None:
        constants["phase"] = phase
    fixed = {"lengths": jnp.asarray(lengths)}
    if segment_ids is not None:
        starts = document_starts(segment_ids, q)
        fixed |= {"starts": to_spans(starts), "begun": to_spans(jnp.cumsum(starts, axis=1), "edge")}

    out, state = _over_spans(inputs, constants, initial_state.astype(accumulate), fixed)
    out = jnp.moveaxis(out, 0, 1).reshape(batch, chunks * chunk, heads, v.shape[-1])
    return out[:, :tokens], state


@jax.custom_vjp
def _over_spans(inputs, constants, state, fixed):
    (out, state), _ = _over_spans_forward(inputs, constants, state, fixed)
    return out, state


def _over_spans_forward(inputs, constants, state, fixed):
    def body(state, x):
        out, after = _span(x[0], constants, state, x[1])
        return after, (out, state)

    final, (out, starts) = _scan(body, state, (inputs, fixed))
    return (out, final), (inputs, constants, starts, fixed)


def _over_spans_backward(residuals, cotangents):
    inputs, constants, starts, fixed = residuals
    d_out, d_state = cotangents

    def body(carry, x):
        d_state, d_constants = carry
        x_inputs, x_fixed, start, x_d_out = x
        _, pullback = jax.vjp(lambda *a: _span(*a, x_fixed), x_inputs, constants, start)
        d_inputs, d_const, d_state = pullback((x_d_out, d_state))
        return (d_state, jax.tree.map(jnp.add, d_constants, d_const)), d_inputs

    zeros = jax.tree.map(jnp.zeros_like, constants)
    (d_state, d_constants), d_inputs = _scan(body, (d_state, zeros), (inputs, fixed, starts, d_out), reverse=True)
    return d_inputs, d_constants, d_state, None


_over_spans.defvjp(_over_spans_forward, _over_spans_backward)


def _scan(body, carry, xs, reverse=False):
    """lax.scan, without the loop when there is a single step: XLA optimises straight code better."""
    if jax.tree.leaves(xs)[0].shape[0] > 1:
        return jax.lax.scan(body, carry, xs, reverse=reverse)
    carry, ys = body(carry, jax.tree.map(lambda x: x[0], xs))
    return carry, jax.tree.map(lambda y: y[None], ys)


def _span(inputs, constants, state, fixed):
    """One span: inputs [B,N,C,H,.] and the state before it -> (out [B,N,C,H,V], the state after it)."""
    dtype = inputs["q"].dtype
    heads_first = jax.tree.map(lambda x: jnp.moveaxis(x, 3, 1).astype(state.dtype), inputs)  # [B,H,N,C,.]
    q, v = heads_first["q"], heads_first["v"]
    if "log_decay" in inputs:
        inside, q_in, k_out, decay = _vector_decay(q, heads_first, fixed, dtype)
        advance = lambda s, a: a[..., None] * s  # noqa: E731
    elif "phase" in constants:
        inside, q_in, k_out, decay = _phase(q, heads_first, constants["phase"], fixed, dtype)
        advance = turn
    else:
        inside, q_in, k_out, decay = _scalar_decay(q, heads_first, constants.get("log_decay"), fixed, dtype)
        advance = lambda s, a: a[..., None, None] * s  # noqa: E731

    updates = product("bhnck,bhncv->bhnkv", k_out, v, dtype)

    def body(state, x):
        decay, update = x
        return advance(state, decay) + update, state

    per_chunk = jax.tree.map(lambda x: jnp.moveaxis(x, 2, 0), (decay, updates))
    state, before = _scan(body, state, per_chunk)
    out = inside + product("bhnck,nbhkv->bhncv", q_in, before, dtype)
    return jnp.moveaxis(out.astype(dtype), 1, 3), state


# Each of the three functions below returns, for the chunks of a span:
#   inside [B,H,N,C,V]: what queries read from keys of their own chunk;
#   q_in   [B,H,N,C,K]: queries, carried back to the chunk's start, to meet the state before the chunk;
#   k_out  [B,H,N,C,K]: keys, carried on to the chunk's end;
#   what takes the state across the chunk, for `advance`.


def _scalar_decay(q, x, log_decay, fixed, dtype):
    i, ages, to_end = _positions(q, fixed)
    rate = jnp.zeros(q.shape[1], q.dtype) if log_decay is None else log_decay.astype(q.dtype)
    rate = jnp.maximum(rate, -1e4)  # exp of it is 0 in every dtype, and -inf times an age of 0 would be NaN
    mask = jnp.exp(rate[:, None, None] * jnp.maximum(ages, 0)) * (ages >= 0)  # [H,C,C]
    same, reads_state, reaches_end, survives = _documents(q, fixed)
    k = x["k"]
    scores = product("bhnck,bhndk->bhncd", q, k, dtype) * mask[:, None] * same
    inside = product("bhncd,bhndv->bhncv", scores, x["v"], dtype)
    q_in = q * jnp.exp(rate[:, None] * (i + 1))[:, None, :, None] * reads_state
    k_out = k * jnp.exp(rate[:, None, None] * to_end)[..., None] * reaches_end
    decay = jnp.exp(rate[:, None] * fixed["lengths"]) * survives  # [B,H,N]
    return inside, q_in, k_out, jnp.broadcast_to(decay, q.shape[:3])


def _phase(q, x, phase, fixed, dtype):
    i, ages, to_end = _positions(q, fixed)
    theta = phase.astype(q.dtype)
    same, reads_state, reaches_end, survives = _documents(q, fixed)
    k = x["k"]

    def features(x, positions, sign=1.0):
        """x times cos and sin of position times theta: [..., 2K]; positions [C] or [N,C]."""
        angle = positions[..., None] * jnp.expand_dims(theta, tuple(range(1, 1 + positions.ndim)))  # [H,(N,)C,K]
        angle = angle if positions.ndim == 2 else angle[:, None]
        return jnp.concatenate([x * jnp.cos(angle), sign * x * jnp.sin(angle)], axis=-1)

    scores = product("bhnck,bhndk->bhncd", features(q, i), features(k, i), dtype)
    inside = product("bhncd,bhndv->bhncv", scores * (ages >= 0) * same, x["v"], dtype)
    q_in = features(q, i + 1, sign=-1.0) * reads_state
    k_out = features(k, to_end) * reaches_end
    angle = fixed["lengths"][:, None] * theta[:, None]  # [H,N,K]
    across = jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=-1) * survives[..., None, None]
    return inside, q_in, k_out, jnp.broadcast_to(across, (*q.shape[:3], *across.shape[-2:]))


def turn(state, angle):
    """A state of a phase [B,H,2K,V], turned by an angle given as its cosine and sine [B,H,K,2]."""
    cos, sin = angle[..., 0, None], angle[..., 1, None]
    even, odd = jnp.split(state, 2, axis=2)
    return jnp.concatenate([cos * even - sin * odd, sin * even + cos * odd], axis=2)


def _vector_decay(q, x, fixed, dtype):
    log_decay, v = x["log_decay"], x["v"]
    k = x["k"] if "k" in x else -jnp.expm1(log_decay)
    if "starts" in fixed:  # nothing before a document's first token reaches it or any later one
        log_decay = jnp.where(fixed["starts"][:, None, ..., None], -jnp.inf, log_decay)

    chunk, tile = q.shape[3], TILE
    i = np.arange(tile)

    def blocks(a, size):
        return a.reshape(*a.shape[:3], chunk // size, size, a.shape[-1])

    # Sums of log gates inside blocks of `half` tokens: first to token (inclusive), after token to last.
    to_token, after_token, half = log_decay, jnp.zeros_like(log_decay), 1
    same_token = jnp.sum(q * k, axis=-1, keepdims=True).reshape(*q.shape[:3], chunk // tile, tile, 1)
    scores = same_token * np.eye(tile, dtype=q.dtype)
    inside = None
    while half < chunk:
        if half == tile:
            inside = product("bhncij,bhncjv->bhnciv", scores, blocks(v, tile), dtype)
        queries, keys = q * jnp.exp(to_token), k * jnp.exp(after_token)
        if half < tile:
            upper, block = (i // half) % 2 == 1, i // (2 * half)
            crosses = upper[:, None] & ~upper & (block[:, None] == block)
            level = product("bhncik,bhncjk->bhncij", blocks(queries, tile), blocks(keys, tile), dtype)
            scores = scores + level * crosses
        else:
            queries, keys = blocks(queries, 2 * half)[..., half:, :], blocks(keys, 2 * half)[..., :half, :]
            level = product("bhncik,bhncjk->bhncij", queries, keys, dtype)
            read = product("bhncij,bhncjv->bhnciv", level, blocks(v, 2 * half)[..., :half, :], dtype)
            inside = blocks(inside.reshape(v.shape), 2 * half)
            inside = jnp.concatenate([inside[..., :half, :], inside[..., half:, :] + read], axis=-2)
        to_token, after_token = _join_halves(blocks(to_token, 2 * half), blocks(after_token, 2 * half), q.shape)
        half *= 2
    if inside is None:  # the chunk is one tile
        inside = product("bhncij,bhncjv->bhnciv", scores, blocks(v, tile), dtype)
    return inside.reshape(v.shape), q * jnp.exp(to_token), k * jnp.exp(after_token), jnp.exp(to_token[..., -1, :])


def _join_halves(to_token, after_token, shape):
    """Sums inside blocks of h tokens -> sums inside blocks of 2h, the blocks' halves being [..., :h] and [..., h:]."""
    half = to_token.shape[-2] // 2
    lower, upper = to_token[..., :half, :], to_token[..., half:, :]
    to_token = jnp.concatenate([lower, upper + lower[..., -1:, :]], axis=-2)
    after_lower, after_upper = after_token[..., :half, :], after_token[..., half:, :]
    after_token = jnp.concatenate([after_lower + upper[..., -1:, :], after_upper], axis=-2)
    return to_token.reshape(shape), after_token.reshape(shape)


def _positions(q, fixed):
    """Positions in the chunk [C], ages of keys for queries [C,C], and tokens from each key to the chunk's end [N,C]."""
    i = jnp.arange(q.shape[3], dtype=q.dtype)
    to_end = jnp.maximum(fixed["lengths"][:, None] - 1 - i, 0)  # padded keys are zero: any finite weight will do
    return i, i[:, None] - i, to_end


def _documents(q, fixed):
    """Masks that keep documents apart, as floats that broadcast to [B,H,N,C,C], [B,H,N,C,K], [...,C,K], [B,H,N]."""
    if "starts" not in fixed:
        return (jnp.ones((1,) * 5, q.dtype),) * 3 + (jnp.ones((1,) * 3, q.dtype),)
    begun, starts = fixed["begun"][:, None], fixed["starts"][:, None]  # [B,1,N,C]
    before, last = begun[..., 0] - starts[..., 0], begun[..., -1]
    masks = (
        begun[..., :, None] == begun[..., None, :],
        (begun == before[..., None])[..., None],
        (begun == last[..., None])[..., None],
        before == last,
    )
    return tuple(m.astype(q.dtype) for m in masks)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def product(spec, a, b, dtype):
    """einsum of a and b rounded to `dtype`, summed in their own dtype, at least float32; cotangents are rounded alike."""
    return _product_forward(spec, a, b, dtype)[0]


def _product_forward(spec, a, b, dtype):
    low = a.astype(dtype), b.astype(dtype)
    return _einsum(spec, *low), low


def _product_backward(spec, dtype, residuals, d_out):
    a, b = residuals
    (of_a, of_b), of_out = spec.split("->")[0].split(","), spec.split("->")[1]
    d_out = d_out.astype(dtype)
    return _einsum(f"{of_out},{of_b}->{of_a}", d_out, b), _einsum(f"{of_a},{of_out}->{of_b}", a, d_out)


product.defvjp(_product_forward, _product_backward)


def _einsum(spec, a, b):
    accumulate = jnp.promote_types(jnp.float32, a.dtype)
    precision = "highest" if a.dtype != jnp.bfloat16 else None
    return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=accumulate)
