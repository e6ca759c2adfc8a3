"""cosFormer2's token mixer: linear attention without decay, reweighted by a cosine per channel (arXiv 2406.16690,
section 2.2 and appendix A.1).

Q = silu(X W_q), K = silu(X W_k), V = X W_v; query t and key s meet as sum_c q_tc k_sc cos((t - s) theta_c) with theta
learned per head and channel; a norm instead of the denominator; O = Norm(..) * sigmoid(X W_down W_up), then W_o. The
relative position encoding that comes once after the embedding is in tpe.py.

Where the paper is silent: theta starts as in the authors' LRPE code, 10000^(-2c/D) over the whole width, so that heads
differ; norms are SimpleRMSNorm as in TNL (the paper's parameter counts hint at norms with parameters, 7 l d of them,
too little to tell which).

Adam's first steps move every theta by the learning rate, and so the angle between tokens t apart by t times as much: by
20 radians at 3e-4 and 65,536 tokens, where config.optimizer.theta_share should be small (measured:
experiments/training/reports/2026-11-27_h200_throughput.md).

Letters: B batch, T tokens, D width, H heads, K channels of a head.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from linscale.config import Model
from linscale.kernels import ACTIVATIONS
from linscale.kernels.remat import kept
from linscale.models import tnl
from linscale.models.layers import LowRankGate, attend, dense, norm_over_heads, split_heads


class Mixer(nnx.Module):
    ffn_activation = "none"
    products = 4  # with its input
    norm = tnl.Mixer.norm

    def __init__(self, model: Model, rngs: nnx.Rngs):
        self.model = model
        self.query, self.key, self.value, self.out = (dense(model.width, model.width, model, rngs) for _ in range(4))
        self.gate = LowRankGate(model, rngs)
        theta = 10_000.0 ** (-2 * jnp.arange(model.width) / model.width)
        self.theta = nnx.Param(theta.reshape(model.heads, -1))  # [H,K], radians a token

    @staticmethod
    def empty_cache(model: Model, batch: int, slots: int):
        """The state [B,H,2K,K], float32: a cosine and a sine part."""
        head_dim = model.width // model.heads
        return jnp.zeros((batch, model.heads, 2 * head_dim, head_dim))

    def __call__(self, inputs, *, layer, position, segment_ids, cache):
        model = self.model
        products = (self.query, self.key, self.value, self.gate)
        *qkv, gate_BTD = (w(x_BTD) for w, x_BTD in zip(products, inputs, strict=True))
        q, k, v = (split_heads(x_BTD, model.heads) for x_BTD in qkv)
        q, k = kept((jax.nn.silu(q), jax.nn.silu(k)))
        v = ACTIVATIONS[model.value_activation](v)
        out, caches = attend(model, q, k, v, cache=cache, segment_ids=segment_ids, phase=self.theta[...])
        return self.out(norm_over_heads(out, gate_BTD)), caches
