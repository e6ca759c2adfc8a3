"""Decoding against the whole model run again for every token; streams, stops, and memory that does not grow."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from linscale import cli, models
from linscale.config import ConfigError, Model
from linscale.evaluation import generation
from linscale.evaluation.generation import Sampling


@functools.cache
def model_and_params(arch, dtype="auto"):
    model = Model(arch=arch, layers=2, width=32, heads=2, ffn=48, vocab_size=61, softmax_every=2, init_std=0.15)
    if dtype != "auto":
        import dataclasses

        model = dataclasses.replace(model, dtype=dtype)
    return model, models.init(model, 3)


def blocks(arch, prompts, **options):
    model, params = model_and_params(arch)
    return np.concatenate(list(generation.token_blocks(model, params, prompts, **options)), axis=1)


@functools.partial(jax.jit, static_argnums=0)
def _logits(model, params, row):
    return models.logits(model, params, models.forward(model, params, row[None])[0])[0]


def greedy(arch, prompt, most):
    model, params = model_and_params(arch)
    ids = list(prompt)
    for _ in range(most):
        row = np.zeros(64, np.int32)
        row[: len(ids)] = ids
        ids.append(int(np.argmax(_logits(model, params, row)[len(ids) - 1])))
    return ids[len(prompt) :]


SLOW = [pytest.param(arch, marks=pytest.mark.slow) for arch in ("tnl", "cosformer2", "hybrid")]


@pytest.mark.parametrize("arch", ["llama", "hgrn2", *SLOW])
def test_greedy_text_is_that_of_the_whole_model(arch):
    rng = np.random.default_rng(1)
    prompts = [rng.integers(61, size=n).tolist() for n in (1, 23, 9)]
    together = blocks(arch, prompts, most=20)
    assert together.tolist() == [greedy(arch, prompt, 20) for prompt in prompts]
    end = int(together[1][4])
    ended = blocks(arch, prompts, most=20, end=end)
    for row, free in zip(ended.tolist(), together.tolist()):
        at = free.index(end) if end in free else len(free)
        assert row[: at + 1] == free[: at + 1] and set(row[at + 1 :]) <= {end}


def test_draws_are_a_function_of_seed_and_row_and_follow_the_distribution():
    prompt = [7, 3, 9]
    model, params = model_and_params("hgrn2")
    many = [prompt] * 4000
    first = blocks("hgrn2", many, most=1, sampling=Sampling(0.7), seed=4)[:, 0]
    assert (first == blocks("hgrn2", many, most=1, sampling=Sampling(0.7), seed=4)[:, 0]).all()
    assert (first != blocks("hgrn2", many, most=1, sampling=Sampling(0.7), seed=5)[:, 0]).any()
    row = np.zeros(64, np.int32)
    row[:3] = prompt
    share = np.asarray(jax.nn.softmax(_logits(model, params, row)[2] / 0.7), np.float64)
    found = np.bincount(first, minlength=61) / len(many)
    assert np.abs(found - share).max() < 5 * np.sqrt(share.max() / len(many))

    order = np.argsort(-share)
    few = blocks("hgrn2", many, most=1, sampling=Sampling(0.7, top_k=3), seed=4)[:, 0]
    assert set(few.tolist()) == set(order[:3].tolist())
    nucleus = order[: int(np.searchsorted(np.cumsum(share[order]), 0.5)) + 1]
    drawn = blocks("hgrn2", many, most=1, sampling=Sampling(0.7, top_p=0.5), seed=4)[:, 0]
    assert set(drawn.tolist()) == set(nucleus.tolist())


@pytest.mark.parametrize("arch", ["tnl", "hgrn2", "cosformer2"])
def test_memory_does_not_grow_with_text(arch):
    model, _ = model_and_params(arch)
    sizes = [
        sum(
            x.size * x.dtype.itemsize
            for x in jax.tree.leaves(jax.eval_shape(lambda n=n: models.init_cache(model, 2, n)))
        )
        for n in (1, 100_000)
    ]
    assert sizes[0] == sizes[1]
    lengths = (16, 4096)
    programs = [
        generation._decode.lower(model, *_decoding(model, slots), -1, 0, Sampling()).as_text() for slots in lengths
    ]
    assert programs[0] == programs[1]  # so every buffer of it has the same size


def _decoding(model, slots, rows=2):
    params = jax.eval_shape(lambda: generation.for_decoding(model, models.init(model, 0)))
    cache = jax.eval_shape(lambda: models.init_cache(model, rows, slots))
    last, ended = jax.ShapeDtypeStruct((rows,), jnp.int32), jax.ShapeDtypeStruct((rows,), bool)
    return params, cache, last, ended, jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))


@pytest.mark.parametrize("arch", ["llama", "hgrn2", "hybrid"])
def test_the_cache_is_changed_in_place(arch):
    """The program takes over the given cache's memory, and holds no second one: about one layer's part is worked on."""
    model = Model(arch=arch, layers=10, width=64, heads=2, ffn=64, vocab_size=61, softmax_every=2, dtype="float32")
    params, cache, last, ended, keys = _decoding(model, 2048, rows=32)
    given = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache["layers"]))
    decode = generation._decode.lower(model, params, cache, last, ended, keys, -1, 0, Sampling())
    used = decode.compile().memory_analysis()
    assert used.alias_size_in_bytes >= given
    assert used.temp_size_in_bytes < 0.3 * given


@pytest.mark.parametrize("arch", ["llama", "hgrn2", "tnl"])
def test_no_step_makes_weights_from_float32(arch):
    model, _ = model_and_params(arch, "bfloat16")
    text = generation._decode.lower(model, *_decoding(model, 64), -1, 0, Sampling()).as_text()
    shapes = {"x".join(map(str, shape)) for shape in ((32, 32), (32, 48), (48, 32), (61, 32), (32, 16), (16, 32))}
    made = re.findall(r"stablehlo.convert .*tensor<((?:\d+x)+)f32>\) -> tensor<(?:\d+x)+bf16>", text)
    assert "bf16" in text and not [shape for shape in made if shape.rstrip("x") in shapes]
    assert not re.findall(r"stablehlo.convert .*tensor<2x(?:32x32|32x48|48x32)xf32>\)", text)


def test_streamed_pieces_join_to_the_text():
    from linscale.data.tokenizers import Bytes

    ids = np.frombuffer("añ≠ stop here".encode(), np.uint8).astype(np.int32)[None]
    each = [ids[:, i : i + 1] for i in range(ids.shape[1])]
    whole = [piece for _, piece in generation.stream_text(Bytes(), each, 1)]
    assert "".join(whole) == "añ≠ stop here" and not any("\ufffd" in piece for piece in whole)
    cut = [piece for _, piece in generation.stream_text(Bytes(), each, 1, stop=["stop"])]
    assert "".join(cut) == "añ≠ " and not any("s" in piece for piece in cut)


def test_the_command_streams_and_continues(trained, capsys, tmp_path):
    run = str(trained / "tnl-tiny")
    assert cli.main(["generate", run, "--prompt", "Document 3.", "--max-tokens", "20"]) == 0
    alone = capsys.readouterr().out
    assert cli.main(["generate", run, "--prompt", "Document 3.", "--max-tokens", "20", "--step", "8"]) == 0
    assert capsys.readouterr().out == alone and len(alone) > 1
    (tmp_path / "prompts").write_text("Document 3.\nIt says\n")
    options = ["--prompts", str(tmp_path / "prompts"), "--max-tokens", "20"]
    assert cli.main(["generate", run, *options]) == 0
    both = capsys.readouterr().out
    assert both.startswith("[1]\n" + alone.rstrip("\n")) and "\n[2]\n" in both
    drawn = []
    for seed in ("1", "1", "2"):
        cli.main(["generate", run, "--prompt", "a", "--max-tokens", "20", "--temperature", "1", "--seed", seed])
        drawn.append(capsys.readouterr().out)
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "there is no prompt; give --prompt TEXT"),
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "a", "--prompt", ""], "prompt 2 is empty"),
        (["--prompts", "missing"], "--prompts missing cannot be read"),
        (["--prompt", "a", "--max-tokens", "0"], "--max-tokens is 0"),
        (["--prompt", "a", "--temperature", "-1"], "temperature is -1.0"),
        (["--prompt", "a", "--top-k", "-1"], "top-k is -1"),
        (["--prompt", "a", "--top-p", "0"], "top-p is 0.0"),
        (["--prompt", "a", "--seed", "-1"], "--seed is -1"),
        (["--prompt", "a", "--step", "5"], "no checkpoint of step 5; it has 4, 8"),
    ],
)
def test_refusals(trained, options, message, capsys):
    assert cli.main(["generate", str(trained / "tnl-tiny"), *options]) == 2
    assert message in capsys.readouterr().err


def test_a_prompt_longer_than_a_softmax_models_context():
    with pytest.raises(ConfigError, match="has 30 tokens, but a model with softmax attention reads at most the 30"):
        blocks("llama", [[1] * 30], most=5, context=30)
    assert blocks("llama", [[1] * 28], most=5, context=30).shape == (1, 2)
