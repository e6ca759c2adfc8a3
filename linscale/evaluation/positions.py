"""Loss by position: how well a model uses, or survives, more text than it was trained on.

Held-out text is cut into rows of 16 times the training length (or as much as there is), documents running on, and
every token is scored given all before it in its row: linear models carry their state, softmax models look at
everything, also beyond the length they know. Losses are averaged over ranges of positions whose ends double.
"""

import dataclasses

import numpy as np

from linscale.config import ConfigError

TIMES = 16  # the training length
ROWS = 8


def task(name: str, args):
    from linscale.evaluation.command import Task

    rows = args.limit or ROWS
    return Task(name, {"times": TIMES, "rows": rows}, lambda lm, run, step: measure(lm, run, step, rows))


def measure(lm, run, step, rows: int) -> dict:
    """scores: nats a token in each range of positions, and the perplexity beyond the training length over within."""
    from linscale.evaluation import needle

    trained = run.config.train.sequence
    text = needle.heldout_tokens(run)
    length = min(TIMES * trained, len(text))
    if length <= trained:
        raise ConfigError(
            f"the held-out text has {len(text)} tokens, not more than the training length of {trained}; train with a "
            "larger config.data.heldout_tokens."
        )
    rows = min(rows, len(text) // length)
    documents = [text[i * length : (i + 1) * length].astype(np.int64).tolist() for i in range(rows)]
    scorer = lm.scorer
    if scorer.context is not None:
        scorer = dataclasses.replace(scorer, context=length)
    losses_RT = -np.stack(scorer.token_scores(documents, lm.eot_token_id)).astype(np.float64)
    scores, errors = {}, {}
    for first, end in ranges(trained, length):
        part = losses_RT[:, first:end]
        scores[f"{first}-{end}"] = float(part.mean())
        if rows > 1:
            errors[f"{first}-{end}"] = float(part.mean(axis=1).std(ddof=1)) / rows**0.5
    return {"scores": scores, "errors": errors, "documents": rows, "samples": []}


def ranges(trained: int, length: int) -> list[tuple[int, int]]:
    """Positions from 0 to `length` in ranges that end at 1/8, 1/4, 1/2, 1, 2, ... times the training length."""
    ends = [trained * 2**i // 8 for i in range(8)]
    ends = sorted({end for end in ends if 0 < end < length} | {length})
    return list(zip([0, *ends], ends))
