"""The train step: one pure function (state, batch) -> (state, metrics), and the evaluation step.

B sequences a step, T tokens a sequence, A micro-batches of B/A sequences. Parameters, gradients and the optimizer's
moments are float32.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from linscale import models, sharding
from linscale.config import Config
from linscale.training import guard, optimizer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    params: Any  # nested dict of float32, as linscale.models.init
    opt_state: Any  # of optimizer.make
    step: jax.Array  # int32: finished optimizer steps, skipped ones included
    guard: guard.Guard  # what decides whether a step is skipped


def init(config: Config) -> TrainState:
    """The state before the first step, a pure function of the config. Meant to be jitted or shape-evaluated."""
    params = models.init(config.model, config.seed)
    return TrainState(params, optimizer.make(config).init(params), jnp.int32(0), guard.init())


def train_step(config: Config, state: TrainState, batch: dict) -> tuple[TrainState, dict]:
    """One optimizer step. batch: tokens, labels, segment_ids int32 [B,T], weights float32 [B,T].

    Metrics, scalars: loss (nats per weighted token, before the update), grad_norm (before clipping), lr, and those of
    guard.judge, which may refuse the update.
    """
    loss, grads = gradients(config, state.params, batch)
    norm = optax.tree.norm(grads)
    good, guarded, judged = guard.judge(config, state.guard, loss, norm)
    moments = state.opt_state
    if config.optimizer.offload:  # the update alone has them on the devices; the caller's out_shardings put them back
        moments = jax.device_put(moments, jax.memory.Space.Device)
    updates, opt_state = optimizer.make(config).update(grads, moments, state.params)
    params = guard.choose(good, optax.apply_updates(state.params, updates), state.params)
    opt_state = guard.choose(good, opt_state, moments)
    metrics = {"loss": loss, "grad_norm": norm, "lr": optimizer.schedule(config)(state.step)} | judged
    return TrainState(params, opt_state, state.step + 1, guarded), metrics


def gradients(config: Config, params, batch: dict) -> tuple[jax.Array, Any]:
    """Loss in nats per weighted token, and its gradient, a tree like params; float32.

    Losses and weights are summed over micro-batches and divided once, so that accumulation changes only rounding,
    also where micro-batches differ in padding. Angles that are kept (theta_share 0) have a gradient of zero, which is not
    worked out.
    """

    def value_and_grad(params, micro):
        def run(softmax):
            def summed(params):
                return models.loss(config.model, optimizer.learned(config, params), micro, softmax=softmax)

            return jax.value_and_grad(summed, has_aux=True)(params)  # ((sum of nats, sum of weights), gradients)

        return models.by_documents(config.model, micro["segment_ids"], run)

    if config.train.accumulation == 1:
        (nats, weights), grads = value_and_grad(params, batch)
    else:

        def accumulate(carry, micro):
            (nats, weights), grads = value_and_grad(params, micro)
            grads = sharding.like_parameters(grads)
            return jax.tree.map(jnp.add, carry, (nats, weights, grads)), None

        zeros = (jnp.float32(0), jnp.float32(0), sharding.like_parameters(jax.tree.map(jnp.zeros_like, params)))
        split = jax.tree.map(lambda x: x.reshape(config.train.accumulation, -1, *x.shape[1:]), batch)
        split = jax.tree.map(lambda x: sharding.constrain(x, None, "batch", "sequence"), split)
        (nats, weights, grads), _ = jax.lax.scan(accumulate, zeros, split)

    grads = sharding.like_parameters(grads)
    weights = jnp.maximum(weights, 1)
    return nats / weights, jax.tree.map(lambda g: g / weights, grads)


def eval_step(config: Config, params, batch: dict) -> tuple[jax.Array, jax.Array]:
    """Sum of nats and sum of weights of one batch, float32 scalars."""
    run = functools.partial(models.loss, config.model, params, batch)
    return models.by_documents(config.model, batch["segment_ids"], run)
