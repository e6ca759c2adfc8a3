"""Skipped steps, against a plain numpy statement of the rule."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from linscale import models
from linscale.config import Config, Model, Optimizer, Train
from linscale.training import guard, step

B, T, VOCAB = 4, 16, 40


def config(**train):
    model = Model(arch="tnl", layers=2, width=32, heads=2, ffn=48, vocab_size=VOCAB, dtype="float32")
    return Config(
        model=model,
        train=Train(**{"batch": B, "sequence": T, "steps": 10} | train),
        optimizer=Optimizer(learning_rate=1e-2, warmup_tokens=0),
    )


def batch(seed):
    tokens = np.random.default_rng(seed).integers(0, VOCAB, (B, T + 1)).astype(np.int32)
    ones = np.ones((B, T), np.int32)
    return {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "segment_ids": ones, "weights": np.float32(ones)}


def test_rule_agrees_with_numpy():
    """Random norms with spikes, NaN and Inf, judged one after the other."""
    c = config(skip_limit=4)
    random = np.random.default_rng(1)
    judge = jax.jit(lambda state, loss, norm: guard.judge(c, state, loss, norm))
    state, window, in_a_row, skipped = guard.init(), [], 0, 0
    for n in range(600):
        norm = np.float32(random.lognormal(0, 0.1))
        loss = np.float32(2.0)
        fault = random.integers(0, 12)
        if fault == 0:
            norm = np.float32(random.choice([np.nan, np.inf, 1e30]))
        if fault == 1:
            norm = np.float32(random.uniform(1, 4))
        if fault == 2 and n % 2:
            loss = np.float32(np.nan)
        window = window[-guard.WINDOW :]
        limit = np.mean(window) + 6 * np.std(window) if len(window) == guard.WINDOW else np.inf
        finite = np.isfinite(norm) and np.isfinite(loss)
        bad = not finite or norm > limit or in_a_row >= 4
        good, state, metrics = judge(state, loss, norm)
        if finite:
            window.append(min(norm, limit))
        in_a_row = in_a_row + 1 if bad else 0
        skipped += bad
        assert bool(good) == (not bad), (n, norm, limit)
        assert (int(metrics["skipped"]), int(metrics["in_a_row"])) == (skipped, in_a_row)
        np.testing.assert_allclose(metrics["norm_limit"], limit, rtol=1e-5)
        if in_a_row == 4:  # latched for good; begin again
            state, window, in_a_row, skipped = guard.init(), [], 0, 0
    assert 0 < skipped < n


@pytest.mark.parametrize("accumulation", (pytest.param(1, marks=pytest.mark.slow), 2))
def test_a_bad_step_changes_counters_alone(monkeypatch, accumulation):
    """NaN in one micro-batch's gradient: parameters and moments keep their bits, the step counts on."""
    c = config(accumulation=accumulation)
    honest = models.loss

    def poisoned(model, params, batch, softmax):  # tokens are never all zero by chance
        nats, weights = honest(model, params, batch, softmax)
        return nats * jnp.where(jnp.all(batch["tokens"][0] == 0), jnp.nan, 1.0), weights

    monkeypatch.setattr(models, "loss", poisoned)
    train_step = jax.jit(functools.partial(step.train_step, c))
    state = jax.jit(functools.partial(step.init, c))()
    state, _ = train_step(state, batch(0))
    bad = batch(1)
    bad["tokens"][0] = 0
    after, metrics = train_step(state, bad)
    assert not np.isfinite(metrics["loss"]) and int(metrics["in_a_row"]) == int(metrics["skipped"]) == 1
    assert int(after.step) == 2 and int(after.guard.entered) == 1
    floats = [leaf for leaf in jax.tree.leaves((state.params, state.opt_state)) if leaf.dtype == jnp.float32]
    kept = [leaf for leaf in jax.tree.leaves((after.params, after.opt_state)) if leaf.dtype == jnp.float32]
    assert len(floats) > 20 and all(map(np.array_equal, floats, kept))
    again, metrics = train_step(after, batch(2))
    assert int(metrics["in_a_row"]) == 0 and not np.array_equal(again.params["embedding"], after.params["embedding"])


def test_after_the_limit_nothing_is_accepted():
    c = config(skip_limit=2)
    state = guard.init()
    for _ in range(2):
        _, state, _ = guard.judge(c, state, jnp.float32(1), jnp.float32(jnp.nan))
    good, state, metrics = guard.judge(c, state, jnp.float32(1), jnp.float32(1))
    assert not good and int(metrics["in_a_row"]) == 3


def test_the_limit_follows_norms_that_rise_for_good():
    """Twice the norm from one step on: a few steps are skipped, never ten in a row, and then none."""
    c, judge = config(), jax.jit(guard.judge, static_argnums=0)
    random, state, in_a_row = np.random.default_rng(3), guard.init(), []
    for n in range(400):
        norm = np.float32(random.lognormal(0, 0.1) * (1 if n < 200 else 2))
        _, state, metrics = judge(c, state, jnp.float32(2), norm)
        in_a_row.append(int(metrics["in_a_row"]))
    assert not any(in_a_row[:200]) and 1 <= max(in_a_row) < c.train.skip_limit and not any(in_a_row[300:])


def test_without_sigma_only_what_is_not_finite_is_bad():
    c = config(spike_sigma=0.0)
    state = dataclasses.replace(guard.init(), norms=jnp.ones(guard.WINDOW), entered=jnp.int32(500))
    assert guard.judge(c, state, jnp.float32(1), jnp.float32(1e6))[0]
    assert not guard.judge(config(), state, jnp.float32(1), jnp.float32(1e6))[0]
