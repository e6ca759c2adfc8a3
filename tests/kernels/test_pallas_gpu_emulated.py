"""The Hopper kernels' arithmetic, barriers and gradients on a CPU (see emulator.py), against the float64 scan."""

import threading

import gates_of_chunks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_linear_attention as shared
from hopper_tests import emulates

from linscale.kernels import linear_attention
from linscale.kernels.linear_attention import pallas_gpu, pallas_gpu_mild, pallas_gpu_phase

pytestmark = emulates


def outputs_and_gradients(run, arrays, weights):
    """`run`'s outputs and the gradients of their weighted sum in all arrays whose gradient needs no other program."""
    fixed = {n: a for n, a in arrays.items() if n == "log_decay" and a.ndim == 1}
    if "initial_state" in arrays:
        fixed |= {n: a for n, a in arrays.items() if n == "phase"}
    free = {n: a for n, a in arrays.items() if n not in fixed}
    outputs, pull = jax.vjp(lambda free: run(**{"k": None, "log_decay": None} | free | fixed), free)
    (grads,) = pull(tuple(jnp.asarray(w).astype(o.dtype) for w, o in zip(weights, outputs)))
    got = dict(zip(("out", "state"), outputs)) | {f"d_{n}": g for n, g in grads.items()}
    return {n: np.asarray(a, np.float64) for n, a in got.items()}


def compare(arrays, ids, spans, monkeypatch, final=True, gates=jnp.float32):
    from emulator import emulated

    monkeypatch.setattr(pallas_gpu, "choose_spans", lambda *_, **__: spans)
    kept = {"phase": jnp.float32, "initial_state": jnp.float32, "log_decay": gates}
    low = {n: jnp.asarray(a, kept.get(n, jnp.bfloat16)) for n, a in arrays.items()}
    rng = np.random.default_rng(1)
    rows = (2 if "phase" in arrays else 1) * shared.KEY
    shapes = (arrays["v"].shape, (*np.array(arrays["v"].shape)[[0, 2]], rows, shared.VALUE))
    weights = [rng.normal(size=s).astype(jnp.bfloat16) for s in shapes]

    def outputs(both):
        return both if final else both[:1]

    def ours(q, k, v, log_decay=None, phase=None, initial_state=None):
        return outputs(pallas_gpu.pallas_gpu(q, k, v, log_decay, phase, initial_state, ids))

    def scan(q, k, v, **named):
        return outputs(linear_attention(q, k, v, segment_ids=ids, implementation="scan", **named))

    with emulated():
        got = outputs_and_gradients(ours, low, weights)
    with jax.enable_x64(True):
        want = outputs_and_gradients(scan, {n: jnp.asarray(np.asarray(a, np.float64)) for n, a in low.items()}, weights)
    errors = shared.relative_errors(got, want)
    assert max(errors.values()) < 5e-3, errors


@pytest.fixture(autouse=True)
def one_row(monkeypatch):
    for name, size in {"BATCH": 1, "HEADS": 1, "KEY": 128, "VALUE": 128}.items():
        monkeypatch.setattr(shared, name, size)


def draw(kind, tokens, **kw):
    arrays, ids = shared.draw(tokens, tokens, kind, **kw)
    if kind.startswith("scalar"):
        arrays["log_decay"] = np.array([-0.05])
    return arrays, ids


@pytest.mark.parametrize(
    ("kind", "spans", "segments", "tied"),
    [
        ("scalar", 1, True, False),
        ("scalar", 2, False, False),
        ("none", 2, False, False),
        ("phase", 1, True, False),
        pytest.param("phase", 1, False, False, marks=pytest.mark.slow),
        ("phase", 2, True, False),
        ("vector/1", 1, True, False),
        pytest.param("vector/0.1", 2, False, True, marks=pytest.mark.slow),
        ("vector/10", 2, True, False),
        ("vector/0.1", 2, True, True),
    ],
)
def test_values_states_and_gradients(kind, spans, segments, tied, monkeypatch):
    arrays, ids = draw(kind, 130, segments=segments, tied_key=tied)
    compare(arrays, ids, spans, monkeypatch)


@pytest.mark.parametrize(
    ("kind", "spans", "keys", "values", "tied"),
    [
        ("scalar", 2, 64, 64, False),
        ("phase", 2, 64, 64, False),
        ("vector/1", 2, 64, 64, False),
        pytest.param("scalar", 2, 256, 256, False, marks=pytest.mark.slow),
        ("none", 1, 64, 256, False),
        pytest.param("phase", 2, 256, 256, False, marks=pytest.mark.slow),
        ("vector/0.1", 2, 256, 256, True),
        *(
            pytest.param(kind, spans, keys, values, tied, marks=pytest.mark.slow)
            for keys, values in ((256, 128), (64, 256))
            for kind, spans, tied in (("scalar", 2, False), ("phase", 2, False), ("vector/1", 2, False))
        ),
        pytest.param("vector/0.1", 1, 256, 64, True, marks=pytest.mark.slow),
    ],
)
def test_other_channels(kind, spans, keys, values, tied, monkeypatch):
    for name, size in {"HEADS": 2, "KEY": keys, "VALUE": values}.items():
        monkeypatch.setattr(shared, name, size)
    tokens = 130 if max(keys, values) < 256 else 70  # blocks of channels differ in what they read, not in their chunks
    arrays, ids = shared.draw(tokens, tokens, kind, segments=True, tied_key=tied)
    if kind == "scalar":
        arrays["log_decay"] = np.array([-0.05, -0.3])
    compare(arrays, ids, spans, monkeypatch)


