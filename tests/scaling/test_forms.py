"""The parametric fits against planted laws, against scipy, and against the scale of the objective."""

import itertools

import jax
import numpy as np
import pytest
from scipy.optimize import minimize

from linscale.config import ConfigError
from linscale.scaling import forms, isoflop, optimum, parametric
from linscale.scaling.minimise import KINDS, Loss, minimise

pytestmark = pytest.mark.usefixtures("many_fits")
PLANTED = {
    "chinchilla": (1.69, 406.4, 410.7, 0.34, 0.28),
    "chinchilla-no-e": (25.0, 30.0, 0.15, 0.14),
    "chinchilla-tied": (1.69, 300.0, 600.0, 0.3),
    "kaplan": (6.4e13, 1.8e13, 0.076, 0.103),
    "data-constrained": (1.87, 521.0, 1488.0, 0.353, 0.353, 15.4, 5.3),
}


def simulate(name, seed=0, count=100, noise=0.01):
    rng = np.random.default_rng(seed)
    n = 10 ** rng.uniform(7.6, 10.2, count)
    d = n * 10 ** rng.uniform(0, 2.5, count)
    unique = d / 10 ** (rng.uniform(0, 1.8, count) * (rng.uniform(size=count) < 0.8))
    loss = forms.FORMS[name].loss(PLANTED[name], n, d, unique) + rng.normal(0, noise, count)
    return parametric.Runs(n, d, loss, unique=unique)


@pytest.mark.parametrize("name", PLANTED)
def test_formula_in_logarithms_is_the_formula(name):
    runs, form = simulate(name), forms.FORMS[name]
    at = forms.frame(runs.n, runs.d)
    theta = form.theta(np.array(PLANTED[name]), at)
    np.testing.assert_allclose(form.coefficients(theta, at), PLANTED[name], rtol=1e-9)
    with jax.enable_x64(True):
        got = form.log_loss(theta, forms.data(runs.n, runs.d, runs.unique, at))
    np.testing.assert_allclose(got, np.log(form.loss(PLANTED[name], runs.n, runs.d, runs.unique)), rtol=1e-9)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n == "data-constrained")) for n in PLANTED]
)
def test_noiseless_runs_give_the_planted_coefficients(name):
    found = parametric.fit(name, simulate(name, noise=0), resamples=0)
    np.testing.assert_allclose(found.values, PLANTED[name], rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_not_worse_than_scipy(kind):
    """The objective, written again by hand, is at our optimum no higher than where simplex search ends from there."""
    runs, delta = simulate("chinchilla"), 1e-3
    found = parametric.fit("chinchilla", runs, Loss(kind, delta), resamples=0)

    def objective(c):
        law = c[0] + np.exp(c[1]) * runs.n ** -c[3] + np.exp(c[2]) * runs.d ** -c[4]
        r = runs.loss - law if kind == "lsq-unlogged" else np.log(runs.loss) - np.log(law)
        s = np.exp(c[5]) if kind == "huber-scale" else 1.0
        u = np.abs(r / s)
        rho = 0.5 * u**2 if kind.startswith("lsq") else np.where(u <= delta, 0.5 * u**2, delta * (u - delta / 2))
        return rho.sum() + len(r) * np.log(s)

    v = found.values
    here = [v[0], np.log(v[1]), np.log(v[2]), v[3], v[4], np.log(found.scale)]
    assert objective(here) == pytest.approx(found.objective, rel=1e-9)
    search = minimize(objective, here, method="Nelder-Mead", options={"maxiter": 4000, "xatol": 1e-9, "fatol": 1e-12})
    assert found.objective <= search.fun + 1e-7 * abs(search.fun)


@pytest.mark.parametrize("kind", KINDS)
def test_scale_of_the_objective_does_not_matter(kind):
    """Sum, mean, times 1e6: the same minimum. Here the objective is really multiplied, by its weights."""
    runs, form = simulate("chinchilla", seed=3), forms.FORMS["chinchilla"]
    at = forms.frame(runs.n, runs.d)
    data, target = forms.data(runs.n, runs.d, None, at), np.log(runs.loss)
    theta = form.theta(form.starts(runs.n, runs.d, None, runs.loss, 4), at)
    found = []
    for factor in (1.0, 1 / len(runs), 1e6, 1e-6):
        weight = np.full((1, len(runs)), factor)
        out = minimise(form.log_loss, theta, data, target, weight, *forms.bounds(form, at, target), Loss(kind))
        found.append(form.coefficients(out.theta[np.argmin(out.objective)], at))
    np.testing.assert_allclose(found[1:], [found[0]] * 3, rtol=1e-4)


def test_reduction_changes_the_objective_alone():
    runs = simulate("chinchilla")
    total, mean = (parametric.fit("chinchilla", runs, Loss(reduction=r), resamples=0) for r in ("sum", "mean"))
    np.testing.assert_array_equal(total.values, mean.values)
    assert total.objective == pytest.approx(100 * mean.objective)


@pytest.mark.slow
def test_hoffmann_starts_reach_the_same_minimum():
    runs = simulate("chinchilla")
    grid = np.array(list(itertools.product((-1, 0, 1), (0, 10, 20), (0, 10, 20), (0.5, 1), (0.5, 1))), float)
    starts = np.column_stack([np.exp(grid[:, :3]), grid[:, 3:]])
    theirs = parametric.fit("chinchilla", runs, resamples=0, starts=starts)
    np.testing.assert_allclose(theirs.values, parametric.fit("chinchilla", runs, resamples=0).values, rtol=1e-5)


def test_float64_stays_inside():
    parametric.fit("chinchilla", simulate("chinchilla"), resamples=200)  # programs of the next test
    assert jax.numpy.ones(1).dtype == np.float32


def test_intervals_hold_the_planted_coefficients_and_the_optimum():
    inside = []
    for seed in range(8):
        found = parametric.fit("chinchilla", simulate("chinchilla", seed), resamples=200, seed=seed)
        inside += [a <= v <= b for v, (a, b) in zip(PLANTED["chinchilla"], found.intervals.values())]
        e, a, b, alpha, beta = PLANTED["chinchilla"]
        best = optimum.optimum(found, 1e21)
        n = (alpha * a / (beta * b)) ** (1 / (alpha + beta)) * (1e21 / 6) ** (beta / (alpha + beta))  # eq. 4
        d = 1e21 / 6 / n
        pairs = zip((n, d, e + a * n**-alpha + b * d**-beta), (best.n_interval, best.d_interval, best.loss_interval))
        inside += [low <= v <= high for v, (low, high) in pairs]
        assert best.n == pytest.approx(n, rel=0.15) and 6 * best.n * best.d == pytest.approx(1e21)
    assert sum(inside) >= 0.85 * len(inside)


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANTED)
def test_coverage(name):
    """Issue 4: at least 90 of 100 simulations, each coefficient. About a minute a form."""
    inside = np.zeros(len(PLANTED[name]))
    for seed in range(100):
        found = parametric.fit(name, simulate(name, seed), resamples=500, seed=seed)
        inside += [a <= v <= b for v, (a, b) in zip(PLANTED[name], found.intervals.values())]
    assert (inside >= 90).all(), dict(zip(forms.FORMS[name].names, inside))


