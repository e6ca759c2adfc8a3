"""Many robust fits at once: a damped Newton method, batched over starts and over bootstrap draws.

Each lane minimises sum_i w_i rho(r_i), r_i = log L_i - log_loss(theta, run i), over its own start theta and its own
weights w (a bootstrap draw is a row of multiplicities). rho is Huber's function (Huber 1964), r^2 / 2 to delta and
linear beyond. Published fits use delta = 1e-3 (Hoffmann et al. 2022, equation 3): most runs lie in the linear part,
the objective is nearly a sum of absolute values, and a quasi-Newton method with an absolute tolerance stops early.
Here instead

- the step solves (J' [rho'' + lambda rho'/r] J) step = J' rho': rho'' is Newton's matrix, rho'/r that of iteratively
  re-weighted least squares, which never fails to descend and is the damping;
- delta falls in stages to its value, so that the kinks appear when the lane is already near;
- a lane ends when its parameters, each of order one, no longer move. Multiplying the objective by a number multiplies
  both sides of the equation above and changes nothing;
- with the same weights for all, lanes that have ended a stage at one place (to SAME) have the same future: one of them
  goes on and the others take its result. The smooth first stages have few minima, so that thousands of starts soon
  become a handful.

Float64 on the CPU inside a context; the rest of linscale keeps its float32. Lane s of S, run n, parameter p of P.
"""

import dataclasses
import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

KINDS = ("huber", "lsq", "lsq-unlogged", "huber-scale")
STAGES = 5  # least squares, then delta times 3^3 ... 3^0
LANES = 256  # in one call: its arrays stay in the cache
ROUND = 8  # steps between two looks at which lanes have ended or met
MAX_STEPS = 192 * ROUND
EARLY, FEW = 48 * ROUND, 8  # of many starts with the same weights only the best go on after so many steps
SAME = 1e-3  # in standardised parameters
SMALL = 7  # parameters, up to which the linear equations are written out
TOLERANCE = 1e-8  # of a step, in standardised parameters
LOOSE = 1e-2  # in the stages before the last


@dataclasses.dataclass(frozen=True)
class Loss:
    """huber: delta in units of log loss. huber-scale: of log loss / s, s fitted by likelihood (each run exp(-rho) / s).

    lsq: least squares of log loss, lsq-unlogged: of the loss itself; delta has no part in either.
    """

    kind: str = "huber"
    delta: float = 1e-3
    reduction: str = "sum"  # of the reported objective; the parameters do not depend on it


HUBER = Loss()


@dataclasses.dataclass(frozen=True)
class Minima:
    theta: np.ndarray  # [S, P]
    objective: np.ndarray  # [S] sum over runs; huber-scale: negative log likelihood without its constant
    scale: np.ndarray  # [S] s; 1 if not fitted
    converged: np.ndarray  # [S] bool
    steps: np.ndarray  # [S]


def minimise(log_loss: Callable, theta_SP, data, target_N, weight_SN, lower_P, upper_P, loss: Loss) -> Minima:
    """log_loss(theta_P, data) -> [N]; data a pytree of arrays. theta is kept inside [lower, upper], [P] or [S, P].

    target_N is log loss whatever the kind. weight_SN with one row: the same for all starts.
    """
    theta_SP = np.clip(np.asarray(theta_SP, np.float64), lower_P, upper_P)
    lanes = len(theta_SP)
    alike = len(weight_SN) == 1 and np.ndim(lower_P) == np.ndim(upper_P) == 1
    weight_SN = np.broadcast_to(np.asarray(weight_SN, np.float64), (lanes, len(target_N)))
    lower_SP, upper_SP = (np.broadcast_to(np.asarray(b, np.float64), theta_SP.shape) for b in (lower_P, upper_P))
    delta = np.inf if loss.kind.startswith("lsq") else float(loss.delta)
    if loss.kind == "lsq-unlogged":
        log_loss, target_N = _unlogged(log_loss), np.exp(target_N)
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        shared = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), (data, target_N, np.float64(delta)))
        steps = functools.partial(_steps, log_loss, loss.kind == "huber-scale")
        state = _initial(theta_SP)
        leader = np.arange(lanes)  # whose result a lane takes
        todo, taken, size = np.arange(lanes), 0, min(LANES, 1 << (max(lanes, 8) - 1).bit_length())
        with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2) as pool:

            def chunk(of):
                padded = np.resize(of, size)  # the last chunk repeats itself: one compiled program
                own = weight_SN[padded], lower_SP[padded], upper_SP[padded]
                with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
                    new = steps({k: v[padded] for k, v in state.items()}, *own, *shared)
                    return of, {k: np.asarray(v)[: len(of)] for k, v in new.items()}

            while len(todo) and taken < MAX_STEPS:
                parts = [todo[i : i + size] for i in range(0, len(todo), size)]
                # The first call compiles; the others wait for it rather than compile the same.
                results = [chunk(parts[0]), *pool.map(chunk, parts[1:])]
                for of, new in results:
                    for key, value in new.items():
                        state[key][of] = value
                taken += ROUND
                todo = todo[~state["done"][todo]]
                if alike:
                    todo = _merge(todo, state, leader)
                if alike and taken >= EARLY:
                    todo = todo[np.argsort(state["value"][todo])[:FEW]]
    while (leader[leader] != leader).any():
        leader = leader[leader]
    state = {key: value[leader] for key, value in state.items()}
    return Minima(state["theta"], state["value"], state["scale"], state["done"], state["steps"])


