"""The TPU kernels: in interpret mode on any machine, with race detection, against the float64 scan; and compiled ahead
of time for every generation.

pytest -m slow tests/kernels/test_pallas_tpu.py          the whole shared class, 64 and 128 channels
pytest -m tpu_compile tests/kernels/test_pallas_tpu.py   needs libtpu (the extra "tpu"), no TPU
"""

import gates_of_chunks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_linear_attention as shared
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu

from linscale.kernels import Axes, linear_attention
from linscale.kernels.linear_attention import pallas_tpu, pallas_tpu_mild

GENERATIONS = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
KINDS = ("none", "scalar", "phase", "vector/1")  # one per kernel, in the budget
EVERY = ("none", "scalar", "scalar-zero", "phase", "vector/0.05", "vector/0.1", "vector/1", "vector/10")


@pytest.fixture
def interpreted(monkeypatch):
    """Runs the kernels on this machine and fails when one reads what another part may still be writing."""
    monkeypatch.setattr(pallas_tpu, "INTERPRET", pltpu.InterpretParams(detect_races=True))
    monkeypatch.setattr(shared, "KEY", 64)
    monkeypatch.setattr(shared, "VALUE", 64)
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter

    yield
    assert interpreter.races is not None
    assert not interpreter.races.races_found


@pytest.mark.parametrize("kind", KINDS)
def test_float32_with_state_and_documents(interpreted, kind):
    """Two chunks, the second cut short, of several rows and heads: every input, both states, all gradients."""
    arrays, ids = shared.draw(1, 200, kind, segments=True)
    shared.compare("pallas_tpu", arrays, ids, 1e-5)


@pytest.mark.parametrize("kind", ("scalar", "vector/0.1", "phase"))
def test_bfloat16_of_128_channels(interpreted, monkeypatch, kind):
    for name, size in {"BATCH": 1, "KEY": 128, "VALUE": 128}.items():
        monkeypatch.setattr(shared, name, size)
    arrays, ids = shared.draw(2, 130, kind, state=False, segments=True, tied_key=kind == "vector/0.1")
    shared.compare("pallas_tpu", arrays, ids, 5e-3, dtype=jnp.bfloat16)


