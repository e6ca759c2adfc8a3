"""The paper's arithmetic on grids whose answers are known by hand, and prompts that hold what they should."""

import numpy as np
import pytest

from linscale.config import ConfigError
from linscale.data import tokenizers
from linscale.evaluation import needle, needle_scores

LENGTHS = np.linspace(1000, 16000, 35).astype(int).tolist()


def grid(value):
    return np.full((35, 35), float(value))


def test_all_fail_and_all_pass():
    for score, share in ((1, 0.0), (10, 1.0)):
        got = needle_scores.summary(grid(score), LENGTHS)
        assert set(got) >= {"accuracy@2000", "accuracy@16000", "accuracy<=4000", "needle_score", "weighted_accuracy"}
        assert list(got.values()) == pytest.approx([share] * len(got), abs=1e-12)


def test_a_contiguous_half_costs_a_factor_of_root_two():
    scores = grid(1)
    scores[:17] = 10  # shallow depths succeed at every length
    got = needle_scores.summary(scores, LENGTHS, alpha=1.0)
    assert got["accuracy"] == got["accuracy@8000"] == pytest.approx(17 / 35)
    assert got["weighted_accuracy"] == pytest.approx(17 / 35)
    assert got["needle_score"] == pytest.approx(17 / 35 / 2**0.5)


def test_alternating_depths_lose_nearly_everything():
    scores = grid(1)
    scores[::2] = 10  # 18 successes in 35 runs
    got = needle_scores.summary(scores, LENGTHS, alpha=1.0)
    assert got["accuracy"] == pytest.approx(18 / 35)
    assert got["needle_score"] == pytest.approx(18 / 35 * 2.0**-17)


def test_short_contexts_alone():
    """Whole columns succeed up to 8,000: no penalty, and less weight than the failing long ones."""
    scores = grid(1)
    short = np.array(LENGTHS) <= 8000
    scores[:, short] = 10
    got = needle_scores.summary(scores, LENGTHS)
    assert got["accuracy<=8000"] == got["accuracy@4000"] == 1 and got["accuracy@16000"] == 0
    a = needle_scores.ALPHA
    by_hand = (a ** short.sum() - 1) / (a**35 - 1)
    assert got["weighted_accuracy"] == got["needle_score"] == pytest.approx(by_hand)
    assert by_hand < got["accuracy"]


def test_the_judges_five_grades_are_ninths():
    column = np.array([1, 3, 5, 7, 10.0])[:, None]
    assert needle_scores.at(column, [10], 10) == pytest.approx((0 + 2 + 4 + 6 + 9) / 9 / 5)
    assert needle_scores.summary(column, [10], threshold=2 / 3)["needle_score"] == pytest.approx(
        sum(w * s for w, s in zip(needle_scores.weights(5, 1)[:, 0], (0, 2 / 9, 4 / 9, 6 / 9, 1))) / 2**0.5
    )


def test_the_papers_own_weights():
    """Table 11: LLaMA passes up to a length and fails beyond; plain -> weighted accuracy, to the paper's rounding."""
    for plain, weighted in ((56.4, 52.3), (47.8, 44.1), (48.8, 45.1)):
        columns = plain / 100 * 35
        a = needle_scores.ALPHA
        assert 100 * (a**columns - 1) / (a**35 - 1) == pytest.approx(weighted, abs=0.8)


def test_scores_out_of_range_are_refused():
    for wrong in (grid(0), grid(11), grid(np.nan), np.ones(5)):
        with pytest.raises(ValueError, match="1 to 10"):
            needle_scores.summary(wrong, LENGTHS)


def test_prompts_have_their_length_and_the_needle_at_its_depth():
    tokenizer = tokenizers.load("bytes")
    hay = tokenizer.encode("The sun rose over the hills. A dog barked twice! Nobody came? " * 3)
    ends = needle.sentence_ends(tokenizer, hay)
    assert {bytes([i]) for i in ends} == {b".", b"!", b"?"}
    hidden, ask = tokenizer.encode(needle.NEEDLES["needle_standard"]).tolist(), tokenizer.encode(needle.ASK).tolist()
    places = []
    for depth in (0, 0.3, 0.6, 1):
        ids = needle.prompt(hay, hidden, ask, 600, depth, ends)
        text = tokenizer.decode(ids)
        assert len(ids) == 600 and text.endswith("Answer:") and text.count(needle.ANSWER) == 1
        before = text.partition(" " + needle.ANSWER)[0]
        assert depth in (0, 1) or before[-1] in ".!?"
        places.append(len(before))
        room = 600 - len(hidden) - len(ask)
        assert places[-1] <= depth * room and depth * room - places[-1] < 40
    assert places[0] == 0 and places == sorted(places)
    with pytest.raises(ConfigError, match="begin --needle-lengths higher"):
        needle.prompt(hay, hidden, ask, 100, 0.5, ends)


def test_the_judge_looks_for_the_phrase_not_the_wording():
    assert needle.judge("Well: EAT a sandwich, and sit in Dolores\nPark on a sunny day!") == 10
    assert needle.judge(needle.ANSWER) == 10
    assert needle.judge("eat a sandwich and sit in Dolores Park") == 1
    assert needle.judge("retreat a sandwich and sit in dolores park on a sunny day") == 1


def test_lengths():
    assert needle.parse_lengths("1000:16000:35")[:3] == [1000, 1441, 1882]
    assert needle.parse_lengths("1000:16000:35")[-2:] == [15558, 16000] and len(LENGTHS) == 35
    for wrong in ("1000", "0:5:2", "9:5:2", "1:2:x", "5:9:1"):
        with pytest.raises(ConfigError, match="FROM:TO:COUNT"):
            needle.parse_lengths(wrong)


def test_heat_map(tmp_path):
    scores = np.array([[1, 10, 1], [10, 1, 3]])
    needle.write_grid(tmp_path, "needle-5", scores, [10, 20, 30], [0.0, 1.0], "a run")
    assert (tmp_path / "needle-5.png").read_bytes().startswith(b"\x89PNG")
