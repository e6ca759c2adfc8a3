"""TPE, cosFormer2's relative position encoding, once after the embedding (arXiv 2406.16690, eq. 16; LightNet, 2405.21022).

A diagonal recurrence with E = D / heads states for every channel:
  u_t = lambda u_{t-1} + (1 - lambda) x_t  (per state),   y_t = sum_k C_k u_tk  (per channel),
which is a causal Toeplitz product with coefficients T_m = sum_k C_k (1 - lambda_k) lambda_k^m. The paper gives the shape
[D,E] of its parameters and its cost, not the parametrisation. Here the read-out C is learned and the decays are fixed,
one time scale a state, spaced geometrically from 1/4 to 4096 tokens; C starts near the identity (fastest state 1).

Worked out in chunks: inside a chunk as a convolution, which is a product with a matrix a channel, between chunks by the
state; no state per token is stored. Spans of the tokens, on the devices of a mesh or side by side on one, hand on the
state alone.

Letters: B batch, T tokens, N chunks, P tokens of a chunk, D width, E states of a channel.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental.layout import Layout, with_layout_constraint

from linscale.config import Model
from linscale.kernels.axes import Axes, mesh_for, over_mesh
from linscale.kernels.handing_on import documents, hand_on
from linscale.sharding import AXES

CHUNK = 128


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
        y, state = toeplitz(x_BTD, self.coefficients[...], state, segment_ids, axes=axes)
        # The products have a batch of channels; left to XLA, channels would come first in memory in all layers.
        return with_layout_constraint(y, Layout((0, 1, 2))), None if cache is None else state


def decays(states: int) -> np.ndarray:
    """[E] float64: exp(-1 / tau), tau from 1/4 to 4096 tokens."""
    return np.exp(-1 / np.geomspace(0.25, 4096, states))


def toeplitz(x_BTD, coefficients_DE, state_BDE, segment_ids=None, *, axes: Axes | None = None):
    """(y [B,T,D] in the dtype of x, the state after the last token [B,D,E]). A document starts where the segment id
    changes; the first one continues the given state. axes: how the mesh in context splits batch, tokens and channels,
    see `linear_attention`.

    Coefficients and states are float32. So are the products for float32 x; for bfloat16 x they are formed in three
    passes of bfloat16 or one of TF32, whose rounding is a quarter of that of y or less.
    """
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
    states = jax.vmap(
        functools.partial(_states, axis="spans"),
        in_axes=(1, None, None if segment_ids is None else 1),
        out_axes=(1, 0),
        axis_name="spans",
    )
    before_BSDE, after_SBDE = states(cut(x_BTD), state_BDE, cut(segment_ids))
    rows = lambda x: None if x is None else x.reshape(batch * spans, -1, *x.shape[2:])  # noqa: E731
    before = before_BSDE.reshape(batch * spans, *state_BDE.shape[1:])
    y, _ = _on_device(rows(x_BTD), coefficients_DE, before, rows(segment_ids))
    return y.reshape(x_BTD.shape), after_SBDE[0]


def spans_of_a_row(batch: int, tokens: int) -> int:
    """The fewest equal spans of at least 256 tokens that make up 64 rows or more together, or as near as it gets."""
    allowed = [n for n in range(1, tokens // 256 + 1) if tokens % n == 0]
    return next((n for n in allowed if n * batch >= 64), max(allowed, default=1))


def _einsum(dtype):
    return functools.partial(jnp.einsum, precision="highest" if dtype == jnp.float32 else "high")


def _states(x_BTD, initial_BDE, segment_ids, axis):
    """The state before this device's span of the tokens, and after the last one."""
    tokens, states = x_BTD.shape[1], initial_BDE.shape[2]
    lam = decays(states)
    age_T = jnp.arange(tokens - 1, -1, -1, dtype=jnp.float32)
    carry_out_TE = jnp.asarray(1 - lam, jnp.float32) * jnp.exp(age_T[:, None] * jnp.asarray(np.log(lam), jnp.float32))
    across_BDE = jnp.asarray(lam**tokens, jnp.float32)[None, None]
    einsum, x_BTD = _einsum(x_BTD.dtype), x_BTD.astype(jnp.float32)
    begins_B = None
    if segment_ids is not None:
        begins_B, reaches_BT, survives_B = documents(segment_ids, axis)
        x_BTD = x_BTD * reaches_BT[..., None]
        across_BDE = across_BDE * survives_B[:, None, None]
    added_BDE = einsum("te,btd->bde", carry_out_TE, x_BTD)
    before, after = hand_on(added_BDE, across_BDE, initial_BDE, axis, jnp.multiply, jnp.multiply)
    return before if begins_B is None else jnp.where(begins_B[:, None, None], 0, before), after


