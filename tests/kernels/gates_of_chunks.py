"""Log decays per token and channel whose every chunk is of a chosen kind, for kernels that choose by them.

Chunks of 64 tokens and the floor of their sums are the Hopper kernels', unless said otherwise.
"""

import jax.numpy as jnp
import numpy as np

CHUNK = 64
FLOOR = -60.0  # the least sum of a mild chunk
KINDS = {
    "m": "mild",
    "s": "strong in every channel",
    "c": "strong in the first channel alone",
    "i": "mild but for one gate that is closed, -inf, in the last channel",
    "f": "at the floor: mild",
    "b": "below the floor by a sixteenth in one channel: strong",
    "z": "zero",
    "w": "weak: what is read of the chunk before counts",
    "j": "weak but for one closed gate in the last channel",
}


def draw(kinds, shape, seed, chunk=CHUNK, floor=FLOOR):
    """[B,T,H,K] float64 of bfloat16 values; T may end inside the last chunk; floor / chunk is exact in bfloat16."""
    batch, tokens, heads, channels = shape
    rng = np.random.default_rng(seed)
    chunks = []
    for kind in kinds:
        x = -0.9 * rng.random((batch, chunk, heads, channels))
        if kind in "wj":
            x = x / 64
        if kind == "s":
            x = 4.0 * x
        elif kind == "c":
            x[..., 0] -= 3.0
        elif kind in "ij":
            x[:, 30, :, -1] = -np.inf
        elif kind in "fb":
            x[:] = floor / chunk
            x[:, 40, :, channels // 2] -= 1 / 16 if kind == "b" else 0.0
        elif kind == "z":
            x[:] = 0.0
        chunks.append(x)
    return np.asarray(jnp.asarray(np.concatenate(chunks, 1)[:, :tokens], jnp.bfloat16), np.float64)


def documents(tokens, *firsts):
    """Segment ids [B,tokens] of sequences whose documents after their first begin at these tokens."""
    return np.stack([np.cumsum(np.isin(np.arange(tokens), first)) for first in firsts])


def mild(log_decay, ids=None, chunk=CHUNK, floor=FLOOR):
    """[B,chunks,H,K] bool: whether a chunk's sum is at least the floor and no document begins in it (ids [B,T] or None).

    Tokens past the end count as zero. The first token of all begins no document.
    """
    batch, tokens, heads, channels = log_decay.shape
    x = log_decay
    if ids is not None:
        begins = np.pad(ids[:, 1:] != ids[:, :-1], [(0, 0), (1, 0)])
        x = np.where(begins[..., None, None], -np.inf, x)
    x = np.pad(x, [(0, 0), (0, -tokens % chunk), (0, 0), (0, 0)])
    return x.reshape(batch, -1, chunk, heads, channels).sum(2) >= floor
