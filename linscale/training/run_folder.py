"""The folder of a run: whether it can be used, whom it belongs to, and whether the run is finished.

Everything here is asked before any compile. The files are described in `linscale.training`.
"""

import dataclasses
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import linscale
from linscale.config import Config, ConfigError
from linscale.scaling import flops
from linscale.training import hosts

# Fields that may change when a run is continued: they change where and how fast, never what is computed or recorded.
FREE = (
    "name",
    "output",
    "data.cache",
    "data.data_dir",
    "data.workers",
    "train.checkpoint_every",
    "train.checkpoint_keep",
    "train.checkpoint_keep_every",
    "train.checkpoint_chinchilla",
    "train.skip_limit",
    "train.stop_seconds",
    "train.hang_seconds",
    "mesh.data",
    "mesh.fsdp",
    "mesh.sequence",
    "mesh.tensor",
    "optimizer.offload",
    "log.tensorboard",
    "log.wandb_project",
)


def of(config: Config) -> Path:
    return Path(config.output) / config.name


def milestones(config: Config) -> dict[str, int]:
    """Multiples of Chinchilla's 20 tokens a parameter within the run -> their steps; {'0.5x': 120, '1x': 240}."""
    tokens = 20 * flops.count_parameters(config.model).total
    multiples = [text.strip() for text in config.train.checkpoint_chinchilla.split(",") if text.strip()]
    steps = {f"{text}x": math.ceil(float(text) * tokens / config.tokens_per_step) for text in multiples}
    return {name: step for name, step in steps.items() if 1 <= step <= config.steps}


def save_steps(config: Config) -> Callable[[int], bool]:
    """Step -> does the run save after it? Regular steps, milestones, and the last."""
    own = {*milestones(config).values(), config.steps}
    return lambda step: step in own or step % config.train.checkpoint_every == 0


def read_done(config: Config) -> dict | None:
    """DONE.json of a finished run, else None."""
    path = of(config) / "DONE.json"
    return json.loads(path.read_text()) if path.exists() else None


def write_json(path: Path, content: dict) -> None:
    """Whole or not at all, also when the process is killed."""
    part = path.with_name(f".{path.name}.tmp")
    with open(part, "w") as file:
        json.dump(content, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def check(config: Config) -> None:
    """ConfigError if the folder cannot be written or belongs to a run of another config."""
    for folder in (Path(config.output), of(config)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise ConfigError(
                f"config.output is {config.output!r}, and {folder} cannot be written ({error.strerror}); "
                "choose another folder with --config.output=DIR."
            ) from error
    _check_owner(config)


def check_space(configs: list[Config]) -> None:
    """ConfigError if the disk cannot hold the checkpoints of these runs: parameters and two moments in float32."""
    if not configs:
        return
    needed = 0
    for config in configs:
        one = 12 * flops.count_parameters(config.model).total
        kept = config.train.checkpoint_keep + len(milestones(config))
        if config.train.checkpoint_keep_every:
            kept += config.steps // config.train.checkpoint_keep_every
        have = sum(file.stat().st_size for file in of(config).glob("checkpoints/[0-9]*/**/*") if file.is_file())
        needed += max(one * kept + 2**20 - have, 0)
    needed += 12 * max(flops.count_parameters(config.model).total for config in configs)  # one being written
    free = shutil.disk_usage(configs[0].output).free
    if free < needed:
        raise ConfigError(
            f"the disk of config.output {configs[0].output!r} has {free / 1e9:.3f} GB free, and the checkpoints need "
            f"{needed / 1e9:.3f} GB; free some, or choose another folder or a smaller config.train.checkpoint_keep."
        )


def claim(config: Config, corpus) -> dict:
    """Writes config.json on the first start; on a later one checks that the data are the same. Returns its content."""
    path = of(config) / "config.json"
    content = {
        "linscale": linscale.__version__,
        "name": config.name,
        "config": dataclasses.asdict(config),
        "parameters": dataclasses.asdict(flops.count_parameters(config.model)),
        "data": {
            "fingerprint": corpus.fingerprint,
            "bytes_per_token": corpus.bytes_per_token,
            "tokenizer": config.data.tokenizer,
            "vocab_size": corpus.tokenizer.vocab_size,
        },
        "flops_per_token": flops.flops_per_token(config.model, config.train.sequence),
        "accounting": "exact",
        "milestones": milestones(config),  # names of checkpoints that are kept for good
    }
    if path.exists():
        old = json.loads(path.read_text())["data"]["fingerprint"]
        if old != corpus.fingerprint:
            raise ConfigError(
                f"{path.parent} was trained on data with fingerprint {old}, but the data now have {corpus.fingerprint}; "
                "restore the files, or choose another config.name."
            )
    if hosts.is_first():
        write_json(path, content)
    return content


def _check_owner(config: Config) -> None:
    folder, path = of(config), of(config) / "config.json"
    if not path.exists():
        if foreign := sorted(entry.name for entry in folder.iterdir() if not entry.name.endswith(".tmp")):
            raise ConfigError(
                f"{folder} holds {foreign[0]} but no config.json, so it is no run folder; "
                "choose another config.name or config.output."
            )
        return
    try:
        old = _flat(json.loads(path.read_text())["config"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); restore it or choose another config.name.") from error
    new = _flat(dataclasses.asdict(config))
    old = _flat(dataclasses.asdict(Config())) | old  # a field younger than the run had its default there
    for field in dict.fromkeys((*new, *old)):
        was, now = old[field], new.get(field, "<absent>")
        if field not in FREE and was != now:
            raise ConfigError(
                f"{folder} belongs to another config: config.{field} was {was!r} there and is {now!r} now; "
                "undo the change, or choose another config.name."
            )


def _flat(tree: dict, prefix: str = "") -> dict:
    out = {}
    for name, value in tree.items():
        out |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return out
