"""Causal softmax attention, the baseline: JAX's own implementations behind one function.

Letters: B batch, T query tokens, S key tokens, H heads, K channels of a head.
"""

import functools
import logging

import jax
import jax.numpy as jnp

from linscale.kernels.softmax_attention.cudnn_packed import packed_attention, serves_packed

_log = logging.getLogger("linscale.kernels")


def softmax_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    offset: jax.Array | int | None = None,
    start: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """softmax(q k^T / sqrt(K)) v over the keys up to each query's own position.

    Args:
      q: [B,T,H,K]; k, v: [B,S,H,K]; one dtype, float32 or bfloat16. Without `offset`, S = T.
      segment_ids: [B,T] integers in runs of equal ids; a query sees keys of its own run alone. Not with offset.
      offset: the position of the first query among the keys, for decoding with a cache of S slots. May be traced.
      start: [B] integers; row b does not see keys before start[b], which are padding on its left. Only with offset.
      implementation: "xla", "cudnn", or None: cuDNN on GPUs with bfloat16, XLA elsewhere. Documents are
        packed without a mask on Hopper and later, a [B,1,T,T] mask before.

    Returns:
      [B,T,H,K] in the dtype of q.

    Raises:
      ValueError: shapes that do not fit, segment_ids with offset, start without offset.
    """
    if k.shape != v.shape or q.shape[::2] != k.shape[::2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q {q.shape}, k {k.shape} and v {v.shape} do not fit; they must be [B,T,H,K], [B,S,H,K] twice."
        )
    if offset is None and q.shape[1] != k.shape[1]:
        raise ValueError(f"q has {q.shape[1]} tokens and k {k.shape[1]}; without offset they must be equal.")
    if segment_ids is not None and offset is not None:
        raise ValueError("segment_ids and offset are both given; give one of them.")
    if start is not None and offset is None:
        raise ValueError("start is given without offset; it belongs to decoding with a cache.")
    if implementation is None:
        on_gpu = jax.default_backend() == "gpu" and q.dtype == jnp.bfloat16 and q.shape[3] % 8 == 0
        implementation = "cudnn" if on_gpu and offset is None else "xla"
    _announce(implementation)
    if implementation == "cudnn" and segment_ids is not None and serves_packed():
        return packed_attention(q, k, v, segment_ids)
    mask = None
    if segment_ids is not None:
        mask = (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    if offset is not None:
        mask = (jnp.arange(k.shape[1]) <= offset + jnp.arange(q.shape[1])[:, None])[None, None]
        if start is not None:
            mask &= (jnp.arange(k.shape[1]) >= start[:, None])[:, None, None]
    # float32 products at full precision, as everywhere in linscale; the context sets XLA's choice for this call alone.
    with jax.default_matmul_precision("highest" if q.dtype == jnp.float32 else "default"):
        return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=offset is None, implementation=implementation)


@functools.cache
def _announce(name: str) -> None:
    _log.info("softmax attention: implementation %r on %s", name, jax.default_backend())
