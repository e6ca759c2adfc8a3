"""Multi-query associative recall (arXiv 2312.04927): which value stood beside this key, asked for many keys.

A sequence is `pairs` distinct keys, each followed by its value, then all the keys again in another order, each followed
by its value; only the values of the second part are scored. Keys and values are ids of two disjoint halves of the
vocabulary, drawn anew for every sequence, so that nothing can be learned by heart: an answer must come from the
sequence. A model whose state is too small for `pairs` associations cannot pass, however long it trains.

  k1 v1 k2 v2 ... kP vP  k2 v2 kP vP ... k1 v1
                            ^     ^         ^   scored: 1/(V/2) by chance

Letters: B sequences, P pairs, T = 4 P tokens, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from linscale import models
from linscale.config import ConfigError, Model


def batch(rng: np.random.Generator, sequences: int, pairs: int, vocab_size: int) -> dict[str, np.ndarray]:
    """tokens, labels, segment_ids int32 and weights float32, all [B,4P-1], as the train step takes them.

    Ids 0 .. V/2-1 are keys, V/2 .. V-1 values. Raises ConfigError if there are fewer keys than pairs.
    """
    half = vocab_size // 2
    if not 1 <= pairs <= half:
        raise ConfigError(f"a vocabulary of {vocab_size} has {half} keys; recall of {pairs} pairs needs 1 to {half}.")
    keys = np.argsort(rng.random((sequences, half)), axis=1)[:, :pairs]
    values = rng.integers(half, 2 * half, size=(sequences, pairs))
    shown = np.stack([keys, values], axis=-1)
    order = np.argsort(rng.random((sequences, pairs)), axis=1)
    asked = np.take_along_axis(shown, order[..., None], axis=1)
    stream = np.concatenate([shown, asked], axis=1).reshape(sequences, 4 * pairs).astype(np.int32)
    weights = np.zeros((sequences, 4 * pairs - 1), np.float32)
    weights[:, 2 * pairs :: 2] = 1.0  # where the input is a key that was asked for
    return {
        "tokens": stream[:, :-1],
        "labels": stream[:, 1:],
        "segment_ids": np.ones_like(stream[:, 1:]),
        "weights": weights,
    }


def batches(seed: int, sequences: int, pairs: int, vocab_size: int):
    """An endless stream of batches, a function of its arguments alone."""
    rng = np.random.default_rng(seed)
    while True:
        yield batch(rng, sequences, pairs, vocab_size)


def accuracy(model: Model, params, *, pairs: int, sequences: int = 256, seed: int = 0, rows: int = 64) -> float:
    """Share of the answers that are right: of `sequences` times `pairs` questions, in batches of `rows` sequences."""
    right, scored = 0, 0
    stream = batches(seed, rows, pairs, model.vocab_size)
    for _ in range(-(-sequences // rows)):
        one = next(stream)
        right += int(_right(model, params, one["tokens"], one["labels"], one["weights"]))
        scored += int(one["weights"].sum())
    return right / scored


@functools.partial(jax.jit, static_argnums=0)
def _right(model, params, tokens_BT, labels_BT, weights_BT):
    hidden_BTD, _ = models.forward(model, params, tokens_BT)
    best_BT = jnp.argmax(models.logits(model, params, hidden_BTD), axis=-1)
    return jnp.sum((best_BT == labels_BT) * weights_BT)
