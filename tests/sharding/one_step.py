"""Loss and gradients of one step on eight devices against those of one. Run by test_meshes.py, in a process with eight."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from linscale import sharding
from linscale.config import ARCHITECTURES, Config, ConfigError, Mesh, Model, Optimizer, Train
from linscale.training import checkpoint, loop, step

MESHES = ((8, 1, 1, 1), (1, 8, 1, 1), (2, 2, 2, 1), (1, 2, 2, 2), (1, 1, 8, 1), (1, 1, 1, 4))
QUICK = {("tnl", (2, 2, 2, 1)), ("llama", (1, 2, 2, 2)), ("cosformer2", (1, 2, 2, 2)), ("hgrn2", (1, 1, 1, 4))}
B, T, VOCAB = 8, 64, 264


def config(arch: str, mesh=(1, 1, 1, 1), accumulation=1, **model) -> Config:
    layers = 5 if arch == "hybrid" else 2  # two periods and a layer more
    sizes = {"layers": layers, "width": 64, "heads": 4, "ffn": 96, "vocab_size": VOCAB, "softmax_every": 2} | model
    return Config(
        model=Model(arch=arch, dtype="float32", **sizes),
        train=Train(batch=B, sequence=T, steps=10, accumulation=accumulation),
        optimizer=Optimizer(learning_rate=1e-2, warmup_tokens=0),
        mesh=Mesh(*mesh),
    )


def batch() -> dict:
    """Documents of all lengths, borders at the borders of devices among them, and a row that is padded."""
    random = np.random.default_rng()
    tokens = random.integers(0, VOCAB, (B, T + 1), np.int32)
    starts = random.random((B, T)) < 0.08
    starts[0, ::8] = True
    segment_ids = 1 + np.cumsum(starts, axis=1, dtype=np.int32)
    weights = np.ones((B, T), np.float32)
    segment_ids[3, 40:], weights[3, 40:] = 0, 0
    return {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "segment_ids": segment_ids, "weights": weights}


def gradients(c: Config, params, rows):
    """(loss, gradients) on the config's mesh, as numpy."""
    mesh = sharding.make_mesh(c.mesh, jax.devices()[: np.prod(dataclasses.astuple(c.mesh))])
    sharding.check(c, mesh.size)
    lie = sharding.shardings(mesh, params)
    with jax.set_mesh(mesh):
        run = jax.jit(functools.partial(step.gradients, c), out_shardings=(sharding.replicated(mesh), lie))
        return jax.device_get(run(jax.device_put(params, lie), sharding.put(rows, mesh)))


def compare(arch: str, shape, **changes):
    alone, rows = config(arch, **changes), batch()
    params = jax.device_get(jax.jit(lambda: step.init(alone).params)())
    params = jax.tree.map(lambda x: x + 0.02 * np.random.default_rng().normal(size=x.shape).astype("float32"), params)
    loss, grads = gradients(alone, params, rows)
    got_loss, got = gradients(config(arch, shape, **changes), params, rows)
    assert got_loss == pytest.approx(loss, rel=1e-5)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(got)):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(a), jax.tree_util.keystr(path)


@pytest.mark.parametrize(
    "arch, shape",
    [
        pytest.param(arch, shape, marks=() if (arch, shape) in QUICK else pytest.mark.slow)
        for arch in ARCHITECTURES
        for shape in MESHES
    ],
)
def test_one_step_equals_one_device(arch, shape):
    compare(arch, shape)


@pytest.mark.slow
@pytest.mark.parametrize("changes", ({"accumulation": 2}, {"remat": "full"}, {"remat": "dots"}, {"tied": False}))
def test_so_it_does_with_accumulation_and_recomputation(changes):
    compare("tnl", (2, 2, 2, 1), **changes)


def test_state_on_a_device_falls_as_one_over_fsdp():
    for arch in ARCHITECTURES:
        held = {}
        for fsdp in (1, 2, 4, 8):
            c = config(arch, (1, fsdp, 1, 1))
            state = checkpoint.abstract_state(c, sharding.make_mesh(c.mesh, jax.devices()[:fsdp]))
            state = (state.params, state.opt_state)
            held[fsdp] = sum(
                np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(state)
            )
        for fsdp in (2, 4, 8):
            assert held[fsdp] == pytest.approx(held[1] / fsdp, rel=0.01), (arch, fsdp)


def test_the_compiled_step_keeps_no_more_than_its_share():
    """What the compiler says of the arguments and results on a device, and no parameter gathered for good."""
    held = {}
    for fsdp in (1, 8):
        c = config("tnl", (1, fsdp, 1, 1), layers=8, width=128, ffn=384)
        mesh = sharding.make_mesh(c.mesh, jax.devices()[:fsdp])
        memory = loop.lower_step(c, checkpoint.abstract_state(c, mesh), mesh).compile().memory_analysis()
        held[fsdp] = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    assert held[8][0] < 1.1 * held[1][0] / 8
    assert held[8][1] < held[1][1] / 2


@pytest.mark.parametrize(
    "shape, changes, words",
    [
        (
            (3, 1, 1, 1),
            {},
            "config.mesh is data 3 x fsdp 1 x sequence 1 x tensor 1, which is 3 devices, but there are 8",
        ),
        ((-1, 3, 1, 1), {}, "3 does not divide the 8 devices"),
        ((-1, 1, 1, 1), {"batch": 6}, "config.train.batch is 6"),
        ((-1, 1, 1, 1), {"accumulation": 2}, "config.train.accumulation"),
        ((1, 1, 8, 1), {"sequence": 60}, "config.train.sequence is 60"),
        ((1, 1, 1, 8), {}, "config.model.heads is 4"),
    ],
)
def test_a_mesh_that_does_not_divide_is_refused(shape, changes, words):
    c = config("tnl", shape)
    with pytest.raises(ConfigError, match=words):
        sharding.check(dataclasses.replace(c, train=dataclasses.replace(c.train, **changes)), 8)


def test_axes_that_collide_are_refused():
    with pytest.raises(ValueError, match="collide"):
        sharding.RULES.spec("heads", "ffn")
    with pytest.raises(ValueError, match="not a logical axis"):
        sharding.RULES.spec("depth")
