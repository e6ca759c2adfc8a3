"""Exports and imports: round trips bit for bit, PyTorch's logits and text, and what is refused."""

import dataclasses
import importlib.util
import json

import jax
import numpy as np
import pytest
from small_models import MODELS, replaced

from linscale import cli, models
from linscale.config import ConfigError
from linscale.evaluation import generation, runs
from linscale.interop import exporting, formats, importing, names, safetensors


def slow(names_of_models, quick):
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names_of_models]


def equal(a, b) -> bool:
    same = jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), a, b)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(jax.tree.leaves(same))


def our_logits(model, params, tokens) -> np.ndarray:
    def run(params):
        return models.logits(model, params, models.forward(model, params, tokens)[0])

    return np.asarray(jax.jit(run)(params))


@pytest.mark.parametrize("name", slow(MODELS, ("llama-untied", "hgrn2", "cosformer2")))
def test_round_trips_are_exact(name, new_run, tmp_path):
    run = new_run(name)
    assert cli.main(["export", str(run), str(tmp_path / "out")]) == 0
    assert cli.main(["import", str(tmp_path / "out"), str(tmp_path / "again")]) == 0
    before, after = runs.open_run(run), runs.open_run(tmp_path / "again")
    assert after.config.model == before.config.model and after.context == before.context
    assert equal(before.params(), after.params())
    text = "héllo\n\t<|endoftext|> ≠"
    assert after.tokenizer.encode(text).tolist() == before.tokenizer.encode(text).tolist()
    assert after.tokenizer.separator_id == before.tokenizer.separator_id

    exporting.export(tmp_path / "again", tmp_path / "out2")
    for file in sorted(path.name for path in (tmp_path / "out").iterdir() if path.suffix != ".json"):
        assert (tmp_path / "out2" / file).read_bytes() == (tmp_path / "out" / file).read_bytes()
    assert not list(tmp_path.glob(".*.tmp"))


def test_half_precision_is_rounded_once(new_run, tmp_path):
    run = new_run("tnl")
    exporting.export(run, tmp_path / "out", dtype="bfloat16")
    importing.import_folder(tmp_path / "out", tmp_path / "again")
    rounded = jax.tree.map(lambda x: x.astype("bfloat16").astype("float32"), runs.open_run(run).params())
    assert equal(rounded, runs.open_run(tmp_path / "again").params())


def load(folder):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    import torch

    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()


def torch_logits(model, tokens) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor(tokens), use_cache=False).logits.numpy()


@pytest.fixture(autouse=True)
def modules_of_exports(tmp_path, monkeypatch):
    """Where transformers copies the model files that it runs."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    dynamic = pytest.importorskip("transformers.dynamic_module_utils") if _has("transformers") else None
    if dynamic is not None:
        monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))


def _has(package):
    return importlib.util.find_spec(package) is not None


@pytest.mark.parametrize("name", slow([name for name in MODELS if name != "hgrn2"], ("llama", "tnl", "cosformer2")))
def test_pytorch_gives_the_same_logits_and_text(name, new_run, tmp_path):
    run = new_run(name)
    exporting.export(run, tmp_path / "out")
    theirs = load(tmp_path / "out")
    import torch

    model, params = MODELS[name], runs.open_run(run).params()
    tokens = np.random.default_rng(1).integers(0, 256, (2, 150))  # more than a chunk of either side
    np.testing.assert_allclose(torch_logits(theirs, tokens), our_logits(model, params, tokens), atol=5e-5)

    prompts = [tokens[0, :20].tolist(), tokens[1, :13].tolist()]  # the second padded on its left
    ours = np.concatenate(list(generation.token_blocks(model, params, prompts, most=10)), axis=1)
    rows, mask = np.zeros((2, 20), np.int64), np.ones((2, 20), np.int64)
    rows[0], rows[1, 7:], mask[1, :7] = prompts[0], prompts[1], 0
    for cached in (True, False):
        got = theirs.generate(
            torch.tensor(rows),
            attention_mask=torch.tensor(mask),
            max_new_tokens=10,
            do_sample=False,
            use_cache=cached,
        )
        assert got[:, 20:].tolist() == ours.tolist()


def naive_fla():
    """flash-linear-attention's HGRN2 with its Triton kernels replaced by its own naive recurrence and by PyTorch."""
    pytest.importorskip("torch")
    pytest.importorskip("triton")
    layer = pytest.importorskip("fla.layers.hgrn2")
    import torch.nn.functional as F
    from fla.modules import mlp
    from fla.ops.gla.naive import naive_recurrent_gla

    def gla(q, k, v, g=None, gk=None, initial_state=None, output_final_state=False, **_):
        return naive_recurrent_gla(q, k, v, g if gk is None else gk, initial_state, output_final_state)

    def norm_linear(x, weight, bias, linear_weight, linear_bias, eps=1e-5):
        return F.linear(F.rms_norm(x, x.shape[-1:], weight, eps), linear_weight, linear_bias)

    patch = pytest.MonkeyPatch()
    for name, function in (
        ("chunk_gla", gla),
        ("fused_recurrent_gla", gla),
        ("swish", F.silu),
        ("rms_norm_linear", norm_linear),
    ):
        patch.setattr(layer, name, function)
    patch.setattr(mlp, "swiglu", lambda gate, y: F.silu(gate) * y)
    return patch


