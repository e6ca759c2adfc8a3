"""cuDNN's causal attention over packed documents, without a [T, T] mask in memory.

JAX's public function takes documents only as a mask: [B,1,T,T], 8.6 GB in bfloat16 at 65,536 tokens, and read by every
head. cuDNN itself takes the offsets and lengths of the documents in each row ("packed layout"); JAX holds that path in
its cudnn module, which this file is the only one to import. The number of documents a row may hold is part of the
compiled program: its kernels pay for each, full or empty, and so does its memory, as if every document were as long as
the row. A caller asks `documents_fit`, once for all layers: a choice in every layer would compile both its branches for
each, and copy what it returns.

Letters: B batch, T tokens, H heads, K channels, M documents a row may hold.
"""

import functools
import math

import jax
import jax.numpy as jnp

from linscale.kernels.axes import Axes, mesh_for

MOST = 16  # documents a row, up to 8192 tokens; in longer rows one for 512 tokens
WORKSPACE = 2**32  # bytes of float32 like q for every document of a row; fewer documents where they would take more


def serves_packed(dtype, channels: int) -> bool:
    """Whether this machine has the packed layout, Hopper (compute capability 9.0) or later, for such queries."""
    if jax.default_backend() != "gpu" or dtype != jnp.bfloat16 or channels % 8:
        return False
    return float(getattr(jax.devices()[0], "compute_capability", "0")) >= 9


def documents_fit(segment_ids, heads: int, channels: int, dtype, axes: Axes | None = None):
    """Whether no row has more documents than the packed layout holds, a traced bool; None where it does not serve.

    segment_ids: [B,T] in runs of equal ids; axes as of softmax_attention.
    """
    mesh = mesh_for(axes)
    parts = (
        dict.fromkeys("BTH", 1) if mesh is None else {n: math.prod(mesh.shape[a] for a in axes.of(n)) for n in "BTH"}
    )
    if not serves_packed(dtype, channels) or parts["T"] > 1:
        return None
    B, T = segment_ids.shape
    served = documents_served((B // parts["B"], T, heads // parts["H"], channels))
    return jnp.all(_starts(segment_ids).sum(axis=1) <= served)


def packed_attention(q, k, v, segment_ids):
    """[B,T,H,K] like q, k and v, bfloat16; segment_ids [B,T] in runs of equal ids, as many a row as `documents_fit` allows."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    starts_BM, lengths_BM = document_table(segment_ids, documents_served(q.shape))
    named = {"q_seqlen": lengths_BM, "kv_seqlen": lengths_BM, "q_offsets": starts_BM, "kv_offsets": starts_BM}
    return cudnn.dot_product_attention(
        q, k, v, scale=q.shape[-1] ** -0.5, mask_type=cudnn.MaskType.PADDING_CAUSAL, **named
    )


def documents_served(shape: tuple[int, int, int, int]) -> int:
    """How many documents each row of q, [B,T,H,K], may hold."""
    tokens = shape[1]
    return min(max(MOST, tokens // 512), tokens, max(1, WORKSPACE // max(1, 4 * math.prod(shape))))


def document_table(segment_ids, documents: int):
    """(first token [B,M+1], length [B,M]), -1 where there is none.

    The column M+1 is always -1: the layout asks for room for an end that the lengths already give.
    """
    tokens = segment_ids.shape[1]
    first = functools.partial(jnp.nonzero, size=documents, fill_value=tokens)
    starts = jax.vmap(lambda row: first(row)[0])(_starts(segment_ids)).astype(jnp.int32)
    ends = jnp.pad(starts[:, 1:], [(0, 0), (0, 1)], constant_values=tokens)
    lengths = jnp.where(starts < tokens, ends - starts, -1)
    starts = jnp.pad(jnp.where(starts < tokens, starts, -1), [(0, 0), (0, 1)], constant_values=-1)
    return starts, lengths


def _starts(segment_ids):
    """[B,T]: whether a document starts here."""
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.pad(changes, [(0, 0), (1, 0)], constant_values=True)
