"""Shared or separate exponents, profile likelihood, the law of a task: planted truths, independent likelihoods."""

import csv
import json

import numpy as np
import pytest
from scipy.optimize import minimize
from test_forms import PLANTED, simulate

from linscale.config import ConfigError
from linscale.scaling import fit, forms, joint, parametric, profile, tasks

NAMES = ("llama", "tnl", "hgrn2")


def groups(truth, seed=0, count=30, noise=0.01):
    """truth: what the groups have in common, see joint.MODELS."""
    rng, out = np.random.default_rng(seed), {}
    for g, name in enumerate(NAMES):
        c = np.array(PLANTED["chinchilla"])
        if truth != "one law":
            c[:3] *= 1 + 0.03 * g, 1 + 0.2 * g, 1 - 0.1 * g
        if truth == "separate":  # other slopes about the middle of the design
            c[1:] *= np.exp(0.025 * g * 20.5), np.exp(-0.025 * g * 23), 1, 1
            c[3:] += 0.025 * g, -0.025 * g
        n = 10 ** rng.uniform(7.6, 10.2, count)
        d = n * 10 ** rng.uniform(0, 2.5, count)
        loss = forms.FORMS["chinchilla"].loss(c, n, d) + rng.normal(0, noise, count)
        out[name] = parametric.Runs(n, d, loss)
    return out


@pytest.mark.usefixtures("many_fits")
def test_verdicts():
    """Each truth is found in most simulations: AICc takes a richer model in vain about once in ten."""
    right = []
    for truth in joint.MODELS:
        for seed in range(4):
            found = joint.fit("chinchilla", groups(truth, seed), resamples=0)
            right.append(found.verdict == truth)
            simple, rich = found.p_values.values()
            assert simple < 1e-6 or truth == "one law"
            assert rich < 1e-3 or truth != "separate"
    assert sum(right) >= 9, right


def test_models_are_nested_and_count_their_coefficients():
    found = joint.fit("chinchilla", groups("shared exponents", 5), resamples=50)
    one, shared, separate = found.models
    assert [m.parameters for m in found.models] == [6, 2 + 3 * 3 + 1, 16]
    assert one.log_likelihood < shared.log_likelihood < separate.log_likelihood
    assert len({tuple(c.values()) for c in one.coefficients.values()}) == 1
    assert len({(c["alpha"], c["beta"]) for c in shared.coefficients.values()}) == 1
    assert len({c["A"] for c in shared.coefficients.values()}) == 3
    for name, planted in (("alpha", 0.34), ("beta", 0.28)):
        value, low, high = found.exponents[name]
        assert low < value < high and value == pytest.approx(planted, rel=0.1)


def test_log_likelihood_is_hubers():
    """Of the separate model, written again: sum of rho(r / s) and n log s."""
    data = groups("separate", 1)
    model = joint.fit("chinchilla", data, resamples=0).models[2]
    residual = np.concatenate(
        [
            np.log(runs.loss)
            - np.log(forms.FORMS["chinchilla"].loss(list(model.coefficients[name].values()), runs.n, runs.d))
            for name, runs in data.items()
        ]
    )

    def negative(log_s):
        u = np.abs(residual) / np.exp(log_s[0])
        return np.where(u < 1.345, u**2 / 2, 1.345 * (u - 1.345 / 2)).sum() + len(u) * log_s[0]

    best = minimize(negative, [np.log(residual.std())], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-9})
    assert -best.fun == pytest.approx(model.log_likelihood, abs=1e-6)


def test_joint_needs_groups():
    data = groups("one law", count=6)
    with pytest.raises(ConfigError, match="at least two groups"):
        joint.fit("chinchilla", {"llama": data["llama"]})
    with pytest.raises(ConfigError, match="tnl has 5 runs"):
        joint.fit("chinchilla", data | {"tnl": data["tnl"].take(np.arange(5))})


def test_profile_ends_are_where_the_likelihood_says():
    """At each end the best of the others, found by scipy, is 1.92 n / (n - P) below the top."""
    runs = simulate("chinchilla-no-e", seed=4)
    found = parametric.fit("chinchilla-no-e", runs, resamples=0)
    ends = profile.profile(found)
    assert set(ends) == {"alpha", "beta"}

    def negative(t, held=None):
        a, b, alpha, beta, log_s = t
        alpha = alpha if held is None else held
        law = np.logaddexp(a - alpha * (np.log(runs.n) - 20), b - beta * (np.log(runs.d) - 23))
        u = np.abs(np.log(runs.loss) - law) / np.exp(log_s)
        return np.where(u < 1.345, u**2 / 2, 1.345 * (u - 1.345 / 2)).sum() + len(u) * log_s

    a, b, alpha, beta = found.values
    here = [np.log(a) - 20 * alpha, np.log(b) - 23 * beta, alpha, beta, np.log(0.003)]
    options = {"maxiter": 20000, "maxfev": 20000, "xatol": 1e-8, "fatol": 1e-8, "adaptive": True}

    def best(held=None):
        start = here
        for _ in range(3):
            start = minimize(negative, start, args=(held,), method="Nelder-Mead", options=options).x
        return negative(start, held)

    top = best()
    for end in ends["alpha"]:
        assert best(end) - top == pytest.approx(1.9207 * 100 / 96, rel=0.05)


