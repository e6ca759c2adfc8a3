"""The Hopper kernels: on any machine they lower to GPU code; on a Hopper GPU they meet the float64 scan.

pytest -m gpu tests/kernels/test_pallas_gpu.py
"""

import gates_of_chunks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_linear_attention as shared
from hopper_tests import hopper, lowers

from linscale.kernels import Axes, linear_attention
from linscale.kernels.linear_attention import pallas_gpu
from linscale.kernels.linear_attention.pallas_gpu_blocks import Blocks

EVERY = ("none", "scalar", "phase", "vector", "tied")
# "none" is "scalar" without its decay, "tied" is "vector" without k
FAMILIES = [pytest.param(kind, marks=[pytest.mark.slow] * (kind in ("none", "tied"))) for kind in EVERY]


def shapes(kind, tokens, channels, state, segments, batch=2, heads=3, values=None):
    x = jax.ShapeDtypeStruct((batch, tokens, heads, channels), jnp.bfloat16)
    v = jax.ShapeDtypeStruct((batch, tokens, heads, values or channels), jnp.bfloat16)
    named = {
        "none": {},
        "scalar": {"log_decay": jax.ShapeDtypeStruct((heads,), jnp.float32)},
        "phase": {"phase": jax.ShapeDtypeStruct((heads, channels), jnp.float32)},
        "vector": {"log_decay": jax.ShapeDtypeStruct(x.shape, jnp.float32)},
        "tied": {"log_decay": x},
        "bfloat16 gates": {"log_decay": x},
    }[kind]
    rows = channels * (2 if kind == "phase" else 1)
    arrays = {"q": x, "k": None if kind == "tied" else x, "v": v, **named}
    if state:
        arrays["initial_state"] = jax.ShapeDtypeStruct((batch, heads, rows, v.shape[-1]), jnp.float32)
    return arrays, jax.ShapeDtypeStruct(x.shape[:2], jnp.int32) if segments else None


@lowers
@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize(
    ("tokens", "keys", "values", "state", "segments"),
    [
        pytest.param(2100, 128, 128, False, False, marks=pytest.mark.slow),
        (1001, 128, 128, True, True),
        pytest.param(5, 64, 64, True, False, marks=pytest.mark.slow),
        (2100, 64, 64, True, True),
        pytest.param(2100, 256, 128, True, True, marks=pytest.mark.slow),
        pytest.param(1001, 256, 256, True, False, marks=pytest.mark.slow),
        pytest.param(2100, 64, 256, False, True, marks=pytest.mark.slow),
    ],
)  # those of 2100 tokens are cut into spans
def test_forward_and_backward_lower(kind, tokens, keys, values, state, segments):
    arrays, ids = shapes(kind, tokens, keys, state, segments, values=values)

    def loss(arrays, ids):
        named = {"log_decay": None, "phase": None, "initial_state": None} | arrays
        out, final = pallas_gpu.pallas_gpu(
            *(named[n] for n in ("q", "k", "v", "log_decay", "phase", "initial_state")), ids
        )
        assert out.shape == arrays["v"].shape
        assert final.shape[-2:] == (keys * (2 if kind == "phase" else 1), values)
        return out.astype(jnp.float32).sum() + final.sum()

    text = jax.jit(jax.value_and_grad(loss)).trace(arrays, ids).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text


@lowers
@pytest.mark.parametrize(
    ("kind", "tokens", "channels", "segments"),
    [
        ("tied", 1001, 128, False),
        ("bfloat16 gates", 2100, 64, False),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("bfloat16 gates", 2100, 128, False),
                ("tied", 2100, 64, False),
                ("bfloat16 gates", 5, 256, False),
                ("bfloat16 gates", 2100, 128, True),
            )
        ),
    ],
)
def test_kernels_that_tell_mild_chunks_lower(kind, tokens, channels, segments):
    """Those of bfloat16 gates; the tests above have those of keys tied to them with documents."""
    test_forward_and_backward_lower(kind, tokens, channels, channels, state=True, segments=segments)


@lowers
@pytest.mark.parametrize("dtype", (jnp.bfloat16, jnp.float32))
def test_marks_close_gates_and_keep_keys(dtype):
    from linscale.kernels.linear_attention.pallas_gpu_gates import FAINT, gates, mark

    own = np.array([0.0, -1e-38, -1e-3, -0.5, -60.0, -111.0, -113.0, -1e4, -3e38, -np.inf])
    own = np.asarray(jnp.asarray(np.tile(own, 2), dtype), np.float64)
    first = np.arange(len(own)) < len(own) // 2
    marked = mark(jnp.asarray(own[None, :, None, None], dtype), jnp.asarray(first[None])).astype(jnp.float32).ravel()
    assert (marked[first] <= -128).all()  # below what the gates of a mild chunk may sum to
    gate, key = gates(marked, True, True)
    np.testing.assert_allclose(gate, np.where(first, 0.0, np.exp(own)), rtol=1e-5, atol=1e-44)
    np.testing.assert_allclose(key, -np.expm1(own), rtol=1e-5, atol=FAINT)
    np.testing.assert_array_equal(gates(marked, True, False)[0], gate)


