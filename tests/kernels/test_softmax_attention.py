"""Softmax attention against a float64 sum over keys, with documents, and with a cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from linscale.kernels import Axes, documents_fit, softmax_attention
from linscale.kernels.softmax_attention import blockwise, cudnn_packed, splash


def reference(q, k, v, ids=None, offset=0):
    out = np.zeros(q.shape)
    for b, t, h in np.ndindex(q.shape[:3]):
        keys = [s for s in range(offset + t + 1) if ids is None or ids[b, s] == ids[b, t]]
        score = k[b, keys, h] @ q[b, t, h] / np.sqrt(q.shape[3])
        p = np.exp(score - score.max())
        out[b, t, h] = p @ v[b, keys, h] / p.sum()
    return out


@pytest.mark.parametrize("tokens", (1, 33))
@pytest.mark.parametrize("documents", (False, True))
def test_values(tokens, documents):
    rng = np.random.default_rng(tokens)
    q, k, v = rng.normal(size=(3, 2, tokens, 3, 8))
    ids = np.cumsum(rng.random((2, tokens)) < 0.2, axis=1) if documents else None
    got = softmax_attention(*map(jnp.float32, (q, k, v)), segment_ids=ids)
    np.testing.assert_allclose(got, reference(q, k, v, ids), atol=1e-5)


def test_queries_at_an_offset_see_the_cache_up_to_themselves():
    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, 4, 3, 8))
    k, v = rng.normal(size=(2, 2, 20, 3, 8))
    got = softmax_attention(*map(jnp.float32, (q, k, v)), offset=9)
    np.testing.assert_allclose(got, reference(q, k, v, offset=9), atol=1e-5)


def test_packed_says_what_it_needs():
    x = jnp.zeros((1, 4, 2, 8))
    with pytest.raises(
        ValueError, match="needs segment_ids, bfloat16, channels in eights and a GPU of Hopper or later; q is float32"
    ):
        softmax_attention(x, x, x, segment_ids=jnp.zeros((1, 4), int), implementation="packed")
    with pytest.raises(ValueError, match="'blockwise' cannot serve: it does not decode with a cache"):
        softmax_attention(x, x, x, offset=0, implementation="blockwise")


def test_bad_shapes_are_named():
    x = jnp.zeros((1, 4, 2, 8))
    with pytest.raises(ValueError, match="without offset they must be equal"):
        softmax_attention(x, x[:, :3], x[:, :3])
    with pytest.raises(ValueError, match="do not fit"):
        softmax_attention(x, x, x[..., :4])


def test_document_table_names_starts_and_lengths():
    ids = np.array([[1, 1, 2, 3, 3, 3], [7, 7, 7, 7, 7, 0]])
    starts, lengths = cudnn_packed.document_table(jnp.array(ids), 4)
    np.testing.assert_array_equal(starts, [[0, 2, 3, -1, -1], [0, 5, -1, -1, -1]])
    np.testing.assert_array_equal(lengths, [[2, 1, 3, -1], [5, 1, -1, -1]])


@pytest.mark.parametrize(("most", "fit"), [(1, False), (2, False), (3, True), (6, True)])
def test_documents_fit_when_every_row_has_room(monkeypatch, most, fit):
    ids = jnp.array([[1, 1, 2, 3, 3, 3], [7, 7, 7, 7, 7, 0]])
    assert documents_fit(ids, 4, 64, jnp.bfloat16) is None, "there is no choice on this device"
    monkeypatch.setattr(cudnn_packed, "serves_packed", lambda *_: True)
    monkeypatch.setattr(cudnn_packed, "MOST", most)
    assert bool(documents_fit(ids, 4, 64, jnp.bfloat16)) == fit


def test_the_choice_sees_one_device_of_a_mesh(monkeypatch):
    monkeypatch.setattr(cudnn_packed, "serves_packed", lambda *_: True)
    served = []
    monkeypatch.setattr(cudnn_packed, "documents_served", lambda shape: served.append(shape) or 16)
    auto = (jax.sharding.AxisType.Auto,) * 4
    for sizes in ((2, 2, 1, 2), (1, 1, 2, 1)):
        mesh = jax.sharding.AbstractMesh(sizes, ("data", "fsdp", "sequence", "tensor"), axis_types=auto)
        with jax.sharding.use_abstract_mesh(mesh):
            ids = jax.ShapeDtypeStruct((8, 64), jnp.int32)
            answer = jax.eval_shape(lambda ids: documents_fit(ids, 4, 64, jnp.bfloat16, Axes()), ids)
            assert (answer is None) == (sizes[2] > 1), "over the sequence axis keys are gathered, and nothing is packed"
    assert served == [(2, 64, 2, 64)]


def test_blocks_of_queries_equal_the_sum(monkeypatch):
    monkeypatch.setattr(blockwise, "_QUERY_BLOCK", 16)
    rng = np.random.default_rng(3)
    q, k, v = rng.normal(size=(3, 2, 37, 3, 8))
    ids = np.cumsum(rng.random((2, 37)) < 0.1, axis=1)
    attend = functools.partial(blockwise.blockwise, query_ids=jnp.array(ids), key_ids=jnp.array(ids))
    got = attend(*map(jnp.float32, (q, k, v)))
    np.testing.assert_allclose(got, reference(q, k, v, ids), atol=1e-5)

    def loss(attend):
        gradient = jax.jit(jax.grad(lambda *x: jnp.sum(jnp.sin(attend(*x))), argnums=(0, 1, 2)))
        return gradient(*map(jnp.float32, (q, k, v)))

    blocks = loss(attend)
    for a, b in zip(blocks, loss(lambda *x: softmax_attention(*x, segment_ids=ids)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_packed_cudnn_lowers_on_this_jax(monkeypatch):
    """The path is private to JAX: its names and arguments may change with any version."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda *_: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda *_: True)
    x, ids = jax.ShapeDtypeStruct((2, 256, 4, 64), jnp.bfloat16), jax.ShapeDtypeStruct((2, 256), jnp.int32)

    def loss(q, k, v, ids):
        return cudnn_packed.packed_attention(q, k, v, ids).astype(jnp.float32).sum()

    text = jax.jit(jax.grad(loss, (0, 1, 2))).trace(x, x, x, ids).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@__cudnn$fmhaSoftmax(") == 1
    assert text.count("@__cudnn$fmhaSoftmaxBackward(") == 1


@pytest.mark.gpu
@pytest.mark.parametrize("documents_a_row", (1, 5, 100))
@pytest.mark.parametrize("tokens", (512, 1000))
def test_packed_cudnn_equals_a_mask(documents_a_row, tokens):
    """100 documents a row are more than the table holds: blocks of queries must take over."""
    rng = np.random.default_rng(tokens + documents_a_row)
    q, k, v, d_out = jnp.asarray(rng.normal(size=(4, 3, tokens, 4, 64)), jnp.bfloat16)
    ids = jnp.asarray(1 + np.cumsum(rng.random((3, tokens)) < (documents_a_row - 1) / tokens, axis=1))
    mask = (ids[:, :, None] == ids[:, None, :])[:, None]

    def exact(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation="xla")

    out, pull = jax.vjp(lambda *x: softmax_attention(*x, segment_ids=ids), q, k, v)
    want, pull_exact = jax.vjp(exact, *(x.astype(jnp.float32) for x in (q, k, v)))
    for a, b in zip((out, *pull(d_out)), (want, *pull_exact(d_out.astype(jnp.float32))), strict=True):
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        assert np.sqrt(np.mean((a - b) ** 2)) / np.sqrt(np.mean(b**2)) < 1e-2


@pytest.mark.parametrize(
    "shape, documents",
    [
        ((16, 2048, 8, 128), 16),
        ((1, 65_536, 8, 128), 16),
        ((1, 65_536, 1, 128), 128),
        ((1, 2**20, 32, 128), 1),
        ((3, 5, 4, 64), 5),
    ],
)
def test_the_table_of_documents_is_bounded_in_memory(shape, documents):
    assert cudnn_packed.documents_served(shape) == documents
    assert documents == 1 or documents * 4 * np.prod(shape) <= cudnn_packed.WORKSPACE


@pytest.mark.parametrize("documents", (False, True))
def test_splash_equals_xla(monkeypatch, documents):
    """The TPU kernel in interpret mode, bfloat16: values and gradients."""
    monkeypatch.setattr(splash, "INTERPRET", True)
    rng = np.random.default_rng(2)
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in rng.normal(size=(4, 2, 256, 2, 64))]
    ids = jnp.asarray(np.cumsum(rng.random((2, 256)) < 0.02, axis=1)) if documents else None

    def run(implementation, dtype):
        *qkv, weight = (x.astype(dtype) for x in arrays)
        loss = lambda *qkv: (softmax_attention(*qkv, segment_ids=ids, implementation=implementation) * weight).sum()  # noqa: E731
        return jax.grad(lambda *x: loss(*x).astype(jnp.float32), (0, 1, 2))(*qkv), softmax_attention(
            *qkv, segment_ids=ids, implementation=implementation
        )

    ours, theirs = jax.tree.leaves(run(None, jnp.bfloat16)), jax.tree.leaves(run("xla", jnp.float32))
    for one, other in zip(ours, theirs):
        assert np.linalg.norm(one - other) < 8e-3 * np.linalg.norm(other)