def compare_chunks(monkeypatch, kinds, channels, tied, gates, start=None):
    """Chunks of the kinds of gates_of_chunks, the last cut short; start: where a second document begins."""
    for name, size in {"BATCH": 1, "HEADS": 2, "KEY": channels, "VALUE": channels}.items():
        monkeypatch.setattr(shared, name, size)
    chunk = channels  # one head of 128 channels, or two of 64 in chunks half as long
    tokens = len(kinds) * chunk - 5
    floor = pallas_tpu_mild.FLOOR
    decay = gates_of_chunks.draw(kinds, (1, tokens, 2, channels), 3, chunk, 2 * floor)
    halves = gates_of_chunks.mild(decay, chunk=chunk // 2, floor=floor).all((0, 2, 3)).reshape(-1, 2)
    assert "".join("m" if both else "s" for both in halves.all(1)) == "".join(
        "m" if k in "mfzw" else "s" for k in kinds
    )
    arrays, _ = shared.draw(3, tokens, "none", tied_key=tied)
    ids = None if start is None else (np.arange(tokens) >= start)[None].astype(np.int32)
    return shared.compare("pallas_tpu", arrays | {"log_decay": decay}, ids, 5e-3, dtype=jnp.bfloat16, gates=gates)


def test_mild_and_strong_chunks(interpreted, monkeypatch):
    """Chunks in one product and chunks halved hand the state and its gradient to one another, through weak gates.

    The second is halved since a document begins in it, the third since a gate is closed.
    """
    compare_chunks(monkeypatch, "wwjww", 64, False, jnp.bfloat16, start=64 + 9)


@pytest.mark.slow
@pytest.mark.parametrize("gates", (jnp.float32, jnp.bfloat16))
@pytest.mark.parametrize("tied", (False, True))
@pytest.mark.parametrize("channels", (64, 128))
@pytest.mark.parametrize("kinds", ("mbfz", "fmfcm"))
def test_chunks_at_the_floor(interpreted, monkeypatch, kinds, channels, tied, gates):
    """The largest and the least weights that one product may have, and more blocks than one of 128 channels."""
    compare_chunks(monkeypatch, kinds, channels, tied, gates)


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("channels", [(64, 64), (128, 128), (64, 128)])
class TestAgainstFloat64Scan:
    """The shared class; lengths around its chunk of 64 become lengths around ours of 128 and around a block."""

    @pytest.fixture(autouse=True)
    def _channels(self, channels, interpreted, monkeypatch):
        monkeypatch.setattr(shared, "KEY", channels[0])
        monkeypatch.setattr(shared, "VALUE", channels[1])
        yield
        jax.clear_caches()  # a program takes hundreds of memory maps, a process has 65,530: past them compiles crash

    @pytest.mark.parametrize("kind", EVERY)
    @pytest.mark.parametrize("tokens", (1, 63, 127, 128, 129, 1000))
    def test_state_and_segments(self, tokens, kind):
        arrays, ids = shared.draw(tokens, tokens, kind, segments=True)
        shared.compare("pallas_tpu", arrays, ids, 1e-5, seed=tokens)

    @pytest.mark.parametrize("kind", EVERY)
    def test_plain(self, kind):
        arrays, ids = shared.draw(7, 130, kind, state=False)
        shared.compare("pallas_tpu", arrays, ids, 1e-5)

    @pytest.mark.parametrize("kind", EVERY)
    def test_bfloat16(self, kind):
        arrays, ids = shared.draw(9, 200, kind, segments=True)
        shared.compare("pallas_tpu", arrays, ids, 5e-3, dtype=jnp.bfloat16)

    @pytest.mark.parametrize("kind", ("vector/0.1", "vector/1"))
    @pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16))
    def test_tied_key(self, kind, dtype):
        arrays, ids = shared.draw(8, 200, kind, segments=True, tied_key=True)
        shared.compare("pallas_tpu", arrays, ids, 1e-5 if dtype == jnp.float32 else 5e-3, dtype=dtype)

    def test_bfloat16_gates(self):
        arrays, ids = shared.draw(9, 200, "vector/1", segments=True, tied_key=True)
        shared.compare("pallas_tpu", arrays, ids, 5e-3, dtype=jnp.bfloat16, gates=jnp.bfloat16)

    @pytest.mark.parametrize("kind", ("none", "scalar", "phase", "vector/1"))
    def test_every_token_its_own_document(self, kind):
        shared.TestAgainstFloat64Scan().test_closed_gates_and_many_documents("pallas_tpu", kind)

    @pytest.mark.parametrize("kind", ("scalar", "vector/1"))
    def test_minus_infinity_forgets(self, kind):
        shared.TestAgainstFloat64Scan().test_minus_infinity_forgets("pallas_tpu", kind)


def test_refusal_names_what_does_not_fit():
    x = jnp.zeros((1, 8, 1, 64))
    with pytest.raises(ValueError, match="cannot serve: it needs a TPU"):
        linear_attention(x, x, x, implementation="pallas_tpu")


def test_refusal_of_channels(monkeypatch):  # no kernel runs, so there are no races to ask about
    monkeypatch.setattr(pallas_tpu, "INTERPRET", pltpu.InterpretParams())
    x = jnp.zeros((1, 8, 1, 96))
    with pytest.raises(ValueError, match="64 or 128 channels a head, q has 96"):
        linear_attention(x, x, x, implementation="pallas_tpu")


def topology_devices(generation):
    pytest.importorskip("libtpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TPU_SKIP_MDS_QUERY", "1")
        patch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
        patch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # a process that only compiles holds no chip
        devices = topologies.get_topology_desc(GENERATIONS[generation], "tpu").devices
    return np.array(devices)