def load_fla(folder):
    import torch
    from fla.models import HGRN2ForCausalLM

    options = {"fuse_norm": False, "fuse_swiglu": False}
    return HGRN2ForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


def test_flash_linear_attention_gives_the_same_logits(new_run, tmp_path):
    patch = naive_fla()
    model = replaced("hgrn2", hgrn2_norm_epsilon=16 * 1e-5 / 4**3)  # K = 16: the scale is 8, nothing is left over
    run = new_run("hgrn2", model)
    exporting.export(run, tmp_path / "out")
    tokens = np.random.default_rng(1).integers(0, 256, (2, 40))
    got = torch_logits(load_fla(tmp_path / "out"), tokens)
    np.testing.assert_allclose(got, our_logits(model, runs.open_run(run).params(), tokens), atol=5e-5)
    patch.undo()


def test_a_foreign_hgrn2_with_scales_of_norms(new_run, tmp_path):
    """Scales that ours has not are multiplied into matrices: another fla model, made here, is still the same function."""
    patch = naive_fla()
    folder = exporting_of_fla(new_run, tmp_path)
    sentence = importing.import_folder(folder, tmp_path / "again")
    assert "scales of norms" in sentence
    after = runs.open_run(tmp_path / "again")
    assert not after.config.model.tied and after.config.model.hgrn2_norm_epsilon == 16e-5
    tokens = np.random.default_rng(1).integers(0, 256, (2, 40))
    got = torch_logits(load_fla(folder), tokens)
    np.testing.assert_allclose(got, our_logits(after.config.model, after.params(), tokens), atol=5e-5)
    patch.undo()


def exporting_of_fla(new_run, tmp_path):
    """An fla model as if fla had written it: no section of ours, scales of norms other than 1."""
    exporting.export(new_run("hgrn2"), tmp_path / "out")
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    del content["linscale"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(content))
    arrays = {name: np.array(array) for name, array in safetensors.read(tmp_path / "out" / "model.safetensors").items()}
    rng = np.random.default_rng(2)
    for name in arrays:
        if "norm" in name:
            arrays[name] = rng.uniform(0.5, 1.5, arrays[name].shape).astype(np.float32)
    safetensors.write(tmp_path / "out" / "model.safetensors", arrays)
    return tmp_path / "out"


def test_grouped_heads_are_repeated(tmp_path):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "out")
    importing.import_folder(tmp_path / "out", tmp_path / "run", "bytes")
    run = runs.open_run(tmp_path / "run")
    tokens = np.random.default_rng(1).integers(0, 256, (1, 30))
    np.testing.assert_allclose(
        torch_logits(theirs, tokens), our_logits(run.config.model, run.params(), tokens), atol=1e-5
    )
    assert run.context == 2048 and not run.config.model.tied


SIZES = ["llama", "tnl", "cosformer2", "hybrid", "hgrn2-paper", "hgrn2"]


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_logits_at_70m_and_512_tokens(name, new_run, tmp_path):
    """The paper's 70M size with a byte vocabulary's head left at its own size; init_std 0.02."""
    from linscale.models.sizes import paper_model

    patch = naive_fla() if name == "hgrn2" else pytest.MonkeyPatch()
    arch = MODELS[name].arch
    size = paper_model("tnl" if arch == "hybrid" else arch, "70m")
    model = dataclasses.replace(
        size,
        arch=arch,
        vocab_size=32_000,
        softmax_every=3,
        ffn_activation=MODELS[name].ffn_activation,
    )
    run = new_run(f"{name}-70m", model, sequence=512)
    exporting.export(run, tmp_path / "out")
    theirs = load_fla(tmp_path / "out") if name == "hgrn2" else load(tmp_path / "out")
    tokens = np.random.default_rng(1).integers(0, 256, (1, 512))
    want = our_logits(model, runs.open_run(run).params(), tokens)
    apart = np.abs(torch_logits(theirs, tokens) - want).max()
    print(f"{name}: largest difference {apart:.2e} of logits up to {np.abs(want).max():.2f}")
    assert apart < 1e-4
    patch.undo()


