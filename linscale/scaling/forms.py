"""Forms of the loss of a finished run with N parameters and D tokens, in nats per token.

chinchilla        L = E + A / N^alpha + B / D^beta                     Hoffmann et al. 2022 (arXiv 2203.15556), eq. 2
chinchilla-no-e   the same with E = 0
chinchilla-tied   the same with beta = alpha                           Gadre et al. 2024 (arXiv 2403.08540), eq. 4
kaplan            L = ((Nc / N)^(alpha_N / alpha_D) + Dc / D)^alpha_D  Kaplan et al. 2020 (arXiv 2001.08361), eq. 1.5
data-constrained  L = E + A / N'^alpha + B / D'^beta                   Muennighoff et al. 2023 (arXiv 2305.16264), eq. 4-7
                  D' = U (1 + R_D* (1 - exp(-(D/U - 1) / R_D*))), U unique tokens; N' the same of U_N = min(N, the N
                  that is compute-optimal for U tokens) with R_N*. All seven fitted together; D = U gives chinchilla
                  but for N' where N exceeds U_N.

A fit does not move these coefficients, which are correlated to 0.99 and more, but theta: the logarithms of the terms
at the centre of the design (mean log N, mean log D), and the exponents per standard deviation of log N and log D.
Each entry of theta is of order one. Run n of N, parameter p of P, start s of S.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from scipy.optimize import nnls

FLOOR = 1e-12  # of a term against the loss: a coefficient below is zero
EXPONENTS = (0.005, 8.0)
REPEATS = (0.01, 1e5)  # R_D*, R_N*


@dataclasses.dataclass(frozen=True)
class Frame:
    """Centre and spread of the design: natural logarithms."""

    x: float  # mean log N
    y: float
    sx: float
    sy: float


@dataclasses.dataclass(frozen=True)
class Form:
    name: str
    formula: str
    names: tuple[str, ...]  # of the coefficients
    loss: Callable  # (coefficients [..., P], N, D, U) -> L; numpy, N, D, U broadcast against the leading axes
    log_loss: Callable  # (theta_P, data) -> [N]; jax, data from `data`
    coefficients: Callable  # (theta [..., P], frame) -> [..., P]
    theta: Callable  # the inverse
    starts: Callable  # (N, D, U, L, per_axis) -> coefficients [S, P]
    needs_unique: bool = False


def frame(n, d) -> Frame:
    x, y = np.log(n), np.log(d)
    # A design without spread keeps its exponents finite; the fit warns of it.
    return Frame(float(x.mean()), float(y.mean()), float(x.std()) or 1.0, float(y.std()) or 1.0)


def data(n, d, u, at: Frame) -> dict:
    """What log_loss takes. u None: no tokens repeated."""
    x, y = np.log(n), np.log(d)
    return {
        "x": (x - at.x) / at.sx,
        "y": (y - at.y) / at.sy,
        "u": y if u is None else np.log(u),
        "frame": np.array(dataclasses.astuple(at)),
    }


def bounds(form: Form, at: Frame, log_l) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper theta. Wide: they keep a lost start finite, and let a term vanish."""
    low, high = [], []
    for name in form.names:
        if name in ("alpha", "alpha_N", "beta", "alpha_D"):
            spread = at.sx if name in ("alpha", "alpha_N") else at.sy
            bound = (EXPONENTS[0] * spread, EXPONENTS[1] * spread)
        elif name.startswith("R_"):
            bound = tuple(np.log(REPEATS))
        else:
            bound = (float(np.min(log_l)) + np.log(FLOOR), float(np.max(log_l)) + 30.0)
        low.append(bound[0])
        high.append(bound[1])
    return np.array(low), np.array(high)


# -- chinchilla, with and without E --


def _chinchilla(c, n, d, u=None):
    e, a, b, alpha, beta = np.moveaxis(np.asarray(c, np.float64), -1, 0)
    return e + a * n**-alpha + b * d**-beta


def _chinchilla_log(t, f):
    terms = t[0] + 0 * f["x"], t[1] - t[3] * f["x"], t[2] - t[4] * f["y"]
    return _logsumexp(terms)


def _chinchilla_coefficients(theta, at: Frame):
    e, a, b, p, q = np.moveaxis(np.asarray(theta, np.float64), -1, 0)
    alpha, beta = p / at.sx, q / at.sy
    return np.stack([np.exp(e), np.exp(a + alpha * at.x), np.exp(b + beta * at.y), alpha, beta], -1)


def _chinchilla_theta(c, at: Frame):
    e, a, b, alpha, beta = np.moveaxis(np.asarray(c, np.float64), -1, 0)
    with np.errstate(divide="ignore"):
        return np.stack([np.log(e), np.log(a) - alpha * at.x, np.log(b) - beta * at.y, alpha * at.sx, beta * at.sy], -1)