def topology_mesh(generation):
    return jax.sharding.Mesh(topology_devices(generation)[:1], ("data",))


def compiled(mesh, kind, batch, tokens, heads, channels, *, gradient, dtype=jnp.bfloat16, state=False, segments=False):
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    array = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=whole)  # noqa: E731
    x = array((batch, tokens, heads, channels), dtype)
    arrays = {"q": x, "k": None if kind == "tied" else x, "v": x}
    if kind == "scalar":
        arrays["log_decay"] = array((heads,), jnp.float32)
    if kind in ("vector", "tied"):
        arrays["log_decay"] = array(x.shape, jnp.float32)
    if kind == "phase":
        arrays["phase"] = array((heads, channels), jnp.float32)
    if state:
        rows = channels * (2 if kind == "phase" else 1)
        arrays["initial_state"] = array((batch, heads, rows, channels), jnp.float32)
    ids = array((batch, tokens), jnp.int32) if segments else None

    def loss(arrays, ids):
        out, final = linear_attention(**arrays, segment_ids=ids)
        return out.astype(jnp.float32).sum() + (final.sum() if state else 0.0)

    with jax.set_mesh(mesh):
        return jax.jit(jax.grad(loss) if gradient else loss).lower(arrays, ids).compile()


@pytest.mark.tpu_compile
@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("kind", ("none", "scalar", "phase", "vector", "tied"))
class TestCompiles:
    @pytest.mark.parametrize("channels", (64, 128))
    def test_shapes_of_the_benchmark_and_of_7b(self, generation, kind, channels):
        """Through the dispatch, with no implementation named; 7B: 32 heads of 128."""
        mesh = topology_mesh(generation)
        for batch, tokens, heads in ((8, 8192, 16), (1, 8192, 32)):
            program = compiled(mesh, kind, batch, tokens, heads, channels, gradient=True)
            assert program.as_text().count('custom_call_target="tpu_custom_call"') == 2

    def test_documents_states_any_length_and_float32(self, generation, kind):
        mesh = topology_mesh(generation)
        for dtype in (jnp.bfloat16, jnp.float32):
            compiled(mesh, kind, 2, 1000, 3, 64, gradient=True, dtype=dtype, state=True, segments=True)


@pytest.mark.tpu_compile
@pytest.mark.parametrize("kind", ("none", "scalar", "phase", "vector", "tied"))
def test_compiles_on_every_device_of_a_mesh(kind):
    """Packed documents over four chips, two of the sequence axis: the kernels, and nothing but states between chips."""
    names = ("data", "fsdp", "sequence", "tensor")
    mesh = jax.sharding.Mesh(topology_devices("v5p").reshape(1, 1, 2, 2), names)

    def array(shape, dtype, *axes):
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    x = array((2, 2048, 4, 128), jnp.bfloat16, "data", "sequence", "tensor")
    named = {
        "scalar": {"log_decay": array((4,), jnp.float32, "tensor")},
        "phase": {"phase": array((4, 128), jnp.float32, "tensor")},
        "vector": {"log_decay": array(x.shape, jnp.float32, "data", "sequence", "tensor")},
        "tied": {"log_decay": x},
    }.get(kind, {})
    arrays = {"q": x, "k": None if kind == "tied" else x, "v": x, **named}

    def loss(arrays, ids):
        return linear_attention(**arrays, segment_ids=ids, axes=Axes())[0].astype(jnp.float32).sum()

    with jax.set_mesh(mesh):
        ids = array(x.shape[:2], jnp.int32, "data", "sequence")
        text = jax.jit(jax.grad(loss)).lower(arrays, ids).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 2
    assert " collective-permute" in text
    assert not any(
        f" {name}" in text for name in ("all-gather(", "all-gather-start(", "all-to-all(", "reduce-scatter(")
    )
