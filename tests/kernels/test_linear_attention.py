"""Every implementation of linear attention against the float64 scan: values, states and all gradients.

Error: RMS of the difference over RMS of the reference. Gates: logsigmoid(N(0,1)) / n, from n = 10 (weak) to n = 0.05
(very strong), with entries of -60 and of 0 mixed in.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from linscale.kernels import linear_attention, linear_attention_step

IMPLEMENTATIONS = ("chunked", "scan")
LENGTHS = {"chunked": (1, 64, 65, 1000), "scan": (1, 1000)}  # no length is special to the scan
BATCH, HEADS, KEY, VALUE = 2, 3, 8, 5

logsigmoid = lambda x: -np.logaddexp(0, -x)  # noqa: E731


def draw_decay(rng, kind, tokens):
    if kind == "none":
        return {}
    if kind == "scalar":
        return {"log_decay": np.array([-1e-3, -0.5, -60.0])}
    if kind == "scalar-zero":
        return {"log_decay": np.array([0.0, -0.1, -3.0])}
    if kind == "phase":
        return {"phase": rng.uniform(0, 1.5, (HEADS, KEY))}
    gates = logsigmoid(rng.normal(size=(BATCH, tokens, HEADS, KEY))) / float(kind.split("/")[1])
    gates = np.where(rng.random(gates.shape) < 0.05, -60.0, gates)
    return {"log_decay": np.where(rng.random(gates.shape) < 0.05, 0.0, gates)}


KINDS = ("none", "scalar", "scalar-zero", "phase", "vector/0.05", "vector/0.1", "vector/1", "vector/10")


def draw(seed, tokens, kind, *, state=True, segments=False, tied_key=False):
    rng = np.random.default_rng(seed)
    arrays = {
        "q": rng.normal(size=(BATCH, tokens, HEADS, KEY)),
        "k": rng.normal(size=(BATCH, tokens, HEADS, KEY)),
        "v": rng.normal(size=(BATCH, tokens, HEADS, VALUE)),
        **draw_decay(rng, kind, tokens),
    }
    if tied_key:
        del arrays["k"]
    if state:
        rows = 2 * KEY if kind == "phase" else KEY
        arrays["initial_state"] = rng.normal(size=(BATCH, HEADS, rows, VALUE))
    ids = None
    if segments:
        ids = np.cumsum(rng.random((BATCH, tokens)) < 8 / tokens, axis=1)
        ids[0, tokens // 2 :] += 1  # one start in the middle, whatever the draw
    return arrays, ids


def outputs(implementation, axes, final, arrays, ids):
    named = dict(arrays)
    q, k, v = named.pop("q"), named.pop("k", None), named.pop("v")
    out = linear_attention(q, k, v, segment_ids=ids, implementation=implementation, axes=axes, **named)
    return out if final else out[:1]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))  # draws of one shape share a program
def gradients_and_outputs(implementation, axes, final, arrays, ids, weights):
    def projection(arrays):
        out = outputs(implementation, axes, final, arrays, ids)
        wide = [o.astype(jnp.promote_types(jnp.float32, o.dtype)) for o in out]
        return sum(jnp.vdot(w.astype(o.dtype), o) for w, o in zip(weights, wide)), out

    return jax.grad(projection, has_aux=True)(arrays)


def run(implementation, arrays, ids, seed, axes=None, final=True):
    """(out, state, and the gradient of a random projection of both in every array), as numpy; final: the state counts."""
    rng = np.random.default_rng(seed + 1)
    arrays = jax.tree.map(jnp.asarray, arrays)
    shapes = jax.eval_shape(functools.partial(outputs, implementation, axes, final), arrays, ids)
    # bfloat16 values, so that rounding the cotangent of a bfloat16 output loses nothing.
    weights = [rng.normal(size=s.shape).astype(jnp.bfloat16) for s in shapes]
    grads, out = gradients_and_outputs(implementation, axes, final, arrays, ids, weights)
    return jax.tree.map(np.asarray, dict(zip(("out", "state"), out)) | {f"d_{n}": g for n, g in grads.items()})


def relative_errors(got, want):
    def error(g, w):
        g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
        assert np.isfinite(g).all()
        scale = np.sqrt(np.mean(w**2))
        return np.sqrt(np.mean((g - w) ** 2)) / scale if scale else np.abs(g).max()

    assert got.keys() == want.keys()
    return {name: error(got[name], want[name]) for name in want}


def compare(implementation, arrays, ids, tolerance, dtype=np.float32, seed=0, final=True, gates=np.float32):
    kept = {"phase": np.float32, "initial_state": np.float32, "log_decay": gates}  # when q, k, v are bfloat16
    low = {n: jnp.asarray(a, kept.get(n, dtype)) for n, a in arrays.items()}
    with jax.enable_x64(True):
        want = run("scan", {n: np.asarray(a, np.float64) for n, a in low.items()}, ids, seed, final=final)
    errors = relative_errors(run(implementation, low, ids, seed, final=final), want)
    assert max(errors.values()) < tolerance, errors
    return errors


def errors_of_own_pairs(out, arrays):
    """out against (q_t . k_t) v_t: the error of each element, relative to what it sums in absolute values.

    So for any number of channels; relative to an element itself, where products cancel, no float32 sum stays small.
    """
    products = arrays["q"] * arrays["k"]
    want = np.sum(products, -1, keepdims=True) * arrays["v"]
    size = np.sum(np.abs(products), -1, keepdims=True) * np.abs(arrays["v"])
    return np.abs(out - want) / size


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("implementation", "tokens"),
    [
        pytest.param(name, tokens, marks=() if tokens in LENGTHS[name] else pytest.mark.slow)
        for name in IMPLEMENTATIONS
        for tokens in (1, 63, 64, 65, 1000)
    ],
)
def test_state_and_segments(implementation, tokens, kind):
    """Against the float64 scan, as the class below."""
    arrays, ids = draw(tokens, tokens, kind, segments=True)
    compare(implementation, arrays, ids, 1e-5, seed=tokens)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
class TestAgainstFloat64Scan:
    @pytest.mark.parametrize("kind", KINDS)
    def test_plain(self, implementation, kind):
        arrays, ids = draw(7, 130, kind, state=False)
        compare(implementation, arrays, ids, 1e-5)

    @pytest.mark.parametrize("kind", ("vector/0.1", "vector/1"))
    def test_tied_key(self, implementation, kind):
        arrays, ids = draw(8, 200, kind, segments=True, tied_key=True)
        compare(implementation, arrays, ids, 1e-5)

    @pytest.mark.parametrize("kind", ("none", "scalar", "phase", "vector/0.1", "vector/10"))
    def test_bfloat16(self, implementation, kind):
        arrays, ids = draw(9, 200, kind, segments=True)
        compare(implementation, arrays, ids, 5e-3, dtype=jnp.bfloat16)

    @pytest.mark.parametrize("tied_key", (False, True))
    def test_bfloat16_gates(self, implementation, tied_key):
        """As HGRN2 gives them on accelerators."""
        arrays, ids = draw(9, 200, "vector/1", segments=True, tied_key=tied_key)
        compare(implementation, arrays, ids, 5e-3, dtype=jnp.bfloat16, gates=jnp.bfloat16)

    @pytest.mark.parametrize("kind", ("none", "scalar", "phase", "vector/1"))
    def test_closed_gates_and_many_documents(self, implementation, kind):
        """Every token its own document: it reads itself alone, and the first one the initial state too."""
        arrays, _ = draw(10, 1000, kind, state=True)
        ids = np.broadcast_to(np.arange(1000), (BATCH, 1000))
        got = run(implementation, {n: a.astype(np.float32) for n, a in arrays.items()}, ids, 0)
        assert errors_of_own_pairs(got["out"], arrays)[:, 1:].max() < 1e-6

    @pytest.mark.parametrize("kind", ("scalar", "vector/1"))
    def test_minus_infinity_forgets(self, implementation, kind):
        arrays, _ = draw(11, 40, kind)
        arrays["log_decay"] = np.full_like(arrays["log_decay"], -np.inf)
        got = run(implementation, {n: a.astype(np.float32) for n, a in arrays.items()}, None, 0)
        assert errors_of_own_pairs(got["out"], arrays).max() < 1e-6
        assert all(np.isfinite(x).all() for x in got.values())


@pytest.mark.parametrize("kind", ("none", "scalar", "phase", "vector/1"))
def test_spans_longer_than_one(kind):
    """More than 32 chunks: the state crosses spans, forward and backward."""
    arrays, ids = draw(12, 2 * 32 * 64 + 65, kind, segments=True)
    compare("chunked", arrays, ids, 1e-5)


@pytest.mark.parametrize("kind", ("none", "scalar", "phase", "vector/1"))
def test_steps_equal_the_whole_sequence(kind):
    arrays, _ = draw(13, 20, kind)
    arrays = {n: jnp.asarray(a, jnp.float32) for n, a in arrays.items()}
    q, k, v, state = (arrays.pop(n) for n in ("q", "k", "v", "initial_state"))
    out, final = jax.jit(linear_attention)(q, k, v, initial_state=state, **arrays)
    one_step = jax.jit(linear_attention_step)
    for t in range(20):
        now = {n: a[:, t] if a.ndim == 4 else a for n, a in arrays.items()}
        step, state = one_step(q[:, t], k[:, t], v[:, t], state, **now)
        np.testing.assert_allclose(step, out[:, t], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state, final, rtol=1e-4, atol=1e-5)


def test_halves_joined_by_the_state_equal_the_whole():
    arrays, _ = draw(14, 150, "vector/1")
    arrays = {n: jnp.asarray(a, jnp.float32) for n, a in arrays.items()}
    state = arrays.pop("initial_state")
    run = jax.jit(linear_attention)
    whole, final = run(**arrays, initial_state=state)
    first, state = run(**{n: a[:, :77] for n, a in arrays.items()}, initial_state=state)
    second, state = run(**{n: a[:, 77:] for n, a in arrays.items()}, initial_state=state)
    np.testing.assert_allclose(jnp.concatenate([first, second], 1), whole, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state, final, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ("none", "scalar", "phase", "vector/1"))
def test_memory_is_linear(kind):
    """No [T,T] array and no state per token: the largest array of the compiled gradient stays small."""
    tokens, heads, channels = 8192, 2, 64
    x = jax.ShapeDtypeStruct((1, tokens, heads, channels), jnp.float32)
    extra = {"scalar": (heads,), "phase": (heads, channels), "vector/1": x.shape}.get(kind)
    named = (
        {} if extra is None else {"phase" if kind == "phase" else "log_decay": jax.ShapeDtypeStruct(extra, jnp.float32)}
    )

    def loss(q, k, v, named):
        return linear_attention(q, k, v, implementation="chunked", **named)[0].sum()

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x, named).compile()
    one_input = tokens * heads * channels * 4
    assert compiled.memory_analysis().temp_size_in_bytes < 24 * one_input


def test_compile_does_not_grow_with_length():
    def operations(tokens):
        x = jax.ShapeDtypeStruct((1, tokens, 2, 16), jnp.float32)
        f = functools.partial(linear_attention, implementation="chunked")
        return jax.jit(f).lower(x, x, x, log_decay=x).as_text().count("\n")

    assert operations(64 * 32 * 16) < 1.1 * operations(64 * 32 * 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"implementation": "pallas_tpu"}, "cannot serve: it needs a TPU, this program is for cpu"),
        (
            {"implementation": "fast"},
            "unknown; it must be None or one of 'scan', 'chunked', 'pallas_gpu', 'pallas_tpu'",
        ),
        ({"k": jnp.zeros((1, 4, 2, 7))}, r"k has shape \(1, 4, 2, 7\); it must be \(1, 4, 2, 8\)"),
        ({"k": None}, "needs a log_decay"),
        ({"log_decay": jnp.zeros(3)}, r"log_decay has shape \(3,\); it must be \(2,\)"),
        ({"log_decay": jnp.zeros(2), "phase": jnp.zeros((2, 8))}, "phase and log_decay are both given"),
        ({"initial_state": jnp.zeros((1, 2, 8, 4))}, "initial_state has shape"),
        ({"segment_ids": jnp.zeros((1, 5), int)}, "segment_ids has shape"),
        ({"v": jnp.zeros((1, 4, 2, 8), jnp.bfloat16)}, "v has dtype bfloat16; it must be float32"),
    ],
)
def test_bad_arguments_are_named(change, message):
    x = jnp.zeros((1, 4, 2, 8))
    with pytest.raises(ValueError, match=message):
        linear_attention(**({"q": x, "k": x, "v": x} | change))
