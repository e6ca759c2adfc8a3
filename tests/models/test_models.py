"""What every architecture must do, whatever its mixer: causality, documents apart, decoding, counts, gradients."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from linscale import models
from linscale.config import ARCHITECTURES, ConfigError, Model
from linscale.kernels.softmax_attention import api as softmax_api
from linscale.kernels.softmax_attention import cudnn_packed
from linscale.models.sizes import ASPECTS, SIZES, paper_model
from linscale.scaling.flops import count_parameters


def small(arch, **changes):
    sizes = {"layers": 6, "width": 48, "heads": 3, "ffn": 80, "vocab_size": 101, "softmax_every": 4, "init_std": 0.1}
    return Model(arch=arch, **(sizes | changes))


@functools.cache
def parameters(model):
    return models.init(model, 0)  # not compiled as a whole: most of its operations are the same in every architecture


def tokens_of(model, batch, tokens, seed=0):
    return np.random.default_rng(seed).integers(model.vocab_size, size=(batch, tokens)).astype(np.int32)


@functools.partial(jax.jit, static_argnums=0)
def all_logits(model, params, tokens, segment_ids=None, cache=None):
    hidden, cache = models.forward(model, params, tokens, segment_ids, cache)
    return models.logits(model, params, hidden), cache


def batch_of(model, batch, tokens):
    drawn, ones = tokens_of(model, batch, tokens + 1), np.ones((batch, tokens), np.int32)
    return {"tokens": drawn[:, :-1], "labels": drawn[:, 1:], "segment_ids": ones, "weights": np.float32(ones)}


@functools.cache
def loss_and_gradients(model):
    """A function of the parameters: (sum of the loss, its weight) of two rows of 64 tokens, and the gradients."""
    batch = batch_of(model, 2, 64)
    return jax.jit(jax.value_and_grad(lambda p: models.loss(model, p, batch), has_aux=True))


@functools.cache
def gradients(model):
    return loss_and_gradients(model)(parameters(model))[1]


@pytest.mark.parametrize("arch", ARCHITECTURES)
class TestEveryArchitecture:
    def test_decoding_equals_teacher_forcing(self, arch):
        """Prefill of 70 tokens, then one at a time; and one at a time from the first token."""
        model = small(arch)
        params, tokens = parameters(model), tokens_of(model, 2, 90)
        want, _ = all_logits(model, params, tokens)
        for prefill in (70, 1):
            got, cache = all_logits(model, params, tokens[:, :prefill], cache=models.init_cache(model, 2, 90))
            got = [got]
            for t in range(prefill, 90):
                step, cache = all_logits(model, params, tokens[:, t : t + 1], cache=cache)
                got.append(step)
            np.testing.assert_allclose(np.concatenate(got, 1), want, atol=1e-4)
            assert cache["position"] == 90

    def test_later_tokens_change_no_earlier_logit(self, arch):
        model = small(arch)
        params, tokens = parameters(model), tokens_of(model, 2, 90)
        changed = tokens.copy()
        changed[:, 66:] = (changed[:, 66:] + 1) % model.vocab_size
        before, _ = all_logits(model, params, tokens)
        after, _ = all_logits(model, params, changed)
        np.testing.assert_array_equal(before[:, :66], after[:, :66])
        assert np.abs(before[:, 66:] - after[:, 66:]).max() > 1e-3

    def test_documents_packed_together_do_not_touch(self, arch):
        """Each document of a packed row gives the logits it gives alone, and ignores changes to the others."""
        model = small(arch)
        params, tokens = parameters(model), tokens_of(model, 1, 120)
        borders = (0, 7, 8, 64, 120)
        ids = np.searchsorted(borders, np.arange(120), side="right")[None]
        packed, _ = all_logits(model, params, tokens, ids)
        spans = list(itertools.pairwise(borders))
        for some in (spans[:2], spans[2:]):
            rows = np.zeros((2, 90), np.int32)  # what follows a document changes nothing: the test above
            for row, (start, end) in zip(rows, some):
                row[: end - start] = tokens[0, start:end]
            for alone, (start, end) in zip(all_logits(model, params, rows)[0], some):
                np.testing.assert_allclose(packed[0, start:end], alone[: end - start], atol=1e-4)
        changed = tokens.copy()
        changed[:, :8] = (changed[:, :8] + 1) % model.vocab_size
        np.testing.assert_array_equal(all_logits(model, params, changed, ids)[0][:, 8:], packed[:, 8:])

    def test_first_loss_is_log_vocabulary(self, arch):
        """For one architecture also at the width and vocabulary where wrongly scaled logits take the loss far off."""
        model = small(arch)
        (nll, weight), _ = loss_and_gradients(model)(parameters(small(arch, init_std=0.02)))
        assert abs(nll / weight / np.log(model.vocab_size) - 1) < 0.05
        if arch == "llama":
            model = small(arch, init_std=0.02, layers=1, width=512, heads=4, ffn=512, vocab_size=100_280)
            nll, weight = jax.jit(functools.partial(models.loss, model))(models.init(model, 0), batch_of(model, 2, 64))
            assert abs(nll / weight / np.log(model.vocab_size) - 1) < 0.05

    def test_every_parameter_learns(self, arch):
        """A parameter with zero gradient is not connected. Layer 0 of HGRN2's bounds is 0 whatever its logits."""
        for path, g in jax.tree_util.tree_leaves_with_path(gradients(small(arch))):
            assert np.isfinite(g).all(), path
            assert np.abs(g).max() > 0, path
            if "layers" in jax.tree_util.keystr(path):
                assert (np.abs(g).reshape(g.shape[0], -1).max(axis=1) > 0).all(), path

    def test_padding_on_the_left_changes_nothing(self, arch):
        """Whatever the padding of a row holds and however long it is, the text after it reads the same."""
        model = small(arch)
        params, rng = parameters(model), np.random.default_rng(5)
        texts = [rng.integers(101, size=n) for n in (40, 7, 25, 39)]  # row 1's padding outlasts the first prefill call
        start = np.array([40 - len(text) for text in texts])
        tokens = np.stack([np.concatenate([rng.integers(101, size=40 - len(text)), text]) for text in texts])
        cache = models.init_cache(model, 4, 40, start=jnp.asarray(start))
        parts = []
        for begin, end in [(0, 18), (18, 36)] + [(t, t + 1) for t in range(36, 40)]:
            logits, cache = all_logits(model, params, tokens[:, begin:end], cache=cache)
            parts.append(logits)
        got = np.concatenate(parts, axis=1)
        alone = np.zeros((4, 90), np.int32)  # the text first: causal models
        for row, text in zip(alone, texts):
            row[: len(text)] = text
        expected = np.concatenate([all_logits(model, params, rows)[0] for rows in (alone[:2], alone[2:])])[:, :40]
        for row, text in enumerate(texts):
            np.testing.assert_allclose(
                got[row, start[row] :], expected[row, : len(text)], atol=1e-4 * np.abs(expected).max()
            )

    def test_bfloat16_is_close(self, arch):
        model = small(arch)
        params, tokens = parameters(model), tokens_of(model, 2, 90)
        want, _ = all_logits(model, params, tokens)
        got, _ = all_logits(dataclasses.replace(model, dtype="bfloat16"), params, tokens)
        assert np.sqrt(np.mean((got - want) ** 2)) < 0.05 * np.sqrt(np.mean(want**2))

    def test_work_does_not_grow_with_depth(self, arch):
        """The traced program of 8 layers and of 32 is the same but for sizes."""

        def operations(layers):
            model = small(arch, layers=layers)
            params = jax.eval_shape(lambda: models.init(model, 0))
            tokens = jax.ShapeDtypeStruct((1, 64), jnp.int32)
            return str(jax.make_jaxpr(lambda p, t: models.forward(model, p, t)[0])(params, tokens)).count("\n")

        assert operations(32) == operations(8)


