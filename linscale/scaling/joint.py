"""Do architectures share their exponents? One law for several groups of runs, compared by likelihood.

Three models of a form of forms.py, each nested in the next:
  one law            the same coefficients for every group
  shared exponents   exponents in common, the other coefficients a group's own
  separate           every coefficient a group's own
All three have one scatter s in common. They are compared by the likelihood of Huber's density with a fitted scale and
delta 1.345 s, whatever loss the coefficients of the single fits minimise: it is nearly that of normal noise and
tolerates stragglers, while twice the log likelihood ratio of Huber's loss with delta 1e-3 (Laplace's density, in
effect) is about pi / 2 too large where the noise is normal.

- likelihood ratio of neighbours: twice the difference in log likelihood, chi squared of the difference in coefficients,
  after Bartlett's manner scaled by (n - P) / n with P of the larger model, for small n;
- AICc (Hurvich and Tsai 1989) and BIC, with the scale counted as a parameter.
The verdict is the model of least AICc; BIC and the p values stand beside it.

Run n of N, group g of G, coefficient p of P; theta: shared ones first, then each group's own.
"""

import dataclasses
import functools
import itertools

import jax.numpy as jnp
import numpy as np
from scipy import stats

from linscale.config import ConfigError
from linscale.scaling import forms, parametric, printing
from linscale.scaling.minimise import Loss, minimise

LIKELIHOOD = Loss("huber-scale", 1.345)
EXPONENTS = ("alpha", "beta", "alpha_N", "alpha_D")
MODELS = ("one law", "shared exponents", "separate")


@dataclasses.dataclass(frozen=True)
class Model:
    name: str
    parameters: int  # coefficients and the scale
    log_likelihood: float  # without the constant of the density
    aicc: float
    bic: float
    coefficients: dict[str, dict[str, float]]  # by group
    converged: bool


@dataclasses.dataclass(frozen=True)
class Joint:
    form: str
    models: tuple[Model, ...]
    p_values: dict[str, float]  # "one law | shared exponents": of the simpler, against the richer
    verdict: str
    exponents: dict[str, tuple[float, float, float]]  # shared ones: value, low, high
    warnings: tuple[str, ...]


def fit(form: forms.Form | str, groups: dict[str, parametric.Runs], resamples: int = 1000, seed: int = 0) -> Joint:
    """Raises ConfigError with fewer than two groups, or too few runs in one for its own law."""
    form = forms.FORMS[form] if isinstance(form, str) else form
    if len(groups) < 2:
        raise ConfigError("A joint fit compares at least two groups of runs; there is one.")
    for name, runs in groups.items():
        if len(runs) <= len(form.names):
            raise ConfigError(
                f"{name} has {len(runs)} runs; the joint fit of {form.name} needs more than {len(form.names)} of each group."
            )
        parametric.check(form, runs)
    stacked = _stack(list(groups.values()))
    group_N = np.repeat(np.arange(len(groups)), [len(runs) for runs in groups.values()])
    at = forms.frame(stacked.n, stacked.d)
    data = forms.data(stacked.n, stacked.d, stacked.unique, at) | {"group": group_N.astype(float)}
    target = np.log(stacked.loss)
    low, high = forms.bounds(form, at, target)
    own = _single(form, stacked, group_N, data, target, low, high, at)
    models, thetas = [], {}
    for name in MODELS:
        shared = _shared(form, name)
        start = _pack(own, shared)
        bounds = [_pack(np.tile(b, (len(groups), 1)), shared) for b in (low, high)]
        starts = np.stack([start, _pack(np.tile(own.mean(0), (len(groups), 1)), shared)])
        law = _log_loss(form.log_loss, shared, len(groups))
        found = minimise(law, starts, data, target, np.ones((1, len(target))), *bounds, LIKELIHOOD)
        best = int(np.argmin(found.objective))
        thetas[name] = found.theta[best]
        models.append(_model(form, name, found, best, len(target), list(groups), shared, at))
    p_values = {}
    for simple, rich in itertools.pairwise(models):
        ratio = 2 * (rich.log_likelihood - simple.log_likelihood) * (len(target) - rich.parameters + 1) / len(target)
        degrees = rich.parameters - simple.parameters
        p_values[f"{simple.name} | {rich.name}"] = float(stats.chi2.sf(max(ratio, 0.0), degrees))
    usable = [model for model in models if np.isfinite(model.aicc)]
    verdict = min(usable, key=lambda model: model.aicc).name if usable else "undecided: too few runs"
    warnings = [f"The fit '{model.name}' had not converged." for model in models if not model.converged]
    exponents = _intervals(
        form, thetas["shared exponents"], groups, group_N, data, target, low, high, at, resamples, seed
    )
    return Joint(form.name, tuple(models), p_values, verdict, exponents, tuple(warnings))


def _stack(tables: list[parametric.Runs]) -> parametric.Runs:
    def column(name):
        values = [getattr(table, name) for table in tables]
        return None if any(value is None for value in values) else np.concatenate(values)

    return parametric.Runs(column("n"), column("d"), column("loss"), column("unique"))


