"""Fitting a form of forms.py to a table of runs: coefficients, intervals, predictions, warnings.

Intervals: the runs are drawn again with replacement and refitted from the optimum. With P coefficients and n runs the
draws scatter too little by about sqrt((n - P) / n), and few runs have the tails of Student's t, so the percentiles are
those of the expanded interval of Hesterberg (arXiv 1411.5279, section 3.3): for 95 % the normal probability of
-sqrt(n / (n - P)) t_{0.975, n - P} instead of 2.5 %. Measured coverage: experiments/scaling/recovery.py.

Draw s of S, run n of N, coefficient p of P.
"""

import dataclasses

import numpy as np
from scipy import stats

from linscale.config import ConfigError
from linscale.scaling import forms
from linscale.scaling.minimise import HUBER, Loss, minimise

GRID = 12  # starts an exponent: 144 starts of two exponents
CLOSE = 0.15  # log D at a given log N must scatter by more than this, and the reverse


@dataclasses.dataclass(frozen=True)
class Runs:
    """Finished runs; float64 arrays of one length. unique None: no repeated tokens; flops None: 6 N D."""

    n: np.ndarray  # parameters
    d: np.ndarray  # tokens seen
    loss: np.ndarray  # nats per token
    unique: np.ndarray | None = None  # unique tokens
    flops: np.ndarray | None = None  # counted
    names: tuple[str, ...] = ()
    n_name: str = "N"
    d_name: str = "D"
    tasks: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # accuracy or error, by benchmark

    def __len__(self) -> int:
        return len(self.n)

    @property
    def compute(self) -> np.ndarray:
        return 6 * self.n * self.d if self.flops is None else self.flops

    @property
    def counted(self) -> str:
        return "6 N D" if self.flops is None else "as counted"

    def take(self, rows) -> "Runs":
        pick = {f: getattr(self, f) for f in ("n", "d", "loss", "unique", "flops")}
        pick = {f: v if v is None else v[rows] for f, v in pick.items()}
        names = tuple(np.array(self.names, object)[rows]) if self.names else ()
        tasks = {name: values[rows] for name, values in self.tasks.items()}
        return dataclasses.replace(self, names=names, tasks=tasks, **pick)


@dataclasses.dataclass(frozen=True)
class Fit:
    form: forms.Form
    runs: Runs
    loss: Loss
    values: np.ndarray  # [P] coefficients
    draws: np.ndarray  # [S, P]
    objective: float
    scale: float  # s of huber-scale
    warnings: tuple[str, ...]
    identified: bool

    @property
    def coefficients(self) -> dict[str, float]:
        return dict(zip(self.form.names, map(float, self.values)))

    @property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """95 %. NaN when the design cannot tell the exponents apart: a number would be an accident of the start."""
        if not self.identified:
            return dict.fromkeys(self.form.names, (np.nan, np.nan))
        low, high = self.interval(self.draws)
        return {name: (float(a), float(b)) for name, a, b in zip(self.form.names, low, high)}

    def interval(self, draws) -> np.ndarray:
        return interval(draws, len(self.runs), len(self.form.names))

    def predict(self, n, d, u=None) -> np.ndarray:
        return self.form.loss(self.values, n, d, d if u is None else u)

    def predict_draws(self, n, d, u=None) -> np.ndarray:
        """[S, ...] of each draw's law."""
        n, d = np.asarray(n, np.float64), np.asarray(d, np.float64)
        values = self.draws.reshape(len(self.draws), *([1] * n.ndim), -1)
        return self.form.loss(values, n, d, d if u is None else u)

    @property
    def residuals(self) -> np.ndarray:
        """log L minus the law's."""
        return np.log(self.runs.loss) - np.log(self.predict(self.runs.n, self.runs.d, self.runs.unique))


def interval(draws, runs: int, parameters: int, level: float = 0.95) -> np.ndarray:
    """[2, ...]: expanded percentiles over the first axis, see above. NaN if no degree of freedom is left."""
    freedom = runs - parameters
    if freedom < 1 or not len(draws):
        return np.full((2, *np.shape(draws)[1:]), np.nan)
    t = stats.t.ppf(0.5 + level / 2, freedom) * np.sqrt(runs / freedom)
    return np.percentile(draws, 100 * stats.norm.cdf([-t, t]), axis=0)