@lowers
@pytest.mark.parametrize(
    ("heads", "channels", "segments"),
    [pytest.param(64, 128, False, marks=pytest.mark.slow), (64, 128, True), (3, 128, True), (3, 256, False)],
)
def test_gradient_of_phase_lowers_to_kernels_alone(heads, channels, segments):
    tokens = 2001
    assert (pallas_gpu.choose_spans("phase", 2 * heads * (channels // 128) ** 2, tokens) > 1) == (heads == 3)
    arrays, _ = shapes("phase", tokens, channels, state=False, segments=False, heads=heads)
    ids = jnp.arange(2 * tokens).reshape(2, tokens) // 300 if segments else None

    def loss(q, k, v, phase):
        return pallas_gpu.pallas_gpu(q, k, v, None, phase, None, ids)[0].astype(jnp.float32).sum()

    trace = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))).trace(*arrays.values())
    text = trace.lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text
    assert "stablehlo.while" not in text
    assert "stablehlo.dot_general" not in text


@lowers
@pytest.mark.parametrize("kind", FAMILIES)
def test_forward_and_backward_lower_on_every_device_of_a_mesh(kind, monkeypatch):
    """Dispatch sees the shapes and the machine of a device, two of the sequence axis."""
    monkeypatch.setattr(pallas_gpu, "on_hopper", lambda: True)
    arrays, ids = shapes(kind, 512, 128, state=False, segments=True, heads=4)

    def loss(arrays, ids):
        return linear_attention(**arrays, segment_ids=ids, axes=Axes())[0].astype(jnp.float32).sum()

    auto = (jax.sharding.AxisType.Auto,) * 4
    mesh = jax.sharding.AbstractMesh((1, 2, 2, 2), ("data", "fsdp", "sequence", "tensor"), axis_types=auto)
    with jax.sharding.use_abstract_mesh(mesh):
        text = jax.jit(jax.grad(loss)).trace(arrays, ids).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text
    assert "collective_permute" in text


@pytest.mark.parametrize("card", ("NVIDIA H100 80GB HBM3", "NVIDIA H200"))
@pytest.mark.parametrize("channels", (64, 128))
@pytest.mark.parametrize("kind", ("scalar", "vector", "phase"))
@pytest.mark.parametrize("rows", (1, 6, 16, 50, 64, 96, 128, 300))
def test_spans_cover_the_sequence_and_none_is_empty(kind, rows, channels, card):
    for tokens in (1, 64, 1000, 8192, 131072):
        spans = pallas_gpu.choose_spans(kind, rows, tokens, channels, card)
        length = 64 * pallas_gpu.chunks_of_a_span(tokens, spans)
        assert (spans - 1) * length < tokens <= spans * length
        assert spans == 1 or length >= 8 * 64


@pytest.mark.parametrize(
    ("rows", "tokens", "scalar", "vector", "phase"),
    [(128, 2048, 1, 1, 1), (128, 8192, 1, 1, 1), (64, 2048, 1, 2, 2), (32, 16384, 4, 4, 4), (16, 131072, 8, 8, 8)],
)
@pytest.mark.parametrize("card", ("NVIDIA H100 80GB HBM3", "NVIDIA H200", "a card nobody knows"))
def test_spans_are_those_that_were_fastest(rows, tokens, scalar, vector, phase, card):
    """Of those timed on an H100: experiments/kernels/reports/2026-11-26_h100_kernels.md."""
    chosen = [pallas_gpu.choose_spans(kind, rows, tokens, card=card) for kind in ("scalar", "vector", "phase")]
    assert chosen == [scalar, vector, phase]


def test_spans_are_chosen_for_the_card_and_the_channels():
    """64 rows of 16,384 tokens: reading keys and values again costs an H100 what the idle half of the chip gains."""
    h100, h200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200"
    assert [pallas_gpu.choose_spans("scalar", 64, 16384, card=card) for card in (h100, h200)] == [1, 2]
    assert [pallas_gpu.choose_spans("scalar", 64, 1024, channels, h200) for channels in (64, 128)] == [2, 1]


@pytest.mark.parametrize(
    ("shape", "streams"),
    [((8, 8192, 16, 128), True), ((4, 2048, 16, 128), False), ((8, 2048, 16, 64), False), ((8, 2048, 32, 256), False)],
)
def test_no_decay_is_weighted_where_all_multiprocessors_stream(shape, streams):
    q = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    assert pallas_gpu._streams(q, Blocks.of(shape[-1], shape[-1])) == streams


