"""Cross-entropy against a float64 log-softmax: value and gradients, in one slice and in many.

The Hopper kernel: pytest -m gpu tests/kernels/test_cross_entropy.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper_tests import emulates, hopper, lowers

from linscale.kernels import Axes, cross_entropy
from linscale.kernels.cross_entropy import chunked


def reference(hidden, embedding, labels, weights):
    log_p = jax.nn.log_softmax(jnp.einsum("btd,vd->btv", hidden, embedding, precision="highest"))
    return -jnp.sum(weights * jnp.take_along_axis(log_p, labels[..., None], axis=-1)[..., 0])


exact = jax.jit(jax.value_and_grad(reference, argnums=(0, 1)))


def draw(batch, tokens, width, vocabulary, scale=1.0):
    rng = np.random.default_rng(tokens + vocabulary)
    weights = np.where(rng.random((batch, tokens)) < 0.3, 0, rng.random((batch, tokens)))
    return (
        rng.normal(size=(batch, tokens, width)),
        scale * rng.normal(size=(vocabulary, width)),
        rng.integers(vocabulary, size=(batch, tokens)),
        weights,
    )


@pytest.mark.parametrize("scale", (0.1, 30.0))  # 30: one logit rules, exp of the raw logits would overflow
@pytest.mark.parametrize("tokens", (1, 7, 64))
@pytest.mark.parametrize("slices", (1, 3))
def test_value_and_gradients(monkeypatch, tokens, slices, scale):
    hidden, embedding, labels, weights = draw(2, tokens, 16, 50, scale)
    monkeypatch.setattr(chunked, "MAX_LOGITS", 2 * tokens * 50 // slices)
    with jax.enable_x64(True):
        want = exact(*map(jnp.asarray, (hidden, embedding, labels, weights)))
        want = jax.tree.map(np.asarray, want)
    low = [jnp.asarray(x, jnp.float32) for x in (hidden, embedding)] + [jnp.asarray(labels), jnp.float32(weights)]
    got = jax.value_and_grad(lambda *a: 2 * cross_entropy(*a), argnums=(0, 1))(*low)
    np.testing.assert_allclose(got[0], 2 * want[0], rtol=1e-5)
    assert cross_entropy(*low) == got[0] / 2  # the value without gradient is the same sweep
    for g, w in zip(got[1], want[1]):
        assert np.sqrt(np.mean((g - 2 * w) ** 2)) < 1e-5 * np.sqrt(np.mean(4 * w**2))


@pytest.mark.parametrize("scale", (0.1, 30.0))
def test_in_one_pass(monkeypatch, scale):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")  # where it is used; the arithmetic is the same here
    test_value_and_gradients(monkeypatch, tokens=7, slices=3, scale=scale)


def test_bfloat16_sums_the_embedding_gradient_in_float32():
    hidden, embedding, labels, weights = draw(2, 64, 16, 50)
    low = (jnp.bfloat16(hidden), jnp.float32(embedding), jnp.asarray(labels), jnp.float32(weights))
    rounded = (jnp.float32(low[0]), jnp.float32(jnp.bfloat16(embedding)), *low[2:])
    _, want = exact(*rounded)
    got = jax.grad(cross_entropy, argnums=(0, 1))(*low)
    assert got[0].dtype == jnp.bfloat16 and got[1].dtype == jnp.float32
    for g, w in zip(got, want):
        assert np.sqrt(np.mean((np.float32(g) - w) ** 2)) < 5e-3 * np.sqrt(np.mean(w**2))


def test_weight_zero_hides_even_nan():
    hidden, embedding, labels, weights = draw(1, 4, 8, 10)
    hidden[0, 2] = np.nan
    weights[0, 2] = 0
    assert np.isfinite(cross_entropy(*map(jnp.float32, (hidden, embedding)), jnp.asarray(labels), jnp.float32(weights)))


def test_logits_are_never_whole():
    """At 16,384 tokens and the paper's vocabulary the [tokens, vocabulary] array alone would be 6.6 GB."""
    shapes = [
        jax.ShapeDtypeStruct((2, 8192, 64), jnp.float32),
        jax.ShapeDtypeStruct((100_280, 64), jnp.float32),
        jax.ShapeDtypeStruct((2, 8192), jnp.int32),
        jax.ShapeDtypeStruct((2, 8192), jnp.float32),
    ]
    compiled = jax.jit(jax.grad(cross_entropy, argnums=(0, 1))).lower(*shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 16_384 * 100_280 * 4 / 3


def test_bad_shapes_are_named():
    hidden, embedding, labels, weights = map(jnp.asarray, draw(1, 4, 8, 10))
    with pytest.raises(ValueError, match=r"labels has shape \(1, 3\); it must be \(1, 4\)"):
        cross_entropy(hidden, embedding, labels[:, :3], weights)
    with pytest.raises(ValueError, match=r"embedding has shape \(10, 7\); it must be \(vocabulary, 8\)"):
        cross_entropy(hidden, embedding[:, :7], labels, weights)


def check_rows(rows, vocabulary, kind="normal", **options):
    """The kernel's losses and gradient of the logits against float64, row by row."""
    from linscale.kernels.cross_entropy.pallas_gpu import losses

    rng = np.random.default_rng(rows + vocabulary)
    logits = np.float32(2 * rng.normal(size=(rows, vocabulary)))
    if kind == "extreme":
        logits += np.float32(1e4) * np.sign(logits)
    elif kind == "equal":
        logits[...] = 3.25
    labels = rng.integers(vocabulary, size=rows, dtype=np.int32)
    labels[:3] = [vocabulary - 1, 0, vocabulary - 9][:rows]
    weights = np.where(rng.random(rows) < 0.3, 0, 1 + rng.random(rows)).astype(np.float32)
    got, d_logits = losses(jnp.asarray(logits), jnp.asarray(labels), jnp.asarray(weights), **options)
    x = logits.astype(np.float64) - logits.max(1, keepdims=True)
    total = np.exp(x).sum(1, keepdims=True)
    label = np.arange(vocabulary) == labels[:, None]
    np.testing.assert_allclose(got, np.log(total[:, 0]) - x[label], rtol=1e-6, atol=1e-6)
    want = (np.exp(x) / total - label) * weights[:, None]
    assert d_logits.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float64(d_logits), want, rtol=4e-3, atol=1e-30)  # 2**-8: bfloat16 rounds to nearest