SCAN, DOTS = {"remat": "full", "attention": "scan"}, {"remat": "dots", "unroll": 2}
# Layers are unrolled and recomputed in one place for all mixers, and in another for periods of two.
QUICK = [(arch, SCAN) for arch in ARCHITECTURES] + [("tnl", DOTS), ("hybrid", DOTS)]


@pytest.mark.parametrize(
    ("arch", "changes"),
    [
        pytest.param(arch, changes, marks=() if (arch, changes) in QUICK else pytest.mark.slow)
        for arch in ARCHITECTURES
        for changes in (SCAN, DOTS, {"remat": "full"}, {"remat": "dots", "unroll": 3})
    ],
    ids=str,
)
def test_remat_unroll_and_implementation_change_no_gradient(arch, changes):
    model = small(arch)
    got = gradients(dataclasses.replace(model, **changes))
    for a, b in zip(jax.tree.leaves(gradients(model)), jax.tree.leaves(got)):
        np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-5 * np.abs(a).max(), err_msg=str(changes))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("size", SIZES + ASPECTS)
def test_parameter_trees_agree_with_the_counting(arch, size):
    model = paper_model(arch, size)
    params = jax.eval_shape(lambda: models.init(model, 0))
    total = sum(p.size for p in jax.tree.leaves(params))
    count = count_parameters(model)
    assert total == count.total
    assert total - params["embedding"].size == count.nonembedding
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(params))


