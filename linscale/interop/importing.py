"""`linscale import`: a folder of transformers' layout as a run directory, which eval, generate, export and
config.init.from_run (with weights_only) accept."""

import argparse
import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np

from linscale.config import NAME, Config, ConfigError, Data, Model, Train, resolve

HELP = """\
Make a run directory of a folder that save_pretrained or linscale export wrote: LlamaForCausalLM,
flash-linear-attention's HGRN2ForCausalLM, or linscale's own exports. Only safetensors files are read, never pickles.

  linscale import exported/llama-450k runs/llama-again
  linscale eval runs/llama-again --data-dir DIR
"""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "linscale import", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("folder", help="what to read: config.json, model.safetensors, tokenizer.json")
    parser.add_argument("run", help="where to write the run; it must not exist")
    parser.add_argument(
        "--tokenizer", metavar="SPEC", help="as config.data.tokenizer, where there is no tokenizer.json"
    )
    args = parser.parse_args(argv)
    print(import_folder(Path(args.folder), Path(args.run), args.tokenizer))
    return 0


def import_folder(folder: Path, run: Path, tokenizer: str | None = None) -> str:
    """Writes the run, whole or not at all, and returns a sentence on it. Raises ConfigError."""
    from linscale.interop import exporting, formats

    content = _config(folder)
    model, form = formats.to_ours(content)
    exporting.check_new(run)
    if not re.fullmatch(NAME, run.name):
        raise ConfigError(f"{run.name!r} is no name of a run: letters, digits, '.', '_' and '-', at most 200.")
    if tokenizer is None:
        if not (folder / "tokenizer.json").is_file():
            raise ConfigError(f"{folder} has no tokenizer.json; name a tokenizer with --tokenizer, as for bytes.")
        tokenizer = f"hf:{run / 'tokenizer'}"
    model, params, folded = _params(folder, content, model, form)
    sequence = content.get("max_position_embeddings", Train.sequence)
    config = Config(
        name=run.name,
        output=str(run.parent),
        model=model,
        data=Data(tokenizer=tokenizer),
        train=Train(sequence=sequence, steps=0, tokens=1),
    )
    resolve(dataclasses.asdict(config))
    part = exporting.scratch(run)
    try:
        _write_run(part, folder, config, params, content)
        part.rename(run)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    sentence = f"{run}: {model.arch} of {sum(x.size for x in _leaves(params)):,} parameters from {folder}"
    return sentence + "; scales of norms were multiplied into the matrices after them" * folded


def _write_run(part: Path, folder: Path, config: Config, params: dict, content: dict) -> None:
    import jax

    import linscale
    from linscale.scaling import flops
    from linscale.training import checkpoint, run_folder

    (part / "checkpoints").mkdir()
    checkpoint.save_alone(part / "checkpoints" / "0", {"params": jax.device_put(params)})
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (folder / name).is_file():
            (part / "tokenizer").mkdir(exist_ok=True)
            shutil.copyfile(folder / name, part / "tokenizer" / name)
    run_folder.write_json(
        part / "config.json",
        {
            "linscale": linscale.__version__,
            "name": config.name,
            "config": dataclasses.asdict(config),
            "parameters": dataclasses.asdict(flops.count_parameters(config.model)),
            "data": {"fingerprint": "imported", "bytes_per_token": None, "tokenizer": config.data.tokenizer},
            "imported": {key: content[key] for key in ("model_type", "_name_or_path") if key in content}
            | {key: value for key, value in (content.get("linscale") or {}).items() if key in ("name", "step")},
            "flops_per_token": flops.flops_per_token(config.model, config.train.sequence),
            "accounting": "exact",
            "milestones": {},
        },
    )


def _config(folder: Path) -> dict:
    path = folder / "config.json"
    if not path.is_file():
        raise ConfigError(f"{folder} has no config.json; name a folder that save_pretrained or linscale export wrote.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is no JSON object")
    except ValueError as error:
        raise ConfigError(f"{path} cannot be read ({error}); fetch it again.") from error
    return content


