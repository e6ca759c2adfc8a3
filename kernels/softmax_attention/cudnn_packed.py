"""cuDNN's causal attention over packed documents, without a [T, T] mask in memory.

JAX's public function takes documents only as a mask: [B,1,T,T], 8.6 GB in bfloat16 at 65,536 tokens, and read by every
head. cuDNN itself takes the offsets and lengths of the documents in each row ("packed layout"); JAX holds that path in
its cudnn module, which this file is the only one to import. The number of documents a row may hold is part of the
compiled program: its kernels pay for each, full or empty, and so does its memory, as if every document were as long as
the row. Rows with more run through blocks of masked XLA attention, slower and as exact.

Letters: B batch, T tokens, H heads, K channels, M documents a row may hold.
"""

import functools
import inspect
import math

import jax
import jax.numpy as jnp

from linscale.kernels.remat import kept
from linscale.kernels.softmax_attention.blockwise import blockwise

MOST = 16  # documents a row, up to 8192 tokens; in longer rows one for 512 tokens
WORKSPACE = 2**32  # bytes of float32 like q for every document of a row; fewer documents where they would take more


def serves_packed() -> bool:
    """cuDNN's packed layout needs Hopper (compute capability 9.0) or later."""
    return float(getattr(jax.devices()[0], "compute_capability", "0")) >= 9


def packed_attention(q, k, v, segment_ids):
    """q, k, v [B,T,H,K] bfloat16, segment_ids [B,T] in runs of equal ids: [B,T,H,K]. Hopper or later."""
    return _attention(q, k, v, segment_ids, document_table(segment_ids, documents_served(q.shape)))


def documents_served(shape: tuple[int, int, int, int]) -> int:
    """How many documents each row of q, [B,T,H,K], may hold."""
    tokens = shape[1]
    return min(max(MOST, tokens // 512), tokens, max(1, WORKSPACE // (4 * math.prod(shape))))


@jax.custom_vjp
def _attention(q, k, v, segment_ids, table):
    return _values(q, k, v, segment_ids, table)[0]


def _values(q, k, v, segment_ids, table):
    """out, and the statistics of the softmax [BM,H,T] float32 that cuDNN's backward pass reads."""
    starts_BM, lengths_BM, fits = table

    def slow():
        out = blockwise(q, k, v, segment_ids, segment_ids)
        return out, jnp.zeros((lengths_BM.size, q.shape[2], q.shape[1]), jnp.float32)

    return jax.lax.cond(fits, lambda: _cudnn(q, k, v, starts_BM, lengths_BM), slow)


def _forward(q, k, v, segment_ids, table):
    out, statistics = kept(_values(q, k, v, segment_ids, table))
    return out, (q, k, v, segment_ids, table, out, statistics)


def _backward(residuals, d_out):
    q, k, v, segment_ids, (starts_BM, lengths_BM, fits), out, statistics = residuals

    def slow():
        return jax.vjp(lambda q, k, v: blockwise(q, k, v, segment_ids, segment_ids), q, k, v)[1](d_out)

    def fast():
        return _cudnn_backward(q, k, v, starts_BM, lengths_BM, statistics, out, d_out)

    # The only results are what leaves the layer: what a branch returns is copied.
    return *jax.lax.cond(fits, fast, slow), None, None


_attention.defvjp(_forward, _backward)


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

    named = {"q_seqlen": lengths_BM, "kv_seqlen": lengths_BM, "q_offsets": starts_BM, "kv_offsets": starts_BM}
    settings = {"scale": q.shape[-1] ** -0.5, "mask_type": cudnn.MaskType.PADDING_CAUSAL}
    return tuple(cudnn.dot_product_attention(q, k, v, **named, **settings, return_residual=True))


def _cudnn_backward(q, k, v, starts_BM, lengths_BM, statistics, out, d_out):
    """dq, dk, dv. JAX keeps the rule to itself, and its arguments differ between versions: they are found by name."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    rule = cudnn._dot_product_attention_bwd_rule
    wanted = inspect.signature(rule).parameters
    nothing = jnp.zeros(0, q.dtype)
    packing = lengths_BM, lengths_BM, starts_BM, starts_BM
    score_mod = ((),) if "score_mod" in wanted else ()
    values = {
        "scale": q.shape[-1] ** -0.5,
        "seed": 42,
        "dropout_rate": 0.0,
        "variadic_args": (False, False),
        "mask_type": cudnn.MaskType.PADDING_CAUSAL,
        "layout": cudnn.AttentionLayout.BTNH.value,
        "sliding_window_length": None,
        "is_training": True,
        "score_mod": None,
        "cudnn_version": None,
        "return_residual": False,
        "res": (q, k, v, nothing, *packing, nothing, nothing, *score_mod, statistics, out),
        "grad_output": d_out,
    }
    return tuple(rule(**{name: values[name] for name in wanted})[:3])
