"""LLaMA's token mixer: softmax attention with rotary embedding, the baseline (arXiv 2406.16690, appendix A.1).

The paper does not say which norm its LLaMA has (its parameter count would fit LayerNorms with bias); this is LLaMA's
own RMSNorm. Full multi-head attention, no biases, scale 1/sqrt(K).

Letters: B batch, T tokens, S cache slots, D width, H heads, K channels of a head.
"""

import jax.numpy as jnp
from flax import nnx

from linscale.config import Model
from linscale.kernels import softmax_attention
from linscale.models.layers import RMSNorm, compute_dtype, dense, merge_heads, split_heads
from linscale.sharding import AXES


class Mixer(nnx.Module):
    ffn_activation = "silu"
    products = 3  # with its input

    def __init__(self, model: Model, rngs: nnx.Rngs):
        self.model = model
        self.query, self.key, self.value, self.out = (dense(model.width, model.width, model, rngs) for _ in range(4))

    @staticmethod
    def norm(model: Model):
        return RMSNorm(model.width, model.norm_epsilon)

    @staticmethod
    def empty_cache(model: Model, batch: int, slots: int):
        """Keys and values of the tokens so far, [B,S,H,K] each, in the compute dtype."""
        shape = (batch, slots, model.heads, model.width // model.heads)
        return {"k": jnp.zeros(shape, compute_dtype(model)), "v": jnp.zeros(shape, compute_dtype(model))}

    def __call__(self, inputs, *, layer, position, segment_ids, cache, start=None, softmax=None):
        products = zip((self.query, self.key, self.value), inputs, strict=True)
        q, k, v = (split_heads(w(x_BTD), self.model.heads) for w, x_BTD in products)
        positions = position + jnp.arange(q.shape[1])
        if start is not None:  # rows padded on the left: positions count from each row's first token
            positions = positions - start[:, None]
        q, k = (rotate(x, positions, self.model.rope_base) for x in (q, k))
        caches = offset = None
        if cache is not None:
            caches = cache.write({"k": k, "v": v}, slot=position)
            kept = cache._replace(caches=caches).read()
            k, v, offset = kept["k"], kept["v"], position
        axes = AXES if cache is None else None
        named = {"segment_ids": segment_ids, "offset": offset, "start": start}
        out = softmax_attention(q, k, v, implementation=softmax, axes=axes, **named)
        return self.out(merge_heads(out)), caches


def rotate(x_BTHK, positions, base):
    """Rotary embedding on pairs (c, c + K/2) with frequencies base^(-2c/K), as LLaMA in Hugging Face's layout.

    positions: [T], or [B,T] where rows differ.
    """
    half = x_BTHK.shape[-1] // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None, None] * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTHK.dtype)
