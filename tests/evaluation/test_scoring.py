"""A score against the model's own logits, one request at a time; then alone, in company, in any order."""

import functools

import jax
import numpy as np
import pytest

from linscale import models
from linscale.config import ConfigError, Model
from linscale.evaluation.batching import branches_at_once, class_of, classes_of_pairs, length_classes, pad
from linscale.evaluation.scoring import Scorer, windows


@functools.cache
def model_and_params(arch):
    model = Model(arch=arch, layers=2, width=32, heads=2, ffn=48, vocab_size=61, softmax_every=2, init_std=0.15)
    return model, models.init(model, 3)


@functools.partial(jax.jit, static_argnums=0)
def log_probabilities(model, params, tokens):
    hidden, _ = models.forward(model, params, tokens[None])
    return jax.nn.log_softmax(models.logits(model, params, hidden))[0]


def expected_score(arch, context, continuation):
    """From one unpadded-looking row: a causal model's padding on the right cannot be seen."""
    model, params = model_and_params(arch)
    row = np.zeros(160, np.int32)
    row[: len(context) + len(continuation)] = [*context, *continuation]
    table = np.asarray(log_probabilities(model, params, row), np.float64)
    at = np.arange(len(context) - 1, len(context) + len(continuation) - 1)
    return table[at, list(continuation)].sum(), bool((table[at].argmax(1) == continuation).all())


def requests_of(seed, shared, wide=False):
    """Contexts of 1 to 32 tokens with 1 to 4 continuations of 1 to 8 tokens (wide: 100 and 30)."""
    rng = np.random.default_rng(seed)
    out = []
    for n in range(12):
        context = rng.integers(61, size=rng.integers(1, 100) if wide else rng.integers(17, 33)).tolist()
        for k in range((4 if n == 0 else rng.integers(2, 5)) if shared else 1):
            length = rng.integers(1, 30) if wide else 8 if k == 0 else rng.integers(1, 9)
            out.append((context, rng.integers(61, size=length).tolist()))
    return out


SLOW = [pytest.param(arch, marks=pytest.mark.slow) for arch in ("tnl", "cosformer2", "hybrid")]


@pytest.mark.parametrize("wide", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("arch", ["llama", "hgrn2", *SLOW])
def test_scores_are_the_models_own(arch, wide):
    model, params = model_and_params(arch)
    requests = requests_of(1, True, wide) + requests_of(2, False, wide)
    model_, greedy_row = model, list(requests[0][0])
    for _ in range(3):  # a continuation that greedy decoding does produce
        row = np.zeros(160, np.int32)
        row[: len(greedy_row)] = greedy_row
        greedy_row.append(int(np.argmax(log_probabilities(model_, params, row)[len(greedy_row) - 1])))
    requests.append((requests[0][0], greedy_row[-3:]))
    got = Scorer(model, params, row_multiple=12).score(requests)
    for (context, continuation), score in zip(requests, got):
        log_likelihood, greedy = expected_score(arch, context, continuation)
        assert score.log_likelihood == pytest.approx(log_likelihood, rel=2e-6, abs=2e-5)
        assert score.greedy == greedy
    assert got[-1].greedy and not got[0].greedy

    if wide:
        return
    order = np.random.default_rng(0).permutation(len(requests))  # the same programs, other company
    shuffled = Scorer(model, params, row_multiple=12).score([requests[i] for i in order])
    for i, score in zip(order, shuffled):
        assert score.log_likelihood == pytest.approx(got[i].log_likelihood, rel=1e-6, abs=1e-5)
        assert score.greedy == got[i].greedy


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["llama", "hgrn2", "cosformer2"])
def test_company_order_and_padding_change_no_score(arch):
    model, params = model_and_params(arch)
    requests = requests_of(3, True, True) + requests_of(4, False, True)
    together = Scorer(model, params, batch_tokens=2048).score(requests)
    order = np.random.default_rng(0).permutation(len(requests))
    shuffled = Scorer(model, params, batch_tokens=300).score([requests[i] for i in order])
    few = Scorer(model, params).score(requests[:2])
    for i, score in [*zip(order, shuffled), *enumerate(few)]:
        assert score.log_likelihood == pytest.approx(together[i].log_likelihood, rel=1e-6, abs=1e-5)
        assert score.greedy == together[i].greedy


