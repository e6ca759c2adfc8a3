"""`linscale export`: one checkpoint as a folder that transformers loads."""

import argparse
import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np

from linscale.config import ConfigError

HELP = """\
Write one checkpoint of a run as a folder that transformers loads: weights (safetensors), config, tokenizer, generation
config.

  linscale export runs/demo/llama-450k exported/llama-450k
  linscale export runs/ladder/tnl-1b exported/tnl-1b --step 20000 --dtype bfloat16

LLaMA becomes LlamaForCausalLM; HGRN2 with config.model.ffn_activation=silu becomes flash-linear-attention's
HGRN2ForCausalLM. What neither library has (TNL, cosFormer2, the hybrid, the paper's HGRN2) comes with a PyTorch model
file of its own, which transformers runs when given trust_remote_code=True: code in the folder, so read it first when
the folder is not yours.
"""
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "linscale export", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("run", help="folder of a run")
    add("folder", help="where to write; it must not exist")
    add("--step", type=int, metavar="N", help="the checkpoint (default: the last)")
    add("--dtype", default="float32", choices=DTYPES, help="of the weights (default: float32)")
    add("--no-tokenizer", action="store_true", help="leave the tokenizer out")
    args = parser.parse_args(argv)
    print(export(Path(args.run), Path(args.folder), args.step, args.dtype, not args.no_tokenizer))
    return 0


def export(run_folder: Path, folder: Path, step: int | None = None, dtype: str = "float32", with_tokenizer=True) -> str:
    """Writes the folder, whole or not at all, and returns a sentence on what it is. Raises ConfigError."""
    from linscale.evaluation import runs
    from linscale.interop import formats, safetensors, tokenizer

    run = runs.open_run(run_folder)
    step = run.step(step)
    check_new(folder)
    model = run.config.model
    form = formats.form_of(model)
    separator = run.tokenizer.separator_id if with_tokenizer else None
    part = scratch(folder)
    try:
        if with_tokenizer:
            tokenizer.write(run.tokenizer, part, run.config.data.tokenizer, run.tokenizer_file)
        params = run.params(step)
        safetensors.write(part / "model.safetensors", _Arrays(model, form, params, DTYPES[dtype]))
        content = formats.to_foreign(model, form, run.config.train.sequence, separator)
        content |= {"dtype": dtype} | formats.about(model, name=run.name, step=step)
        _write(part / "config.json", content)
        carried = run.folder / "tokenizer" / "generation_config.json"
        if carried.is_file():
            shutil.copyfile(carried, part / "generation_config.json")
        else:
            ids = {"bos_token_id": separator, "eos_token_id": separator, "pad_token_id": separator}
            _write(part / "generation_config.json", ids | {"do_sample": False})
        if form == "plain":
            shutil.copyfile(Path(__file__).with_name("torch_model.py"), part / formats.MODEL_FILE)
        part.rename(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    said = {
        "llama": "LlamaForCausalLM of transformers",
        "fla": "HGRN2ForCausalLM of flash-linear-attention",
        "plain": f"{formats.MODEL_FILE} beside the weights, loaded with trust_remote_code=True "
        f"({formats.reason(model)})",
    }
    return f"{folder}: {run.name} step {step}, {dtype}, as {said[form]}"


class _Arrays(dict):
    """Foreign name -> array, made when asked for; keys are those of the model's table, and fla's norms."""

    def __init__(self, model, form, params, dtype):
        from linscale.interop import formats, names

        self.model, self.params, self.dtype = model, params, dtype
        super().__init__(names.entries(model, form))
        self.scale = formats.value_scale(model) if form == "fla" else 1.0
        if form == "fla":
            ones = [f"model.layers.{n}.{norm}" for n in range(model.layers) for norm in names.FLA_NORMS]
            self.update(dict.fromkeys([*ones, "model.norm.weight"]))

    def __getitem__(self, name):
        from linscale.interop import names

        entry = super().__getitem__(name)
        if entry is None:
            return np.ones(self.model.width, self.dtype)
        array = names.to_foreign(self.params, entry)
        if self.scale != 1.0 and entry.path[-2:] == ("value", "kernel"):
            array = array * np.float32(self.scale)
        return array.astype(self.dtype)


def check_new(folder: Path) -> None:
    """Raises ConfigError if something is there already."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists already; name a folder that does not, or remove it.")


def scratch(folder: Path) -> Path:
    """An empty folder beside `folder`, to be renamed to it."""
    part = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    return part


def _write(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")
