"""cuDNN's causal attention over packed documents, without a [T, T] mask in memory.

JAX's public function takes documents only as a mask: [B,1,T,T], 8.6 GB in bfloat16 at 65,536 tokens, and read by every
head. cuDNN itself takes the offsets and lengths of the documents in each row ("packed layout"); JAX holds that path in
its cudnn module, which this file is the only one to import. The number of documents a row may hold is part of the
compiled program, and its kernels pay for each, full or empty: a program holds two, for few documents and for eight times
as many, and the batch decides. Rows with still more run through blocks of masked XLA attention, slower and as exact.

Letters: B batch, T tokens, H heads, K channels, M documents a row may hold.
"""

import functools

import jax
import jax.numpy as jnp

from linscale.kernels.softmax_attention.blockwise import blockwise

FEW = 8  # documents a row, up to 8192 tokens; in longer rows one for 1024 tokens
MANY = 8  # times as many


def serves_packed() -> bool:
    """cuDNN's packed layout needs Hopper (compute capability 9.0) or later."""
    return float(getattr(jax.devices()[0], "compute_capability", "0")) >= 9


def packed_attention(q, k, v, segment_ids):
    """q, k, v [B,T,H,K] bfloat16, segment_ids [B,T] in runs of equal ids: [B,T,H,K]. Hopper or later."""
    few = max(FEW, q.shape[1] // 1024)
    sizes = sorted({min(size, q.shape[1]) for size in (few, MANY * few)})
    tables = [document_table(segment_ids, size) for size in sizes]
    branches = [
        lambda starts=starts, lengths=lengths: _cudnn(q, k, v, starts, lengths) for starts, lengths, _ in tables
    ]
    branches.append(lambda: blockwise(q, k, v, segment_ids, segment_ids))
    return jax.lax.switch(sum(~fits for *_, fits in tables), branches)


def document_table(segment_ids, documents: int):
    """(first token [B,M+1], length [B,M], whether every row has at most M documents), -1 where there is none.

    The column M+1 is always -1: the layout asks for room for an end that the lengths already give.
    """
    tokens = segment_ids.shape[1]
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    is_start = jnp.pad(changes, [(0, 0), (1, 0)], constant_values=True)
    first = functools.partial(jnp.nonzero, size=documents, fill_value=tokens)
    starts = jax.vmap(lambda row: first(row)[0])(is_start).astype(jnp.int32)
    ends = jnp.pad(starts[:, 1:], [(0, 0), (0, 1)], constant_values=tokens)
    lengths = jnp.where(starts < tokens, ends - starts, -1)
    starts = jnp.pad(jnp.where(starts < tokens, starts, -1), [(0, 0), (0, 1)], constant_values=-1)
    return starts, lengths, jnp.all(is_start.sum(axis=1) <= documents)


def _cudnn(q, k, v, starts_BM, lengths_BM):
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    return cudnn.dot_product_attention(
        q,
        k,
        v,
        q_seqlen=lengths_BM,
        kv_seqlen=lengths_BM,
        q_offsets=starts_BM,
        kv_offsets=starts_BM,
        scale=q.shape[-1] ** -0.5,
        mask_type=cudnn.MaskType.PADDING_CAUSAL,
    )