@pytest.mark.skipif(pallas_gpu.on_hopper(), reason="served here")
def test_refusal_on_other_devices_says_why():
    x = jnp.zeros((1, 8, 1, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match="cannot serve: it needs a Hopper GPU"):
        linear_attention(x, x, x, implementation="pallas_gpu")


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((1, 8, 1, 128), jnp.float32, "takes bfloat16"),
        ((1, 8, 1, 96), jnp.bfloat16, "64, 128 or 256 channels a head, q has 96"),
    ],
)
def test_refusal_names_what_does_not_fit(shape, dtype, message):
    x = jnp.zeros(shape, dtype)
    assert message in pallas_gpu.unsupported(x, x, x, None)
    for channels in (64, 128, 256):
        x = jnp.zeros((1, 8, 1, channels), jnp.bfloat16)
        for log_decay, phase in ((None, None), (x, None), (None, jnp.zeros((1, channels)))):
            assert pallas_gpu.unsupported(x, x, x, log_decay, phase) is None


KINDS = ("none", "scalar", "scalar-zero", "phase", "vector/0.05", "vector/0.1", "vector/1", "vector/10")


@pytest.mark.gpu
@hopper
class TestOnTheDevice:
    """Error bound 5e-3 of root mean square, values, states and every gradient, q, k and v in bfloat16."""

    @pytest.fixture(autouse=True)
    def _channels(self, monkeypatch):
        monkeypatch.setattr(shared, "KEY", 128)
        monkeypatch.setattr(shared, "VALUE", 128)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("tokens", (1, 63, 64, 65, 1000))
    def test_state_and_segments(self, tokens, kind):
        arrays, ids = shared.draw(tokens, tokens, kind, segments=True)
        shared.compare("pallas_gpu", arrays, ids, 5e-3, dtype=jnp.bfloat16, seed=tokens)

    @pytest.mark.parametrize("kind", KINDS)
    def test_plain(self, kind):
        arrays, ids = shared.draw(7, 130, kind, state=False)
        shared.compare("pallas_gpu", arrays, ids, 5e-3, dtype=jnp.bfloat16)

    @pytest.mark.parametrize("segments", (False, True))
    @pytest.mark.parametrize("tokens", (500, 2100))  # the second is cut into spans
    def test_gradient_of_phase_by_the_kernels(self, tokens, segments):
        arrays, ids = shared.draw(3, tokens, "phase", state=False, segments=segments)
        shared.compare("pallas_gpu", arrays, ids, 5e-3, dtype=jnp.bfloat16, final=False)

    @pytest.mark.parametrize("kind", ("vector/0.1", "vector/1", "vector/10"))
    @pytest.mark.parametrize("segments", (False, True))
    def test_tied_key(self, kind, segments):
        arrays, ids = shared.draw(8, 200, kind, segments=segments, tied_key=True)
        for gates in (jnp.float32, jnp.bfloat16):
            shared.compare("pallas_gpu", arrays, ids, 5e-3, dtype=jnp.bfloat16, gates=gates)

    @pytest.mark.parametrize("kind", ("scalar", "phase", "vector/1"))
    def test_sixty_four_channels(self, kind, monkeypatch):
        monkeypatch.setattr(shared, "KEY", 64)
        monkeypatch.setattr(shared, "VALUE", 64)
        for tokens in (200, 2100):  # the second is cut into spans
            arrays, ids = shared.draw(9, tokens, kind, segments=True)
            shared.compare("pallas_gpu", arrays, ids, 5e-3, dtype=jnp.bfloat16)

    @pytest.mark.parametrize(("keys", "values"), [(256, 256), (256, 128), (128, 64), (64, 256)])
    @pytest.mark.parametrize("kind", ("none", "scalar", "phase", "vector/0.1", "vector/1", "tied"))
    def test_heads_in_blocks_and_unlike_channels(self, kind, keys, values, monkeypatch):
        for name, size in {"BATCH": 1, "KEY": keys, "VALUE": values}.items():  # the scan keeps all states in float64
            monkeypatch.setattr(shared, name, size)
        tied = kind == "tied"
        for tokens in (200, 1100):
            arrays, ids = shared.draw(10, tokens, "vector/0.1" if tied else kind, segments=True, tied_key=tied)
            shared.compare("pallas_gpu", arrays, ids, 5e-3, dtype=jnp.bfloat16)

    @pytest.mark.parametrize(("keys", "values"), [(256, 256), (256, 64)])
    def test_gradient_of_phase_in_blocks(self, keys, values, monkeypatch):
        for name, size in {"BATCH": 1, "KEY": keys, "VALUE": values}.items():
            monkeypatch.setattr(shared, name, size)
        for tokens in (200, 1100):
            arrays, ids = shared.draw(4, tokens, "phase", state=False, segments=True)
            shared.compare("pallas_gpu", arrays, ids, 5e-3, dtype=jnp.bfloat16, final=False)

    @pytest.mark.parametrize("kind", ("scalar", "phase", "vector/1"))
    def test_spans(self, kind):
        tokens = 2100
        assert pallas_gpu.choose_spans(kind.split("/")[0], 6, tokens) > 1
        arrays, ids = shared.draw(13, tokens, kind, segments=True)
        shared.compare("pallas_gpu", arrays, ids, 5e-3, dtype=jnp.bfloat16)

    @pytest.mark.parametrize("tied", (False, True))
    @pytest.mark.parametrize("channels", (64, 128))
    @pytest.mark.parametrize("chunks", ("mmmm", "mcimfbzs", "smbfmcif" * 4 + "m"))  # the third is cut into spans
    def test_mild_chunks(self, chunks, channels, tied, monkeypatch):
        sizes = {"BATCH": 1, "KEY": channels, "VALUE": channels}  # the scan keeps all states in float64
        for name, size in sizes.items():
            monkeypatch.setattr(shared, name, size)
        tokens = 64 * len(chunks) - 12
        assert (pallas_gpu.choose_spans("vector", 3, tokens, channels) > 1) == (len(chunks) > 8)
        arrays, _ = shared.draw(14, tokens, "vector/1", tied_key=tied)
        arrays["log_decay"] = gates_of_chunks.draw(chunks, arrays["log_decay"].shape, 14)
        shared.compare("pallas_gpu", arrays, None, 5e-3, dtype=jnp.bfloat16, gates=jnp.bfloat16)

    @pytest.mark.parametrize("tied", (False, True))
    @pytest.mark.parametrize("channels", (64, 128, 256))
    @pytest.mark.parametrize("chunks", ("mmmmmm", "zimsfm", "mzmcimfb" * 4 + "m"))  # the third is cut into spans
    def test_mild_chunks_with_documents(self, chunks, channels, tied, monkeypatch):
        """They begin on the first, a middle and the last token of mild chunks, on closed gates, and in short ones."""
        heads = 3 if channels < 256 else 1
        for name, size in {"HEADS": heads, "KEY": channels, "VALUE": channels}.items():
            monkeypatch.setattr(shared, name, size)
        tokens = 64 * len(chunks) - 12
        arrays, _ = shared.draw(15, tokens, "vector/1", tied_key=tied)
        arrays["log_decay"] = gates_of_chunks.draw(chunks, arrays["log_decay"].shape, 15)
        ids = gates_of_chunks.documents(tokens, (20, 21, 94, 192), (127, *range(256, 300, 7), tokens - 1))
        assert gates_of_chunks.mild(arrays["log_decay"], ids).any()
        shared.compare("pallas_gpu", arrays, ids, 5e-3, dtype=jnp.bfloat16, gates=jnp.bfloat16)

    @pytest.mark.parametrize("kind", ("scalar", "vector/1"))
    def test_minus_infinity_forgets(self, kind):
        arrays, _ = shared.draw(11, 40, kind)
        arrays["log_decay"] = np.full_like(arrays["log_decay"], -np.inf)
        low = {n: a.astype(jnp.bfloat16 if n in "qkv" else np.float32) for n, a in arrays.items()}
        got = shared.run("pallas_gpu", low, None, 0)
        q, k, v = (np.asarray(low[n], np.float32) for n in "qkv")
        np.testing.assert_allclose(got["out"], np.sum(q * k, -1, keepdims=True) * v, rtol=2e-2, atol=0.2)
        assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in got.values())

    @pytest.mark.parametrize(
        ("kind", "segments"),
        [(k, True) for k in ("scalar", "phase", "vector/1")] + [("mild and strong", s) for s in (False, True)],
    )
    def test_bits_do_not_change_between_runs(self, kind, segments):
        """A race would show as a moving error."""
        tokens, chosen = 1000, kind == "mild and strong"
        arrays, ids = shared.draw(12, tokens, "vector/1" if chosen else kind, segments=segments)
        gates = jnp.float32
        if chosen:
            arrays["log_decay"] = gates_of_chunks.draw("msmcifmb" * 2, arrays["log_decay"].shape, 12)
            gates = jnp.bfloat16
        types = dict.fromkeys("qkv", jnp.bfloat16) | {"log_decay": gates}
        low = {n: jnp.asarray(a, types.get(n, jnp.float32)) for n, a in arrays.items()}
        first = shared.run("pallas_gpu", low, ids, 0)
        for _ in range(10):
            for name, x in shared.run("pallas_gpu", low, ids, 0).items():
                np.testing.assert_array_equal(x, first[name], err_msg=name)
