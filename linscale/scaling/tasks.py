"""The second step from loss to a task: accuracy (or error) of a benchmark as a function of the loss of the same runs.

sigmoid      y = floor + rise / (1 + exp(slope (L - middle)))   rc accuracy of the OLMo ladder (arXiv 2412.04403), eq. 3
exponential  y = level - gain exp(-decay L)                     top-1 error of Gadre et al. 2024 (arXiv 2403.08540), eq. 5

Least squares of y. The first step is any fit of L(N, D) to the same runs; both steps use the same draws of the runs, so
that the interval of a prediction from N and D holds the uncertainty of both. L is the column of the first step, which
may be a task's own bits per byte.

Run n of N, draw s of S, coefficient p of 4 or 3.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from linscale.config import ConfigError
from linscale.scaling import optimum, parametric, printing
from linscale.scaling.minimise import Loss, minimise

NAMES = {"sigmoid": ("floor", "rise", "slope", "middle"), "exponential": ("level", "gain", "decay")}
FORMULAS = {
    "sigmoid": "y = floor + rise / (1 + exp(slope (L - middle)))",
    "exponential": "y = level - gain exp(-decay L)",
}


@dataclasses.dataclass(frozen=True)
class Task:
    name: str
    form: str
    values: np.ndarray  # [P]
    draws: np.ndarray  # [S, P]
    intervals: dict[str, tuple[float, float]]
    rms: float  # of y about the law at the measured losses
    rms_both: float  # at the losses that the first step gives
    loss: np.ndarray  # [N]
    y: np.ndarray  # [N]
    warnings: tuple[str, ...]

    @property
    def coefficients(self) -> dict[str, float]:
        return dict(zip(NAMES[self.form], map(float, self.values)))

    def __call__(self, loss) -> np.ndarray:
        return curve(self.form, self.values, loss)


def curve(form: str, values, loss) -> np.ndarray:
    """values [..., P], loss [...] -> y."""
    parts = np.moveaxis(np.asarray(values, np.float64), -1, 0)
    if form == "sigmoid":
        floor, rise, slope, middle = parts
        return floor + rise / (1 + np.exp(np.clip(slope * (loss - middle), -500, 500)))
    level, gain, decay = parts
    return level - gain * np.exp(-decay * loss)


def _sigmoid(theta, data):
    return theta[0] + theta[1] * jax.nn.sigmoid(-jnp.exp(theta[2]) * (data["x"] - theta[3]))


def _exponential(theta, data):
    return theta[0] - theta[1] * jnp.exp(-jnp.exp(theta[2]) * data["x"])


def fit(name: str, form: str, y, first: parametric.Fit, resamples: int = 1000, seed: int = 0) -> Task:
    """y [N] of the runs of the first step. Raises ConfigError for fewer runs than coefficients."""
    y, loss = np.asarray(y, np.float64), first.runs.loss
    size = len(NAMES[form])
    if len(y) <= size:
        raise ConfigError(f"{len(y)} runs cannot determine the {size} coefficients of {form} for {name}.")
    centre, spread, height = loss.mean(), loss.std() or 1.0, y.std() or 1.0
    data, target = {"x": (loss - centre) / spread}, (y - y.mean()) / height
    if form == "sigmoid":
        law, low, high = _sigmoid, [-30, 0, -4, -6], [30, 60, 4, 6]
        starts = [
            (target.min() - a, np.ptp(target) + 2 * a, np.log(s), m)
            for a in (0.1, 1)
            for s in (0.7, 2, 5)
            for m in (-1, 0, 1)
        ]
        if np.corrcoef(loss, y)[0, 1] > 0:  # an error rate rises with the loss
            low[1], high[1] = -60, 0
            starts = [(target.max() + a - 0.1, -r, s, m) for a, r, s, m in starts for a in (0.2,)]
    else:
        law, low, high = _exponential, [-300, -600, -5], [300, 600, 3]
        sign = 1 if np.corrcoef(loss, y)[0, 1] > 0 else -1
        starts = [(sign * g, sign * g, np.log(k)) for g in (1, 4) for k in (0.1, 0.5, 2)]
    low, high = np.array(low, float), np.array(high, float)
    weight = np.ones((1, len(y)))
    found = minimise(law, np.array(starts), data, target, weight, low, high, Loss("lsq"))
    best = int(np.argmin(found.objective))

    def plain(theta):
        theta = np.moveaxis(theta, -1, 0)
        rate = np.exp(theta[2]) / spread
        if form == "sigmoid":
            return np.stack([y.mean() + height * theta[0], height * theta[1], rate, centre + spread * theta[3]], -1)
        gain = height * theta[1] * np.exp(np.minimum(rate * centre, 600))
        return np.stack([y.mean() + height * theta[0], gain, rate], -1)

    values, draws, notes = plain(found.theta[best]), np.empty((0, size)), []
    if not found.converged[best]:
        notes.append(f"The law of {name} had not converged.")
    if ((found.theta[best] <= low) | (found.theta[best] >= high)).any():
        notes.append(f"The law of {name} ends at a bound: its runs do not show both ends of the curve.")
    if resamples:
        pick = np.random.default_rng(seed).integers(0, len(y), (resamples, len(y)))  # the draws of parametric.fit
        drawn = np.zeros((resamples, len(y)))
        np.add.at(drawn, (np.arange(resamples)[:, None], pick), 1.0)
        again = minimise(law, np.tile(found.theta[best], (resamples, 1)), data, target, drawn, low, high, Loss("lsq"))
        draws = plain(again.theta)
    bounds = parametric.interval(draws, len(y), size)
    predicted = curve(form, values, first.predict(first.runs.n, first.runs.d, first.runs.unique))
    return Task(
        name=name,
        form=form,
        values=values,
        draws=draws,
        intervals={key: (float(a), float(b)) for key, a, b in zip(NAMES[form], *bounds)},
        rms=float(np.sqrt(np.mean((y - curve(form, values, loss)) ** 2))),
        rms_both=float(np.sqrt(np.mean((y - predicted) ** 2))),
        loss=loss,
        y=y,
        warnings=tuple(notes),
    )


def predict(task: Task, first: parametric.Fit, n, d, u=None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """y at N, D by both steps, and its 95 % interval (of the law, without the scatter of a run)."""
    y = task(first.predict(n, d, u))
    if not len(task.draws) or len(task.draws) != len(first.draws) or not first.identified:
        return y, np.full_like(y, np.nan), np.full_like(y, np.nan)
    losses = first.predict_draws(n, d, u)
    draws = curve(task.form, task.draws.reshape(len(task.draws), *([1] * np.ndim(n)), -1), losses)
    low, high = parametric.interval(draws, len(task.y), len(first.form.names) + len(NAMES[task.form]))
    return y, low, high


def as_lines(task: Task) -> list[str]:
    lines = [f"{task.name}: {FORMULAS[task.form]}, least squares; L is the loss column of the first step."]
    rows = [(key, value, *task.intervals[key]) for key, value in task.coefficients.items()]
    lines += printing.table(("coefficient", "value", "95 % low", "95 % high"), rows)
    return [*lines, f"rms error {task.rms:.4g} at the measured losses, {task.rms_both:.4g} from N and D by both steps"]


def as_json(task: Task, first: parametric.Fit, budgets=(), compute: str = "6nd") -> dict:
    """budgets: FLOPs; the task at the N and D that are best for the loss."""
    out = {
        "task": task.name,
        "form": task.form,
        "coefficients": task.coefficients,
        "intervals": {key: list(map(printing.finite, pair)) for key, pair in task.intervals.items()},
        "rms": task.rms,
        "rms_from_n_and_d": task.rms_both,
    }
    if budgets:
        out["optimal"] = []
    for budget in budgets:
        best = optimum.optimum(first, budget, compute)
        y, low, high = (float(v) for v in predict(task, first, np.float64(best.n), np.float64(best.d)))
        out["optimal"].append(
            printing.plain({"flops": best.flops, "n": best.n, "d": best.d, "y": y, "interval": (low, high)})
        )
    return out
