"""Speed of the batched fit beside a loop of scipy's L-BFGS over the same work.

    python experiments/scaling/fit_speed.py [--fraction 0.05]

245 simulated runs (noise sd 0.01 nats), L = E + A/N^alpha + B/D^beta by Huber loss, delta 1e-3.
1. 4,500 starts from exponents: a grid of 67 x 68 (alpha, beta), the other coefficients by non-negative least squares.
2. 4,500 starts of Hoffmann et al. (arXiv 2203.15556, appendix D.3): the full grid of all five, most of it far from any
   sensible law.
3. 4,000 bootstrap refits from the optimum.
The scipy loop has the analytic gradient and the tolerances that the batched fit needs to agree (it minimises the mean of
rho / delta, so that its absolute tolerances mean something); it runs a stated fraction of the starts, evenly spread, and
its time is divided by that fraction. Times include compilation unless "again" is printed; on a machine shared with
others the processor time (summed over threads) is the fairer figure.
"""

import argparse
import itertools
import os
import platform
import time

import jax
import numpy as np
import scipy
from scipy.optimize import minimize

from linscale.scaling import forms, parametric
from linscale.scaling.minimise import HUBER, minimise

PLANTED = (1.69, 406.4, 410.7, 0.34, 0.28)
FORM = forms.FORMS["chinchilla"]


def simulate(seed: int = 0, count: int = 245) -> parametric.Runs:
    rng = np.random.default_rng(seed)
    n = 10 ** rng.uniform(7.6, 10.2, count)
    d = n * 10 ** rng.uniform(0, 2.3, count)
    return parametric.Runs(n, d, FORM.loss(PLANTED, n, d) + rng.normal(0, 0.01, count))


def hoffmann_starts() -> np.ndarray:
    """e, a, b are logarithms of E, A, B."""
    axes = ((-1, -0.5, 0, 0.5, 1), range(0, 30, 5), range(0, 30, 5), (0, 0.5, 1, 1.5, 2), (0, 0.5, 1, 1.5, 2))
    grid = np.array(list(itertools.product(*axes)), float)
    return np.column_stack([np.exp(grid[:, :3]), grid[:, 3:]])


def exponent_starts(runs) -> np.ndarray:
    pairs = itertools.product(np.geomspace(0.08, 1.6, 67), np.geomspace(0.08, 1.6, 68))
    return np.array([forms._given_exponents(runs.n, runs.d, runs.loss, *pair) for pair in pairs])[:4500]


def scipy_fit(runs, start, weight) -> tuple[float, np.ndarray]:
    x, y, target = np.log(runs.n), np.log(runs.d), np.log(runs.loss)
    delta, total = HUBER.delta, weight.sum()

    def objective(t):
        terms = np.stack([np.full_like(x, t[0]), t[1] - t[3] * x, t[2] - t[4] * y])
        most = terms.max(0)
        parts = np.exp(terms - most)
        sums = parts.sum(0)
        r = target - most - np.log(sums)
        size = np.abs(r)
        value = weight @ np.where(size <= delta, 0.5 * r**2, delta * (size - delta / 2))
        share = -weight * np.clip(r, -delta, delta) * parts / sums
        gradient = np.array([*share.sum(1), -share[1] @ x, -share[2] @ y])
        return value / delta / total, gradient / delta / total

    start = np.concatenate([np.log(start[:3]), start[3:]])
    options = {"maxiter": 10_000, "maxfun": 10_000, "ftol": 1e-13, "gtol": 1e-9}
    found = minimize(objective, start, jac=True, method="L-BFGS-B", options=options)
    return found.fun * delta * total, np.concatenate([np.exp(found.x[:3]), found.x[3:]])


def timed(text, work):
    began, cpu = time.perf_counter(), time.process_time()
    out = work()
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu
    print(f"{text:<40} {wall:7.2f} s, processor {cpu:.2f} s", flush=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fraction", type=float, default=0.05, help="of the work that scipy does (0.05)")
    fraction = parser.parse_args().fraction
    print(f"Python {platform.python_version()}, jax {jax.__version__}, scipy {scipy.__version__}")
    print(f"{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f} at the start")
    runs, again = simulate(), simulate(1)
    at = forms.frame(runs.n, runs.d)
    bounds = forms.bounds(FORM, at, np.log(runs.loss))

    def starts_of(runs, starts):
        at = forms.frame(runs.n, runs.d)
        data = forms.data(runs.n, runs.d, None, at)
        theta = FORM.theta(starts, at)
        return minimise(FORM.log_loss, theta, data, np.log(runs.loss), np.ones((1, 245)), *bounds, HUBER)

    first = timed("4,500 starts from exponents", lambda: starts_of(runs, exponent_starts(runs)))
    timed("  again, other data", lambda: starts_of(again, exponent_starts(again)))
    best = first.objective.min()
    print(f"  {np.mean(first.objective < best * (1 + 1e-6)):.1%} at the least objective {best:.9g}")
    grid = timed("4,500 starts of Hoffmann et al.", lambda: starts_of(runs, hoffmann_starts()))
    print(f"  {np.mean(grid.objective < best * (1 + 1e-6)):.1%} at the least objective {grid.objective.min():.9g}")

    def refits(resamples):
        return parametric.fit("chinchilla", runs, resamples=resamples, starts=FORM.coefficients(first.theta[:1], at))

    found = timed("4,000 bootstrap refits", lambda: refits(4000))
    timed("  again", lambda: refits(4000))
    print(
        "  "
        + ", ".join(
            f"{k} {v:.5g} [{a:.5g}, {b:.5g}]"
            for (k, v), (a, b) in zip(found.coefficients.items(), found.intervals.values())
        )
    )

    ones = np.ones(245)
    for text, starts in (("from exponents", exponent_starts(runs)), ("of Hoffmann et al.", hoffmann_starts())):
        some = starts[:: round(1 / fraction)]
        began = time.perf_counter()
        values = np.array([scipy_fit(runs, start, ones)[0] for start in some])
        each = (time.perf_counter() - began) / len(some)
        print(
            f"scipy, {len(some)} of the starts {text}: {each * 4500:.1f} s for 4,500; least {values.min():.9g}, "
            f"{np.mean(values < best * (1 + 1e-6)):.1%} there to 1e-6, {np.mean(values < best * (1 + 1e-3)):.1%} to 1e-3",
            flush=True,
        )
    rng, count = np.random.default_rng(0), round(4000 * fraction)
    began = time.perf_counter()
    for _ in range(count):
        scipy_fit(runs, found.values, np.bincount(rng.integers(0, 245, 245), minlength=245).astype(float))
    print(f"scipy, {count} of the refits: {(time.perf_counter() - began) / count * 4000:.1f} s for 4,000")


if __name__ == "__main__":
    main()