@pytest.mark.usefixtures("many_fits")
def test_profile_holds_the_planted_and_leaves_open_what_is_open():
    inside = 0
    for seed in range(6):
        ends = profile.profile(parametric.fit("chinchilla", simulate("chinchilla", seed), resamples=0))
        truth = dict(zip(("E", "A", "B", "alpha", "beta"), PLANTED["chinchilla"]))
        inside += sum(low < truth[name] < high for name, (low, high) in ends.items())
    assert inside >= 16
    few = simulate("chinchilla", 1, count=12, noise=0.2)
    assert np.isnan(profile.profile(parametric.fit("chinchilla", few, resamples=0))["E"][0])


@pytest.mark.parametrize("form, sign", [("sigmoid", 1), ("sigmoid", -1), ("exponential", 1)])
def test_task_law_recovers_a_planted_curve(form, sign):
    runs = simulate("chinchilla", 2)
    planted = {"sigmoid": (0.25, 0.6 * sign, 4.0, 2.8), "exponential": (0.86, 2.21, 0.4)}[form]
    if form == "sigmoid" and sign < 0:
        planted = (0.85, -0.6, 4.0, 2.8)
    y = tasks.curve(form, np.array(planted), runs.loss)
    first = parametric.fit("chinchilla", runs, resamples=100)
    exact = tasks.fit("x", form, y, first, resamples=0)
    np.testing.assert_allclose(exact.values, planted, rtol=2e-2)
    np.testing.assert_allclose(exact(runs.loss), y, atol=1e-5)
    noisy = tasks.fit("x", form, y + np.random.default_rng(0).normal(0, 0.005, len(y)), first, resamples=100)
    at = np.array([3e9]), np.array([2e11])
    value, low, high = tasks.predict(noisy, first, *at)
    truth = tasks.curve(form, np.array(planted), forms.FORMS["chinchilla"].loss(PLANTED["chinchilla"], *at))
    assert low < truth < high and high - low < 0.05 and value == pytest.approx(truth, abs=0.01)
    with pytest.raises(ConfigError, match="cannot determine"):
        tasks.fit("x", form, y[:3], parametric.fit("chinchilla-no-e", runs.take(np.arange(4)), resamples=0))


def test_command(tmp_path, capsys):
    path, out = tmp_path / "runs.csv", tmp_path / "out.json"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["arch", "seed", "n", "d", "loss", "acc"])
        for name, runs in groups("shared exponents", count=24).items():  # as many as test_fit_page.py: its programs
            for i, (n, d, loss) in enumerate(zip(runs.n, runs.d, runs.loss)):
                writer.writerow([name, i % 2, n, d, loss, 0.9 - 0.2 * loss])
    names = ["--n", "n", "--d", "d", "--loss", "loss", "--resamples", "150"]  # as many as starts
    options = ["--group", "arch", "--where", "arch=llama,tnl", "--joint", "--profile", "--json", str(out)]
    assert (
        fit.main([str(path), *names, *options, "--task", "acc", "--task-form", "exponential", "--budget", "1e21"]) == 0
    )
    found = json.loads(out.read_text())
    assert [one["arch"] for one in found["fits"]] == ["llama", "tnl"] and found["fits"][0]["n_runs"] == 24
    assert found["joint"]["verdict"] in joint.MODELS and set(found["joint"]["exponents"]) == {"alpha", "beta"}
    low, high = found["fits"][0]["profile"]["alpha"]
    assert low < found["fits"][0]["coefficients"]["alpha"] < high
    task = found["fits"][0]["tasks"][0]
    assert task["rms"] < 0.01 and 0 < task["optimal"][0]["y"] < 0.9
    text = capsys.readouterr().out
    assert "Least AICc" in text and "acc: y = level - gain" in text and "Profile likelihood" in text
    assert fit.main([str(path), *names, "--where", "arch=llama,tnl", "seed=1.0", "--json", str(out)]) == 0
    assert json.loads(out.read_text())["n_runs"] == 24  # of 48 and of 36
    for option, message in (
        (["--where", "arch"], "give COLUMN=VALUE"),
        (["--where", "arch=gpt"], "no row with"),
        (["--where", "size=3"], "no column 'size'"),
        (["--group", "size"], r"no column 'size' \(--group\)"),
        (["--joint"], "--joint compares groups"),
        (["--form", "isoflop", "--joint", "--group", "arch"], "isoflop is none"),
        (["--task", "arch"], "is not a finite number"),
    ):
        with pytest.raises(ConfigError, match=message):
            fit.main([str(path), *names, *option])
