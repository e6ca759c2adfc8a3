"""RMS norm: every implementation, values and gradients, against float64.

The Hopper kernels: pytest -m gpu tests/kernels/test_rms_norm.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper_tests import emulates, hopper, lowered, lowers

from linscale.kernels import Axes, gated_rms_norm, rms_norm
from linscale.kernels.remat import KEPT
from linscale.kernels.rms_norm import api

EPSILON = 1e-3  # large enough to be seen
# Of a row's root mean square. The kernels round the normed x, which they keep, and results; XLA every step outside the norm.
BOUND = {"float32": 3e-7, "bfloat16": 4e-3}
BOUND_OF_XLA = {"float32": 3e-7, "bfloat16": 2e-2}
every_form = pytest.mark.parametrize(("uses", "add", "beside"), [(1, False, False), (3, False, True), (2, True, True)])
every_type = pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16))


def draw(shape, dtype, uses, add):
    """x, added, the weights of each result in a sum; rows of very different size."""
    rng = np.random.default_rng(hash((shape, uses, add)) % 2**32)
    size = 10 ** rng.uniform(-2, 2, (*shape[:2], 1))
    arrays = [size * rng.normal(size=shape) for _ in range(2)] + [rng.normal(size=shape) for _ in range(uses + 1)]
    x, added, *weights = (jnp.asarray(a, dtype) for a in arrays)
    return x, added if add else None, weights


def exact(x, added, weights, beside):
    """(normed, s, the gradient of s) in float64; what is rounded on the way, the sum, is rounded here too."""
    s = np.asarray(x if added is None else x + added, np.float64)
    *of_normed, of_s = (np.asarray(w, np.float64) for w in weights)
    scale = 1 / np.sqrt(np.mean(s * s, -1, keepdims=True) + EPSILON)
    normed, g = s * scale, sum(of_normed)
    return normed, s, scale * (g - normed * np.mean(g * normed, -1, keepdims=True)) + beside * of_s


def check(shape, dtype, uses, add, beside, bound=BOUND):
    x, added, weights = draw(shape, dtype, uses, add)

    def run(x, added):
        normed, s = rms_norm(x, added, epsilon=EPSILON, uses=uses)
        return (*normed, s) if beside else normed

    results, pull = jax.vjp(run, x, added)
    grads = pull(tuple(weights if beside else weights[:-1]))
    normed, s, ds = exact(x, added, weights, beside)
    wanted = {"normed": (results[0], normed), "ds": (grads[0], ds)}
    if beside:
        wanted["s"] = (results[-1], s)
    if add:
        wanted["added"] = (grads[1], ds)
    assert all(np.array_equal(results[0], other) for other in results[1:uses])
    meet(wanted, dtype, bound)


def check_gated(shape, dtype, bound=BOUND):
    x, gate, (gradient, _) = draw(shape, dtype, 1, True)
    gate = gate / jnp.sqrt(jnp.mean(gate * gate, -1, keepdims=True))
    out, pull = jax.vjp(lambda x, gate: gated_rms_norm(x, gate, epsilon=EPSILON), x, gate)
    dx, d_gate = pull(gradient)
    wide_gradient, wide_gate = np.asarray(gradient, np.float64), 1 / (1 + np.exp(-np.asarray(gate, np.float64)))
    normed, _, ds = exact(x, None, (wide_gradient * wide_gate, wide_gradient), False)
    wanted = {"out": (out, normed * wide_gate), "dx": (dx, ds)}
    wanted["d_gate"] = (d_gate, wide_gradient * normed * wide_gate * (1 - wide_gate))
    meet(wanted, dtype, bound)


def meet(wanted, dtype, bound):
    for name, (got, want) in wanted.items():
        assert got.dtype == dtype
        # By rows, whose sizes differ: an error in the smallest must show.
        error = np.sqrt(np.mean((np.asarray(got, np.float64) - want) ** 2, -1) / np.mean(want**2, -1))
        assert error.max() < bound[got.dtype.name], (name, error.max())


@every_type
@every_form
@pytest.mark.parametrize("shape", [(2, 37, 64), (1, 1, 128), (3, 5, 1000)])
def test_xla(shape, dtype, uses, add, beside):
    check(shape, dtype, uses, add, beside, BOUND_OF_XLA)


@every_type
@pytest.mark.parametrize("shape", [(2, 37, 64), (1, 1, 128), (3, 5, 1000)])
def test_xla_gated(shape, dtype):
    check_gated(shape, dtype, BOUND_OF_XLA)


@emulates
@every_type
@every_form
@pytest.mark.parametrize("shape", [(2, 37, 256), (1, 3, 768), (1, 11, 1024), (1, 2, 4096)])
def test_kernels_emulated(shape, dtype, uses, add, beside, monkeypatch):
    from emulator import emulated

    monkeypatch.setattr(api, "on_hopper", lambda: True)
    with emulated():
        check(shape, dtype, uses, add, beside)


@emulates
@every_type
@pytest.mark.parametrize("shape", [(2, 37, 256), (1, 3, 768), (1, 2, 4096)])
def test_gated_kernels_emulated(shape, dtype, monkeypatch):
    from emulator import emulated

    monkeypatch.setattr(api, "on_hopper", lambda: True)
    with emulated():
        check_gated(shape, dtype)


def gated_loss(x, gate, axes=None):
    return gated_rms_norm(x, gate, epsilon=EPSILON, axes=axes).astype(jnp.float32).sum()


def loss(x, added, axes=None):
    (one, two), s = rms_norm(x, added, epsilon=EPSILON, uses=2, axes=axes)
    return (one * 2 + two * 3 + s).astype(jnp.float32).sum()


@lowers
@every_type
@pytest.mark.parametrize("width", (256, 768, 1024, 2560, 4096, 8192))
def test_kernels_lower(width, dtype, monkeypatch):
    monkeypatch.setattr(api, "on_hopper", lambda: True)
    x = jax.ShapeDtypeStruct((3, 1001, width), dtype)
    for f in (loss, gated_loss):
        text = lowered(jax.value_and_grad(f, argnums=(0, 1)), x, x)
        assert text.count("@mosaic_gpu") == 2
        assert "stablehlo.rsqrt" not in text


@lowers
def test_kernels_lower_on_every_device_of_a_mesh(monkeypatch):
    monkeypatch.setattr(api, "on_hopper", lambda: True)
    x = jax.ShapeDtypeStruct((4, 256, 1024), jnp.bfloat16)
    auto = (jax.sharding.AxisType.Auto,) * 4
    mesh = jax.sharding.AbstractMesh((1, 2, 2, 2), ("data", "fsdp", "sequence", "tensor"), axis_types=auto)
    with jax.sharding.use_abstract_mesh(mesh):
        text = lowered(jax.grad(lambda x: loss(x, x, Axes())), x)
        split = lowered(jax.grad(lambda x: gated_loss(x, x, Axes())), x)
    calls = [line for line in text.splitlines() if "@mosaic_gpu" in line]
    assert len(calls) == 2
    assert all("tensor<256x1024xbf16>" in line for line in calls)  # 2 of the rows' batch, 128 tokens: a quarter
    assert "mosaic_gpu" not in split


@lowers
def test_rematerialisation_keeps_what_the_gradient_needs(monkeypatch):
    monkeypatch.setattr(api, "on_hopper", lambda: True)
    x = jax.ShapeDtypeStruct((1, 8, 256), jnp.bfloat16)
    policy = jax.checkpoint_policies.save_only_these_names(KEPT)

    def squares(x):
        (one, two), s = rms_norm(x, x, epsilon=EPSILON, uses=2)
        return (one * two + s).astype(jnp.float32).sum()

    def gated_squares(x):
        return (gated_rms_norm(x, x, epsilon=EPSILON) ** 2).astype(jnp.float32).sum()

    for f in (squares, gated_squares):
        for keep, forwards in ((policy, 1), (None, 2)):
            text = lowered(jax.value_and_grad(jax.checkpoint(f, policy=keep)), x)
            assert text.count("@mosaic_gpu") == forwards + 1


def test_refusal_says_why(monkeypatch):
    x = jnp.zeros((1, 8, 96), jnp.bfloat16)
    with pytest.raises(ValueError, match="is none of None"):
        rms_norm(x, epsilon=EPSILON, implementation="triton")
    with pytest.raises(ValueError, match="must be alike"):
        rms_norm(x, x.astype(jnp.float32), epsilon=EPSILON)
    if not api.on_hopper():
        with pytest.raises(ValueError, match="cannot serve: it needs a Hopper GPU"):
            rms_norm(x, epsilon=EPSILON, implementation="pallas_gpu")
    monkeypatch.setattr(api, "on_hopper", lambda: True)
    assert "steps of 256 up to 8192, x has 96" in api.refusal(x)
    assert "steps of 256 up to 8192, x has 16384" in api.refusal(jnp.zeros((1, 1, 16384)))
    assert "dtype float16" in api.refusal(x.astype(jnp.float16))
    assert api.refusal(jnp.zeros((1, 8, 768))) is None


@pytest.mark.gpu
@hopper
class TestOnTheDevice:
    @every_type
    @every_form
    @pytest.mark.parametrize(
        "shape", [(1, 1, 256), (2, 1001, 256), (3, 77, 768), (4, 501, 1024), (2, 33, 2560), (1, 50, 4096), (1, 9, 8192)]
    )
    def test_values_and_gradients(self, shape, dtype, uses, add, beside):
        assert api.refusal(jnp.zeros(shape, dtype)) is None
        check(shape, dtype, uses, add, beside)
        check_gated(shape, dtype)

    def test_bits_do_not_change_between_runs(self):
        x, added, _ = draw((4, 2048, 1024), jnp.bfloat16, 2, True)
        run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
        first = run(x, added)
        for _ in range(10):
            jax.tree.map(np.testing.assert_array_equal, run(x, added), first)
