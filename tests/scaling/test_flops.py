"""Counts against the paper's printed table 7, against the real parameter trees, and against a count by hand."""

import dataclasses
import math

import pytest

from linscale.config import ConfigError, Model
from linscale.models.sizes import ASPECTS, SIZES, paper_model
from linscale.scaling import flops, paper

ALL = [(arch, size) for arch in paper.TABLE3 for size in SIZES]


@pytest.mark.parametrize("arch, size", ALL)
def test_table7_as_printed(arch, size):
    model, column = paper_model(arch, size), SIZES.index(size)
    pflops = flops.paper_flops_per_step(model, paper.TABLE7_BATCH, paper.TABLE7_SEQUENCE) / 1e15
    assert f"{pflops:.1f}" == f"{paper.TABLE7_PFLOPS[arch][column]:.1f}"
    millions, printed = flops.count_parameters(model).nonembedding_paper / 1e6, paper.TABLE7_PARAMETERS[arch][column]
    if arch == "cosformer2":  # its printed formula does not give its printed numbers
        assert millions == pytest.approx(printed, rel=0.0013)
    else:
        assert f"{millions:.1f}" == f"{printed:.1f}"


TINY = Model(layers=8, width=64, heads=4, ffn=192, vocab_size=264, softmax_every=4)
MODELS = (
    [paper_model(arch, size) for arch, size in ALL]
    + [paper_model(arch, size) for arch in paper.TABLE3 for size in ASPECTS]
    + [dataclasses.replace(TINY, arch=arch) for arch in (*paper.TABLE3, "hybrid")]
)


@pytest.mark.parametrize("model", MODELS, ids=lambda m: f"{m.arch}-l{m.layers}-d{m.width}")
def test_real_parameter_trees(model):
    """eval_shape makes the shapes of the whole tree without allocating it."""
    import functools

    import jax

    from linscale import models

    tree = jax.eval_shape(functools.partial(models.init, model), 0)
    leaves = [(jax.tree_util.keystr(path), leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
    counted = flops.count_parameters(model)
    assert sum(math.prod(shape) for _, shape in leaves) == counted.total, f"the tree is {leaves}"


def test_parameters_by_hand():
    """TNL with d=8, e=4, g=16, two layers: 4*64 + 3*128 + 2*32 = 704 a layer, 10*8 in the embedding."""
    counted = flops.count_parameters(Model(arch="tnl", layers=2, width=8, heads=2, ffn=16, vocab_size=10))
    assert (counted.nonembedding, counted.total, counted.nonembedding_with_head) == (1408, 1488, 1488)


def test_hybrid_takes_its_softmax_layers_from_llama():
    hybrid = dataclasses.replace(TINY, arch="hybrid")
    assert [i for i, kind in enumerate(flops.layer_kinds(hybrid)) if kind == "llama"] == [3, 7]
    one = {arch: flops.count_parameters(dataclasses.replace(TINY, arch=arch)) for arch in ("tnl", "llama")}
    llama_layers = one["llama"].nonembedding - TINY.width  # without the final norm, which the hybrid does not have
    assert flops.count_parameters(hybrid).nonembedding == one["tnl"].nonembedding * 6 // 8 + llama_layers * 2 // 8


def test_flops_by_hand():
    """d=8, e=4, g=16, V=10, one layer, n=5: matrices 2*640, head 2*80, llama attention 4*8*3."""
    model = Model(arch="llama", layers=1, width=8, heads=2, ffn=16, vocab_size=10)
    matrices = 2 * (4 * 64 + 3 * 128) + 2 * 80
    expected = {
        "llama": matrices + 4 * 8 * 3,
        "tnl": matrices + 2 * 64 + 5 * 32,
        "hgrn2": matrices + 5 * 32,
        "cosformer2": matrices + 2 * 64 + 8 * 32 + 5 * 32,
    }
    for arch, forward in expected.items():
        assert flops.flops_per_token(dataclasses.replace(model, arch=arch), 5) == 3 * forward


def test_only_softmax_depends_on_the_length():
    for arch in paper.TABLE3:
        model = dataclasses.replace(TINY, arch=arch)
        longer = flops.flops_per_token(model, 2000) - flops.flops_per_token(model, 1000)
        assert longer == (3 * 8 * 4 * 64 * 500 if arch == "llama" else 0)


def test_bad_lengths_are_named():
    with pytest.raises(ConfigError, match="sequence is 0"):
        flops.flops_per_token(TINY, 0)
    with pytest.raises(ConfigError, match="batch is 0"):
        flops.paper_flops_per_step(TINY, batch=0)


@pytest.mark.parametrize(
    "kind, tera",
    [
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989.4),
        ("NVIDIA B200", 2250),
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU7x", 1153.5),
    ],
)
def test_peaks(kind, tera):
    assert flops.peak_flops(kind, "bfloat16") == tera * 1e12
    assert flops.peak_flops(kind, "float32") is None


def test_unknown_peaks_are_none():
    assert flops.peak_flops("cpu", "bfloat16") is None
    assert flops.peak_flops("TPU v4 lite", "bfloat16") is None
