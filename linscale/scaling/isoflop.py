"""IsoFLOP parabolas: approach 2 of Hoffmann et al. (arXiv 2203.15556, section 3.2), with intervals.

Runs whose compute differs by less than SAME form one budget. In each budget L is a parabola in log N by least squares;
its vertex is the best N of that budget, and D = C / (6 N). Straight lines of log N and log D on log C through the
vertices give N = N_coefficient C^N_exponent and D = D_coefficient C^D_exponent, C in FLOPs; the least losses of the
budgets give L = L_coefficient C^L_exponent. A budget of fewer than 3 sizes, or whose parabola opens downward, has no
vertex and is left out.

A parabola is not the law: with sizes far from the best the vertex is off by the law's third derivative (Hoffmann's
designs keep within about 4x). Intervals: runs drawn again within each budget, expanded percentiles of parametric.py.
"""

import dataclasses

import numpy as np

from linscale.config import ConfigError
from linscale.scaling.parametric import Runs, interval

SAME = 0.1  # of log C, between neighbours
NAMES = ("N_coefficient", "N_exponent", "D_coefficient", "D_exponent", "L_coefficient", "L_exponent")
FORMULA = "N = N_coefficient C^N_exponent, D = D_coefficient C^D_exponent, L = L_coefficient C^L_exponent"


@dataclasses.dataclass(frozen=True)
class Fit:
    runs: Runs
    values: np.ndarray  # [6], the order of NAMES
    draws: np.ndarray  # [S, 6]
    intervals: dict[str, tuple[float, float]]
    budgets: np.ndarray  # [G] FLOPs
    best_n: np.ndarray  # [G]
    best_loss: np.ndarray  # [G]
    objective: float  # sum of squares of L about the parabolas
    warnings: tuple[str, ...]

    @property
    def coefficients(self) -> dict[str, float]:
        return dict(zip(NAMES, map(float, self.values)))


def fit(runs: Runs, resamples: int = 1000, seed: int = 0) -> Fit:
    """Raises ConfigError with fewer than two budgets that have a vertex."""
    order = np.argsort(runs.compute, kind="stable")
    cuts = np.flatnonzero(np.diff(np.log(runs.compute[order])) > SAME) + 1
    groups, notes = [], []
    for rows in np.split(order, cuts):
        budget = float(np.exp(np.log(runs.compute[rows]).mean()))
        if len(np.unique(runs.n[rows])) < 3:
            notes.append(f"The budget {budget:.3g} has fewer than 3 sizes and is left out.")
            continue
        vertex, _, _ = _parabola(runs, rows[None])
        if not np.isfinite(vertex[0]):
            notes.append(f"The parabola of the budget {budget:.3g} opens downward; it is left out.")
            continue
        if not np.log(runs.n[rows]).min() <= vertex[0] <= np.log(runs.n[rows]).max():
            notes.append(f"The best N of the budget {budget:.3g} lies outside its sizes: extrapolated.")
        groups.append(rows)
    if len(groups) < 2:
        raise ConfigError(
            f"isoflop needs at least two budgets of at least 3 sizes each; the runs have {len(groups)}. "
            "Use --form chinchilla, which needs no budgets."
        )
    if len(groups) < 4:
        notes.append(f"Only {len(groups)} budgets: the exponents rest on {len(groups)} points.")
    log_c = np.array([np.log(runs.compute[rows]).mean() for rows in groups])
    vertices, losses, squares = zip(*(_parabola(runs, rows[None]) for rows in groups))
    best_n, best_loss = np.concatenate(vertices), np.concatenate(losses)
    values = _lines(log_c, best_n[None], best_loss[None])[0]

    rng, drawn_n, drawn_loss = np.random.default_rng(seed), [], []
    for rows in groups:
        vertex, least, _ = _parabola(runs, rows[rng.integers(0, len(rows), (resamples, len(rows)))])
        # The fewer the runs of a budget, the more their draws scatter too little: sqrt(m / (m - 3)) of the deviation.
        wider = np.sqrt(len(rows) / max(len(rows) - 3, 1))
        drawn_n.append(_widen(vertex, wider))
        drawn_loss.append(_widen(least, wider))
    draws = _lines(log_c, np.stack(drawn_n, 1), np.stack(drawn_loss, 1)) if resamples else np.empty((0, 6))
    draws = draws[np.isfinite(draws).all(1)]
    used = sum(map(len, groups))
    # The widening above has taken the place of the degrees of freedom.
    low, high = interval(draws, 10 * used, 1) if len(draws) else np.full((2, 6), np.nan)
    if len(draws) < 0.95 * resamples:
        notes.append(f"{resamples - len(draws)} of {resamples} draws have a parabola without a vertex; left out.")
    return Fit(
        runs=runs,
        values=values,
        draws=draws,
        intervals={name: (float(a), float(b)) for name, a, b in zip(NAMES, low, high)},
        budgets=np.exp(log_c),
        best_n=np.exp(best_n),
        best_loss=best_loss,
        objective=float(sum(s[0] for s in squares)),
        warnings=tuple(notes),
    )


def _widen(values, factor):
    middle = np.nanmedian(values)
    return middle + factor * (values - middle)


def _parabola(runs: Runs, rows_SM) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log N at the vertex, L there, and the sum of squares, [S]; NaN where there is no vertex."""
    x_SM, y_SM = np.log(runs.n[rows_SM]), runs.loss[rows_SM]
    middle_S = x_SM.mean(1, keepdims=True)
    z_SM = x_SM - middle_S
    columns_SMP = np.stack([np.ones_like(z_SM), z_SM, z_SM**2], -1)
    c_SP = (np.linalg.pinv(columns_SMP) @ y_SM[..., None])[..., 0]
    squares_S = ((y_SM - (columns_SMP * c_SP[:, None]).sum(-1)) ** 2).sum(1)
    distinct_S = (np.diff(np.sort(x_SM, 1), axis=1) > 1e-9).sum(1) >= 2
    curved_S = np.where((c_SP[:, 2] > 0) & distinct_S, c_SP[:, 2], np.nan)
    return (
        middle_S[:, 0] - c_SP[:, 1] / (2 * curved_S),
        c_SP[:, 0] - c_SP[:, 1] ** 2 / (4 * curved_S),
        squares_S,
    )


def _lines(log_c_G, log_n_SG, loss_SG) -> np.ndarray:
    """[S, 6]: the three power laws through the vertices; D = C / (6 N)."""
    middle = log_c_G.mean()
    x_G = log_c_G - middle
    out = []
    with np.errstate(invalid="ignore", over="ignore"):
        for y_SG in (log_n_SG, log_c_G - np.log(6) - log_n_SG, np.log(loss_SG)):
            slope_S = (y_SG * x_G).sum(1) / (x_G**2).sum()
            out += [np.exp(y_SG.mean(1) - slope_S * middle), slope_S]
    return np.stack(out, 1)