def _params(folder: Path, content: dict, model: Model, form: str) -> tuple[Model, dict, bool]:
    """(model, parameters, whether norms were folded in). Raises ConfigError with a list of all that does not fit."""
    from linscale.interop import formats, names, safetensors

    found = dict(safetensors.read_folder(folder))
    for name in [name for name in found if name.endswith("rotary_emb.inv_freq")]:
        del found[name]
    if form == "llama":
        _repeat_heads(found, content, model)
    if form == "fla":
        affine = content.get("elementwise_affine", True)
        scales = {f"model.layers.{n}.{norm}" for n in range(model.layers) for norm in names.FLA_NORMS} | {
            "model.norm.weight"
        }
        scales = {name for name in scales if affine or "g_norm" not in name}
    else:
        scales = set()
    table = names.entries(model, form)
    expected = {name: entry.shape for name, entry in table.items()} | dict.fromkeys(sorted(scales), (model.width,))
    if model.tied:  # some versions of transformers write both copies of a tied matrix
        twin = next(name for name, entry in table.items() if entry.path == ("embedding",))
        head = found.get("lm_head.weight")
        if head is not None and twin in found and np.array_equal(head, found[twin]):
            del found["lm_head.weight"]
    wrong = names.differences(expected, {name: array.shape for name, array in found.items()})
    if wrong:
        raise ConfigError(f"the weights in {folder} are not those of its config.json: {names.told(wrong)}.")
    bad = [name for name, array in found.items() if not np.isfinite(np.asarray(array, np.float32)).all()]
    if bad:
        raise ConfigError(f"{folder} has numbers that are not finite in {names.told(bad, 5)}; fetch it again.")
    if form != "fla":
        return model, names.from_foreign(found, table), False
    norms = {name: np.asarray(found[name], np.float32) for name in scales}
    folded = any((scale != 1).any() for scale in norms.values())
    if folded:
        model, found = _fold(model, found, norms)
        table = names.entries(model, form)
    params = names.from_foreign(found, table)
    if content.get("linscale"):  # else the model's epsilon is fla's, and the scale 1
        params["layers"]["hgrn2"]["mixer"]["value"]["kernel"] /= np.float32(formats.value_scale(model))
    return model, params, folded


def _repeat_heads(found: dict, content: dict, model: Model) -> None:
    """Grouped key and value heads, which linscale has not, become one a query head: the same function, more memory."""
    groups = content.get("num_key_value_heads") or model.heads
    if groups == model.heads or model.heads % groups:
        return
    dim = model.width // model.heads
    for name, array in found.items():
        if name.endswith(("k_proj.weight", "v_proj.weight")) and array.shape == (groups * dim, model.width):
            heads = array.reshape(groups, dim, model.width)
            found[name] = np.repeat(heads, model.heads // groups, axis=0).reshape(-1, model.width)


def _fold(model: Model, found: dict, norms: dict) -> tuple[Model, dict]:
    """The scales of fla's norms multiplied into the matrices [outputs, inputs] that read them."""
    found = {name: array for name, array in found.items() if name not in norms}
    readers = {
        "attn_norm.weight": ("attn.q_proj", "attn.f_proj", "attn.i_proj"),
        "mlp_norm.weight": ("mlp.gate_proj", "mlp.up_proj"),
        "attn.g_norm.weight": ("attn.o_proj",),
    }
    for name, scale in norms.items():
        if name == "model.norm.weight":
            head = np.asarray(found.get("lm_head.weight", found["model.embeddings.weight"]), np.float32)
            if (scale != 1).any():
                model = dataclasses.replace(model, tied=False)
                found["lm_head.weight"] = head * scale
            continue
        _, _, layer, norm = name.split(".", 3)
        for reader in readers[norm]:
            matrix = f"model.layers.{layer}.{reader}.weight"
            found[matrix] = np.asarray(found[matrix], np.float32) * scale
    return model, found


def _leaves(tree) -> list:
    return [leaf for x in tree.values() for leaf in _leaves(x)] if isinstance(tree, dict) else [tree]