def broken(folder, what):
    """Spoils an export in one way."""
    weights, config = folder / "model.safetensors", folder / "config.json"
    content = json.loads(config.read_text())
    arrays = dict(safetensors.read(weights))
    if what == "truncated":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif what == "no safetensors":
        weights.write_bytes(b"\x80\x04" * 500)
    elif what == "pickle":
        weights.rename(folder / "pytorch_model.bin")
    elif what == "names":
        arrays["surplus"] = arrays.pop("model.norm.weight")
        arrays["model.embed_tokens.weight"] = arrays["model.embed_tokens.weight"][:, :-1]
        safetensors.write(weights, arrays)
    elif what == "not finite":
        arrays["model.norm.weight"] = np.full(32, np.nan, np.float32)
        safetensors.write(weights, arrays)
    elif what == "config":
        config.write_text("{")
    elif what == "changed":
        config.write_text(json.dumps(content | {"hidden_size": 64}))
    elif what == "foreign":
        config.write_text(json.dumps(content | {"model_type": "mamba"}))
    elif what == "scaled":
        del content["linscale"]
        rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}
        config.write_text(json.dumps(content | {"rope_parameters": rope, "attention_bias": True}))
    elif what == "tokenizer":
        (folder / "tokenizer.json").unlink()


REFUSED = {
    "truncated": "is corrupt: .* should lie in bytes",
    "no safetensors": "is no safetensors file",
    "pickle": "pytorch_model.bin, a pickle, which could run any code",
    "names": r"norm.weight of shape \(32,\) is missing; surplus of shape \(32,\) has no place; "
    r"model.embed_tokens.weight has shape \(264, 31\) and must have \(264, 32\)",
    "not finite": "not finite in model.norm.weight",
    "config": "config.json cannot be read",
    "changed": "hidden_size is 64 and was 32",
    "foreign": "model_type 'mamba'; linscale reads llama, hgrn2",
    "scaled": "rope_type is 'llama3' and must be 'default'; attention_bias is True and must be False",
    "tokenizer": "has no tokenizer.json; name a tokenizer with --tokenizer",
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_refused_and_nothing_written(what, new_run, tmp_path):
    exporting.export(new_run("llama"), tmp_path / "out")
    broken(tmp_path / "out", what)
    with pytest.raises(ConfigError, match=REFUSED[what]):
        importing.import_folder(tmp_path / "out", tmp_path / "again")
    assert not (tmp_path / "again").exists() and not list(tmp_path.glob(".*.tmp"))


def test_folders_in_use_are_refused(new_run, tmp_path):
    run = new_run("llama")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "note").write_text("mine")
    with pytest.raises(ConfigError, match="exists already"):
        exporting.export(run, tmp_path / "out")
    with pytest.raises(ConfigError, match="no checkpoint of step 3; it has 0"):
        exporting.export(run, tmp_path / "other", 3)


def test_the_scale_of_values_takes_fla_s_epsilon_out():
    for dim in (16, 64, 128):
        model = replaced("hgrn2", width=2 * dim)
        left = dim * formats.FLA_NORM_EPSILON / formats.value_scale(model) ** 2 / model.hgrn2_norm_epsilon
        assert 0.5 <= left <= 2


def test_differences_are_told_in_full_up_to_a_length():
    found = names.differences({f"a{i}": (1,) for i in range(30)}, {})
    assert names.told(found).count(";") == 20 and names.told(found).endswith("and 10 more")


@pytest.mark.slow
def test_an_imported_run_can_be_trained_on_from_its_weights(new_run, tmp_path):
    from linscale.config import base, resolve
    from linscale.training import loop

    exporting.export(new_run("tnl"), tmp_path / "out")
    importing.import_folder(tmp_path / "out", tmp_path / "again")
    for name in ("text", "heldout"):
        (tmp_path / f"{name}.txt").write_text("one two three four five six seven eight nine ten " * 200)
    config = base()
    config.name, config.output = "more", str(tmp_path / "runs")
    config.model.update(dataclasses.asdict(runs.open_run(tmp_path / "again").config.model))
    config.data.source, config.data.path, config.data.cache = (
        "text",
        str(tmp_path / "text.txt"),
        str(tmp_path / "cache"),
    )
    config.data.heldout_path = str(tmp_path / "heldout.txt")
    config.data.heldout_tokens = 500
    config.train.batch, config.train.sequence, config.train.steps = 2, 32, 1
    config.optimizer.learning_rate = 0.0
    config.log.tensorboard = False
    config.init.from_run = str(tmp_path / "again")
    with pytest.raises(ConfigError, match="without an optimizer"):
        loop.train(resolve(config))
    config.init.weights_only = True
    loop.train(resolve(config))
    assert equal(runs.open_run(tmp_path / "runs" / "more").params(), runs.open_run(tmp_path / "again").params())