@pytest.mark.parametrize(
    ("spans", "segments", "keys", "values"),
    [
        *((1, False, 128, 128), (2, True, 128, 128), (3, False, 128, 128), (1, False, 64, 256)),
        pytest.param(2, True, 256, 256, marks=pytest.mark.slow),
    ],
)
def test_gradient_of_phase_by_the_kernels(spans, segments, keys, values, monkeypatch):
    """As in training: no state given, none read; those between spans are the kernels' own."""
    monkeypatch.setattr(shared, "KEY", keys)
    monkeypatch.setattr(shared, "VALUE", values)
    monkeypatch.setattr(pallas_gpu_phase, "_phase_gradient_by_xla", None)
    arrays, ids = draw("phase", 130, segments=segments, state=False)
    compare(arrays, ids, spans, monkeypatch, final=False)


@pytest.fixture
def calls(monkeypatch):
    """How often each of what mild chunks alone are weighted with was asked for."""
    count = {"weights": 0, "product": 0}
    lock = threading.Lock()

    def counted(name, f):
        def call(*args):
            with lock:
                count[name] += 1
            return f(*args)

        return call

    for name in count:
        monkeypatch.setattr(pallas_gpu_mild, name, counted(name, getattr(pallas_gpu_mild, name)))
    return count


@pytest.mark.parametrize(
    ("chunks", "spans", "channels", "tied", "state", "firsts"),
    [
        ("mcim", 2, 128, True, True, None),
        ("fbz", 1, 128, False, True, None),
        ("zimm", 2, 128, True, True, (20, 21, 94, 127, 192)),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("mm", 1, 128, True, False, None),
                ("mfsm", 2, 128, False, True, None),
                ("fbm", 1, 128, True, True, None),
                ("zim", 1, 128, True, False, None),
                ("iic", 1, 128, False, False, None),
                ("mcif", 2, 64, True, True, None),
                ("bfms", 2, 64, False, True, None),
                ("mcm", 1, 256, True, True, None),
                ("zimm", 2, 128, False, True, (20, 21, 94, 127, 192)),
                ("mfs", 1, 128, True, False, ()),
                ("mzzm", 1, 128, True, True, (64, 191)),
                ("mmcm", 2, 64, True, True, (*range(67, 128, 7), 191)),
                ("mzm", 1, 256, True, True, (64,)),
            )
        ),
    ],
)
def test_mild_chunks(chunks, spans, channels, tied, state, firsts, calls, monkeypatch):
    """bfloat16 gates: each block of threads takes the short way for its mild chunks, and no other.

    firsts: where documents begin; None: the sequence has no segment ids. The marks of those of "zimm" lie in the middle of
    a mild chunk, on a log decay of zero; on a closed gate; on the last and on the first token of a chunk, alone there.
    """
    monkeypatch.setattr(shared, "KEY", channels)
    monkeypatch.setattr(shared, "VALUE", channels)
    tokens = 64 * len(chunks) - 54
    arrays, _ = shared.draw(tokens, tokens, "vector/1", state=state, tied_key=tied)
    gates = arrays["log_decay"] = gates_of_chunks.draw(chunks, arrays["log_decay"].shape, tokens)
    ids = None if firsts is None else gates_of_chunks.documents(tokens, firsts)
    compare(arrays, ids, spans, monkeypatch, final=state, gates=jnp.bfloat16)
    mild = gates_of_chunks.mild(gates, ids)[0, :, 0]  # one row
    width, walks = min(channels, 128), max(1, channels // 128)  # walks: blocks of values for each block of keys
    whole, halves, slices = (walks * mild.reshape(len(mild), -1, n).all(-1).sum() for n in (width, width // 2, 64))
    # Forward each of two warpgroups weights once, `within` each of two slices of 64 channels, `carry` thrice by itself.
    assert calls == {"weights": 2 * whole + 2 * slices, "product": 3 * halves}


@pytest.mark.slow
@pytest.mark.parametrize("segments", (False, True))
def test_float32_gates_halve_every_chunk(segments, calls, monkeypatch):
    arrays, ids = shared.draw(120, 120, "vector/1", segments=segments, tied_key=True)
    arrays["log_decay"] = gates_of_chunks.draw("mf", arrays["log_decay"].shape, 0)
    compare(arrays, ids, 1, monkeypatch)
    assert not any(calls.values())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ("none", "scalar-zero", "phase", "vector/0.05", "vector/1"))
@pytest.mark.parametrize("tokens", (1, 63, 64, 65, 500))
def test_lengths(kind, tokens, monkeypatch):
    arrays, ids = draw(kind, tokens, segments=tokens > 64)
    compare(arrays, ids, 1 if tokens < 65 else 2, monkeypatch)
