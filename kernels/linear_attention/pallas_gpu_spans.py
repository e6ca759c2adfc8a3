"""Spans of a sequence on Hopper GPUs: how many, and the states before each from what they add.

Letters: B batch, H heads, K key channels, N spans.
"""

import math

import jax
import jax.numpy as jnp

MULTIPROCESSORS = 132  # of an H100 or H200
MORE_THAN_MEMORY = {"split": 4, "whole": 3}  # costs of a chunk where arithmetic takes longer than the tensors


def choose_spans(rows: int, tokens: int, split: int = 6, whole: int = 4) -> int:
    """How many spans to cut a sequence into, for `rows` = batch x heads.

    split, whole: what a chunk costs if the sequence is cut and if it is not; for no or scalar decay the tensors moved.
    """
    chunks = -(-tokens // 64)
    best, best_cost = 1, math.inf
    for spans in range(1, max(1, min(chunks // 8, 2 * MULTIPROCESSORS // rows)) + 1):
        spans = -(-chunks // -(-chunks // spans))  # no span without a chunk
        waves = -(-rows * spans // MULTIPROCESSORS)
        cost = (
            whole * waves * chunks if spans == 1 else split * waves * -(-chunks // spans) + 4 * split
        )  # the small operations between
        if cost < 0.95 * best_cost:
            best, best_cost = spans, cost
    return best


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
