"""Do the 95 % intervals of `linscale fit` hold? Planted coefficients, 100 simulations of 100 runs a form.

    python experiments/scaling/recovery.py [--forms chinchilla,kaplan] [--simulations 100] [--kind huber]

Losses are the form's plus normal noise of sd 0.01 nats. The designs are those of real ladders: sizes 40M to 15B, 1 to
300 tokens a parameter; for data-constrained up to 60 passes over the unique tokens; for isoflop nine budgets of
eleven sizes. Prints, for each coefficient, in how many simulations its interval held the planted value, and the median
width of the interval. About 8 minutes on 2 cores for all forms.
"""

import argparse
import time

import numpy as np

from linscale.scaling import forms, isoflop, parametric
from linscale.scaling.minimise import KINDS, Loss

PLANTED = {
    "chinchilla": (1.69, 406.4, 410.7, 0.34, 0.28),
    "chinchilla-no-e": (25.0, 30.0, 0.15, 0.14),
    "kaplan": (6.4e13, 1.8e13, 0.076, 0.103),
    "data-constrained": (1.87, 521.0, 1488.0, 0.353, 0.353, 15.4, 5.3),
}
NOISE = 0.01  # nats, sd


def simulate(name: str, seed: int, count: int = 100, noise: float = NOISE) -> parametric.Runs:
    rng = np.random.default_rng(seed)
    n = 10 ** rng.uniform(7.6, 10.2, count)
    d = n * 10 ** rng.uniform(0, 2.5, count)
    unique = d / 10 ** (rng.uniform(0, 1.8, count) * (rng.uniform(size=count) < 0.8))
    loss = forms.FORMS[name].loss(PLANTED[name], n, d, unique) + rng.normal(0, noise, count)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forms", default=",".join([*PLANTED, "isoflop"]))
    parser.add_argument("--simulations", type=int, default=100)
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--kind", choices=KINDS, default="huber")
    options = parser.parse_args()
    for name in options.forms.split(","):
        began, held, widths = time.perf_counter(), [], []
        for seed in range(options.simulations):
            if name == "isoflop":
                truth = isoflop_truth()
                found = isoflop.fit(simulate_isoflop(seed), options.resamples, seed).intervals
            else:
                truth = dict(zip(forms.FORMS[name].names, PLANTED[name]))
                runs = simulate(name, seed)
                found = parametric.fit(name, runs, Loss(options.kind), options.resamples, seed).intervals
            held.append([found[key][0] <= truth[key] <= found[key][1] for key in truth])
            widths.append([(found[key][1] - found[key][0]) / truth[key] for key in truth])
        print(f"{name}, {options.kind}: {options.simulations} simulations, {time.perf_counter() - began:.0f} s")
        for key, inside, width in zip(truth, np.sum(held, 0), np.median(widths, 0)):
            print(f"  {key:<14} {truth[key]:>10.4g}  inside {inside:>3}  median width {100 * width:.1f} %", flush=True)


if __name__ == "__main__":
    main()
