"""Causal attention on TPUs through JAX's splash attention kernels, which skip the masked half.

Letters: B batch, T tokens, H heads, K channels of a head.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention

from linscale.kernels.linear_attention.pallas_tpu_tiles import target

INTERPRET = False  # the kernels then run on any device, slowly; for tests
LANES = 128
BLOCK = 512  # queries, and keys, of a tile; smaller ones where this does not divide the tokens


def refusal(q) -> str | None:
    """Why splash attention cannot serve self-attention of q [B,T,H,K], as a sentence without its stop; else None."""
    if target(q) is None and not INTERPRET:
        return f"it needs a TPU, this program is for {jax.default_backend()}"
    if q.dtype != jnp.bfloat16:
        return f"q has dtype {q.dtype}, it takes bfloat16"
    if q.shape[1] % LANES or q.shape[3] not in (64, 128, 256):
        return f"q has shape {q.shape}, it takes multiples of {LANES} tokens and 64, 128 or 256 channels"
    return None


def splash(q, k, v, segment_ids):
    """q, k, v [B,T,H,K], segment_ids [B,T] or None; result [B,T,H,K]."""
    tokens, heads, channels = q.shape[1:]
    kernel = _kernel(tokens, heads, INTERPRET)
    q, k, v = (jnp.moveaxis(x, 2, 1) for x in (q * jnp.asarray(channels**-0.5, q.dtype), k, v))
    if segment_ids is None:
        out = jax.vmap(kernel)(q, k, v)
    else:
        ids = segment_ids.astype(jnp.int32)
        out = jax.vmap(kernel)(q, k, v, splash_attention.SegmentIds(ids, ids))
    return jnp.moveaxis(out, 1, 2)


def _kernel(tokens: int, heads: int, interpret: bool):
    size = next(size for size in (BLOCK, 256, LANES) if tokens % size == 0)
    names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv")
    sizes = splash_attention.BlockSizes(**dict.fromkeys(names, size), use_fused_bwd_kernel=True)
    mask = splash_attention.MultiHeadMask([splash_attention.CausalMask((tokens, tokens))] * heads)
    make = functools.partial(splash_attention.make_splash_mha, head_shards=1, q_seq_shards=1)
    return make(mask, block_sizes=sizes, interpret=interpret)