def fit(
    form: forms.Form | str,
    runs: Runs,
    loss: Loss = HUBER,
    resamples: int = 1000,
    seed: int = 0,
    starts: np.ndarray | None = None,
    grid: int = GRID,
) -> Fit:
    """The best of many starts and `resamples` bootstrap refits. starts: coefficients [S, P] instead of the grid, which
    has `grid` values of each exponent.

    Raises ConfigError for data that cannot be fitted at all; doubtful data get a sentence in Fit.warnings.
    """
    form = forms.FORMS[form] if isinstance(form, str) else form
    check(form, runs)
    at = forms.frame(runs.n, runs.d)
    data, target = forms.data(runs.n, runs.d, runs.unique, at), np.log(runs.loss)
    low, high = forms.bounds(form, at, target)
    if starts is None:
        starts = form.starts(runs.n, runs.d, runs.unique, runs.loss, grid)
    theta = form.theta(starts, at)
    theta = theta[np.isfinite(theta).all(1)]
    found = minimise(form.log_loss, theta, data, target, np.ones((1, len(runs))), low, high, loss)
    best = int(np.argmin(found.objective))
    values = form.coefficients(found.theta[best], at)
    warnings, identified = doubts(form, runs)
    if not found.converged[best]:
        warnings.append("The best start had not converged; the coefficients are not to be trusted.")

    draws = np.empty((0, len(values)))
    if resamples:
        rng = np.random.default_rng(seed)
        pick = rng.integers(0, len(runs), (resamples, len(runs)))
        weight = np.zeros((resamples, len(runs)))
        np.add.at(weight, (np.arange(resamples)[:, None], pick), 1.0)
        begin = np.tile(found.theta[best], (resamples, 1))
        # Back from the bound where a term is zero: there it has no slope and no draw could leave.
        begin = np.clip(begin, np.where(low < np.log(1e-6), low + np.log(1e8), low), high)
        refits = minimise(form.log_loss, begin, data, target, weight, low, high, loss)
        # Draws that still creep along a flat valley are the far ones: leaving them out would narrow the intervals.
        draws = form.coefficients(refits.theta, at)
        if (creeping := int((~refits.converged).sum())) > 0.01 * resamples:
            warnings.append(
                f"{creeping} of {resamples} bootstrap refits had not converged; they are kept as they stood."
            )
    objective = found.objective[best] / (len(runs) if loss.reduction == "mean" else 1)
    out = Fit(form, runs, loss, values, draws, float(objective), float(found.scale[best]), tuple(warnings), identified)
    return dataclasses.replace(out, warnings=(*out.warnings, *_wide(out)))


def check(form: forms.Form, runs: Runs) -> None:
    if len(runs) < len(form.names):
        raise ConfigError(
            f"{len(runs)} runs cannot determine the {len(form.names)} coefficients of {form.name} "
            f"({', '.join(form.names)}); give more runs or a form with fewer coefficients."
        )
    if (points := len(set(zip(runs.n.tolist(), runs.d.tolist())))) < len(form.names):
        raise ConfigError(
            f"{len(runs)} runs with {points} different pairs of N and D cannot determine the {len(form.names)} "
            f"coefficients of {form.name} ({', '.join(form.names)}); give runs of other sizes."
        )
    if form.needs_unique and runs.unique is None:
        raise ConfigError(f"{form.name} needs the unique tokens of each run; name their column with --unique.")


def doubts(form: forms.Form, runs: Runs) -> tuple[list[str], bool]:
    """Sentences on what the design cannot tell, and whether the exponents can be told apart at all."""
    notes, identified = [], True
    x, y = np.log(runs.n), np.log(runs.d)
    if len(runs) == len(form.names):
        notes.append(f"As many runs as coefficients ({len(runs)}): the law passes through all, intervals do not exist.")
    elif len(runs) < 2 * len(form.names):
        notes.append(f"{len(runs)} runs for {len(form.names)} coefficients: the intervals cannot be trusted.")
    for one, name in ((x, "N"), (y, "D")):
        if np.ptp(one) < 0.05:
            identified = False
            notes.append(f"{name} is the same in all runs: its exponent cannot be identified.")
    if identified and min(_scatter(x, y), _scatter(y, x)) < CLOSE:
        identified = False
        notes.append(
            "D is (nearly) a power of N in these runs, as with one ratio D/N: the exponents of N and D cannot be told "
            "apart, so no intervals are given; add runs of other D/N."
        )
    if np.ptp(np.log(runs.compute)) < 0.2:
        notes.append("All runs have (nearly) one compute budget: how the loss falls with compute is not identified.")
    if runs.unique is not None and form.needs_unique and (runs.d <= runs.unique * 1.05).all():
        notes.append("No run repeats tokens (D <= U): R_D and R_N cannot be identified.")
    return notes, identified


def _scatter(x, y) -> float:
    """Standard deviation of y about its straight line in x."""
    slope, intercept = np.polyfit(x, y, 1)
    return float(np.std(y - intercept - slope * x))


def _wide(found: Fit) -> list[str]:
    """Exponents and E that the draws leave open."""
    notes = []
    if not found.identified or not len(found.draws):
        return notes
    for name, (low, high) in found.intervals.items():
        if name.startswith(("alpha", "beta")) and high > 3 * max(low, 1e-3):
            notes.append(f"{name} is hardly identified: its 95 % interval is {low:.3g} to {high:.3g}.")
        if name.startswith("R_") and high > 100 * max(low, 1e-3):
            notes.append(f"{name} is hardly identified: its 95 % interval is {low:.3g} to {high:.3g}.")
        if name == "E" and low < 1e-3 * found.runs.loss.min():
            notes.append("The irreducible loss E cannot be told from zero in these runs.")
    return notes
