"""Softmax attention against a float64 sum over keys, with documents, and with a cache."""

import jax.numpy as jnp
import numpy as np
import pytest

from linscale.kernels import softmax_attention


def reference(q, k, v, ids=None, offset=0):
    out = np.zeros(q.shape)
    for b, t, h in np.ndindex(q.shape[:3]):
        keys = [s for s in range(offset + t + 1) if ids is None or ids[b, s] == ids[b, t]]
        score = k[b, keys, h] @ q[b, t, h] / np.sqrt(q.shape[3])
        p = np.exp(score - score.max())
        out[b, t, h] = p @ v[b, keys, h] / p.sum()
    return out


@pytest.mark.parametrize("tokens", (1, 33))
@pytest.mark.parametrize("documents", (False, True))
def test_values(tokens, documents):
    rng = np.random.default_rng(tokens)
    q, k, v = rng.normal(size=(3, 2, tokens, 3, 8))
    ids = np.cumsum(rng.random((2, tokens)) < 0.2, axis=1) if documents else None
    got = softmax_attention(*map(jnp.float32, (q, k, v)), segment_ids=ids)
    np.testing.assert_allclose(got, reference(q, k, v, ids), atol=1e-5)


def test_queries_at_an_offset_see_the_cache_up_to_themselves():
    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, 4, 3, 8))
    k, v = rng.normal(size=(2, 2, 20, 3, 8))
    got = softmax_attention(*map(jnp.float32, (q, k, v)), offset=9)
    np.testing.assert_allclose(got, reference(q, k, v, offset=9), atol=1e-5)


def test_bad_shapes_are_named():
    x = jnp.zeros((1, 4, 2, 8))
    with pytest.raises(ValueError, match="without offset they must be equal"):
        softmax_attention(x, x[:, :3], x[:, :3])
    with pytest.raises(ValueError, match="do not fit"):
        softmax_attention(x, x, x[..., :4])
