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
from linscale.models import tnl
from linscale.models.layers import activation, attend, dense, merge_heads, simple_rms_norm, split_heads


class Mixer(nnx.Module):
    ffn_activation = staticmethod(activation("none"))
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

    def __call__(self, x_BTD, *, layer, position, segment_ids, cache):
        model = self.model
        q, v = (split_heads(w(x_BTD), model.heads) for w in (self.query, self.value))
        q = activation(model.hgrn2_query_activation)(q)
        gates = log_forget(self.forget(x_BTD).astype(jnp.float32), self.lower_bound[...])
        gates = split_heads(gates.astype(q.dtype), model.heads)  # a rounded log near 0 hardly moves its gate
        out, caches = attend(model, q, None, v, cache=cache, segment_ids=segment_ids, log_decay=gates)
        return self.out(simple_rms_norm(merge_heads(out), model.hgrn2_norm_epsilon)), caches


def log_forget(x: jax.Array, beta: jax.Array) -> jax.Array:
    """log(beta + (1 - beta) sigmoid(x)) in float32, accurate near f = 1 and near f = 0, with finite gradients.

    For x >= 0, 1 - f = (1 - beta) sigmoid(-x) is small and log1p of it keeps its digits; for x < 0 the sum of the two
    terms of f is formed in log space, where neither can vanish.
    """
    small = (1 - beta) * jax.nn.sigmoid(-jnp.maximum(x, 0))
    floor = jnp.log(jnp.maximum(beta, jnp.finfo(jnp.float32).tiny))
    in_log_space = jnp.logaddexp(floor, jnp.log1p(-beta) + jax.nn.log_sigmoid(x))
    return jnp.where(x >= 0, jnp.log1p(-small), in_log_space)
