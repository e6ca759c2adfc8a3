"""TPE, cosFormer2's relative position encoding, once after the embedding (arXiv 2406.16690, eq. 16; LightNet, 2405.21022).

A diagonal recurrence with E = D / heads states for every channel:
  u_t = lambda u_{t-1} + (1 - lambda) x_t  (per state),   y_t = sum_k C_k u_tk  (per channel),
which is a causal Toeplitz product with coefficients T_m = sum_k C_k (1 - lambda_k) lambda_k^m. The paper gives the shape
[D,E] of its parameters and its cost, not the parametrisation. Here the read-out C is learned and the decays are fixed,
one time scale a state, spaced geometrically from 1/4 to 4096 tokens; C starts near the identity (fastest state 1).

Worked out in chunks: inside a chunk as a short convolution, between chunks by the state; no state per token is stored.
Spans of the tokens, on the devices of a mesh or side by side on one, hand on the state alone.

Letters: B batch, T tokens, N chunks, P tokens of a chunk, D width, E states of a channel.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from linscale.config import Model
from linscale.kernels.axes import Axes, mesh_for, over_mesh
from linscale.kernels.handing_on import documents, hand_on
from linscale.sharding import AXES

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
        axes = AXES if cache is None else None
        y, state = toeplitz(x_BTD.astype(jnp.float32), self.coefficients[...], state, segment_ids, axes=axes)
        return y.astype(x_BTD.dtype), None if cache is None else state


def decays(states: int) -> np.ndarray:
    """[E] float64: exp(-1 / tau), tau from 1/4 to 4096 tokens."""
    return np.exp(-1 / np.geomspace(0.25, 4096, states))


def toeplitz(x_BTD, coefficients_DE, state_BDE, segment_ids=None, *, axes: Axes | None = None):
    """All float32 -> (y [B,T,D], the state after the last token). A document starts where the segment id changes; the
    first one continues the given state. axes: how the mesh in context splits batch, tokens and
    channels, see `linear_attention`."""
    mesh = mesh_for(axes)
    if mesh is None:
        return _side_by_side(x_BTD, coefficients_DE, state_BDE, segment_ids)

    def span(arrays):
        if mesh.shape[axes.sequence] == 1:
            return _side_by_side(*arrays.values())
        return _span(*arrays.values(), axis=axes.sequence)

    arrays = {"x": x_BTD, "coefficients": coefficients_DE, "state": state_BDE, "segment_ids": segment_ids}
    # Channels are as far apart as heads are, so the axis of heads splits them.
    dims = {"x": "BTH", "coefficients": "HE", "state": "BHE", "segment_ids": "BT"}
    return over_mesh(span, mesh, axes, arrays, dims, ("BTH", "BHE"))


def _span(x_BTD, coefficients_DE, state_BDE, segment_ids, axis):
    """One of several spans of the tokens that lie along a mapped axis."""
    before_BDE, after_BDE = _states(x_BTD, state_BDE, segment_ids, axis)
    return _on_device(x_BTD, coefficients_DE, before_BDE, segment_ids)[0], after_BDE


def _side_by_side(x_BTD, coefficients_DE, state_BDE, segment_ids):
    """On an accelerator few long rows are cut into spans that run side by side, as over the devices of a mesh: a chunk
    waits for the one before it, and alone would leave the chip idle."""
    batch, tokens, _ = x_BTD.shape
    spans = 1 if jax.default_backend() == "cpu" else spans_of_a_row(batch, tokens)
    if spans == 1:
        return _on_device(x_BTD, coefficients_DE, state_BDE, segment_ids)
    cut = lambda x: None if x is None else x.reshape(batch, spans, tokens // spans, *x.shape[2:])  # noqa: E731
    run = functools.partial(_span, axis="spans")
    run = jax.vmap(run, in_axes=(1, None, None, None if segment_ids is None else 1), out_axes=(1, 0), axis_name="spans")
    y_BSTD, after_SBDE = run(cut(x_BTD), coefficients_DE, state_BDE, cut(segment_ids))
    return y_BSTD.reshape(x_BTD.shape), after_SBDE[0]


def spans_of_a_row(batch: int, tokens: int) -> int:
    """The fewest equal spans of at least 256 tokens that make up 64 rows or more together, or as near as it gets."""
    allowed = [n for n in range(1, tokens // 256 + 1) if tokens % n == 0]
    return next((n for n in allowed if n * batch >= 64), max(allowed, default=1))


def _states(x_BTD, initial_BDE, segment_ids, axis):
    """The state before this device's span of the tokens, and after the last one."""
    tokens, states = x_BTD.shape[1], initial_BDE.shape[2]
    lam = decays(states)
    age_T = jnp.arange(tokens - 1, -1, -1, dtype=jnp.float32)
    carry_out_TE = jnp.asarray(1 - lam, jnp.float32) * jnp.exp(age_T[:, None] * jnp.asarray(np.log(lam), jnp.float32))
    across_BDE = jnp.asarray(lam**tokens, jnp.float32)[None, None]
    begins_B = None
    if segment_ids is not None:
        begins_B, reaches_BT, survives_B = documents(segment_ids, axis)
        x_BTD = x_BTD * reaches_BT[..., None]
        across_BDE = across_BDE * survives_B[:, None, None]
    added_BDE = jnp.einsum("te,btd->bde", carry_out_TE, x_BTD, precision="highest")
    before, after = hand_on(added_BDE, across_BDE, initial_BDE, axis, jnp.multiply, jnp.multiply)
    return before if begins_B is None else jnp.where(begins_B[:, None, None], 0, before), after


def _on_device(x_BTD, coefficients_DE, state_BDE, segment_ids):
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

    log_lam_E = jnp.asarray(np.log(lam), jnp.float32)
    lengths = np.clip(tokens - chunk * np.arange(chunks), 0, chunk)

    def to_spans(x, **pad):
        """[B,T,...] -> [spans, chunks of a span, B, P, ...], padded at the end."""
        x = jnp.pad(x, [(0, 0), (0, chunks * chunk - tokens)] + [(0, 0)] * (x.ndim - 2), **pad)
        x = x.reshape(batch, spans, chunks // spans, chunk, *x.shape[2:])
        return jnp.moveaxis(x, (1, 2), (0, 1))

    starts = jnp.zeros((batch, tokens), bool)
    if segment_ids is not None:
        starts = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    begun = to_spans(jnp.cumsum(starts, axis=1), mode="edge")
    xs = (to_spans(x_BTD), begun, to_spans(starts), jnp.asarray(lengths).reshape(spans, -1))

    def one_chunk(state_BDE, x):
        x_BPD, begun_BP, starts_BP, length = x
        to_end_P = jnp.maximum(length - 1 - i, 0)  # padded x are zero: any finite weight will do
        carry_out_PE = jnp.asarray(1 - lam, jnp.float32) * jnp.exp(to_end_P[:, None] * log_lam_E)
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
        return state_BDE * jnp.exp(length * log_lam_E) * survives + new, y_BPD

    state, y = jax.lax.scan(jax.checkpoint(lambda s, x: jax.lax.scan(one_chunk, s, x)), state_BDE, xs)
    y = jnp.moveaxis(y, 2, 0).reshape(batch, chunks * chunk, width)  # from [spans,N,B,P,D]
    return y[:, :tokens], state
