"""The paper's own sizes: 7B traces, 410M takes a real optimizer step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from linscale.config import ARCHITECTURES, Config, Train
from linscale.models.sizes import paper_model
from linscale.training import step


def batch_shapes(batch, sequence):
    kinds = {"tokens": jnp.int32, "labels": jnp.int32, "segment_ids": jnp.int32, "weights": jnp.float32}
    return {name: jax.ShapeDtypeStruct((batch, sequence), kind) for name, kind in kinds.items()}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_7b_train_step_traces(arch):
    model = dataclasses.replace(paper_model(arch, "7b"), remat="full", dtype="bfloat16")
    config = Config(model=model, train=Train(batch=480, sequence=8192, accumulation=8))
    state = jax.eval_shape(functools.partial(step.init, config))
    after, metrics = jax.eval_shape(functools.partial(step.train_step, config), state, batch_shapes(480, 8192))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert metrics["loss"].shape == ()


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_410m_steps(arch):
    """Two optimizer steps at sequence 256, full vocabulary: the first loss is ln V within 5 %, the second is lower."""
    config = Config(model=paper_model(arch, "410m"), train=Train(batch=1, sequence=256, steps=2))
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, warmup_tokens=0))
    tokens = np.random.default_rng(0).integers(100_280, size=(1, 257)).astype(np.int32)
    batch = {
        "tokens": tokens[:, :-1],
        "labels": tokens[:, 1:],
        "segment_ids": np.ones((1, 256), np.int32),
        "weights": np.ones((1, 256), np.float32),
    }
    state = jax.jit(functools.partial(step.init, config))()
    train_step = jax.jit(functools.partial(step.train_step, config), donate_argnums=0)
    losses = []
    for _ in range(2):
        state, metrics = train_step(state, batch)
        losses.append(float(metrics["loss"]))
    assert abs(losses[0] / np.log(100_280) - 1) < 0.05
    assert losses[1] < losses[0]
