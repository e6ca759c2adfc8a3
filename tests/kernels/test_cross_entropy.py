"""Cross-entropy against a float64 log-softmax: value and gradients, in one slice and in many."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from linscale.kernels import cross_entropy
from linscale.kernels.cross_entropy import chunked


def reference(hidden, embedding, labels, weights):
    log_p = jax.nn.log_softmax(jnp.einsum("btd,vd->btv", hidden, embedding, precision="highest"))
    return -jnp.sum(weights * jnp.take_along_axis(log_p, labels[..., None], axis=-1)[..., 0])


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
        want = jax.value_and_grad(reference, argnums=(0, 1))(*map(jnp.asarray, (hidden, embedding, labels, weights)))
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
    want = jax.grad(reference, argnums=(0, 1))(*rounded)
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