def test_an_untied_head_counts_learns_and_decides_the_logits():
    model = small("tnl", tied=False)
    params, tokens = models.init(model, 0), tokens_of(model, 2, 17)
    assert sum(p.size for p in jax.tree.leaves(params)) == count_parameters(model).total
    batch = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "segment_ids": np.ones((2, 16), np.int32)}
    batch["weights"] = np.ones((2, 16), np.float32)
    nll, grads = jax.jit(jax.value_and_grad(lambda p: models.loss(model, p, batch)[0]))(params)
    log_p = jax.nn.log_softmax(all_logits(model, params, batch["tokens"])[0])
    np.testing.assert_allclose(nll, -np.take_along_axis(log_p, batch["labels"][..., None], -1).sum(), rtol=1e-5)
    unseen = np.setdiff1d(np.arange(model.vocab_size), batch["tokens"])
    assert np.abs(grads["embedding"][unseen]).max() == 0, "the embedding still serves as head"
    assert np.abs(grads["head"]).max(axis=1).min() > 0
    tied = dataclasses.replace(model, tied=True)
    assert count_parameters(model).total - count_parameters(tied).total == model.vocab_size * model.width
    assert count_parameters(model).nonembedding_with_head == count_parameters(tied).nonembedding_with_head


@pytest.mark.parametrize("arch", ("llama", pytest.param("hybrid", marks=pytest.mark.slow)))
def test_softmax_layers_are_chosen_by_documents_once_a_program(arch, monkeypatch):
    """As on a Hopper GPU, with a mask in the place of cuDNN: one branch around all layers and their gradients."""
    model, used = small(arch, layers=2, softmax_every=2), []
    params, batch = parameters(model), batch_of(model, 2, 32)

    def values(params, ids, softmax=None):
        return jax.value_and_grad(lambda p: models.loss(model, p, batch | {"segment_ids": ids}, softmax)[0])(params)

    def run(params, ids):
        return models.by_documents(model, ids, functools.partial(values, params, ids))

    def masked(q, k, v, segment_ids):
        mask = (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
        jax.debug.callback(lambda: used.append("packed"))
        return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True)

    ids_of = lambda documents: np.broadcast_to(np.arange(32) * documents // 32, (2, 32)).astype(np.int32)  # noqa: E731
    plain = jax.jit(values).lower(params, ids_of(2)).compile()
    for module in (cudnn_packed, softmax_api):
        monkeypatch.setattr(module, "serves_packed", lambda *_: True)
    monkeypatch.setattr(softmax_api, "packed_attention", masked)
    lowered = jax.jit(run).lower(params, ids_of(2))
    assert lowered.as_text().count("stablehlo.case") == 1
    chosen = lowered.compile()
    for documents in (2, 20):
        used.clear()
        got, want = chosen(params, ids_of(documents)), plain(params, ids_of(documents))
        jax.effects_barrier()
        assert bool(used) == (documents == 2)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


def test_hybrid_places_softmax_in_every_eighth_layer():
    model = paper_model("hybrid", "410m")
    params = jax.eval_shape(lambda: models.init(model, 0))
    layers = {kind: stack["ffn"]["up"]["kernel"].shape[0] for kind, stack in params["layers"].items()}
    assert layers == {"tnl": 23, "llama": 3}


def test_equal_seeds_give_equal_parameters_and_others_do_not():
    model = small("hgrn2")
    a, b, c = (models.init(model, seed)["embedding"] for seed in (1, 1, 2))
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - c).max() > 0


@pytest.mark.parametrize("arch", ("tnl", "hgrn2", "cosformer2"))
def test_decoding_state_does_not_grow(arch):
    model = small(arch)
    sizes = [sum(x.size for x in jax.tree.leaves(models.init_cache(model, 1, slots))) for slots in (10, 10_000)]
    assert sizes[0] == sizes[1]


def test_implementation_that_cannot_run_is_named():
    with pytest.raises(ConfigError, match=r"config\.model\.attention is 'pallas_gpu'"):
        models.validate(small("tnl", attention="pallas_gpu"))


@pytest.mark.parametrize("arch", ("llama", "tnl", "hgrn2", "cosformer2"))
def test_short_rows_do_not_depend_on_how_many_there_are(arch):
    """XLA's CPU compiler once got 16 or more rows of one chunk wrong, by orders of magnitude."""
    model = Model(arch=arch, layers=2, width=64, heads=1, ffn=64)
    params = models.init(model, 0)
    tokens = jax.random.randint(jax.random.key(1), (32, 8), 0, model.vocab_size)
    run = jax.jit(lambda params, tokens: models.forward(model, params, tokens)[0])
    np.testing.assert_allclose(run(params, tokens)[:2], run(params, tokens[:2]), atol=1e-4)


def test_gradient_of_a_frequent_token_is_the_sum_over_its_places():
    """In bfloat16, where adding a small number to a large one changes nothing."""
    model = small("llama", layers=1, dtype="bfloat16", tied=False)
    params, places = parameters(model), 4096

    def gradient(rows):
        tokens, to = np.full((rows, 1), 7, np.int32), jax.random.normal(jax.random.key(1), (model.width,))
        loss = lambda p: jnp.sum(models.forward(model, p, tokens)[0].astype(jnp.float32) * to)  # noqa: E731
        return jax.jit(jax.grad(loss))(params)["embedding"][7]

    np.testing.assert_allclose(gradient(places), places * gradient(1), rtol=1e-3, atol=places * 1e-4)
