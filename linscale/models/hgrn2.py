"""HGRN2's token mixer: a linear RNN with a data-dependent decay per channel (arXiv 2406.16690, appendix A.1; 2404.07904).

f = beta + (1 - beta) sigmoid(X W_f), S_t = diag(f_t) S_{t-1} + (1 - f_t) v_t^T, O = Norm(S_t^T q_t) W_o with
q = silu(X W_q) and V = X W_v; SimpleRMSNorm over all heads together. The key is tied to the gate, k = 1 - f, and never
stored. Lower bounds beta grow with depth: a softmax over layers of a learned [layers, D], summed up, the first row
subtracted so that the first layer may forget everything (the paper prints no subtraction; all released code has it).

Where the sources differ: the paper prints q without activation, the released code has silu
(`model.hgrn2_query_activation`).

Letters: B batch, T tokens, D width, H heads, K channels of a head.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from linscale.config import Model
from linscale.kernels import ACTIVATIONS
from linscale.kernels.remat import kept
from linscale.models import tnl
from linscale.models.layers import attend, dense, norm_over_heads, split_heads


class Mixer(nnx.Module):
    ffn_activation = "none"
    products = 3  # with its input
    norm = tnl.Mixer.norm
    empty_cache = tnl.Mixer.empty_cache

    def __init__(self, model: Model, rngs: nnx.Rngs):
        self.model = model
        self.query, self.forget, self.value, self.out = (dense(model.width, model.width, model, rngs) for _ in range(4))
        self.lower_bound = nnx.Param(jnp.ones(model.width))  # logits; `across_layers` turns them into bounds

    @staticmethod
    def across_layers(mixer: dict) -> dict:
        """Stacked parameters of all layers with the logits [layers,D] replaced by the bounds beta, 0 in layer 0."""
        share = jax.nn.softmax(mixer["lower_bound"], axis=0)
        return mixer | {"lower_bound": jnp.cumsum(share, axis=0) - share[:1]}

    def __call__(self, inputs, *, layer, position, segment_ids, cache):
        model = self.model
        products = (self.query, self.value, self.forget)
        *qv, forget_BTD = (w(x_BTD) for w, x_BTD in zip(products, inputs, strict=True))
        q, v = (split_heads(x_BTD, model.heads) for x_BTD in qv)
        q = kept(ACTIVATIONS[model.hgrn2_query_activation](q))
        # In bfloat16 the logs are rounded too: near 0 that hardly moves a gate.
        gates = split_heads(log_forget(forget_BTD, self.lower_bound[...]), model.heads)
        out, caches = attend(model, q, None, v, cache=cache, segment_ids=segment_ids, log_decay=gates)
        return self.out(norm_over_heads(out, epsilon=model.hgrn2_norm_epsilon)), caches


@jax.custom_vjp
def log_forget(x: jax.Array, beta: jax.Array) -> jax.Array:
    """log(beta + (1 - beta) sigmoid(x)) in x's dtype, formed in float32; x [...,D], beta [D] or a scalar, float32.

    Accurate near f = 1, where 1 - f = (1 - beta) sigmoid(-x) is small and keeps its digits, and near f = 0, where f
    itself is the sum of two numbers of one sign. Values and gradients are finite: a bound below the smallest float32 is
    raised to it.
    """
    stay, leave = _sigmoids(x)
    small = (1 - beta) * leave
    near_one = small < 0.5
    f = jnp.where(near_one, 1 - small, _floor(beta) + (1 - beta) * stay)
    return (jnp.log(f) + jnp.where(near_one, (1 - f) - small, 0.0)).astype(x.dtype)  # what 1 - small has rounded off


def _sigmoids(x):
    """sigmoid(x) and sigmoid(-x) in float32, each accurate near 0, from one exponential."""
    x = x.astype(jnp.float32)
    fraction = jnp.exp(-jnp.abs(x))
    large = 1 / (1 + fraction)
    small = fraction * large
    return jnp.where(x >= 0, large, small), jnp.where(x >= 0, small, large)


def _floor(beta):
    return jnp.maximum(beta, jnp.finfo(jnp.float32).tiny)


def _log_forget_forward(x, beta):
    return log_forget(x, beta), (x, beta)


def _log_forget_backward(residuals, d_log):
    """Formed anew for x and for beta: what the two and the forward pass share, XLA would store as float32 arrays of x's
    size, as by JAX's own rule."""
    x, beta = residuals

    def anew(x, d_log):
        x, d_log = jax.lax.optimization_barrier((x, d_log))
        stay, leave = _sigmoids(x)
        return x, d_log, stay, d_log.astype(jnp.float32) * leave / (_floor(beta) + (1 - beta) * stay)

    x, d_log, stay, d_stay = anew(x, d_log)
    d_x = ((1 - beta) * stay * d_stay).astype(x.dtype)
    *_, d_stay = anew(x, d_log)
    d_beta = jnp.sum(d_stay, axis=tuple(range(x.ndim - beta.ndim)))
    return d_x, jnp.where(beta < _floor(beta), 0.0, d_beta)  # a bound raised to the smallest number does not move f


log_forget.defvjp(_log_forget_forward, _log_forget_backward)
