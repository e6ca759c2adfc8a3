"""Smoothed curves, lower envelopes, and straight lines through them: the array work of laws.py.

Curve i of R runs, bin g of G, draw s of S.
"""

import numpy as np

MIN_BINS = 4


def local_line(at: np.ndarray, x: np.ndarray, y: np.ndarray, width: float) -> np.ndarray:
    """y smoothed at `at`: a straight line with Gaussian weights about each place, so that the ends are not biased."""
    weight = np.exp(-0.5 * ((at[:, None] - x) / width) ** 2)
    weight /= np.maximum(weight.sum(1, keepdims=True), 1e-300)
    mean_x, mean_y = weight @ x, weight @ y
    spread = (weight * (x - mean_x[:, None]) ** 2).sum(1)
    slope = (weight * (x - mean_x[:, None]) * y).sum(1) / np.maximum(spread, 1e-12)
    smooth = mean_y + slope * (at - mean_x)
    # Between points further apart than the window (sparse logs) the line rests on one point: interpolate instead.
    return np.where(spread > (0.3 * width) ** 2, smooth, np.interp(at, x, y))


def envelopes(loss_RG: np.ndarray, chosen_SR: np.ndarray) -> np.ndarray:
    """[S, G]: the least log loss of the chosen runs in each bin, inf in bins that are none, see rule 3."""
    runs, bins = loss_RG.shape
    out_SG = np.full((len(chosen_SR), bins), np.inf)
    for chosen_S, row_G in zip(chosen_SR.T, loss_RG):
        np.minimum(out_SG, np.where(chosen_S[:, None], row_G, np.inf), out=out_SG)
    speaks_RG = np.isfinite(loss_RG)
    first_R = np.where(speaks_RG.any(1), speaks_RG.argmax(1), bins)
    last_R = bins - 1 - speaks_RG[:, ::-1].argmax(1)
    first_SR = np.where(chosen_SR, first_R, bins)
    earliest_S = first_SR.argmin(1)
    second_S = np.partition(first_SR, 1, axis=1)[:, 1] if runs > 1 else np.full(len(out_SG), bins)
    from_S = np.where(second_S < bins, np.minimum(second_S, last_R[earliest_S]), 0)
    out_SG = np.where(np.arange(bins) >= from_S[:, None], out_SG, np.inf)
    before_SG = np.minimum.accumulate(out_SG, axis=1)
    before_SG = np.concatenate([np.full((len(out_SG), 1), np.inf), before_SG[:, :-1]], axis=1)
    return np.where(out_SG < before_SG, out_SG, np.inf)


def least_squares(x_G: np.ndarray, y_SG: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Intercepts and slopes [S] of y on x over each row's finite values; NaN for rows with fewer than MIN_BINS."""
    weight_SG = np.isfinite(y_SG).astype(np.float64)
    y_SG = np.where(weight_SG > 0, y_SG, 0.0)
    n_S = weight_SG.sum(1)
    enough_S = n_S >= MIN_BINS
    n_S = np.maximum(n_S, 1)
    mean_x_S, mean_y_S = (weight_SG * x_G).sum(1) / n_S, y_SG.sum(1) / n_S
    dx_SG = weight_SG * (x_G - mean_x_S[:, None])
    slope_S = (dx_SG * y_SG).sum(1) / np.where(enough_S, (dx_SG**2).sum(1), 1.0)
    slope_S = np.where(enough_S, slope_S, np.nan)
    return mean_y_S - slope_S * mean_x_S, slope_S