@pytest.mark.parametrize(
    "shape, dtype, reason",
    [
        ((1, 100, 2, 64), jnp.bfloat16, "multiples of 128 tokens"),
        ((1, 128, 2, 64), jnp.float32, "it takes bfloat16"),
    ],
)
def test_splash_says_why_it_cannot_serve(monkeypatch, shape, dtype, reason):
    x = jnp.zeros(shape, dtype)
    with pytest.raises(ValueError, match="it needs a TPU"):
        softmax_attention(x, x, x, implementation="splash")
    monkeypatch.setattr(splash, "INTERPRET", True)
    with pytest.raises(ValueError, match=reason):
        softmax_attention(x, x, x, implementation="splash")


@pytest.mark.tpu_compile
@pytest.mark.parametrize("channels", (64, 128))
def test_splash_compiles_on_every_device_of_a_mesh(channels):
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    mesh = jax.sharding.Mesh(np.array(devices).reshape(2, 1, 1, 2), ("data", "fsdp", "sequence", "tensor"))

    def array(shape, dtype, *axes):
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    x, ids = array((2, 8192, 8, channels), jnp.bfloat16, "data", None, "tensor"), array((2, 8192), jnp.int32, "data")
    with jax.set_mesh(mesh):
        loss = lambda q, k, v, ids: softmax_attention(q, k, v, segment_ids=ids, axes=Axes()).astype(jnp.float32).sum()  # noqa: E731
        program = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x, ids).compile()
    assert program.as_text().count('custom_call_target="tpu_custom_call"') == 2
    assert program.memory_analysis().temp_size_in_bytes < 2**28  # scores would take 2 GiB
