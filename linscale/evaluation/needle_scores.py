"""The paper's arithmetic on a grid of needle-in-a-haystack scores (arXiv 2406.16690, section 4.2 and appendix).

A grid has a row for each depth and a column for each context length; a score is 1 (the answer is missing) to 10 (it is
there), and its accuracy (score - 1) / 9.

  accuracy at a length       mean over the depths of the column nearest to it
  accuracy up to a length    mean over all columns up to it
  weighted accuracy          weights grow geometrically with the place, alpha to the i, along both axes
  needle score               the same with every column multiplied by its penalty

The penalty of a column is taken from which of its cells succeed: none 0, all 1, else 2^((1-n)/2), n being the number
of runs of equal cells. One contiguous block of successes beginning at an end (n = 2) costs a factor 0.71, alternating
cells cost nearly everything.

The paper does not print its alpha. From the pairs of plain and weighted accuracy of its Table 11, in which LLaMA
succeeds up to a length and fails beyond, alpha is 1.01 to two places for lengths (56.4 -> 52.3, 47.8 -> 44.1,
48.8 -> 45.1); the same is used for depths.
"""

import numpy as np

ALPHA = 1.01


def accuracy(scores_DC: np.ndarray) -> np.ndarray:
    """Scores 1 to 10 -> accuracies 0 to 1, cell by cell."""
    scores_DC = np.asarray(scores_DC, np.float64)
    if scores_DC.ndim != 2 or not scores_DC.size or not ((scores_DC >= 1) & (scores_DC <= 10)).all():
        raise ValueError("a grid of scores is [depths, lengths], each of 1 to 10")
    return (scores_DC - 1) / 9


def at(scores_DC, lengths: list[int], length: float) -> float:
    """Accuracy of the column nearest to a length."""
    return float(accuracy(scores_DC)[:, np.argmin(np.abs(np.asarray(lengths) - length))].mean())


def up_to(scores_DC, lengths: list[int], length: float) -> float:
    """Mean accuracy of the columns up to a length; nan if there are none."""
    chosen = accuracy(scores_DC)[:, np.asarray(lengths) <= length]
    return float(chosen.mean()) if chosen.size else float("nan")


def weights(depths: int, lengths: int, alpha_depth: float = ALPHA, alpha_length: float = ALPHA) -> np.ndarray:
    """[depths, lengths], summing to 1."""
    outer = np.outer(alpha_depth ** np.arange(depths), alpha_length ** np.arange(lengths))
    return outer / outer.sum()


def penalty(success_D: np.ndarray) -> float:
    """Of one column."""
    success_D = np.asarray(success_D, bool)
    if not success_D.any():
        return 0.0
    runs = 1 + int((success_D[1:] != success_D[:-1]).sum())
    return 2.0 ** ((1 - runs) / 2)


def summary(scores_DC, lengths: list[int], threshold: float = 0.5, alpha: float = ALPHA) -> dict[str, float]:
    """Every figure of the paper, as shares of 1. lengths: ascending, of the columns.

    threshold: the accuracy from which a cell counts as a success for the penalty. The lengths "at" and "up to" are the
    paper's where the longest is 16,000: an eighth, a quarter, a half and the whole of the longest.
    """
    right_DC = accuracy(scores_DC)
    weights_DC = weights(*right_DC.shape, alpha, alpha)
    penalties_C = np.array([penalty(column >= threshold) for column in right_DC.T])
    out = {
        "accuracy": float(right_DC.mean()),
        "weighted_accuracy": float((weights_DC * right_DC).sum()),
        "needle_score": float((weights_DC * right_DC * penalties_C).sum()),
    }
    longest = lengths[-1]
    out |= {f"accuracy@{longest // part}": at(scores_DC, lengths, longest / part) for part in (8, 4, 2, 1)}
    for part in (4, 2):
        if lengths[0] <= longest / part:
            out[f"accuracy<={longest // part}"] = up_to(scores_DC, lengths, longest / part)
    return out
