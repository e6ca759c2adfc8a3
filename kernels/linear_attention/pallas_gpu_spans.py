"""Spans of a sequence on Hopper GPUs: how many, and the states before each from what they add.

Letters: B batch, H heads, K key channels, N spans.
"""

import math

import jax
import jax.numpy as jnp

from linscale.kernels.hopper import MULTIPROCESSORS

# Microseconds on an H100 with 128 channels, of experiments/kernels/reports/2026-11-26_h100_kernels.md.
TENSOR = 0.0056  # memory's time for a chunk of one tensor, 64 tokens of a head in bfloat16
OPERATIONS = 4.0  # more to launch, if the sequence is cut
COSTS = {  # a chunk on one multiprocessor where memory keeps up: (to give out, to give what a span adds); tensors as
    "scalar": (1.95, 0.5, 4),  # large as a float32 state
    "vector": (5.1, 1.9, 4),
    "phase": (3.7, 1.7, 8),
}


def choose_spans(kind: str, rows: int, tokens: int) -> int:
    """How many spans to cut a sequence into, for `rows` = batch x heads: one, or what fills the chip once or twice."""
    chunks = -(-tokens // 64)
    least, best = math.inf, 1
    for full in (rows, MULTIPROCESSORS, 2 * MULTIPROCESSORS):
        spans = max(1, min(chunks // 8, full // rows))
        spans = -(-chunks // -(-chunks // spans))  # no span without a chunk
        time = _microseconds(kind, rows * spans, -(-chunks // spans), cut=spans > 1)
        if time < least:
            least, best = time, spans
    return best


def _microseconds(kind, blocks, chunks, cut):
    """Of the forward pass, by `blocks` blocks of threads that each walk `chunks` chunks."""
    out, added, state = COSTS[kind]
    waves = -(-blocks // MULTIPROCESSORS)
    memory = blocks * TENSOR
    time = chunks * max(waves * out, 4 * memory)  # q, k, v and out
    if cut:  # two of them again; the states are written and read, and once more to chain them
        time += chunks * max(waves * added, 2 * memory) + 4 * state * memory + OPERATIONS
    return time


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