def _chinchilla_starts(n, d, u, loss, per_axis, with_e=True):
    """Given the exponents the rest is linear: non-negative least squares of L, relative, on a grid of exponents."""
    grid = np.geomspace(0.08, 1.6, per_axis)
    return np.array([_given_exponents(n, d, loss, alpha, beta, with_e) for alpha in grid for beta in grid])


def _given_exponents(n, d, loss, alpha, beta, with_e=True):
    columns = ([np.ones_like(n)] if with_e else []) + [n**-alpha, d**-beta]
    matrix = np.stack(columns, 1) / loss[:, None]
    size = np.linalg.norm(matrix, axis=0)
    found = nnls(matrix / size, np.ones_like(loss))[0]
    # A term that least squares leaves out starts small, not at zero, from where it could not come back.
    found = np.maximum(found, 1e-3 * found.max()) / size
    return [*found, alpha, beta]


def _drop_e(function):
    def without(values, at):
        zero = np.ones_like(np.asarray(values, np.float64)[..., :1])
        return function(np.concatenate([zero, values], -1), at)[..., 1:]

    return without


# -- Kaplan --


def _kaplan(c, n, d, u=None):
    nc, dc, alpha_n, alpha_d = np.moveaxis(np.asarray(c, np.float64), -1, 0)
    return ((nc / n) ** (alpha_n / alpha_d) + dc / d) ** alpha_d


def _kaplan_log(t, f):
    alpha_d = t[3] / f["frame"][3]
    return alpha_d * jnp.logaddexp((t[0] - t[2] * f["x"]) / alpha_d, (t[1] - t[3] * f["y"]) / alpha_d)


def _kaplan_coefficients(theta, at: Frame):
    a, b, p, q = np.moveaxis(np.asarray(theta, np.float64), -1, 0)
    alpha_n, alpha_d = p / at.sx, q / at.sy
    with np.errstate(over="ignore"):
        return np.stack([np.exp(a / alpha_n + at.x), np.exp(b / alpha_d + at.y), alpha_n, alpha_d], -1)


def _kaplan_theta(c, at: Frame):
    nc, dc, alpha_n, alpha_d = np.moveaxis(np.asarray(c, np.float64), -1, 0)
    with np.errstate(divide="ignore"):
        return np.stack(
            [alpha_n * (np.log(nc) - at.x), alpha_d * (np.log(dc) - at.y), alpha_n * at.sx, alpha_d * at.sy], -1
        )


def _kaplan_starts(n, d, u, loss, per_axis):
    """L^(1 / alpha_D) is linear in Nc^(alpha_N / alpha_D) and Dc. About the centre, where the powers stay finite."""
    n0, d0, loss0 = (np.exp(np.log(values).mean()) for values in (n, d, loss))
    grid, out = np.geomspace(0.03, 0.8, per_axis), []
    for alpha_n in grid:
        for alpha_d in grid:
            power = (loss / loss0) ** (1 / alpha_d)
            at_n, at_d, *_ = _given_exponents(n / n0, d / d0, power, alpha_n / alpha_d, 1.0, with_e=False)
            nc = n0 * at_n ** (alpha_d / alpha_n) * loss0 ** (1 / alpha_n)
            out.append([nc, d0 * at_d * loss0 ** (1 / alpha_d), alpha_n, alpha_d])
    return np.array(out)


# -- chinchilla with one exponent: theta has alpha per standard deviation of log N --


def _tied_log(t, f):
    _, _, sx, sy = f["frame"]
    return _logsumexp((t[0] + 0 * f["x"], t[1] - t[3] * f["x"], t[2] - t[3] * sy / sx * f["y"]))


def _untie(theta, at: Frame):
    theta = np.asarray(theta, np.float64)
    return np.concatenate([theta, theta[..., 3:] * at.sy / at.sx], -1)


def _tied_back(values):
    return values[..., :4]


def _tied_starts(n, d, u, loss, per_axis):
    grid = np.geomspace(0.05, 1.6, 3 * per_axis)
    return np.array([_given_exponents(n, d, loss, alpha, alpha)[:4] for alpha in grid])


# -- data-constrained --


def _constrained(c, n, d, u):
    e, a, b, alpha, beta, rd, rn = np.moveaxis(np.asarray(c, np.float64), -1, 0)
    u = np.minimum(u, d)
    # Hoffmann et al., eq. 4: N = G (C/6)^(beta/(alpha+beta)), D = (C/6)^(alpha/(alpha+beta)) / G.
    log_g = np.log(alpha * a / (beta * b)) / (alpha + beta)
    un = np.minimum(n, np.exp(log_g + beta / alpha * (np.log(u) + log_g)))
    effective_d = u * (1 + rd * -np.expm1(-(d / u - 1) / rd))
    effective_n = un * (1 + rn * -np.expm1(-(n / un - 1) / rn))
    return e + a * effective_n**-alpha + b * effective_d**-beta