def _single(form, stacked, group_N, data, target, low, high, at) -> np.ndarray:
    """[G, P] theta of each group alone, to start from: weights pick the group."""
    own = []
    for g in range(int(group_N.max()) + 1):
        inside = group_N == g
        unique = None if stacked.unique is None else stacked.unique[inside]
        starts = form.theta(form.starts(stacked.n[inside], stacked.d[inside], unique, stacked.loss[inside], 8), at)
        starts = starts[np.isfinite(starts).all(1)]
        base = {key: value for key, value in data.items() if key != "group"}
        found = minimise(form.log_loss, starts, base, target, inside[None].astype(float), low, high, LIKELIHOOD)
        own.append(found.theta[np.argmin(found.objective)])
    return np.array(own)


def _shared(form: forms.Form, model: str) -> tuple[bool, ...]:
    return tuple(model == "one law" or (model != "separate" and name in EXPONENTS) for name in form.names)


def _pack(own_GP, shared) -> np.ndarray:
    shared = np.array(shared)
    return np.concatenate([own_GP[:, shared].mean(0), own_GP[:, ~shared].ravel()])


def _unpack(theta, shared, groups, stack=np.stack):
    """[..., G, P] from theta [..., Q]."""
    common, rows = sum(shared), []
    each = len(shared) - common
    for g in range(groups):
        before = iter(range(common))
        after = iter(range(common + g * each, common + (g + 1) * each))
        rows.append(stack([theta[..., next(before if s else after)] for s in shared], -1))
    return stack(rows, -2)


@functools.cache
def _log_loss(base, shared, groups):
    def law(theta, data):
        own_GP = _unpack(theta, shared, groups, jnp.stack)
        rest = {key: value for key, value in data.items() if key != "group"}
        return sum(jnp.where(data["group"] == g, base(own_GP[g], rest), 0.0) for g in range(groups))

    return law


def _model(form, name, found, best, runs, groups, shared, at) -> Model:
    parameters = len(found.theta[best]) + 1
    log_likelihood = -float(found.objective[best])
    own = form.coefficients(_unpack(found.theta[best], shared, len(groups)), at)
    rest = runs - parameters - 1
    aic = 2 * parameters - 2 * log_likelihood
    return Model(
        name=name,
        parameters=parameters,
        log_likelihood=log_likelihood,
        aicc=aic + 2 * parameters * (parameters + 1) / rest if rest > 0 else np.nan,
        bic=parameters * np.log(runs) - 2 * log_likelihood,
        coefficients={group: dict(zip(form.names, map(float, row))) for group, row in zip(groups, own)},
        converged=bool(found.converged[best]),
    )


def _intervals(form, theta, groups, group_N, data, target, low, high, at, resamples, seed):
    """Of the shared exponents: runs drawn again within each group."""
    if not resamples:
        return {}
    shared = _shared(form, "shared exponents")
    rng = np.random.default_rng(seed)
    weight = np.zeros((resamples, len(target)))
    for g in range(len(groups)):
        rows = np.flatnonzero(group_N == g)
        pick = rows[rng.integers(0, len(rows), (resamples, len(rows)))]
        np.add.at(weight, (np.arange(resamples)[:, None], pick), 1.0)
    bounds = [_pack(np.tile(b, (len(groups), 1)), shared) for b in (low, high)]
    law = _log_loss(form.log_loss, shared, len(groups))
    found = minimise(law, np.tile(theta, (resamples, 1)), data, target, weight, *bounds, LIKELIHOOD)

    def first(theta):
        return form.coefficients(_unpack(theta, shared, len(groups)), at)[..., 0, :]

    pairs = parametric.interval(first(found.theta), len(target), len(theta))
    value = first(theta)
    return {
        name: (float(value[p]), float(pairs[0, p]), float(pairs[1, p]))
        for p, name in enumerate(form.names)
        if shared[p]
    }


def as_lines(found: Joint) -> list[str]:
    lines = ["Do the groups share a law? Huber likelihood of log L with one fitted scale, delta 1.345:"]
    lines += printing.table(
        ("model", "parameters", "log likelihood", "AICc", "BIC"),
        [(m.name, m.parameters, f"{m.log_likelihood:.2f}", f"{m.aicc:.1f}", f"{m.bic:.1f}") for m in found.models],
    )
    lines += [f"p of '{simple}' against '{rich}': {p:.3g}" for simple, rich, p in _pairs(found)]
    lines.append(f"Least AICc: {found.verdict}.")
    if found.exponents:
        lines += ["", "Shared exponents:"]
        rows = [(name, *values) for name, values in found.exponents.items()]
        lines += printing.table(("exponent", "value", "95 % low", "95 % high"), rows)
    return lines + [f"Warning: {note}" for note in found.warnings]


def as_json(found: Joint) -> dict:
    return {
        "form": found.form,
        "likelihood": {"kind": LIKELIHOOD.kind, "delta": LIKELIHOOD.delta},
        "models": [printing.plain(dataclasses.asdict(model)) for model in found.models],
        "p_values": [{"simpler": a, "richer": b, "p": p} for a, b, p in _pairs(found)],
        "verdict": found.verdict,
        "exponents": {name: printing.plain({"v": values})["v"] for name, values in found.exponents.items()},
        "warnings": list(found.warnings),
    }


def _pairs(found: Joint):
    return [(*key.split(" | "), p) for key, p in found.p_values.items()]
