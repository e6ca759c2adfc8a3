"""evals/results.jsonl of a run directory: one line for each checkpoint and task that was judged.

A line: {task, step, settings, scores {metric: number}, errors {metric: standard error}, documents, tokens, flops,
heldout_loss, heldout_bpb, seconds, versions}. task, step and settings together say what was measured: a line of the
same three is not measured again, and a later line of the same three replaces an earlier one.
"""

import json
import math
import os
from pathlib import Path

FILE = "results.jsonl"


def path_of(run_folder: Path) -> Path:
    return run_folder / "evals" / FILE


def read(run_folder: Path) -> list[dict]:
    """All lines in their order, without one that was cut off while it was written."""
    path = path_of(run_folder)
    if not path.is_file():
        return []
    out = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            out.append(json.loads(line))
        except ValueError:
            continue
    return out


def find(lines: list[dict], task: str, step: int, settings: dict) -> dict | None:
    """The newest line that measured the same."""
    for line in reversed(lines):
        if (line["task"], line["step"], line["settings"]) == (task, step, settings):
            return line
    return None


def append(run_folder: Path, line: dict) -> None:
    """Adds one line, on disk when this returns; first removes one that was cut off."""
    path = path_of(run_folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(finite(line), allow_nan=False) + "\n"
    with open(path, "ab+") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        whole = file.read().rfind(b"\n") + 1
        if whole != size:
            file.truncate(whole)
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def write_samples(run_folder: Path, task: str, step: int, samples: list[dict]) -> None:
    """evals/samples/TASK-STEP.jsonl: what the model answered, document by document. Whole or not at all."""
    path = run_folder / "evals" / "samples" / f"{task}-{step}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.tmp")
    part.write_text("".join(json.dumps(finite(sample), default=str) + "\n" for sample in samples), encoding="utf-8")
    os.replace(part, path)


def finite(x):
    """The same tree with null for numbers that JSON does not have."""
    if isinstance(x, dict):
        return {str(key): finite(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [finite(value) for value in x]
    if hasattr(x, "item") and getattr(x, "ndim", None) == 0:
        x = x.item()
    return None if isinstance(x, float) and not math.isfinite(x) else x