def _constrained_log(t, f):
    cx, cy, sx, sy = f["frame"]
    alpha, beta = t[3] / sx, t[4] / sy
    log_a, log_b, rd, rn = t[1] + alpha * cx, t[2] + beta * cy, jnp.exp(t[5]), jnp.exp(t[6])
    n, d = cx + sx * f["x"], cy + sy * f["y"]
    u = jnp.minimum(f["u"], d)
    log_g = (jnp.log(alpha) + log_a - jnp.log(beta) - log_b) / (alpha + beta)
    un = jnp.minimum(n, log_g + beta / alpha * (u + log_g))
    more_d = u + jnp.log1p(rd * -jnp.expm1(-jnp.expm1(d - u) / rd))
    more_n = un + jnp.log1p(rn * -jnp.expm1(-jnp.expm1(jnp.minimum(n - un, 50.0)) / rn))
    return _logsumexp((t[0] + 0 * n, log_a - alpha * more_n, log_b - beta * more_d))


def _constrained_coefficients(theta, at: Frame):
    return np.concatenate([_chinchilla_coefficients(theta[..., :5], at), np.exp(theta[..., 5:])], -1)


def _constrained_theta(c, at: Frame):
    c = np.asarray(c, np.float64)
    return np.concatenate([_chinchilla_theta(c[..., :5], at), np.log(c[..., 5:])], -1)


def _constrained_starts(n, d, u, loss, per_axis):
    u, out = np.minimum(u, d), []
    for rd in (3.0, 15.0, 60.0):
        effective = u * (1 + rd * -np.expm1(-(d / u - 1) / rd))
        starts = _chinchilla_starts(n, effective, None, loss, max(4, per_axis // 2))
        out += [np.column_stack([starts, np.tile([rd, rn], (len(starts), 1))]) for rn in (1.0, 5.0, 50.0)]
    return np.concatenate(out)


def _logsumexp(terms):
    most = terms[0]
    for term in terms[1:]:
        most = jnp.maximum(most, term)
    return most + jnp.log(sum(jnp.exp(term - most) for term in terms))


CHINCHILLA = ("E", "A", "B", "alpha", "beta")
FORMS = {
    form.name: form
    for form in (
        Form(
            "chinchilla",
            "L = E + A / N^alpha + B / D^beta",
            CHINCHILLA,
            _chinchilla,
            _chinchilla_log,
            _chinchilla_coefficients,
            _chinchilla_theta,
            _chinchilla_starts,
        ),
        Form(
            "chinchilla-no-e",
            "L = A / N^alpha + B / D^beta",
            CHINCHILLA[1:],
            lambda c, n, d, u=None: _chinchilla(np.concatenate([0 * np.asarray(c)[..., :1], c], -1), n, d),
            lambda t, f: jnp.logaddexp(t[0] - t[2] * f["x"], t[1] - t[3] * f["y"]),
            _drop_e(_chinchilla_coefficients),
            _drop_e(_chinchilla_theta),
            lambda n, d, u, loss, per_axis: _chinchilla_starts(n, d, u, loss, per_axis, with_e=False),
        ),
        Form(
            "chinchilla-tied",
            "L = E + A / N^alpha + B / D^alpha",
            CHINCHILLA[:-1],
            lambda c, n, d, u=None: _chinchilla(np.concatenate([c, np.asarray(c)[..., 3:]], -1), n, d),
            _tied_log,
            lambda theta, at: _tied_back(_chinchilla_coefficients(_untie(theta, at), at)),
            lambda c, at: _tied_back(_chinchilla_theta(np.concatenate([c, np.asarray(c)[..., 3:]], -1), at)),
            _tied_starts,
        ),
        Form(
            "kaplan",
            "L = ((Nc / N)^(alpha_N / alpha_D) + Dc / D)^alpha_D",
            ("Nc", "Dc", "alpha_N", "alpha_D"),
            _kaplan,
            _kaplan_log,
            _kaplan_coefficients,
            _kaplan_theta,
            _kaplan_starts,
        ),
        Form(
            "data-constrained",
            "L = E + A / N'^alpha + B / D'^beta, N' and D' with the returns of repeated tokens (unique tokens U)",
            (*CHINCHILLA, "R_D", "R_N"),
            _constrained,
            _constrained_log,
            _constrained_coefficients,
            _constrained_theta,
            _constrained_starts,
            needs_unique=True,
        ),
    )
}