@jax.checkpoint
def _on_device(x_BTD, coefficients_DE, state_BDE, segment_ids):
    batch, tokens, width = x_BTD.shape
    chunk = min(CHUNK, tokens)
    chunks = -(-tokens // chunk)
    lam = decays(coefficients_DE.shape[1])
    log_lam_E = jnp.asarray(np.log(lam), jnp.float32)
    i = np.arange(chunk)
    dtype, x_BTD = x_BTD.dtype, x_BTD.astype(jnp.float32)
    einsum = _einsum(dtype)
    taps_PD = einsum("pe,de->pd", jnp.asarray((1 - lam) * lam ** i[:, None], jnp.float32), coefficients_DE)
    carry_in_PE = jnp.asarray(lam ** (i[:, None] + 1), jnp.float32)

    def carry_out_PE(length):  # padded x are zero: any finite weight will do
        return jnp.asarray(1 - lam, jnp.float32) * jnp.exp(np.maximum(length - 1 - i, 0)[:, None] * log_lam_E)

    def to_chunks(x, **pad):
        """[B,T,...] -> [B,N,P,...], padded at the end."""
        x = jnp.pad(x, [(0, 0), (0, chunks * chunk - tokens)] + [(0, 0)] * (x.ndim - 2), **pad)
        return x.reshape(batch, chunks, chunk, *x.shape[2:])

    x_BNPD = writes_BNPD = to_chunks(x_BTD)
    place_BNP, reads_BNP, survives_BN = None, 1.0, jnp.ones((batch, chunks))
    if segment_ids is not None:
        starts = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
        begun_BNP = to_chunks(jnp.cumsum(starts, axis=1), mode="edge")
        before_BN = begun_BNP[..., 0] - to_chunks(starts)[..., 0]
        place_BNP = begun_BNP - begun_BNP[..., :1]
        reads_BNP = (begun_BNP == before_BN[..., None])[..., None]
        writes_BNPD = x_BNPD * (begun_BNP == begun_BNP[..., -1:])[..., None]
        survives_BN = (before_BN == begun_BNP[..., -1]).astype(jnp.float32)

    def one_chunk(state_BDE, x):
        added_BDE, survives_B = x
        across = jnp.exp(chunk * log_lam_E) * survives_B[:, None, None]
        return state_BDE * across + added_BDE, state_BDE

    added_NBDE = einsum("pe,bnpd->nbde", carry_out_PE(chunk), writes_BNPD[:, :-1])
    last_BDE, states_NBDE = jax.lax.scan(one_chunk, state_BDE, (added_NBDE, survives_BN[:, :-1].T))
    states_NBDE = jnp.concatenate([states_NBDE, last_BDE[None]])
    y_BNPD = _convolve(dtype, x_BNPD, taps_PD, place_BNP)
    y_BNPD += einsum("nbde,pe->bnpd", states_NBDE * coefficients_DE, carry_in_PE) * reads_BNP
    length = tokens - chunk * (chunks - 1)
    after_BDE = last_BDE * jnp.exp(length * log_lam_E) * survives_BN[:, -1, None, None]
    after_BDE += einsum("pe,bpd->bde", carry_out_PE(length), writes_BNPD[:, -1])
    return y_BNPD.reshape(batch, -1, width)[:, :tokens].astype(dtype), after_BDE


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve(dtype, x_BNPD, taps_PD, place_BNP):
    """y_p = sum over q <= p of its document of taps_(p-q) x_q, in each chunk.

    place: the number of each token's document in its chunk, from 0, or None for one document. One product with the
    matrix of taps serves one document of every chunk, so there are as many products as the fullest chunk has documents.
    dtype: that of the caller's x, which decides their precision.
    """
    matrix_PQD = _toeplitz_matrix(taps_PD)
    product = functools.partial(_einsum(dtype), "pqd,bnqd->bnpd")
    return _by_place(place_BNP, lambda of_one: of_one(product(matrix_PQD, of_one(x_BNPD))))


def _convolve_forward(dtype, *args):
    return _convolve(dtype, *args), args


def _convolve_backward(dtype, residuals, dy_BNPD):
    x_BNPD, taps_PD, place_BNP = residuals
    matrix_PQD, pullback = jax.vjp(_toeplitz_matrix, taps_PD)
    einsum = _einsum(dtype)

    def gradients(of_one):
        dy = of_one(dy_BNPD)
        dx = of_one(einsum("pqd,bnpd->bnqd", matrix_PQD, dy))
        return dx, einsum("bnpd,bnqd->pqd", dy, of_one(x_BNPD))

    dx_BNPD, d_matrix_PQD = _by_place(place_BNP, gradients)
    return dx_BNPD, *pullback(d_matrix_PQD), None


_convolve.defvjp(_convolve_forward, _convolve_backward)


def _toeplitz_matrix(taps_PD):
    """[P,Q,D]: taps_(p-q), 0 where q > p."""
    lag = np.subtract.outer(np.arange(len(taps_PD)), np.arange(len(taps_PD)))
    return jnp.where((lag >= 0)[..., None], taps_PD[np.maximum(lag, 0)], 0)


def _by_place(place_BNP, part):
    """The sum over places j of part(of_one), where of_one keeps the tokens of every chunk's j-th document."""
    if place_BNP is None:
        return part(lambda x: x)

    def here(j):
        return part(lambda x: jnp.where((place_BNP == j)[..., None], x, 0))

    def add(carry):
        j, total = carry
        return j + 1, jax.tree.map(jnp.add, total, here(j))

    return jax.lax.while_loop(lambda carry: carry[0] <= jnp.max(place_BNP), add, (1, here(0)))[1]
