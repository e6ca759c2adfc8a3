"""Adam with decoupled weight decay and the learning-rate schedules, from `config.Optimizer`.

The paper: 3e-4 for every size and architecture, constant after the warm-up, weight decay 0.1. It does not say betas,
eps, clipping or warm-up; the defaults are those of the launcher its authors used.
"""

import math

import jax
import jax.numpy as jnp
import optax

from linscale.config import Config

# Weight decay pulls these toward zero. The other parameters are norm scales, rotation angles (theta), lower bounds and
# TPE coefficients, which set scales, positions and time constants: zero is a meaningful value of theirs, not a small one.
DECAYED = ("kernel", "embedding", "head")


def schedule(config: Config):
    """Learning rate as a function of the number of finished steps (int32 scalar -> float32 scalar).

    Step n (1, 2, ...) has min(1, n / warm-up steps) of the peak, then one of
      constant  1
      cosine    from 1 to final_share by the end of the run
      wsd       1, then linearly to final_share over the last decay_share of the steps
    """
    o, steps = config.optimizer, config.steps
    warmup = math.ceil(o.warmup_tokens / config.tokens_per_step)
    decay = max(1, round(o.decay_share * steps))

    def rate(count):
        n = jnp.asarray(count, jnp.float32) + 1
        factor = jnp.float32(1)
        if o.schedule == "cosine":
            x = jnp.clip((n - warmup) / max(1, steps - warmup), 0, 1)
            factor = o.final_share + (1 - o.final_share) * 0.5 * (1 + jnp.cos(jnp.pi * x))
        elif o.schedule == "wsd":
            x = jnp.clip((n - (steps - decay)) / decay, 0, 1)
            factor = 1 - (1 - o.final_share) * x
        return o.learning_rate * factor * jnp.minimum(1, n / max(1, warmup))

    return rate


def decay_mask(params):
    """Tree of bools like params: True for every matrix, the embedding and the head, by the last name on the leaf's path."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in DECAYED, params)


def angles(params):
    """Tree of bools like params: True for cosFormer2's angles (theta)."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "theta", params)


def learned(config: Config, params):
    """params, without a gradient those that are kept as they start."""
    if config.optimizer.theta_share:
        return params
    return jax.tree.map(lambda kept, x: jax.lax.stop_gradient(x) if kept else x, angles(params), params)


def make(config: Config) -> optax.GradientTransformation:
    """clip by global norm (0: off) -> Adam -> decoupled weight decay -> learning rate.

    The angles are learned in units of theta_share: as if theta / theta_share were the parameter, their gradients are that
    much smaller, for the clipping too, and so are their steps.
    """
    o = config.optimizer
    clip = optax.clip_by_global_norm(o.clip) if o.clip else optax.identity()
    rate = optax.scale_by_learning_rate(schedule(config))
    if o.theta_share != 1:
        unit = optax.masked(optax.scale(o.theta_share), angles)
        clip, rate = optax.chain(unit, clip), optax.chain(rate, unit)
    decay = optax.add_decayed_weights(o.weight_decay, mask=decay_mask)
    return optax.chain(clip, optax.scale_by_adam(o.beta1, o.beta2, o.eps), decay, rate)
