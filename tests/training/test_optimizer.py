import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from linscale import models
from linscale.config import ARCHITECTURES, Model
from linscale.training import optimizer

SETTING = {"train.steps": 100, "train.batch": 2, "train.sequence": 50, "optimizer.learning_rate": 0.5}


def rates(config):
    rate = optimizer.schedule(config)
    return np.array([float(rate(n)) for n in range(config.steps)])


def test_warm_up_is_linear_in_tokens_and_reaches_the_peak(plain):
    got = rates(plain(**SETTING, **{"optimizer.warmup_tokens": 950}))  # 9.5 steps of 100 tokens
    np.testing.assert_allclose(got[:10], 0.5 * np.arange(1, 11) / 10, rtol=1e-6)
    np.testing.assert_allclose(got[10:], 0.5, rtol=1e-6)


def test_no_warm_up_starts_at_the_peak(plain):
    assert rates(plain(**SETTING, **{"optimizer.warmup_tokens": 0}))[0] == 0.5


def test_cosine_falls_from_the_peak_to_the_final_share(plain):
    got = rates(plain(**SETTING, **{"optimizer.warmup_tokens": 1000, "optimizer.schedule": "cosine"}))
    assert got[9] == 0.5 and np.all(np.diff(got[9:]) < 0)
    np.testing.assert_allclose(got[54], 0.5 * 0.55, rtol=1e-5)  # halfway: mean of 1 and 0.1
    np.testing.assert_allclose(got[-1], 0.05, rtol=1e-5)


def test_wsd_is_flat_and_then_linear(plain):
    changes = {"optimizer.warmup_tokens": 1000, "optimizer.schedule": "wsd", "optimizer.decay_share": 0.2}
    got = rates(plain(**SETTING, **changes))
    np.testing.assert_allclose(got[9:80], 0.5, rtol=1e-6)
    np.testing.assert_allclose(got[80:], 0.5 * (1 - 0.9 * np.arange(1, 21) / 20), rtol=1e-5)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_decay_of_matrices_and_embedding_alone(arch):
    model = Model(arch=arch, layers=3, width=32, heads=2, ffn=48, softmax_every=2)
    params = jax.eval_shape(lambda: models.init(model, 0))
    mask = dict(jax.tree_util.tree_leaves_with_path(optimizer.decay_mask(params)))
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = {key.key for key in path}
        in_and_out = leaf.ndim - ("layers" in names) == 2  # the first axis of a stacked leaf is the layer
        special = names & {"scale", "theta", "lower_bound", "tpe"}
        assert mask[path] == (in_and_out and not special), jax.tree_util.keystr(path)
    assert sum(mask.values()) >= 8


def test_one_update_by_hand(plain):
    """Adam's first update is -lr (sign(g) + decay w) whatever the size of g; clipping changes only g."""
    config = plain(**SETTING, **{"optimizer.warmup_tokens": 0, "optimizer.weight_decay": 0.1, "optimizer.eps": 0.0})
    params = {"kernel": jnp.array([[2.0, -3.0]]), "scale": jnp.array([2.0])}
    grads = {"kernel": jnp.array([[30.0, -40.0]]), "scale": jnp.array([5.0])}
    adam = optimizer.make(config)
    updates, state = adam.update(grads, adam.init(params), params)
    np.testing.assert_allclose(updates["kernel"], [[-0.5 * (1 + 0.2), -0.5 * (-1 - 0.3)]], rtol=1e-5)
    np.testing.assert_allclose(updates["scale"], [-0.5], rtol=1e-5)
    norm = np.sqrt(30**2 + 40**2 + 5**2)
    np.testing.assert_allclose(state[1].mu["kernel"], [[0.1 * 30 / norm, -0.1 * 40 / norm]], rtol=1e-5)


@pytest.mark.parametrize("share", (0.0, 0.01))
def test_the_angles_are_learned_in_units_of_their_share(plain, share):
    """As if theta / share were the parameter: a share of 0 keeps them, and out of the clipping."""
    config = plain(**SETTING, **{"optimizer.warmup_tokens": 0, "optimizer.weight_decay": 0.0})
    slowed = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, theta_share=share))
    params = {"kernel": jnp.array([[2.0]]), "mixer": {"theta": jnp.array([0.5, 1.0])}}
    grads = {"kernel": jnp.array([[3.0]]), "mixer": {"theta": jnp.array([400.0, -400.0])}}

    def one_update(config):
        adam = optimizer.make(config)
        updates, state = adam.update(grads, adam.init(params), params)
        return updates, state[1].mu["kernel"]

    (usual, _), (slow, moment) = one_update(config), one_update(slowed)
    np.testing.assert_allclose(usual["mixer"]["theta"], [-0.5, 0.5], rtol=1e-5)
    np.testing.assert_allclose(slow["mixer"]["theta"], [-0.5 * share, 0.5 * share], rtol=1e-5)
    np.testing.assert_allclose(slow["kernel"], usual["kernel"], rtol=1e-5)
    norm = np.sqrt(3**2 + 2 * (share * 400) ** 2)
    np.testing.assert_allclose(moment, [[0.1 * 3 / norm]], rtol=1e-5)


@pytest.mark.parametrize("clip", (0.0, 1e9))
def test_clip_of_zero_is_off(plain, clip):
    adam = optimizer.make(plain(**SETTING, **{"optimizer.clip": clip}))
    params = {"kernel": jnp.ones((1, 2))}
    _, state = adam.update({"kernel": jnp.array([[300.0, 400.0]])}, adam.init(params), params)
    np.testing.assert_allclose(state[1].mu["kernel"], [[30.0, 40.0]], rtol=1e-5)
