"""The best N and D of a budget under a fitted law, the loss there, with intervals; the backtest of a law.

Compute is C = 6 N D, or as counted: then C / (N D) = k N^q is fitted to the runs' counted FLOPs by least squares, since
small models spend more of their compute outside of 6 N D. All tokens are taken to be unique.
"""

import dataclasses

import numpy as np

from linscale.config import ConfigError
from linscale.scaling.minimise import HUBER, Loss
from linscale.scaling.parametric import Fit, Runs, fit

COMPUTES = ("6nd", "counted")
GRID = 241  # sizes, over SPAN decades about the runs
SPAN = 4.0


@dataclasses.dataclass(frozen=True)
class Optimum:
    flops: float
    n: float
    d: float
    loss: float
    n_interval: tuple[float, float]
    d_interval: tuple[float, float]
    loss_interval: tuple[float, float]
    edge: bool  # no optimum inside the searched sizes


def optimum(found: Fit, flops: float, compute: str = "6nd") -> Optimum:
    k, q = cost(found, compute)
    # Search in decades about N = 20^-1/2 (C/6)^1/2, the usual optimum; wide enough for any law that makes sense.
    log_n = np.log(np.sqrt(flops / 6 / 20)) + np.log(10) * np.linspace(-SPAN, SPAN, GRID)
    values = np.concatenate([found.values[None], found.draws])
    n, loss, edge = _least(found, values, log_n, flops, k, q)
    d = flops / (k * n ** (1 + q))
    pairs = [tuple(map(float, found.interval(x[1:]))) if found.identified else (np.nan, np.nan) for x in (n, d, loss)]
    return Optimum(float(flops), float(n[0]), float(d[0]), float(loss[0]), *pairs, edge=bool(edge[0]))


def round_budgets(tables: list[Runs]) -> list[float]:
    """Five powers of ten in FLOPs, from a tenth or less of the greatest run to hundreds of times as much."""
    most = max(runs.compute.max() for runs in tables)
    return [float(f"1e{int(np.floor(np.log10(most))) - 1 + i}") for i in range(5)]


def cost(found: Fit, compute: str) -> tuple[float, float]:
    """k and q of C = k N^(1 + q) D."""
    if compute == "6nd":
        return 6.0, 0.0
    if found.runs.flops is None:
        raise ConfigError("--compute-model counted needs counted FLOPs: give --flops with --d, or use 6nd.")
    x = np.log(found.runs.n)
    y = np.log(found.runs.flops / (found.runs.n * found.runs.d))
    q, log_k = np.polyfit(x, y, 1) if np.ptp(x) > 0.05 else (0.0, y.mean())
    return float(np.exp(log_k)), float(q)


def _least(found: Fit, values_SP, log_n_G, flops, k, q):
    """Grid search and one parabola through the three lowest points, in log N: [S] N, loss, whether at the edge."""
    n_G = np.exp(log_n_G)
    d_G = flops / (k * n_G ** (1 + q))
    with np.errstate(over="ignore", invalid="ignore"):
        loss_SG = found.form.loss(values_SP[:, None], n_G, d_G, d_G)
    at_S = np.clip(np.nanargmin(loss_SG, 1), 1, len(n_G) - 2)
    edge_S = ~((at_S > 1) & (at_S < len(n_G) - 2))
    rows = np.arange(len(at_S))
    a, b, c = (loss_SG[rows, at_S + i] for i in (-1, 0, 1))
    curve = np.where(a - 2 * b + c > 0, a - 2 * b + c, np.inf)
    shift = np.clip(0.5 * (a - c) / curve, -1, 1)
    n_S = np.exp(log_n_G[at_S] + shift * (log_n_G[1] - log_n_G[0]))
    d_S = flops / (k * n_S ** (1 + q))
    return n_S, found.form.loss(values_SP, n_S, d_S, d_S), edge_S


@dataclasses.dataclass(frozen=True)
class Backtest:
    """The law of all but the k runs of greatest compute, against those."""

    fit: Fit
    names: tuple[str, ...]
    n: np.ndarray
    d: np.ndarray
    loss: np.ndarray
    predicted: np.ndarray
    low: np.ndarray  # 95 % for a new run: law and scatter
    high: np.ndarray

    @property
    def error(self) -> np.ndarray:
        """Relative, signed: positive where the law is too high."""
        return self.predicted / self.loss - 1

    @property
    def covered(self) -> int:
        return int(((self.low <= self.loss) & (self.loss <= self.high)).sum())


def check_backtest(runs: Runs, count: int) -> None:
    if not 0 < count < len(runs):
        raise ConfigError(f"--backtest is {count}; it must lie between 1 and {len(runs) - 1}, one less than the runs.")


def backtest(form, runs: Runs, count: int, loss: Loss = HUBER, resamples: int = 1000, seed: int = 0) -> Backtest:
    """Fits without the `count` runs of greatest compute and predicts them. Raises ConfigError if too few remain."""
    check_backtest(runs, count)
    order = np.argsort(runs.compute, kind="stable")
    found = fit(form, runs.take(np.sort(order[:-count])), loss, resamples, seed)
    held = runs.take(order[-count:])
    predicted = found.predict(held.n, held.d, held.unique)
    freedom = len(found.runs) - len(found.form.names)
    if len(found.draws) and freedom > 0:
        draws = found.predict_draws(held.n, held.d, held.unique)
        rng = np.random.default_rng(seed + 1)
        # Residuals are smaller than the scatter of new runs by the degrees of freedom that the fit has used.
        scatter = found.residuals * np.sqrt(len(found.runs) / freedom)
        low, high = found.interval(draws * np.exp(rng.choice(scatter, draws.shape)))
    else:
        low = high = np.full(count, np.nan)
    return Backtest(found, held.names, held.n, held.d, held.loss, predicted, low, high)
