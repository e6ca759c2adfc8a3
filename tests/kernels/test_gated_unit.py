"""The gated unit: every implementation, values and gradients, against float64.

The Hopper kernel: pytest -m gpu tests/kernels/test_gated_unit.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper_tests import emulates, hopper, lowered, lowers

from linscale.kernels import Axes, gated_unit
from linscale.kernels.gated_unit import api
from linscale.kernels.remat import KEPT

every_type = pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16))
every_activation = pytest.mark.parametrize("activation", ("none", "silu"))
# Of what is multiplied, a gate counting as one at least, as silu's slope has a zero. XLA rounds every step in bfloat16.
BOUND = {"float32": 1e-6, "bfloat16": 4e-3}
BOUND_OF_XLA = {"float32": 1e-6, "bfloat16": 3e-2}


def check(shape, dtype, activation, bound=BOUND):
    rng = np.random.default_rng(hash((shape, activation)) % 2**32)
    up, gate, gradient = (jnp.asarray(rng.normal(size=shape) * s, dtype) for s in (1, 5, 30))
    out, pull = jax.vjp(lambda up, gate: gated_unit(up, gate, activation=activation), up, gate)
    d_up, d_gate = pull(gradient)
    u, g, d = (np.asarray(x, np.float64) for x in (up, gate, gradient))
    opened = 1 / (1 + np.exp(-g)) if activation == "silu" else np.ones_like(g)
    slope = opened * (1 + g * (1 - opened)) if activation == "silu" else opened
    size = 1 + np.abs(g)
    wanted = {
        "out": (out, u * g * opened, u * size),
        "d_up": (d_up, d * g * opened, d * size),
        "d_gate": (d_gate, d * u * slope, d * u * size),
    }
    for name, (got, want, size) in wanted.items():
        assert got.dtype == dtype
        error = np.max(np.abs(np.asarray(got, np.float64) - want) / np.abs(size))
        assert error < bound[jnp.dtype(dtype).name], (name, error)


@every_type
@every_activation
@pytest.mark.parametrize("shape", [(2, 37, 64), (1, 1, 1), (3, 5, 1000)])
def test_xla(shape, dtype, activation):
    check(shape, dtype, activation, BOUND_OF_XLA)


@emulates
@every_type
@every_activation
@pytest.mark.parametrize("shape", [(2, 16, 64), (1, 2, 2560), (1, 11, 1024)])
def test_kernel_emulated(shape, dtype, activation, monkeypatch):
    from emulator import emulated

    monkeypatch.setattr(api, "on_hopper", lambda: True)
    with emulated():
        assert api.refusal(jnp.zeros(shape, dtype)) is None
        # The forward pass is XLA's, which rounds silu in bfloat16 first.
        check(shape, dtype, activation, BOUND if activation == "none" else BOUND_OF_XLA)


def loss(up, gate, activation="silu", axes=None):
    return (gated_unit(up, gate, activation=activation, axes=axes).astype(jnp.float32) ** 2).sum()


@lowers
@every_type
@every_activation
def test_kernel_lowers(dtype, activation, monkeypatch):
    monkeypatch.setattr(api, "on_hopper", lambda: True)
    x = jax.ShapeDtypeStruct((3, 1000, 2560), dtype)
    text = lowered(jax.value_and_grad(lambda up, gate: loss(up, gate, activation), argnums=(0, 1)), x, x)
    assert text.count("@mosaic_gpu") == 1


@lowers
def test_kernel_lowers_on_every_device_of_a_mesh(monkeypatch):
    monkeypatch.setattr(api, "on_hopper", lambda: True)
    x = jax.ShapeDtypeStruct((4, 256, 2048), jnp.bfloat16)
    auto = (jax.sharding.AxisType.Auto,) * 4
    mesh = jax.sharding.AbstractMesh((1, 2, 2, 2), ("data", "fsdp", "sequence", "tensor"), axis_types=auto)
    with jax.sharding.use_abstract_mesh(mesh):
        text = lowered(jax.grad(lambda x: loss(x, x, axes=Axes())), x)
    calls = [line for line in text.splitlines() if "@mosaic_gpu" in line]
    assert len(calls) == 1
    assert "tensor<256x1024xbf16>" in calls[0]  # 2 rows of 128 tokens and 1,024 channels


@lowers
def test_rematerialisation_keeps_the_result(monkeypatch):
    """A product with it needs it for the gradient of its matrix."""
    monkeypatch.setattr(api, "on_hopper", lambda: True)
    x = jax.ShapeDtypeStruct((1, 8, 1024), jnp.bfloat16)

    def f(up, gate):
        return (gated_unit(up, gate, activation="silu") ** 2).astype(jnp.float32).sum()

    for policy, formed in ((jax.checkpoint_policies.save_only_these_names(KEPT), 1), (None, 2)):
        text = lowered(jax.value_and_grad(jax.checkpoint(f, policy=policy), argnums=(0, 1)), x, x)
        assert text.count("call @silu") == formed


def test_bad_input_is_refused(monkeypatch):
    x = jnp.zeros((1, 8, 96), jnp.bfloat16)
    with pytest.raises(ValueError, match="is none of None"):
        gated_unit(x, x, activation="silu", implementation="triton")
    with pytest.raises(ValueError, match="activation='gelu' is none of 'none', 'silu'"):
        gated_unit(x, x, activation="gelu")
    with pytest.raises(ValueError, match="must be alike"):
        gated_unit(x, x.astype(jnp.float32), activation="silu")
    if not api.on_hopper():
        with pytest.raises(ValueError, match="cannot serve: it needs a Hopper GPU"):
            gated_unit(x, x, activation="silu", implementation="pallas_gpu")
    monkeypatch.setattr(api, "on_hopper", lambda: True)
    assert "multiples of 1,024 elements on each device, x has 768 on 1" in api.refusal(x)
    assert "dtype float16" in api.refusal(x.astype(jnp.float16))
    assert api.refusal(jnp.zeros((1, 32, 96))) is None


@pytest.mark.gpu
@hopper
class TestOnTheDevice:
    @every_type
    @every_activation
    @pytest.mark.parametrize("shape", [(1, 1, 1024), (2, 1000, 256), (3, 77, 3072), (16, 2048, 2560)])
    def test_values_and_gradients(self, shape, dtype, activation):
        assert api.refusal(jnp.zeros(shape, dtype)) is None
        check(shape, dtype, activation, BOUND if activation == "none" else BOUND_OF_XLA)