@emulates
@pytest.mark.parametrize("kind", ("normal", "extreme", "equal"))
@pytest.mark.parametrize(
    ("rows", "vocabulary", "options"),
    [
        (3, 4096, {}),
        (5, 5008, {"vectors": 1}),
        (2, 9000, {"warpgroups": 3, "held": 1}),
        (5, 9000, {"held": 2, "vectors": 2}),
        (1, 2048, {}),
    ],
)
def test_kernel_emulated(rows, vocabulary, options, kind, monkeypatch):
    from emulator import emulated

    from linscale.kernels.cross_entropy import pallas_gpu

    monkeypatch.setattr(pallas_gpu, "MULTIPROCESSORS", 2)  # several rows for each
    with emulated():
        check_rows(rows, vocabulary, kind, **options)


def lowered(vocabulary=50_304, dtype=jnp.bfloat16, axes=None, differentiate=jax.grad):
    shapes = [
        jax.ShapeDtypeStruct((2, 128, 64), dtype),
        jax.ShapeDtypeStruct((vocabulary, 64), jnp.float32),
        jax.ShapeDtypeStruct((2, 128), jnp.int32),
        jax.ShapeDtypeStruct((2, 128), jnp.float32),
    ]
    f = differentiate(lambda *a: cross_entropy(*a, axes=axes))
    return jax.jit(f).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


@lowers
@pytest.mark.parametrize("vocabulary", (4096, 32_008, 50_304, 100_280))
def test_kernel_lowers(vocabulary, monkeypatch):
    monkeypatch.setattr(chunked, "on_hopper", lambda: True)
    text = lowered(vocabulary)
    assert text.count("@mosaic_gpu") == 1
    assert f"tensor<256x{vocabulary}xbf16>" in text
    assert "mosaic_gpu" not in lowered(vocabulary, differentiate=lambda f: f)


@lowers
def test_xla_where_the_kernel_cannot_serve(monkeypatch):
    assert "mosaic_gpu" not in lowered()
    monkeypatch.setattr(chunked, "on_hopper", lambda: True)
    assert "mosaic_gpu" not in lowered(50_300)
    assert "mosaic_gpu" not in lowered(dtype=jnp.float32)
    assert "steps of 8 from 4096 to" in chunked.refusal(50_300, jnp.bfloat16)
    assert "dtype float32" in chunked.refusal(50_304, jnp.dtype(jnp.float32))


@lowers
@pytest.mark.parametrize(("tensor", "kernels"), ((1, 1), (2, 0)))
def test_kernel_over_a_mesh(tensor, kernels, monkeypatch):
    monkeypatch.setattr(chunked, "on_hopper", lambda: True)
    auto = (jax.sharding.AxisType.Auto,) * 4
    mesh = jax.sharding.AbstractMesh((1, 2, 2, tensor), ("data", "fsdp", "sequence", "tensor"), axis_types=auto)
    with jax.sharding.use_abstract_mesh(mesh):
        text = lowered(axes=Axes())
    assert text.count("@mosaic_gpu") == kernels
    assert ("tensor<64x50304xbf16>" in text) == bool(kernels)  # a quarter of the rows


@pytest.mark.gpu
@hopper
class TestOnTheDevice:
    @pytest.mark.parametrize("kind", ("normal", "extreme", "equal"))
    @pytest.mark.parametrize(("rows", "vocabulary"), [(1, 4096), (7, 32_008), (300, 50_304), (135, 100_280)])
    def test_rows(self, rows, vocabulary, kind):
        check_rows(rows, vocabulary, kind)

    def test_value_and_gradients(self):
        hidden, embedding, labels, weights = draw(2, 200, 64, 4104)
        low = jnp.bfloat16(hidden), jnp.float32(jnp.bfloat16(embedding)), jnp.asarray(labels), jnp.float32(weights)
        assert chunked.refusal(4104, low[0].dtype) is None
        want = jax.value_and_grad(reference, argnums=(0, 1))(jnp.float32(low[0]), *low[1:])
        got = jax.value_and_grad(cross_entropy, argnums=(0, 1))(*low)
        np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
        for g, w in zip(got[1], want[1]):
            assert np.sqrt(np.mean((np.float32(g) - w) ** 2)) < 5e-3 * np.sqrt(np.mean(w**2))

    def test_bits_do_not_change_between_runs(self):
        hidden, embedding, labels, weights = draw(4, 512, 64, 50_304)
        low = jnp.bfloat16(hidden), jnp.float32(embedding), jnp.asarray(labels), jnp.float32(weights)
        run = jax.jit(jax.value_and_grad(cross_entropy, argnums=(0, 1)))
        first = run(*low)
        for _ in range(10):
            jax.tree.map(np.testing.assert_array_equal, run(*low), first)
