"""The recall task is what it says: answers stand in the sequence, and only they count."""

import jax
import numpy as np
import pytest

from linscale import models
from linscale.config import ConfigError, Model
from linscale.evaluation import recall


def test_every_answer_stands_beside_its_key():
    rng = np.random.default_rng(4)
    pairs, vocab = 9, 40
    one = recall.batch(rng, 6, pairs, vocab)
    assert one["tokens"].shape == (6, 4 * pairs - 1)
    for tokens, labels, weights in zip(one["tokens"], one["labels"], one["weights"]):
        shown = dict(zip(tokens[: 2 * pairs : 2].tolist(), tokens[1 : 2 * pairs : 2].tolist()))
        assert len(shown) == pairs and max(shown) < vocab // 2 <= min(shown.values())
        asked = np.flatnonzero(weights)
        assert sorted(tokens[asked]) == sorted(shown)
        assert [shown[key] for key in tokens[asked].tolist()] == labels[asked].tolist()
    assert len({tuple(row) for row in one["tokens"].tolist()}) == 6


def test_the_stream_is_a_function_of_its_seed():
    first, again, other = (next(recall.batches(seed, 2, 3, 20))["tokens"].tolist() for seed in (1, 1, 2))
    assert first == again != other


def test_accuracy_counts_only_the_answers(monkeypatch):
    """A made-up model that looks the answers up, save every third sequence's, scores two thirds."""
    model = Model(arch="tnl", layers=1, width=16, heads=1, ffn=16, vocab_size=24)
    rng = np.random.default_rng(0)
    one = recall.batch(rng, 6, 5, 24)
    monkeypatch.setattr(models, "forward", lambda model, params, tokens: (tokens, None))

    def logits(model, params, tokens):
        best = np.where((one["weights"] > 0) & (np.arange(6) % 3 > 0)[:, None], one["labels"], 0)
        return jax.nn.one_hot(best, 24)

    monkeypatch.setattr(models, "logits", logits)
    monkeypatch.setattr(recall, "batches", lambda *a: iter([one]))
    assert recall.accuracy(model, {"fresh": np.zeros(1)}, pairs=5, sequences=6, rows=6) == pytest.approx(2 / 3)


def test_more_pairs_than_keys_are_refused():
    with pytest.raises(ConfigError, match="has 4 keys; recall of 5"):
        recall.batch(np.random.default_rng(0), 1, 5, 8)