@pytest.mark.parametrize("arch", ["hgrn2", pytest.param("tnl", marks=pytest.mark.slow), SLOW[1]])
def test_a_document_in_one_pass_equals_one_window(arch, monkeypatch):
    model, params = model_and_params(arch)
    monkeypatch.setattr("linscale.evaluation.scoring.STREAM", 32)  # several calls, the state carried between them
    rng = np.random.default_rng(6)
    documents = [rng.integers(61, size=n).tolist() for n in (150, 145, 147)] + [[]]
    one_pass = Scorer(model, params, batch_tokens=2048).rolling(documents, prefix=60)
    windowed = Scorer(model, params, context=200).rolling(documents, prefix=60)
    np.testing.assert_allclose(one_pass, windowed, rtol=1e-6, atol=1e-5)
    for document, score in zip(documents[:2], one_pass):
        assert score == pytest.approx(expected_score(arch, [60], document)[0], rel=1e-6, abs=1e-5)
    assert one_pass[-1] == 0


def test_windows_are_those_of_the_harness():
    utils = pytest.importorskip("lm_eval.utils")
    rng = np.random.default_rng(7)
    for length in (1, 7, 8, 9, 16, 29):
        document = rng.integers(100, size=length).tolist()
        theirs = map(utils.make_disjoint_window, utils.get_rolling_token_windows(document, 100, 8, 1))
        assert list(windows(document, 100, 8)) == [tuple(pair) for pair in theirs]


def test_a_context_too_long_loses_its_left():
    model, params = model_and_params("llama")
    rng = np.random.default_rng(8)
    context, continuation = rng.integers(61, size=50).tolist(), rng.integers(61, size=5).tolist()
    cut = Scorer(model, params, context=20).score([(context, continuation)])[0]
    assert cut.log_likelihood == pytest.approx(expected_score("llama", context[-16:], continuation)[0], rel=1e-6)
    with pytest.raises(ConfigError, match="more than the 4"):
        Scorer(model, params, context=4).score([(context, continuation)])


def test_what_cannot_be_scored_is_refused():
    model, params = model_and_params("tnl")
    for request, message in ((([], [1]), "empty"), (([1], []), "empty"), (([1], [61]), "vocabulary of 61")):
        with pytest.raises(ConfigError, match=message):
            Scorer(model, params).score([request])


def test_length_classes_cost_least():
    rng = np.random.default_rng(9)
    for _ in range(5):
        lengths = rng.integers(1, 160, size=40).tolist()
        classes = length_classes(lengths, 3)
        assert len(classes) <= 3 and classes[-1] >= max(lengths)
        cost = sum(class_of(n, classes) for n in lengths)
        grid = range(16, 176, 16)
        others = [sorted({a, b, classes[-1]}) for a in grid for b in grid if max(a, b) <= classes[-1]]
        assert cost <= min(sum(class_of(n, other) for n in lengths) for other in others)


def test_pad():
    np.testing.assert_array_equal(pad([[1, 2], [], [3]], 3, 4), [[1, 2, 0], [0, 0, 0], [3, 0, 0], [0, 0, 0]])
    np.testing.assert_array_equal(pad([[1, 2], []], 3, 2, left=True), [[0, 1, 2], [0, 0, 0]])


def test_a_rare_context_with_many_continuations_does_not_pad_the_others():
    assert branches_at_once([4] * 100 + [8, 5]) == 4
    assert branches_at_once([2] * 10) == 2
    assert branches_at_once([32]) == 8


def test_classes_go_where_lengths_differ():
    spread, alike = list(range(1, 100)), [7] * 99
    assert classes_of_pairs(alike, spread, 2) == ([8], length_classes(spread, 6, 8))
    assert classes_of_pairs(spread, alike, 2) == (length_classes(spread, 6), [8])
