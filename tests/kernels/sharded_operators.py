"""Operators over meshes of eight simulated devices against one device: values, states, gradients and communication.

XLA_FLAGS=--xla_force_host_platform_device_count=8 pytest tests/kernels/sharded_operators.py

Meshes are data x fsdp x sequence x tensor. Error: RMS of the difference over RMS of the reference.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_cross_entropy as losses
import test_linear_attention as shared

from linscale.kernels import Axes, cross_entropy, linear_attention, softmax_attention
from linscale.kernels.linear_attention import context_parallel
from linscale.models.tpe import toeplitz

MESHES = ((1, 1, 8, 1), (2, 2, 2, 1), (1, 2, 2, 2), (1, 1, 1, 4))
BATCH, HEADS, KEY, VALUE = 4, 4, 8, 5
TOLERANCE = 1e-5


def mesh_of(shape):
    names = ("data", "fsdp", "sequence", "tensor")
    auto = (jax.sharding.AxisType.Auto,) * 4
    return jax.make_mesh(shape, names, axis_types=auto, devices=jax.devices()[: np.prod(shape)])


def documents(tokens, spans):
    """[4,T]: borders anywhere; borders exactly between spans; one document; borders two spans and a token apart."""
    length = tokens // spans
    t = np.arange(tokens)
    rng = np.random.default_rng(tokens)
    rows = np.cumsum(rng.random(tokens) < 3 / tokens), t // length, 0 * t, (t + 1) // (2 * length + 1)
    return np.stack(rows)


def draw(kind, tokens):
    rng = np.random.default_rng(tokens)
    normal = lambda *shape: rng.normal(size=shape)  # noqa: E731
    arrays = {n: normal(BATCH, tokens, HEADS, size) for n, size in (("q", KEY), ("k", KEY), ("v", VALUE))}
    arrays["initial_state"] = normal(BATCH, HEADS, 2 * KEY if kind == "phase" else KEY, VALUE)
    if kind == "scalar":
        arrays["log_decay"] = np.array([0.0, -0.05, -60.0, -np.inf])
    if kind == "phase":
        arrays["phase"] = rng.uniform(0, 1.5, (HEADS, KEY))
    if kind in ("vector", "tied"):
        gates = shared.logsigmoid(normal(BATCH, tokens, HEADS, KEY)) / 3
        for value, share in ((-60.0, 0.03), (0.0, 0.05), (-np.inf, 0.03)):
            gates = np.where(rng.random(gates.shape) < share, value, gates)
        arrays["log_decay"] = gates
    if kind == "tied":
        del arrays["k"]
    return {n: a.astype(np.float32) for n, a in arrays.items()}


def compare(got, want):
    errors = shared.relative_errors(dict(enumerate(jax.tree.leaves(got))), dict(enumerate(jax.tree.leaves(want))))
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.parametrize(
    ("mesh", "tokens", "kind"),
    [(MESHES[0], 24, "phase")]
    + [(MESHES[0], 8, "vector")]  # a token a device
    + [(MESHES[0], 8 * 67, "tied")]  # more than a chunk, divided by nothing
    + [(MESHES[1], 70, "scalar"), (MESHES[2], 70, "tied")]
    + [
        pytest.param(MESHES[0], tokens, kind, marks=pytest.mark.slow)
        for tokens, kind in ((24, "none"), (24, "scalar"), (24, "vector"), (24, "tied"), (8, "phase"))
    ]
    + [pytest.param(MESHES[3], 35, "phase", marks=pytest.mark.slow)]
    + [
        pytest.param(mesh, 2 * 67 * mesh[2], kind, marks=pytest.mark.slow)
        for mesh in MESHES
        for kind in ("none", "scalar", "phase", "vector", "tied")
    ],
    ids=str,
)
def test_linear_attention(mesh, tokens, kind):
    arrays, ids = draw(kind, tokens), documents(tokens, mesh[2])
    with jax.enable_x64(True):
        want = shared.run("scan", {n: a.astype(np.float64) for n, a in arrays.items()}, ids, seed=tokens)
    with jax.set_mesh(mesh_of(mesh)):
        got = shared.run(None, arrays, ids, seed=tokens, axes=Axes())
    errors = shared.relative_errors(got, want)
    assert max(errors.values()) < TOLERANCE, errors


def test_linear_attention_without_state_or_documents_over_three_devices():
    """A number of spans that is no power of two."""
    arrays = draw("scalar", 30)
    del arrays["initial_state"]
    with jax.enable_x64(True):
        want = shared.run("scan", {n: a.astype(np.float64) for n, a in arrays.items()}, None, seed=1)
    with jax.set_mesh(mesh_of((1, 2, 3, 1))):
        got = shared.run(None, arrays, None, seed=1, axes=Axes())
    errors = shared.relative_errors(got, want)
    assert max(errors.values()) < TOLERANCE, errors


def test_bfloat16():
    arrays, ids = draw("tied", 40), documents(40, 8)
    low = {n: jnp.asarray(a, jnp.bfloat16 if n in "qkv" else jnp.float32) for n, a in arrays.items()}
    with jax.enable_x64(True):
        want = shared.run("scan", {n: np.asarray(a, np.float64) for n, a in low.items()}, ids, seed=2)
    with jax.set_mesh(mesh_of(MESHES[0])):
        got = shared.run(None, low, ids, seed=2, axes=Axes())
    errors = shared.relative_errors(got, want)
    assert max(errors.values()) < 5e-3, errors


def test_angles_of_long_spans():
    theta = np.random.default_rng(0).uniform(0, 1.5, (1, 5)).astype(np.float32)
    cos, sin = context_parallel._angles(jnp.asarray(theta), 200_003)
    exact = np.arange(200_004)[:, None, None] * theta.astype(np.float64)
    np.testing.assert_allclose(cos, np.cos(exact), atol=2e-6)
    np.testing.assert_allclose(sin, np.sin(exact), atol=2e-6)


def gradients(operator, arrays, axes):
    """The results of operator(*arrays, axes) and the gradient of a smooth function of them in every array."""

    def loss(*arrays):
        results = operator(*arrays, axes)
        return sum(jnp.sum(jnp.sin(r)) for r in jax.tree.leaves(results)), results

    return jax.jit(jax.grad(loss, argnums=tuple(range(len(arrays))), has_aux=True))(*arrays)


def softmax(ids):
    return lambda q, k, v, axes: softmax_attention(q, k, v, segment_ids=ids, axes=axes)


def tpe(ids):
    return lambda x, coefficients, state, axes: toeplitz(x, coefficients, state, ids, axes=axes)


@pytest.mark.parametrize(
    ("mesh", "packed"),
    [(MESHES[0], True), (MESHES[2], True)]
    + [pytest.param(mesh, packed, marks=pytest.mark.slow) for mesh in MESHES for packed in (True, False)],
    ids=str,
)
class TestAgainstOneDevice:
    def test_softmax_attention(self, mesh, packed):
        rng = np.random.default_rng(0)
        arrays = rng.normal(size=(3, BATCH, 56, HEADS, KEY))
        operator = softmax(documents(56, mesh[2]) if packed else None)
        with jax.enable_x64(True):
            want = jax.tree.map(np.asarray, gradients(operator, list(arrays), None))
        with jax.set_mesh(mesh_of(mesh)):
            compare(gradients(operator, list(arrays.astype(np.float32)), Axes()), want)

    def test_tpe(self, mesh, packed):
        rng = np.random.default_rng(1)
        arrays = [rng.normal(size=s).astype(np.float32) for s in ((BATCH, 56, 8), (8, 3), (BATCH, 8, 3))]
        operator = tpe(documents(56, mesh[2]) if packed else None)
        want = gradients(operator, arrays, None)
        with jax.set_mesh(mesh_of(mesh)):
            compare(gradients(operator, arrays, Axes()), want)


@pytest.mark.parametrize(
    ("mesh", "scale"), [(MESHES[0], 0.1), (MESHES[1], 1.0), (MESHES[2], 30.0), (MESHES[3], 30.0)], ids=str
)
def test_cross_entropy(monkeypatch, mesh, scale):
    """In slices of two tokens, which do not divide the tokens of a device."""
    hidden, embedding, labels, weights = losses.draw(BATCH, 24, 16, 48, scale)
    monkeypatch.setattr(losses.chunked, "MAX_LOGITS", 2 * BATCH * 48 // np.prod(mesh[:2] + mesh[3:]))
    loss = lambda h, e: losses.reference(h, e, labels, weights)  # noqa: E731
    with jax.enable_x64(True):
        want = jax.tree.map(np.asarray, jax.value_and_grad(loss, argnums=(0, 1))(hidden, embedding))
    weights = weights.astype(np.float32)
    loss = lambda h, e: cross_entropy(h, e, labels, weights, axes=Axes())  # noqa: E731
    with jax.set_mesh(mesh_of(mesh)):
        compare(jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(jnp.float32(hidden), jnp.float32(embedding)), want)


BYTES = {"f32": 4, "bf16": 2, "s32": 4, "pred": 1}
COLLECTIVE = re.compile(r"= (.*?) (all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all)(?:-start)?\(")


def communicated(operator, shapes):
    """{collective: bytes of its results} in the compiled gradient over eight devices of the sequence axis."""
    mesh = mesh_of(MESHES[0])

    def loss(arrays):
        return jnp.sum(operator(arrays).astype(jnp.float32))

    def placed(shape):
        dims = (None, "sequence") if len(shape) > 2 else ()
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*dims))
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

    with jax.set_mesh(mesh):
        text = jax.jit(jax.grad(loss)).lower({n: placed(s) for n, s in shapes.items()}).compile().as_text()
    total = {}
    for shapes_of, name in COLLECTIVE.findall(text):
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes_of):
            size = BYTES[dtype] * int(np.prod([int(d) for d in dims.split(",") if d] or [1]))
            total[name] = total.get(name, 0) + size
    return total


@pytest.mark.parametrize("kind", ("scalar", "phase", "vector"))
def test_linear_communication_does_not_depend_on_tokens(kind):
    heads, channels = 2, 16

    def shapes(tokens):
        wide = (1, tokens, heads, channels)
        decay = {"scalar": (heads,), "vector": wide}.get(kind)
        named = {"phase": (heads, channels)} if decay is None else {"log_decay": decay}
        return dict.fromkeys(("q", "k", "v"), wide) | named

    def operator(arrays):
        ids = jnp.zeros(arrays["q"].shape[:2], jnp.int32)
        return linear_attention(**arrays, segment_ids=ids, axes=Axes())[0]

    short, long = (communicated(operator, shapes(tokens)) for tokens in (256, 1024))
    assert short == long
    # log2(8) + 1 states forward and backward, of twice the rows with phase, and factors of 1 / channels of their size.
    state = 4 * heads * channels * channels * (2 if kind == "phase" else 1)
    assert 8 * state <= short["collective-permute"] <= 8 * state * (1 + 2 / channels)
    assert short.get("all-reduce", 0) <= 4 * heads * channels  # the gradient of what all devices share
    assert short.keys() <= {"collective-permute", "all-reduce"}


def test_tpe_communication_does_not_depend_on_tokens():
    def operator(arrays):
        return toeplitz(arrays["x"], arrays["coefficients"], jnp.zeros((1, 16, 4)), axes=Axes())[0]

    short, long = (communicated(operator, {"x": (1, t, 16), "coefficients": (16, 4)}) for t in (256, 1024))
    assert short == long


def test_softmax_communicates_keys_and_values_once():
    """Gathered forward and again in no backward: their gradients are scattered, 1/8 of the whole on each device."""
    tokens, heads, channels = 1024, 2, 16
    shapes = dict.fromkeys(("q", "k", "v"), (1, tokens, heads, channels))
    got = communicated(lambda arrays: softmax_attention(**arrays, axes=Axes()), shapes)
    whole = 4 * tokens * heads * channels
    assert got == {"all-gather": 2 * whole, "reduce-scatter": 2 * whole // 8}


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 8, 2, 4), r"q has shape \(3, 8, 2, 4\): 3 does not divide over 2 devices of mesh axis 'data' x 'fsdp'"),
        ((2, 9, 2, 4), r"q has shape \(2, 9, 2, 4\): 9 does not divide over 2 devices of mesh axis 'sequence'"),
        ((2, 8, 3, 4), r"q has shape \(2, 8, 3, 4\): 3 does not divide over 2 devices of mesh axis 'tensor'"),
    ],
)
@pytest.mark.parametrize("operator", (linear_attention, softmax_attention))
def test_what_does_not_divide_is_named(operator, shape, message):
    x = jnp.zeros(shape)
    with jax.set_mesh(mesh_of((2, 1, 2, 2))), pytest.raises(ValueError, match=message):
        operator(x, x, x, axes=Axes())


def test_vocabulary_that_does_not_divide_is_named():
    with jax.set_mesh(mesh_of((1, 1, 1, 4))), pytest.raises(ValueError, match=r"embedding has shape .* 'tensor'"):
        cross_entropy(jnp.zeros((1, 4, 2)), jnp.zeros((50, 2)), jnp.zeros((1, 4), int), jnp.ones((1, 4)), axes=Axes())


def test_an_axis_that_the_mesh_lacks_is_named():
    x = jnp.zeros((2, 8, 2, 4))
    with jax.set_mesh(mesh_of((2, 1, 2, 2))), pytest.raises(ValueError, match="'model'; the mesh in context has"):
        linear_attention(x, x, x, axes=Axes(heads="model"))
