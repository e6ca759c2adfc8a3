"""Do the 95 % intervals of `linscale fit` hold? Planted coefficients, 100 simulations of 100 runs a form.

    python experiments/scaling/recovery.py [--forms chinchilla,kaplan] [--simulations 100] [--kind huber]

Losses are the form's plus normal noise of sd 0.01 nats. The designs are those of real ladders: sizes 40M to 15B, 1 to
300 tokens a parameter; for data-constrained up to 60 passes over the unique tokens; for isoflop nine budgets of
eleven sizes; for envelope the curves of twelve sizes (chinchilla-no-e, whose frontier is a power law: with E it is not),
noise of sd 0.01 nats of each run and of each point; for the laws of tasks accuracies of the losses, noise of sd 0.01; for
joint two groups of 50 runs that share their exponents. chinchilla also counts the best N, D and loss of budgets and the
intervals of the five runs of greatest compute, predicted from the others. Prints, for each coefficient, in how many
simulations its interval held the planted value, and the median width of the interval.
"""

import argparse
import time

import numpy as np

from linscale.scaling import forms, isoflop, joint, laws, optimum, parametric, tasks
from linscale.scaling.flops import PF_DAY
from linscale.scaling.minimise import KINDS, Loss

PLANTED = {
    "chinchilla": (1.69, 406.4, 410.7, 0.34, 0.28),
    "chinchilla-no-e": (25.0, 30.0, 0.15, 0.14),
    "chinchilla-tied": (1.69, 1500.0, 2500.0, 0.35),
    "kaplan": (6.4e13, 1.8e13, 0.076, 0.103),
    "data-constrained": (1.87, 521.0, 1488.0, 0.353, 0.353, 15.4, 5.3),
}
TASKS = {"sigmoid": (0.25, 0.7, 3.0, 2.4), "exponential": (0.85, 3.0, 1.0)}  # of the losses of chinchilla, 2 to 3.5
BUDGETS = (1e22, 1e24)
NOISE = 0.01  # nats, sd; of accuracies too


def simulate(name: str, seed: int, count: int = 100, noise: float = NOISE, planted=None) -> parametric.Runs:
    rng = np.random.default_rng(seed)
    n = 10 ** rng.uniform(7.6, 10.2, count)
    d = n * 10 ** rng.uniform(0, 2.5, count)
    unique = d / 10 ** (rng.uniform(0, 1.8, count) * (rng.uniform(size=count) < 0.8))
    loss = forms.FORMS[name].loss(planted or PLANTED[name], n, d, unique) + rng.normal(0, noise, count)
    return parametric.Runs(n, d, loss, unique=unique if forms.FORMS[name].needs_unique else None)


def isoflop_truth(planted=PLANTED["chinchilla"]) -> dict[str, float]:
    """Hoffmann et al., eq. 4, of the planted law."""
    _, a, b, alpha, beta = planted
    g, power = (alpha * a / (beta * b)) ** (1 / (alpha + beta)), beta / (alpha + beta)
    return {
        "N_coefficient": g / 6**power,
        "N_exponent": power,
        "D_coefficient": 1 / g / 6 ** (1 - power),
        "D_exponent": 1 - power,
    }


def simulate_isoflop(seed: int, noise: float = NOISE) -> parametric.Runs:
    rng, truth = np.random.default_rng(seed), isoflop_truth()
    budget = np.repeat(np.geomspace(6e18, 3e21, 9), 11)
    best = truth["N_coefficient"] * budget ** truth["N_exponent"]
    n = best * np.tile(np.geomspace(0.25, 4, 11), 9)
    d = budget / 6 / n
    return parametric.Runs(
        n, d, forms.FORMS["chinchilla"].loss(PLANTED["chinchilla"], n, d, d) + rng.normal(0, noise, 99)
    )


def simulate_curves(seed: int, noise: float = NOISE) -> tuple[list[laws.Curve], dict[str, float]]:
    """Curves of twelve sizes, each to six times the tokens for which it is best; the power laws of their frontier."""
    rng, curves = np.random.default_rng(seed), []
    a, b, alpha, beta = PLANTED["chinchilla-no-e"]
    truth = isoflop_truth((0, a, b, alpha, beta))
    best_n = truth["N_coefficient"] * PF_DAY ** truth["N_exponent"]  # C in PFLOP/s-days, as the envelope has it
    best_d = truth["D_coefficient"] * PF_DAY ** truth["D_exponent"]
    for n in np.geomspace(4e7, 1.5e10, 12):
        d = 6 * best_d * (n / best_n) ** (truth["D_exponent"] / truth["N_exponent"]) * np.geomspace(0.02, 1, 150)
        loss = forms.FORMS["chinchilla-no-e"].loss(PLANTED["chinchilla-no-e"], n, d)
        loss += rng.normal(0, noise) + rng.normal(0, noise, len(d))
        curves.append(laws.Curve(f"{n:.3g}", n, 6 * n * d / PF_DAY, d, loss))
    return curves, {
        "L_coefficient": a * best_n**-alpha + b * best_d**-beta,
        "L_exponent": -alpha * beta / (alpha + beta),
        "N_coefficient": best_n,
        "N_exponent": truth["N_exponent"],
        "D_coefficient": best_d,
        "D_exponent": truth["D_exponent"],
    }


