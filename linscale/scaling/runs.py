"""Reading run directories: the only thing that fits and reports know of training.

A run directory holds config.json, metrics.jsonl and, when finished, DONE.json; a ladder is a folder of them with
ladder.json. Any other trainer's runs can be read by writing the first two files. A run that is still being written
is read as far as it goes.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from linscale.config import Config, ConfigError, resolve
from linscale.scaling.flops import PF_DAY, Parameters, count_parameters, paper_flops_per_token

ACCOUNTINGS = ("exact", "paper")
SIZES = {  # fields of flops.Parameters that a fit may call N
    "total": "all parameters",
    "nonembedding": "parameters without embedding",
    "nonembedding_with_head": "parameters without embedding, with the output head",
}


@dataclasses.dataclass(frozen=True)
class Curve:
    """Loss during a run: float64 arrays of one length, tokens strictly increasing, loss finite and positive."""

    tokens: np.ndarray
    flops: np.ndarray  # as counted by the trainer
    loss: np.ndarray  # nats per token

    def __len__(self) -> int:
        return len(self.tokens)


@dataclasses.dataclass(frozen=True)
class Run:
    path: Path
    name: str
    config: Config
    parameters: Parameters
    data: dict  # fingerprint, bytes_per_token, tokenizer, vocab_size; empty if not recorded
    train: Curve
    heldout: Curve
    heldout_bpb: float | None  # bits per byte at the last held-out point
    finished: bool
    tokens_per_s: float | None  # median of the logged values
    seconds: float | None  # whole run; known when finished
    unusable: int  # logged losses that are not finite or not positive
    changed: float  # time stamp of the last write, seconds since 1970

    @property
    def arch(self) -> str:
        return self.config.model.arch

    @property
    def last(self) -> Curve:
        """The end of the run as curves of one point; held-out if there is any, else training, else empty."""
        curve = self.heldout if len(self.heldout) else self.train
        return Curve(curve.tokens[-1:], curve.flops[-1:], curve.loss[-1:])


@dataclasses.dataclass(frozen=True)
class Ladder:
    runs: tuple[Run, ...]
    missing: tuple[str, ...]  # named in ladder.json, not started
    recipe: str  # empty if not recorded


def compute(run: Run, curve: Curve, accounting: str) -> np.ndarray:
    """PFLOP/s-days spent at each point of a curve. exact: as the trainer counted; paper: from tokens and sizes."""
    if accounting == "exact":
        return curve.flops / PF_DAY
    return curve.tokens * paper_flops_per_token(run.config.model, run.config.train.sequence) / PF_DAY


def read(paths: Sequence[str | Path]) -> Ladder:
    """Ladder folders, run directories, or folders of run directories, in any mixture.

    Raises ConfigError for a path that is none of these and for files that cannot be understood.
    """
    runs, missing, recipes = [], [], []
    for path in map(Path, paths):
        if not path.is_dir():
            raise ConfigError(f"{path} is not a folder; give the output folder of `linscale ladder`.")
        if (path / "config.json").exists():
            folders = [path]
        elif (path / "ladder.json").exists():
            ladder = _object(path / "ladder.json")
            names = ladder.get("runs")
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise ConfigError(f"{path / 'ladder.json'} has no list of names under 'runs'.")
            recipes.append(str(ladder.get("recipe") or ""))
            folders = [path / name for name in names]
            missing += [folder.name for folder in folders if not (folder / "config.json").exists()]
            folders = [folder for folder in folders if (folder / "config.json").exists()]
        else:
            folders = sorted(file.parent for file in path.glob("*/config.json"))
            if not folders:
                raise ConfigError(
                    f"{path} holds neither ladder.json nor a run with config.json; "
                    "give the output folder of `linscale ladder`."
                )
        runs += map(read_run, folders)
    return Ladder(tuple(runs), tuple(missing), ", ".join(filter(None, dict.fromkeys(recipes))))


def read_run(path: Path) -> Run:
    """One run directory. Missing metrics.jsonl or DONE.json: a run that has just begun, or is not finished."""
    description = _object(path / "config.json")
    try:
        config = resolve(description.get("config", {}))
    except (ConfigError, TypeError, ValueError) as error:
        raise ConfigError(f"{path / 'config.json'}: {error}") from error
    lines = _metrics(path / "metrics.jsonl")
    train, bad_train = _curve(lines, "loss", path)
    heldout, bad_heldout = _curve(lines, "heldout_loss", path)
    done = _object(path / "DONE.json") if (path / "DONE.json").exists() else {}
    speeds = [line["tokens_per_s"] for line in lines if _usable(line.get("tokens_per_s"))]
    bpb = [line["heldout_bpb"] for line in lines if _usable(line.get("heldout_bpb"))]
    data = description.get("data")
    files = [file for file in (path / "DONE.json", path / "metrics.jsonl", path / "config.json") if file.exists()]
    return Run(
        path=path,
        name=str(description.get("name") or path.name),
        config=config,
        parameters=_parameters(description.get("parameters"), config),
        data=data if isinstance(data, dict) else {},
        train=train,
        heldout=heldout,
        heldout_bpb=float(bpb[-1]) if bpb else None,
        finished=bool(done),
        tokens_per_s=float(np.median(speeds)) if speeds else None,
        seconds=float(done["seconds"]) if _usable(done.get("seconds")) else None,
        unusable=bad_train + bad_heldout,
        changed=files[0].stat().st_mtime,
    )


def _parameters(recorded, config: Config) -> Parameters:
    """The trainer's own numbers where it recorded them, else the count of the configured sizes."""
    fields = [field.name for field in dataclasses.fields(Parameters)]
    if isinstance(recorded, dict) and all(isinstance(recorded.get(field), int) for field in fields):
        return Parameters(**{field: recorded[field] for field in fields})
    return count_parameters(config.model)


def _object(file: Path) -> dict:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{file} does not exist; a run directory must hold it.") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read as JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{file} is not a JSON object.")
    return value


def _metrics(file: Path) -> list[dict]:
    """The lines of metrics.jsonl, without a half-written last one."""
    if not file.exists():
        return []
    texts = file.read_text(encoding="utf-8", errors="replace").splitlines()
    lines = []
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            if not isinstance(line, dict):
                raise ValueError
        except ValueError:
            if number == len(texts):  # the trainer is writing it, or was killed while it did
                break
            raise ConfigError(f"{file} line {number} is not a JSON object.") from None
        lines.append(line)
    return lines


def _usable(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _curve(lines: list[dict], field: str, path: Path) -> tuple[Curve, int]:
    """The curve of one field and how many of its values cannot be used. A step that occurs twice counts as last seen."""
    points, unusable = {}, 0
    for line in lines:
        if field not in line:
            continue
        if not (_usable(line.get("tokens")) and _usable(line.get("flops"))):
            raise ConfigError(f"{path / 'metrics.jsonl'}: a line with {field} lacks positive tokens and flops: {line}.")
        if _usable(line[field]):
            points[line["tokens"]] = (line["flops"], line[field])
        else:
            unusable += 1
    tokens = sorted(points)
    flops_and_loss = np.array([points[t] for t in tokens], np.float64).reshape(len(tokens), 2)
    return Curve(np.array(tokens, np.float64), flops_and_loss[:, 0], flops_and_loss[:, 1]), unusable
