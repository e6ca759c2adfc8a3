"""TNL's token mixer: lightning attention with a fixed decay per head (arXiv 2406.16690, appendix A.1; 2405.17381).

Q = silu(X W_q), K = silu(X W_k), V = X W_v, O = Norm(LA(Q, K, V, lambda)) * sigmoid(X W_down W_up), then W_o. The norm is
SimpleRMSNorm over all heads together; q k is not scaled, the norm takes care of the magnitude.

Where the sources differ: the paper prints V without activation, the 2024 code has silu (`model.value_activation`);
the TNL paper prints exponential slopes, all released code has ALiBi's (`model.tnl_decay`); no rotary or LRPE factor,
as the seed paper counts none.

Letters: B batch, T tokens, D width, H heads, K channels of a head.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from linscale.config import Model
from linscale.kernels import ACTIVATIONS, rms_norm
from linscale.kernels.remat import kept
from linscale.models.layers import LowRankGate, attend, dense, norm_over_heads, split_heads
from linscale.sharding import AXES


class Mixer(nnx.Module):
    ffn_activation = "none"
    products = 4  # with its input

    def __init__(self, model: Model, rngs: nnx.Rngs):
        self.model = model
        self.query, self.key, self.value, self.out = (dense(model.width, model.width, model, rngs) for _ in range(4))
        self.gate = LowRankGate(model, rngs)

    @staticmethod
    def norm(model: Model):
        return functools.partial(rms_norm, epsilon=model.norm_epsilon, axes=AXES)

    @staticmethod
    def empty_cache(model: Model, batch: int, slots: int):
        """The state [B,H,K,K], float32; its size does not depend on the tokens seen."""
        head_dim = model.width // model.heads
        return jnp.zeros((batch, model.heads, head_dim, head_dim))

    def __call__(self, inputs, *, layer, position, segment_ids, cache):
        model = self.model
        products = (self.query, self.key, self.value, self.gate)
        *qkv, gate_BTD = (w(x_BTD) for w, x_BTD in zip(products, inputs, strict=True))
        q, k, v = (split_heads(x_BTD, model.heads) for x_BTD in qkv)
        q, k = kept((jax.nn.silu(q), jax.nn.silu(k)))
        v = ACTIVATIONS[model.value_activation](v)
        out, caches = attend(model, q, k, v, cache=cache, segment_ids=segment_ids, log_decay=log_decay(model, layer))
        return self.out(norm_over_heads(out, gate_BTD)), caches


def log_decay(model: Model, layer) -> jax.Array:
    """[H] float32, log lambda of one layer (0 .. layers - 1, may be traced); deeper layers forget less.

    alibi: -slope_h (1 - l/(L-1) + 1e-5), the released code. exponential: -(8h/H)(1 - l/L), 2405.17381 eq. 10.
    """
    if model.tnl_decay == "exponential":
        return -8 * jnp.arange(model.heads) / model.heads * (1 - layer / model.layers)
    return -jnp.asarray(alibi_slopes(model.heads), jnp.float32) * (1 - layer / max(model.layers - 1, 1) + 1e-5)


def alibi_slopes(heads: int) -> np.ndarray:
    """[H]: 2^(-8(h+1)/H) for a power of two; else those of the power below, then every second of the power above."""
    power = 2 ** int(math.log2(heads))
    slopes = 2.0 ** (-8 * np.arange(1, power + 1) / power)
    if power == heads:
        return slopes
    return np.concatenate([slopes, alibi_slopes(2 * power)[::2][: heads - power]])
