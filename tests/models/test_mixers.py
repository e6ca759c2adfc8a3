"""The equations of each mixer against float64 numpy, written out from the paper."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from linscale.config import Model
from linscale.models import hgrn2, tnl, tpe
from linscale.models.llama import rotate
from linscale.models.tpe import decays, toeplitz
from linscale.models.transformer import init


class TestTnl:
    def test_slopes_of_a_power_of_two(self):
        np.testing.assert_allclose(tnl.alibi_slopes(8), [2.0**-i for i in range(1, 9)])

    def test_slopes_between_powers_take_every_second_of_the_next(self):
        want = [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]
        np.testing.assert_allclose(tnl.alibi_slopes(6), want)
        assert [len(tnl.alibi_slopes(h)) for h in (4, 6, 8, 12, 20, 32)] == [4, 6, 8, 12, 20, 32]

    def test_first_layer_decays_fully_and_last_almost_not(self):
        model = Model(layers=12, heads=4, width=64)
        np.testing.assert_allclose(tnl.log_decay(model, 0), -tnl.alibi_slopes(4) * (1 + 1e-5), rtol=1e-6)
        np.testing.assert_allclose(tnl.log_decay(model, 11), -tnl.alibi_slopes(4) * 1e-5, rtol=1e-2)

    def test_exponential_decay_of_the_tnl_paper(self):
        model = Model(layers=12, heads=4, width=64, tnl_decay="exponential")
        np.testing.assert_allclose(tnl.log_decay(model, 3), [0, -2 * 0.75, -4 * 0.75, -6 * 0.75])


class TestHgrn2:
    @pytest.mark.parametrize("beta", (0.0, 1e-30, 0.3, 1 - 1e-3))
    def test_log_forget_is_exact_at_both_ends(self, beta):
        x = np.concatenate([[-100, -80, -60, -20, 20, 60, 100], np.linspace(-8, 8, 101)])
        got = np.asarray(hgrn2.log_forget(jnp.float32(x), jnp.float32(beta)), np.float64)
        beta = np.float64(np.float32(beta))
        # 1 - f = (1 - beta) sigmoid(-x) in longdouble keeps the digits near f = 1; f itself near 0.
        x = np.float32(x).astype(np.longdouble)
        near_one = np.log1p(-(1 - beta) / (1 + np.exp(np.maximum(x, 0))))
        want = np.where(x >= 0, near_one, np.log(beta + (1 - beta) / (1 + np.exp(-x)))).astype(float)
        floor = np.log(np.finfo(np.float32).tiny)  # bounds below the smallest float32 are raised to it
        clear = want > floor + 16
        np.testing.assert_allclose(got[clear], want[clear], rtol=2e-6, atol=1e-37)
        np.testing.assert_allclose(got[~clear], np.logaddexp(floor, want[~clear]), rtol=2e-6)

    @pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
    def test_gradients_are_those_of_the_formula(self, dtype):
        rng = np.random.default_rng(0)
        x = jnp.asarray(np.concatenate([[-60, -30, 30, 80], 4 * rng.normal(size=996)]).reshape(4, 5, 50), dtype)
        beta = jnp.float32(np.concatenate([[0.0, 1e-30, 1 - 1e-6], rng.uniform(0.001, 0.99, 47)]))
        d_log = jnp.asarray(rng.normal(size=x.shape), dtype)
        _, pullback = jax.vjp(hgrn2.log_forget, x, beta)
        dx, d_beta = pullback(d_log)
        assert dx.dtype == x.dtype and d_beta.shape == beta.shape

        def plain(x, beta):
            return jnp.log(beta + (1 - beta) * jax.nn.sigmoid(x))

        with jax.enable_x64(True):
            wide = [jnp.asarray(np.asarray(a, np.float64)) for a in (x, beta, d_log)]
            _, pullback = jax.vjp(plain, *wide[:2])
            want_x, want_beta, scale = (np.asarray(a) for a in (*pullback(wide[2]), jnp.abs(wide[2])))
        assert np.max(np.abs(np.asarray(dx, np.float64) - want_x) / scale) < (1e-6 if dtype == "float32" else 4e-3)
        assert d_beta[0] == 0  # a bound of zero is the first layer's, and stays
        np.testing.assert_allclose(d_beta[1:], want_beta[1:], rtol=1e-5, atol=1e-4)

    def test_gradients_are_finite_everywhere(self):
        x = jnp.concatenate([jnp.array([-1e4, -100.0, 100.0, 1e4]), jnp.linspace(-20, 20, 41)])
        for beta in (0.0, 1e-38, 0.5, 1.0 - 1e-7):
            dx, db = jax.grad(lambda x, b: hgrn2.log_forget(x, b).sum(), argnums=(0, 1))(x, jnp.full_like(x, beta))
            assert np.isfinite(dx).all() and np.isfinite(db).all()

    def test_bounds_rise_from_zero_with_depth(self):
        logits = np.random.default_rng(0).normal(size=(5, 8))
        bounds = np.asarray(hgrn2.Mixer.across_layers({"lower_bound": jnp.float32(logits)})["lower_bound"])
        share = np.exp(logits) / np.exp(logits).sum(0)
        np.testing.assert_allclose(bounds, np.cumsum(share, 0) - share[0], atol=1e-6)
        assert (bounds[0] == 0).all() and (np.diff(bounds, axis=0) > 0).all() and (bounds < 1).all()

    def test_uniform_start(self):
        params = init(Model(arch="hgrn2", layers=4), 0)["layers"]["hgrn2"]["mixer"]
        bounds = hgrn2.Mixer.across_layers(params)["lower_bound"]
        np.testing.assert_allclose(bounds[:, 0], [0, 0.25, 0.5, 0.75], atol=1e-6)


class TestCosformer2:
    def test_theta_starts_as_one_geometric_series_over_heads_and_channels(self):
        model = Model(arch="cosformer2", layers=2, width=32, heads=2)
        theta = init(model, 0)["layers"]["cosformer2"]["mixer"]["theta"]
        np.testing.assert_allclose(theta[0].reshape(-1), 10_000 ** (-2 * np.arange(32) / 32), rtol=1e-5)

    @pytest.mark.parametrize(("tokens", "dtype"), [(1, "float32"), (33, "float32"), (700, "float32"), (20, "bfloat16")])
    def test_tpe_is_the_recurrence(self, tokens, dtype, monkeypatch):
        """Values and gradients, with documents and a state to continue, against a float64 loop."""
        if tokens < 50:  # several chunks at every length
            monkeypatch.setattr(tpe, "CHUNK", 16)
        rng = np.random.default_rng(tokens)
        batch, width, states = 2, 6, 5
        x = np.asarray(jnp.asarray(rng.normal(size=(batch, tokens, width)), dtype), np.float64)
        coefficients = rng.normal(size=(width, states))
        state = rng.normal(size=(batch, width, states))
        ids = np.cumsum(rng.random((batch, tokens)) < 0.1, axis=1)
        weights = rng.normal(size=(batch, tokens, width)), rng.normal(size=state.shape)

        def recurrence(x, coefficients, state):
            lam, begins = jnp.asarray(decays(states)), np.diff(ids, axis=1, prepend=ids[:, :1]) != 0

            def token(state, now):
                x, begins = now
                state = lam * jnp.where(begins[:, None, None], 0, state) + (1 - lam) * x[..., None]
                return state, (coefficients * state).sum(-1)

            state, ys = jax.lax.scan(token, state, (x.swapaxes(0, 1), begins.T))
            return ys.swapaxes(0, 1), state

        def values_and_gradients(f, *args):
            def projected(*args):
                out = f(*args)
                return sum((jnp.asarray(w, y.dtype) * y).sum() for w, y in zip(weights, out)), out

            gradients, out = jax.jit(jax.grad(projected, argnums=(0, 1, 2), has_aux=True))(*args)
            return out, gradients

        with jax.enable_x64(True):
            want = values_and_gradients(recurrence, *map(jnp.asarray, (x, coefficients, state)))
        low = (jnp.asarray(x, dtype), jnp.float32(coefficients), jnp.float32(state))
        got = values_and_gradients(lambda *a: toeplitz(*a, segment_ids=jnp.asarray(ids)), *low)
        for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
            g, w = np.asarray(g, np.float64), np.asarray(w)
            bound = 1e-5 if dtype == "float32" else 5e-3
            assert np.sqrt(np.mean((g - w) ** 2)) < bound * np.sqrt(np.mean(np.square(w)))

    def test_tpe_starts_near_the_identity(self):
        model = Model(arch="cosformer2", width=32, heads=2)
        coefficients = init(model, 0)["tpe"]["coefficients"]
        x = jax.random.normal(jax.random.key(1), (1, 50, 32))
        y, _ = jax.jit(toeplitz)(x, coefficients, jnp.zeros((1, 32, 16)))
        assert np.sqrt(np.mean((y - x) ** 2)) < 0.2 * np.sqrt(np.mean(np.square(x)))


def test_rotary_scores_depend_on_the_distance_alone():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 16))

    def score(t, s):
        return jnp.vdot(rotate(q, jnp.array([t]), 1e4), rotate(k, jnp.array([s]), 1e4))

    np.testing.assert_allclose(score(9, 2), score(107, 100), rtol=1e-4)
    assert abs(score(9, 2) - score(9, 3)) > 1e-3
