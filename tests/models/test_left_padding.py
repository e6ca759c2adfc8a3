"""Rows padded on the left: whatever the padding holds and however long it is, the text after it reads the same."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from linscale import models
from linscale.config import ARCHITECTURES, Model


@functools.partial(jax.jit, static_argnums=0)
def all_logits(model, params, tokens, cache=None):
    hidden, cache = models.forward(model, params, tokens, None, cache)
    return models.logits(model, params, hidden), cache


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_padding_on_the_left_changes_nothing(arch):
    model = Model(arch=arch, layers=2, width=32, heads=2, ffn=48, vocab_size=61, softmax_every=2, init_std=0.2)
    params = models.init(model, 3)
    rng = np.random.default_rng(5)
    texts = [rng.integers(61, size=n) for n in (40, 7, 25, 39)]  # row 1's padding outlasts the first prefill call
    start = np.array([40 - len(text) for text in texts])
    tokens = np.stack([np.concatenate([rng.integers(61, size=40 - len(text)), text]) for text in texts])
    cache = models.init_cache(model, 4, 40, start=jnp.asarray(start))
    parts = []
    for begin, end in [(0, 18), (18, 36)] + [(t, t + 1) for t in range(36, 40)]:
        logits, cache = all_logits(model, params, tokens[:, begin:end], cache)
        parts.append(logits)
    got = np.concatenate(parts, axis=1)
    rolled = np.stack([np.roll(row, -begin) for row, begin in zip(tokens, start)])  # the text first, causal models
    expected, _ = all_logits(model, params, rolled)
    for row, text in enumerate(texts):
        np.testing.assert_allclose(
            got[row, start[row] :], expected[row, : len(text)], atol=1e-4 * np.abs(expected).max()
        )