def test_ratio_without_spread_is_named_and_has_no_intervals():
    runs = simulate("chinchilla")
    d = 20 * runs.n
    runs = parametric.Runs(runs.n, d, forms.FORMS["chinchilla"].loss(PLANTED["chinchilla"], runs.n, d, d))
    found = parametric.fit("chinchilla", runs, resamples=20)
    assert "cannot be told apart" in " ".join(found.warnings)
    assert np.isnan(list(found.intervals.values())).all()


def test_one_budget_and_one_size_are_named():
    runs = simulate("chinchilla")
    d = 1e21 / 6 / runs.n
    one = parametric.Runs(runs.n, d, forms.FORMS["chinchilla"].loss(PLANTED["chinchilla"], runs.n, d, d))
    assert any("one compute budget" in note for note in parametric.doubts(forms.FORMS["chinchilla"], one)[0])
    same = parametric.Runs(np.full(100, 1e9), runs.d, runs.loss)
    notes, identified = parametric.doubts(forms.FORMS["chinchilla"], same)
    assert not identified and "N is the same in all runs" in notes[0]


def test_too_few_runs():
    with pytest.raises(ConfigError, match="4 runs cannot determine the 5 coefficients"):
        parametric.fit("chinchilla", simulate("chinchilla", count=4))
    found = parametric.fit("chinchilla", simulate("chinchilla", count=5), resamples=5)
    assert "As many runs as coefficients" in found.warnings[0]
    assert np.isnan(found.intervals["E"]).all()


def test_backtest_of_a_planted_law():
    test = optimum.backtest("chinchilla", simulate("chinchilla"), 10, resamples=300)
    assert len(test.fit.runs) == 90 and test.fit.runs.compute.max() <= (6 * test.n * test.d).min()
    assert np.abs(test.error).max() < 0.02
    assert test.covered >= 8
    assert 0.02 < np.median(test.high - test.low) < 0.12, "noise of sd 0.01 gives about 0.04"


def isoflop_runs(noise, seed=0):
    """Parabolas in log N with vertices at N = 0.1 C^0.5."""
    budget = np.repeat(np.geomspace(1e18, 1e21, 7), 9)
    n = 0.1 * budget**0.5 * np.tile(np.geomspace(0.3, 3, 9), 7)
    loss = 30 * budget**-0.05 + 0.05 * np.log(n / (0.1 * budget**0.5)) ** 2
    return parametric.Runs(n, budget / 6 / n, loss + np.random.default_rng(seed).normal(0, noise, 63))


def test_isoflop_finds_planted_vertices():
    found = isoflop.fit(isoflop_runs(0), resamples=10)
    c = found.coefficients
    assert c["N_exponent"] == pytest.approx(0.5, abs=1e-9) and c["N_coefficient"] == pytest.approx(0.1, rel=1e-6)
    assert c["L_exponent"] == pytest.approx(-0.05, abs=1e-9) and c["L_coefficient"] == pytest.approx(30, rel=1e-6)
    assert c["D_exponent"] == pytest.approx(0.5, abs=1e-9)
    inside = 0
    for seed in range(20):
        low, high = isoflop.fit(isoflop_runs(0.01, seed), resamples=200).intervals["N_exponent"]
        inside += low <= 0.5 <= high
        assert high - low < 0.2
    assert inside >= 17


def test_isoflop_names_budgets_that_it_cannot_use():
    runs = isoflop_runs(0)
    with pytest.raises(ConfigError, match="at least two budgets"):
        isoflop.fit(runs.take(np.arange(9)), resamples=2)
    found = isoflop.fit(runs.take(np.r_[0:20]), resamples=2)
    assert "fewer than 3 sizes" in found.warnings[0] and "Only 2 budgets" in found.warnings[1]
