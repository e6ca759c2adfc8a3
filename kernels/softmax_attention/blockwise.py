"""Causal attention in XLA with memory linear in the tokens, and over a mesh.

Letters: B batch, T query tokens, S key tokens, H heads, K channels, C queries of a block.
"""

import jax
import jax.numpy as jnp

from linscale.kernels.axes import Axes, over_mesh

_QUERY_BLOCK = 256  # queries whose scores and mask exist at one time


def sharded(mesh, axes: Axes, local, q, k, v, segment_ids):
    """[B,T,H,K] over a mesh; local(q, k, v, segment_ids=...) serves devices that hold whole sequences.

    Along the sequence axis keys, values and segment ids are gathered, and their gradients scattered back; queries stay.
    Every device meets all keys, masked, so that the first does as much work as the last.
    """
    axis = axes.sequence

    def on_device(arrays):
        if mesh.shape[axis] == 1:
            return local(**arrays)
        q, segment_ids = arrays["q"], arrays["segment_ids"]
        k, v, key_ids = (
            None if x is None else jax.lax.all_gather(x, axis, axis=1, tiled=True)
            for x in (arrays["k"], arrays["v"], segment_ids)
        )
        return blockwise(q, k, v, segment_ids, key_ids, jax.lax.axis_index(axis) * q.shape[1])

    dims = dict.fromkeys(("q", "k", "v"), "BTHK") | {"segment_ids": "BT"}
    arrays = {"q": q, "k": k, "v": v, "segment_ids": segment_ids}
    return over_mesh(on_device, mesh, axes, arrays, dims, "BTHK")


def blockwise(q, k, v, query_ids, key_ids, first=0):
    """A block of queries at a time, recomputed in the backward.

    q [B,T,H,K], k and v [B,S,H,K]; segment ids [B,T] and [B,S], or None twice; first: the position of the first query
    among the keys, may be traced.
    """
    tokens = q.shape[1]
    size = min(_QUERY_BLOCK, tokens)
    padded = -(-tokens // size) * size

    def to_blocks(x):
        x = jnp.pad(x, [(0, 0), (0, padded - tokens)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)

    key_S = jnp.arange(k.shape[1])

    @jax.checkpoint
    def block(x):
        mask = (key_S <= x["first"] + jnp.arange(size)[:, None])[None]
        if key_ids is not None:
            mask &= x["ids"][:, :, None] == key_ids[:, None, :]
            # A padding query may see no key: it must see one, or its softmax and gradient are not numbers.
            mask |= (key_S == 0) & ~mask.any(axis=-1, keepdims=True)
        # float32 products at full precision, as everywhere in linscale.
        with jax.default_matmul_precision("highest" if q.dtype == jnp.float32 else "default"):
            return jax.nn.dot_product_attention(x["q"], k, v, mask=mask[:, None], implementation="xla")

    blocks = {"q": to_blocks(q), "first": first + jnp.arange(0, padded, size)}
    if query_ids is not None:
        blocks["ids"] = to_blocks(query_ids)
    out = jax.lax.map(block, blocks)
    return jnp.moveaxis(out, 0, 1).reshape(q.shape[0], padded, *q.shape[2:])[:, :tokens]
