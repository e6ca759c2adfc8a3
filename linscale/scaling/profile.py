"""Profile likelihood intervals of the coefficients that a fit moves directly: E and the exponents.

The likelihood is that of Huber's density with a fitted scale, delta 1.345 (see joint.py). A coefficient is held at each
value of a grid, all others and the scale are fitted again, every value a lane of one batch; the interval holds the
values whose log likelihood is less than chi2_{0.95, 1} / 2 = 1.92 below the best, scaled by n / (n - P) for small n.
It needs no draws, follows valleys that bend, and ends at infinity (here: NaN) where the data set no end.
"""

import numpy as np
from scipy import stats

from linscale.scaling import forms, parametric
from linscale.scaling.joint import LIKELIHOOD
from linscale.scaling.minimise import minimise

NAMES = ("E", "alpha", "beta", "alpha_N", "alpha_D")
STEPS = np.concatenate([-np.geomspace(8, 0.25, 16), np.geomspace(0.25, 8, 16)])  # standard errors


def profile(found: parametric.Fit, level: float = 0.95) -> dict[str, tuple[float, float]]:
    """name -> (low, high); NaN at an end that the likelihood leaves open. {} if the exponents are not identified."""
    form, runs = found.form, found.runs
    freedom = len(runs) - len(form.names)
    if not found.identified or freedom < 1:
        return {}
    at = forms.frame(runs.n, runs.d)
    data, target = forms.data(runs.n, runs.d, runs.unique, at), np.log(runs.loss)
    low, high = forms.bounds(form, at, target)
    weight = np.ones((1, len(runs)))
    start = form.theta(found.values, at)
    best = minimise(form.log_loss, np.stack([start] * 8), data, target, weight, low, high, LIKELIHOOD)
    top, least = best.theta[0], best.objective[0]
    jacobian = _slopes(form.log_loss, top, data)
    covariance = np.linalg.pinv(jacobian.T @ jacobian) * best.scale[0] ** 2
    places = [p for p, name in enumerate(form.names) if name in NAMES]
    lanes, lower, upper = [], [], []
    for p in places:
        for step in STEPS:
            lane = top + covariance[p] / covariance[p, p] * step * np.sqrt(covariance[p, p])
            lanes.append(np.clip(lane, low, high))
            lower.append(np.where(np.arange(len(top)) == p, lanes[-1], low))
            upper.append(np.where(np.arange(len(top)) == p, lanes[-1], high))
    held = minimise(form.log_loss, np.array(lanes), data, target, weight, np.array(lower), np.array(upper), LIKELIHOOD)
    drop = stats.chi2.ppf(level, 1) / 2 * len(runs) / freedom
    out = {}
    for i, p in enumerate(places):
        rows = slice(i * len(STEPS), (i + 1) * len(STEPS))
        theta, rise = held.theta[rows, p], held.objective[rows] - least
        ends = []
        for side in (np.flatnonzero(STEPS < 0)[::-1], np.flatnonzero(STEPS > 0)):
            x, y = np.append(top[p], theta[side]), np.append(0.0, rise[side])
            over = np.flatnonzero(y >= drop)
            if not len(over):
                ends.append(np.nan)
                continue
            j = over[0]
            # The root of the rise is nearly straight in theta: interpolate it.
            a, b = np.sqrt(max(y[j - 1], 0.0)), np.sqrt(y[j])
            x_end = x[j - 1] + (np.sqrt(drop) - a) / (b - a) * (x[j] - x[j - 1])
            whole = top.copy()
            whole[p] = x_end
            ends.append(float(form.coefficients(whole, at)[p]))
        out[form.names[p]] = (ends[0], ends[1])
    return out


def _slopes(log_loss, theta, data) -> np.ndarray:
    """[N, P] by differences: only the width of the grid depends on it."""
    steps = 1e-5 * np.eye(len(theta))
    return np.stack([np.asarray(log_loss(theta + s, data) - log_loss(theta - s, data)) / 2e-5 for s in steps], 1)
