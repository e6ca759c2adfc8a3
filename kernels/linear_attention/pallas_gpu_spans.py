"""Spans of a sequence on Hopper GPUs: how many, and the states before each from what they add.

Letters: B batch, H heads, K key channels, N spans.
"""

import math

import jax
import jax.numpy as jnp

from linscale.kernels.hopper import MULTIPROCESSORS

# Of experiments/kernels/reports/2026-11-26_h100_kernels.md and 2026-11-27_h200_kernels.md, in microseconds.
MEMORY = {"H100": 0.0056, "H200": 0.0040}  # a chunk of one tensor: 64 tokens of a head of 128 channels in bfloat16
OPERATIONS = 5.0  # more to launch, if a sequence of 128 channels is cut; of 64 what the gradients gain outweighs them
COSTS = {  # a chunk (of vector decay a mild one) where memory keeps up: (to give out, to give what a span adds), by channels
    64: {"scalar": (0.91, 0.73), "vector": (2.3, 1.5), "phase": (1.93, 0.82)},
    128: {"scalar": (1.85, 0.4), "vector": (3.9, 1.9), "phase": (3.65, 1.1)},
}


def choose_spans(kind: str, rows: int, tokens: int, channels: int = 128, card: str | None = None) -> int:
    """How many spans to cut a sequence into, for `rows` = batch x heads: one, or what fills the chip once or twice.

    channels: 64 or 128, of keys and of values. card: its `device_kind`; None: the card that is here.
    """
    card = jax.devices()[0].device_kind if card is None else card
    chunks = -(-tokens // 64)
    least, best = math.inf, 1
    for full in (rows, MULTIPROCESSORS, 2 * MULTIPROCESSORS):
        spans = max(1, min(chunks // 8, full // rows))
        spans = -(-chunks // -(-chunks // spans))  # no span without a chunk
        time = _microseconds(kind, rows * spans, -(-chunks // spans), channels, card, cut=spans > 1)
        if time < least:
            least, best = time, spans
    return best


def _microseconds(kind, blocks, chunks, channels, card, cut):
    """Of the forward pass, by `blocks` blocks of threads that each walk `chunks` chunks."""
    out, added = COSTS[channels][kind]
    state = channels / 32 * (2 if kind == "phase" else 1)  # in float32, in tensors of a chunk
    waves = -(-blocks // MULTIPROCESSORS)
    memory = blocks * _memory(card) * channels / 128
    time = chunks * max(waves * out, 4 * memory)  # q, k, v and out
    if cut:  # two of them again
        time += chunks * max(waves * added, 2 * memory)
        if channels == 128:  # states are written and read, and once more to chain them; smaller ones stay in the cache
            time += 4 * state * memory + OPERATIONS
    return time


def _memory(card):
    """An unknown card's memory counts as an H100's, the slower one."""
    return next((time for name, time in MEMORY.items() if name in card.split()), MEMORY["H100"])


def chunks_of_a_span(tokens: int, spans: int) -> int:
    return math.ceil(math.ceil(tokens / 64) / spans)


def chain(state, added, kept, reverse=False):
    """The state before each span from what spans add, [B,N,H,.,.]; with `reverse`, from the end.

    kept: what is left across a span, [B or 1,N,H] or, if channels differ, [B,N,H,K].
    """
    if state is None:
        state = jnp.zeros_like(added[:, 0])

    def body(state, x):
        add, keep = x
        return keep * state + add, state

    kept = jnp.broadcast_to(kept[..., None] if kept.ndim == 4 else kept[..., None, None], (*added.shape[:4], 1))
    if added.shape[1] <= 16:  # one fused operation instead of a loop of many small ones
        before = []
        for n in sorted(range(added.shape[1]), reverse=reverse):
            before.append(state)
            state = kept[:, n] * state + added[:, n]
        return jnp.stack(before[::-1] if reverse else before, axis=1)
    _, before = jax.lax.scan(body, state, (jnp.moveaxis(added, 1, 0), jnp.moveaxis(kept, 1, 0)), reverse=reverse)
    return jnp.moveaxis(before, 0, 1)
