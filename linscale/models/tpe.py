"""TPE, cosFormer2's relative position encoding, once after the embedding (arXiv 2406.16690, eq. 16; LightNet, 2405.21022).

A diagonal recurrence with E = D / heads states for every channel:
  u_t = lambda u_{t-1} + (1 - lambda) x_t  (per state),   y_t = sum_k C_k u_tk  (per channel),
which is a causal Toeplitz product with coefficients T_m = sum_k C_k (1 - lambda_k) lambda_k^m. The paper gives the shape
[D,E] of its parameters and its cost, not the parametrisation. Here the read-out C is learned and the decays are fixed,
one time scale a state, spaced geometrically from 1/4 to 4096 tokens; C starts near the identity (fastest state 1).

Worked out in chunks: inside a chunk as a short convolution, between chunks by the state; no state per token is stored.

Letters: B batch, T tokens, N chunks, P tokens of a chunk, D width, E states of a channel.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from linscale.config import Model

CHUNK = 16
SPAN = 32  # chunks between stored states


class Tpe(nnx.Module):
    def __init__(self, model: Model, rngs: nnx.Rngs):
        states = model.width // model.heads
        noise = model.init_std * jax.random.normal(rngs.params(), (model.width, states))
        self.coefficients = nnx.Param(noise.at[:, 0].set(1.0))

    @staticmethod
    def empty_cache(model: Model, batch: int):
        """The state [B,D,E], float32."""
        return jnp.zeros((batch, model.width, model.width // model.heads))

    def __call__(self, x_BTD, *, segment_ids, cache):
        state = jnp.zeros((x_BTD.shape[0], *self.coefficients.shape)) if cache is None else cache
        y, state = toeplitz(x_BTD.astype(jnp.float32), self.coefficients[...], state, segment_ids)
        return y.astype(x_BTD.dtype), None if cache is None else state


def decays(states: int) -> np.ndarray:
    """[E] float64: exp(-1 / tau), tau from 1/4 to 4096 tokens."""
    return np.exp(-1 / np.geomspace(0.25, 4096, states))


def toeplitz(x_BTD, coefficients_DE, state_BDE, segment_ids=None):
    """All float32 -> (y [B,T,D], the state after the last token). A document starts where the segment id changes; the
    first one continues the given state."""
    batch, tokens, width = x_BTD.shape
    chunk = min(CHUNK, tokens)
    chunks = -(-tokens // chunk)
    spans = -(-chunks // SPAN)
    chunks = -(-chunks // spans) * spans
    lam = decays(coefficients_DE.shape[1])
    i = np.arange(chunk)
    einsum = functools.partial(jnp.einsum, precision="highest")
    taps_PD = einsum("pe,de->pd", jnp.asarray((1 - lam) * lam ** i[:, None], jnp.float32), coefficients_DE)
    carry_in_PE = jnp.asarray(lam ** (i[:, None] + 1), jnp.float32)

    lengths = np.clip(tokens - chunk * np.arange(chunks), 0, chunk)
    to_end = lengths[:, None] - 1 - i  # negative on padding
    carry_out_NPE = np.where(to_end[..., None] >= 0, (1 - lam) * lam ** np.maximum(to_end, 0)[..., None], 0)
    across_NE = lam ** lengths[:, None]

    def to_spans(x, axis=1, **pad):
        """Splits an axis of tokens (padded) or of chunks into [spans, ..., chunks, ...] with spans in front."""
        if axis == 1:
            x = jnp.pad(x, [(0, 0), (0, chunks * chunk - tokens)] + [(0, 0)] * (x.ndim - 2), **pad)
            x = x.reshape(batch, spans, chunks // spans, chunk, *x.shape[2:])
            return jnp.moveaxis(x, (1, 2), (0, 1))
        return jnp.asarray(x, jnp.float32).reshape(spans, chunks // spans, *x.shape[1:])

    starts = jnp.zeros((batch, tokens), bool)
    if segment_ids is not None:
        starts = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    begun = to_spans(jnp.cumsum(starts, axis=1), mode="edge")
    xs = (to_spans(x_BTD), begun, to_spans(starts), to_spans(carry_out_NPE, 0), to_spans(across_NE, 0))

    def one_chunk(state_BDE, x):
        x_BPD, begun_BP, starts_BP, carry_out_PE, across_E = x
        y_BPD = jnp.zeros_like(x_BPD)
        for lag in range(chunk):  # the convolution inside the chunk, fused by XLA into one loop
            same = begun_BP[:, lag:] == begun_BP[:, : chunk - lag]
            part = taps_PD[lag] * x_BPD[:, : chunk - lag] * same[..., None]
            y_BPD += jnp.pad(part, ((0, 0), (lag, 0), (0, 0)))
        before_B = begun_BP[:, 0] - starts_BP[:, 0]
        reads = begun_BP == before_B[:, None]
        y_BPD += einsum("bde,pe->bpd", state_BDE * coefficients_DE, carry_in_PE) * reads[..., None]
        reaches = begun_BP == begun_BP[:, -1:]
        survives = (before_B == begun_BP[:, -1])[:, None, None]
        new = einsum("pe,bpd->bde", carry_out_PE, x_BPD * reaches[..., None])
        return state_BDE * across_E * survives + new, y_BPD

    state, y = jax.lax.scan(jax.checkpoint(lambda s, x: jax.lax.scan(one_chunk, s, x)), state_BDE, xs)
    y = jnp.moveaxis(y, 2, 0).reshape(batch, chunks * chunk, width)  # from [spans,N,B,P,D]
    return y[:, :tokens], state