@functools.cache
def _unlogged(log_loss: Callable) -> Callable:
    return lambda theta_P, data: jnp.exp(log_loss(theta_P, data))


def _merge(todo, state, leader) -> np.ndarray:
    """Those of `todo` that go on. The others have met one of them at the end of a stage, which becomes their leader."""
    old = todo[state["stage"][todo] > 0]
    if not len(old):
        return todo
    cell = np.column_stack([state["stage"][old], np.round(state["theta"][old] / SAME)])
    _, first, of = np.unique(cell, axis=0, return_index=True, return_inverse=True)
    leader[old] = old[first][of.ravel()]
    return todo[leader[todo] == todo]


def _initial(theta_SP) -> dict[str, np.ndarray]:
    lanes = len(theta_SP)
    return {
        "theta": theta_SP.copy(),
        "value": np.full(lanes, np.inf),
        "scale": np.ones(lanes),
        "damping": np.full(lanes, 0.1),
        "stage": np.zeros(lanes, np.int64),
        "in_stage": np.zeros(lanes, np.int64),
        "steps": np.zeros(lanes, np.int64),
        "done": np.zeros(lanes, bool),
    }


@functools.partial(jax.jit, static_argnums=(0, 1))
def _steps(log_loss, free_scale, state, weight_SN, lower_SP, upper_SP, data, target_N, delta):
    """Up to ROUND steps of every lane that has not ended."""

    def objective(theta_P, weight_N, delta_here, scale):
        """Value, scale and residuals over the scale."""
        residual_N = target_N - log_loss(theta_P, data)
        if free_scale:
            scale = _scale(residual_N, weight_N, delta_here, scale)
        u_N = residual_N / scale
        size_N = jnp.abs(u_N)
        inner_N = jnp.minimum(size_N, delta_here)
        rho_N = jnp.where(size_N <= delta_here, 0.5 * u_N**2, inner_N * (size_N - 0.5 * inner_N))
        value = weight_N @ rho_N
        if free_scale:
            value += weight_N.sum() * jnp.log(scale)
        return jnp.where(jnp.isfinite(value), value, jnp.inf), scale, u_N

    def one(lane, weight_N, lower_P, upper_P):
        theta_P = lane["theta"]
        delta_here = jnp.where(lane["stage"] == 0, jnp.inf, delta * 3.0 ** (STAGES - 1 - lane["stage"]))
        value, scale, u_N = objective(theta_P, weight_N, delta_here, lane["scale"])
        eye = jnp.eye(len(theta_P))
        jacobian_PN = jax.vmap(lambda tangent: jax.jvp(lambda t: log_loss(t, data), (theta_P,), (tangent,))[1])(eye)
        size_N = jnp.abs(u_N)
        newton_N = jnp.where(size_N <= delta_here, 1.0, 0.0)
        reweighted_N = jnp.minimum(1.0, delta_here / jnp.maximum(size_N, 1e-300))
        curvature_N = weight_N * (newton_N + lane["damping"] * reweighted_N)
        matrix_PP = (jacobian_PN * curvature_N) @ jacobian_PN.T
        right_P = jacobian_PN @ (weight_N * reweighted_N * u_N) * scale
        # A coefficient at its bound has a column of zeros; it must not spoil the step of the others.
        diagonal_P = jnp.diagonal(matrix_PP)
        at_bound_P = ((theta_P <= lower_P) & (right_P < 0)) | ((theta_P >= upper_P) & (right_P > 0))
        free_P = ~at_bound_P & (diagonal_P > 1e-14 * diagonal_P.max())
        matrix_PP = jnp.where(free_P[:, None] & free_P, matrix_PP, 0.0) + jnp.diag(
            jnp.where(free_P, 1e-11 * diagonal_P + 1e-300, 1.0)
        )
        step_P = _solve(matrix_PP, jnp.where(free_P, right_P, 0.0))
        step_P = jnp.where(jnp.isfinite(step_P), step_P, 0.0)
        step_P = step_P / jnp.maximum(1.0, jnp.abs(step_P).max())
        there_P = jnp.clip(theta_P + step_P, lower_P, upper_P)
        moved = jnp.abs(there_P - theta_P).max()
        value_there, scale_there, _ = objective(there_P, weight_N, delta_here, scale)
        better = value_there < value
        damping = jnp.where(better, lane["damping"] / 6, jnp.maximum(lane["damping"], 1e-6) * 5)
        last = lane["stage"] == STAGES - 1
        still = (moved < jnp.where(last, TOLERANCE, LOOSE)) | (damping > 1e9)
        still |= ~last & (lane["in_stage"] > 40)
        stage = jnp.where(still & ~last, lane["stage"] + 1, lane["stage"])
        new = {
            "theta": jnp.where(better, there_P, theta_P),
            "value": jnp.where(better, value_there, value),
            "scale": jnp.where(better, scale_there, scale),
            "damping": jnp.where(stage != lane["stage"], 0.1, jnp.maximum(damping, 1e-9)),
            "stage": stage,
            "in_stage": jnp.where(stage != lane["stage"], 0, lane["in_stage"] + 1),
            "steps": lane["steps"] + 1,
            "done": still & last,
        }
        return {k: jnp.where(lane["done"], lane[k], new[k]) for k in new}

    def body(carry):
        count, lanes = carry
        return count + 1, jax.vmap(one)(lanes, weight_SN, lower_SP, upper_SP)

    return lax.while_loop(lambda c: (c[0] < ROUND) & ~c[1]["done"].all(), body, (0, state))[1]


