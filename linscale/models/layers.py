"""Pieces the mixers share: norms, heads, the gated linear unit, the low-rank gate, and the linear attention call.

Letters: B batch, T tokens, D width, H heads, K channels of a head.
"""

import functools
import typing

import jax
import jax.numpy as jnp
from flax import nnx

from linscale.config import Model
from linscale.kernels import gated_rms_norm, gated_unit, linear_attention, linear_attention_step, rms_norm
from linscale.sharding import AXES, constrain

EPSILON = 1e-6


def compute_dtype(model: Model):
    """The dtype of activations: model.dtype, or by "auto" float32 on a CPU and bfloat16 elsewhere."""
    if model.dtype == "auto":
        return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    return jnp.dtype(model.dtype)


def matrices_in(dtype, params: dict) -> dict:
    """Stacked parameters of layers with every matrix ("kernel") in dtype.

    Cast once and before the loop over layers, so that all of it is sent and sliced in few bytes, and nothing cast again in
    the backward pass.
    """
    one = lambda path, x: _cast(dtype, x) if path[-1].key == "kernel" and x.dtype != dtype else x  # noqa: E731
    return jax.tree_util.tree_map_with_path(one, params)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cast(dtype, x):
    return x.astype(dtype)


# The barrier has XLA put gradients of unrolled layers together in dtype, and not in the optimizer, where each of parameters
# and moments would then be a pass of its own.
_cast.defvjp(
    lambda dtype, x: (_cast(dtype, x), None),
    lambda dtype, _, gradient: (jax.lax.optimization_barrier(gradient).astype(jnp.float32),),
)


def dense(inputs: int, outputs: int, model: Model, rngs: nnx.Rngs) -> nnx.Linear:
    """A matrix without bias: float32 parameter, normal(0, init_std), multiplied in the compute dtype.

    float32 is multiplied at full precision: left to itself, a TPU would round to bfloat16 and a GPU to TF32.
    """
    dtype, init = compute_dtype(model), nnx.initializers.normal(model.init_std)
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    return nnx.Linear(inputs, outputs, use_bias=False, dtype=dtype, precision=precision, kernel_init=init, rngs=rngs)


class RMSNorm(nnx.Module):
    """RMS norm with a learned scale, LLaMA's; statistics in float32."""

    def __init__(self, width: int, epsilon: float = EPSILON):
        self.scale, self.epsilon = nnx.Param(jnp.ones(width)), epsilon

    def __call__(self, x_BTD, added_BTD=None, uses=1):
        """As `rms_norm`."""
        # XLA's: beside a kernel, the scale would need passes of its own in both directions.
        (normed_BTD,), x_BTD = rms_norm(x_BTD, added_BTD, epsilon=self.epsilon, implementation="xla")
        return (normed_BTD * self.scale[...].astype(x_BTD.dtype),) * uses, x_BTD


def norm_over_heads(x_BTHK: jax.Array, gate_BTD: jax.Array | None = None, epsilon: float = EPSILON) -> jax.Array:
    """SimpleRMSNorm over the channels of all heads together, times sigmoid(gate) where one is given; [B,T,D]."""
    if gate_BTD is not None:
        return gated_rms_norm(merge_heads(x_BTHK), gate_BTD, epsilon=epsilon, axes=AXES)
    (normed_BTD,), _ = rms_norm(merge_heads(x_BTHK), epsilon=epsilon, axes=AXES, split=True)
    return normed_BTD


def split_heads(x_BTD: jax.Array, heads: int) -> jax.Array:
    return constrain(x_BTD.reshape(*x_BTD.shape[:-1], heads, -1), "batch", "sequence", "heads", None)


def merge_heads(x_BTHK: jax.Array) -> jax.Array:
    return x_BTHK.reshape(*x_BTHK.shape[:-2], -1)


class GatedLinearUnit(nnx.Module):
    """[U * f(V)] W_down. f is silu for LLaMA (SwiGLU) and the identity for the linear models (SGLU)."""

    products = 2  # with its input

    def __init__(self, model: Model, activation: str, rngs: nnx.Rngs):
        self.up = dense(model.width, model.ffn, model, rngs)
        self.gate = dense(model.width, model.ffn, model, rngs)
        self.down = dense(model.ffn, model.width, model, rngs)
        self.activation = activation

    def __call__(self, inputs):
        """inputs: x [B,T,D], once for each of two products, as `rms_norm` returns it."""
        up, gate = (w(x_BTD) for w, x_BTD in zip((self.up, self.gate), inputs, strict=True))
        inner = gated_unit(up, gate, activation=self.activation, axes=AXES)
        return self.down(constrain(inner, "batch", "sequence", "ffn"))


class LowRankGate(nnx.Module):
    """x W_down W_up with a bottleneck of one head dim, to go through a sigmoid (arXiv 2406.16690, appendix A.1; x is the
    normed input, as in the released code)."""

    def __init__(self, model: Model, rngs: nnx.Rngs):
        rank = model.width // model.heads
        self.down = dense(model.width, rank, model, rngs)
        self.up = dense(rank, model.width, model, rngs)

    def __call__(self, x_BTD):
        # Kept apart from other products with x: merged with one, XLA would slice and copy what comes of both.
        return self.up(self.down(jax.lax.optimization_barrier(x_BTD)))


class LayerCache(typing.NamedTuple):
    """One layer's part of the caches of all layers of its kind, arrays [L,B,...]."""

    caches: typing.Any
    layer: jax.Array  # which of them

    def read(self):
        take = functools.partial(jax.lax.dynamic_index_in_dim, keepdims=False, allow_negative_indices=False)
        return jax.tree.map(lambda x: take(x, self.layer), self.caches)

    def write(self, new, slot=0):
        """All caches, with this layer's replaced by `new`, or the part of it that `new` covers from `slot` on."""
        put = functools.partial(jax.lax.dynamic_update_slice, allow_negative_indices=False)
        at = (self.layer, 0, slot)
        return jax.tree.map(lambda x, part: put(x, part[None], at + (0,) * (x.ndim - 3)), self.caches, new)


def attend(model: Model, q, k, v, *, cache: LayerCache | None, segment_ids, log_decay=None, phase=None):
    """Linear attention in a mixer: one step when a single token continues a state, the whole sequence otherwise.

    Returns (out [B,T,H,K], all layers' states with this one's after the last token, or None where no cache was given).
    """
    state = None if cache is None else cache.read()
    if state is not None and q.shape[1] == 1:
        now = log_decay[:, 0] if log_decay is not None and log_decay.ndim == 4 else log_decay
        k_now = None if k is None else k[:, 0]
        out, state = linear_attention_step(q[:, 0], k_now, v[:, 0], state, log_decay=now, phase=phase)
        return out[:, None], cache.write(state)
    implementation = None if model.attention == "auto" else model.attention
    run = functools.partial(linear_attention, log_decay=log_decay, phase=phase, implementation=implementation)
    run = functools.partial(run, axes=AXES if state is None else None)  # decoding is left to the partitioner
    out, after = run(q, k, v, initial_state=state, segment_ids=segment_ids)
    return out, None if cache is None else cache.write(after)
