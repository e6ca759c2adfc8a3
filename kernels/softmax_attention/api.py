"""Causal softmax attention, the baseline: JAX's own implementations behind one function.

Letters: B batch, T query tokens, S key tokens, H heads, K channels of a head.
"""

import functools
import logging

import jax
import jax.numpy as jnp

from linscale.kernels.axes import Axes, mesh_for
from linscale.kernels.remat import kept
from linscale.kernels.softmax_attention import blockwise, splash
from linscale.kernels.softmax_attention.cudnn_packed import documents_fit, packed_attention, serves_packed

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
    axes: Axes | None = None,
) -> jax.Array:
    """softmax(q k^T / sqrt(K)) v over the keys up to each query's own position.

    Args:
      q: [B,T,H,K]; k, v: [B,S,H,K]; one dtype, float32 or bfloat16. Without `offset`, S = T.
      segment_ids: [B,T] integers in runs of equal ids; a query sees keys of its own run alone. Not with offset.
      offset: the position of the first query among the keys, for decoding with a cache of S slots. May be traced.
      start: [B] integers; row b does not see keys before start[b], which are padding on its left. Only with offset.
      implementation: "xla", "cudnn", "splash", "packed", "blockwise", or None: with bfloat16 cuDNN on GPUs and splash on
        TPUs, XLA elsewhere. "cudnn" masks documents, [B,1,T,T]; "packed" is cuDNN without a mask, on Hopper and later,
        for as many documents a row as `documents_fit` allows, which is not checked; "blockwise" is XLA with memory linear
        in T. None chooses between the last two by the documents where "packed" can run.
      axes: how the mesh in context (jax.set_mesh) splits batch, tokens and heads. Along the sequence axis keys and
        values are gathered and a block of queries at a time meets all of them, in XLA and with memory linear in S; the
        causal half that is masked is computed too. None, or no mesh: one device's work. Not with offset.

    Returns:
      [B,T,H,K] in the dtype of q.

    Raises:
      ValueError: shapes that do not fit, segment_ids or axes with offset, start without offset; an implementation that
        cannot serve; batch, tokens or heads that do not divide over their mesh axes.
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
    mesh = mesh_for(axes)
    if mesh is not None:
        if offset is not None:
            raise ValueError("axes and offset are both given; decoding with a cache is left to the partitioner.")
        if mesh.shape[axes.sequence] > 1:
            if implementation not in (None, "xla"):
                raise ValueError(
                    f"implementation={implementation!r} cannot serve a sequence axis of {mesh.shape[axes.sequence]}; "
                    "None or 'xla' can."
                )
            _announce("blockwise xla over gathered keys")
        local = functools.partial(softmax_attention, implementation=implementation)
        return blockwise.sharded(mesh, axes, local, q, k, v, segment_ids)
    if implementation is None and segment_ids is not None and serves_packed(q.dtype, q.shape[3]):
        packed, blocks = (
            functools.partial(softmax_attention, q, k, v, segment_ids=segment_ids, implementation=name)
            for name in ("packed", "blockwise")
        )
        return jax.lax.cond(documents_fit(segment_ids, *q.shape[2:], q.dtype), packed, blocks)
    if implementation is None:
        on_gpu = jax.default_backend() == "gpu" and q.dtype == jnp.bfloat16 and q.shape[3] % 8 == 0
        implementation = "cudnn" if on_gpu and offset is None else "xla"
        if offset is None and splash.refusal(q) is None:
            implementation = "splash"
    _announce(implementation)
    if implementation in ("splash", "packed", "blockwise") and offset is not None:
        raise ValueError(f"implementation={implementation!r} cannot serve: it does not decode with a cache. None can.")
    if implementation == "splash":
        if reason := splash.refusal(q):
            raise ValueError(f"implementation='splash' cannot serve: {reason}. None or 'xla' can.")
        return kept(splash.splash(q, k, v, segment_ids))
    if implementation == "packed":
        if segment_ids is None or not serves_packed(q.dtype, q.shape[3]):
            raise ValueError(
                "implementation='packed' cannot serve: it needs segment_ids, bfloat16, channels in eights and a GPU of "
                f"Hopper or later; q is {q.dtype}, {q.shape}, on {jax.default_backend()}. None can."
            )
        return kept(packed_attention(q, k, v, segment_ids))
    if implementation == "blockwise":
        return kept(blockwise.blockwise(q, k, v, segment_ids, segment_ids))
    mask = None
    if segment_ids is not None:
        mask = (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    if offset is not None:
        mask = (jnp.arange(k.shape[1]) <= offset + jnp.arange(q.shape[1])[:, None])[None, None]
        if start is not None:
            mask &= (jnp.arange(k.shape[1]) >= start[:, None])[:, None, None]
    # float32 products at full precision, as everywhere in linscale; the context sets XLA's choice for this call alone.
    with jax.default_matmul_precision("highest" if q.dtype == jnp.float32 else "default"):
        causal = offset is None
        out = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=causal, implementation=implementation)
    return kept(out)


@functools.cache
def _announce(name: str) -> None:
    _log.info("softmax attention: implementation %r on %s", name, jax.default_backend())