def _scale(residual_N, weight_N, delta, scale):
    """The s at which the likelihood of Huber's density is greatest: the weighted mean of rho'(r/s) r/s is 1."""

    def newton(_, log_s):
        u_N = residual_N * jnp.exp(-log_s)
        size_N = jnp.abs(u_N)
        moment = weight_N @ (jnp.minimum(size_N, delta) * size_N) / weight_N.sum()
        inner = weight_N @ jnp.where(size_N <= delta, size_N**2, 0.0) / weight_N.sum()
        moment = jnp.maximum(moment, 1e-300)
        return log_s + jnp.clip(jnp.log(moment) * moment / (moment + inner), -5.0, 5.0)

    return jnp.exp(jnp.maximum(lax.fori_loop(0, 6, newton, jnp.log(scale)), -60.0))


def _solve(matrix_PP, right_P):
    """Cholesky without LAPACK for few parameters, where one call a lane would cost more than the rest of a step."""
    size = len(right_P)
    if size > SMALL:
        return jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(matrix_PP), True), right_P)
    low = [[None] * size for _ in range(size)]
    for i in range(size):
        for j in range(i + 1):
            rest = matrix_PP[i, j] - sum(low[i][k] * low[j][k] for k in range(j))
            low[i][j] = jnp.sqrt(jnp.maximum(rest, 1e-14 * matrix_PP[i, i])) if i == j else rest / low[j][j]
    half, out = [], [None] * size
    for i in range(size):
        half.append((right_P[i] - sum(low[i][k] * half[k] for k in range(i))) / low[i][i])
    for i in reversed(range(size)):
        out[i] = (half[i] - sum(low[k][i] * out[k] for k in range(i + 1, size))) / low[i][i]
    return jnp.stack(out)