Pairs = tuple[dict[str, float], dict[str, tuple[float, float]]]  # planted values, intervals


def of_isoflop(seed: int, options) -> Pairs:
    return isoflop_truth(), isoflop.fit(simulate_isoflop(seed), options.resamples, seed).intervals


def of_envelope(seed: int, options) -> Pairs:
    curves, truth = simulate_curves(seed)
    settings = laws.Options("train", resamples=options.resamples, seed=seed, smoothing=laws.SMOOTHING)
    settings = laws.settled([curves], settings)  # as `linscale fit FILE --form envelope`
    return truth, {key: ends for key, (_, ends) in laws.fit_curves("", curves, settings).coefficients.items()}


def of_task(form: str):
    def one(seed: int, options) -> Pairs:
        first = parametric.fit("chinchilla", simulate("chinchilla", seed), resamples=0)
        noise = np.random.default_rng(seed + 1000).normal(0, NOISE, len(first.runs))
        y = tasks.curve(form, TASKS[form], first.runs.loss) + noise
        return dict(zip(tasks.NAMES[form], TASKS[form])), tasks.fit(
            "task", form, y, first, options.resamples, seed
        ).intervals

    return one


def of_joint(seed: int, options) -> Pairs:
    _, a, b, alpha, beta = PLANTED["chinchilla"]
    groups = {}
    for g, planted in enumerate((PLANTED["chinchilla"], (1.9, 1.3 * a, 0.8 * b, alpha, beta))):
        runs = simulate("chinchilla", 2 * seed + g, 50, planted=planted)
        groups[str(g)] = runs
    found = joint.fit("chinchilla", groups, options.resamples, seed)
    return {"alpha": alpha, "beta": beta}, {name: ends for name, (_, *ends) in found.exponents.items()}


def of_form(name: str):
    def one(seed: int, options) -> Pairs:
        runs, loss = simulate(name, seed), Loss(options.kind)
        found = parametric.fit(name, runs, loss, options.resamples, seed)
        truth, intervals = dict(zip(forms.FORMS[name].names, PLANTED[name])), dict(found.intervals)
        if name != "chinchilla":
            return truth, intervals
        planted = isoflop_truth()
        for budget in BUDGETS:
            best = optimum.optimum(found, budget)
            n, d = (planted[f"{x}_coefficient"] * budget ** planted[f"{x}_exponent"] for x in "ND")
            least = float(found.form.loss(PLANTED[name], n, d))
            for key, value, ends in (("N", n, "n"), ("D", d, "d"), ("loss", least, "loss")):
                truth[f"{key} of {budget:.0e}"] = value
                intervals[f"{key} of {budget:.0e}"] = getattr(best, f"{ends}_interval")
        test = optimum.backtest(name, runs, 5, loss, options.resamples, seed)
        for i in range(5):
            truth[f"held out {i + 1}"], intervals[f"held out {i + 1}"] = test.loss[i], (test.low[i], test.high[i])
        return truth, intervals

    return one


SIMULATIONS = {name: of_form(name) for name in PLANTED} | {
    "isoflop": of_isoflop,
    "envelope": of_envelope,
    "task-sigmoid": of_task("sigmoid"),
    "task-exponential": of_task("exponential"),
    "joint": of_joint,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forms", default=",".join(SIMULATIONS))
    parser.add_argument("--simulations", type=int, default=100)
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--kind", choices=KINDS, default="huber")
    options = parser.parse_args()
    for name in options.forms.split(","):
        began, held, widths = time.perf_counter(), [], []
        for seed in range(options.simulations):
            truth, found = SIMULATIONS[name](seed, options)
            held.append([found[key][0] <= truth[key] <= found[key][1] for key in truth])
            widths.append([(found[key][1] - found[key][0]) / abs(truth[key]) for key in truth])
        print(f"{name}, {options.kind}: {options.simulations} simulations, {time.perf_counter() - began:.0f} s")
        for key, inside, width in zip(truth, np.sum(held, 0), np.median(widths, 0)):
            print(f"  {key:<14} {truth[key]:>10.4g}  inside {inside:>3}  median width {100 * width:.1f} %", flush=True)


if __name__ == "__main__":
    main()
