"""The optimizer's moments in the host's memory: where they lie, that nothing changes, and where it cannot work."""

import functools
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from test_step import batch, config

from linscale import sharding
from linscale.config import ConfigError
from linscale.training import checkpoint, loop, step


def kinds(tree) -> set[str]:
    return {x.sharding.memory_kind for x in jax.tree.leaves(tree)}


def trained(offload: bool):
    """(state after three steps of the compiled program that training runs, its abstract state, losses)."""
    c = config("llama", offload=offload)
    mesh = sharding.make_mesh(c.mesh, jax.devices()[:1])
    abstract = checkpoint.abstract_state(c, mesh)
    lie, losses = jax.tree.map(lambda x: x.sharding, abstract), []
    state = jax.jit(functools.partial(step.init, c), out_shardings=lie)()
    compiled = loop.lower_step(c, abstract, mesh).compile()
    for n in range(3):
        state, measured = compiled(state, sharding.put(jax.device_get(batch(n)), mesh))
        losses.append(float(measured["loss"]))
    return state, abstract, losses


def same(a, b) -> bool:
    return all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))


def test_nothing_changes_but_where_the_moments_lie_and_so_they_are_saved_and_restored(tmp_path):
    state, abstract, losses = trained(offload=True)
    moments = state.opt_state[1]
    assert kinds((moments.mu, moments.nu)) == {sharding.HOST}
    assert kinds((state.params, state.step, moments.count, state.guard)) == {"device"}
    expected, plain, expected_losses = trained(offload=False)
    assert losses == expected_losses and same(state, expected)

    checkpoint.save_alone(tmp_path / "one", state)
    for wanted in (abstract, plain):  # the option may change when a run continues
        back, _ = checkpoint.read(tmp_path / "one", wanted)
        assert same(back, expected) and kinds(back.opt_state) == kinds(wanted.opt_state)


def test_a_backend_without_such_memory_is_refused():
    device = SimpleNamespace(device_kind="abacus", addressable_memories=lambda: [SimpleNamespace(kind="device")])
    with pytest.raises(ConfigError, match=r"config\.optimizer\.offload is True, but abacus offers no memory of kind"):
        sharding.check_host_memory(config(offload=True), device)
    sharding.check_host_memory(config(), device)
    sharding.check_host_memory(config(offload=True), jax.devices()[0])
