"""Runs of any trainer from CSV or JSONL, and the finished runs of a ladder, as a table for fitting.

A column mapping says which column holds N, D and the loss; anything that cannot be a run is one sentence with the
column, the row and the value. Rows are counted from 1, the header not included.
"""

import csv
import dataclasses
import json
import math
from pathlib import Path

import numpy as np

from linscale.config import ConfigError
from linscale.scaling import runs as runs_
from linscale.scaling.parametric import Runs

SIZES = tuple(runs_.SIZES)
NAMES = ("name", "run", "run_name", "model")
TOKENIZERS = ("tokenizer", "tokenizer_name", "vocab_size", "vocab")
DERIVED = "C / (6 N)"
SCHEDULES = ("schedule", "lr_schedule")


@dataclasses.dataclass(frozen=True)
class Columns:
    n: str | None = None
    d: str | None = None
    loss: str | None = None
    flops: str | None = None
    unique: str | None = None
    tasks: tuple[str, ...] = ()
    where: tuple[str, ...] = ()  # COLUMN=VALUE[,VALUE...], all must hold


def read(path: str | Path, columns: Columns) -> tuple[Runs, list[str]]:
    """The runs of a file and what makes them doubtful. D is C / (6 N) where only FLOPs are given."""
    return read_groups(path, columns)[""]


def read_groups(path: str | Path, columns: Columns, group: str | None = None) -> dict[str, tuple[Runs, list[str]]]:
    """The same by the values of a column, in the order of the file; one group named "" without a column."""
    return {
        name: (runs, notes + doubts(runs, rows, numbers))
        for name, (runs, notes, rows, numbers) in _groups(Path(path), columns, group).items()
    }


def read_points(
    path: str | Path, columns: Columns, group: str | None = None
) -> dict[str, tuple[Runs, list, list[dict]]]:
    """Points of training curves, each a row: table, notes and the rows themselves, by group."""
    out = {}
    for name, (points, notes, rows, _) in _groups(Path(path), columns, group).items():
        out[name] = points, notes + _tokenizers(rows) + _units(points), rows
    return out


def _groups(path: Path, columns: Columns, group: str | None) -> dict[str, tuple[Runs, list, list[dict], list[int]]]:
    rows = _chosen(path, _rows(path), columns.where)
    if group is None:
        return {"": _table(path, rows, columns)}
    if not any(group in row for _, row in rows):
        raise ConfigError(f"{path} has no column {group!r} (--group); it has {', '.join(map(str, rows[0][1]))}.")
    groups = {}
    for number, row in rows:
        groups.setdefault(str(row.get(group)), []).append((number, row))
    return {name: _table(path, members, columns) for name, members in groups.items()}


def _chosen(path: Path, rows: list[dict], where: tuple[str, ...]) -> list[tuple[int, dict]]:
    """Rows with their numbers. Numbers compare as numbers: 20 is 20.0."""
    out = list(enumerate(rows, 1))
    for condition in where:
        column, equals, values = condition.partition("=")
        if not (column and equals and values):
            raise ConfigError(f"--where is {condition!r}; give COLUMN=VALUE or COLUMN=VALUE,VALUE.")
        if not any(column in row for row in rows):
            raise ConfigError(f"{path} has no column {column!r} (--where); it has {', '.join(map(str, rows[0]))}.")
        wanted = {_comparable(value) for value in values.split(",")}
        out = [(number, row) for number, row in out if _comparable(row.get(column)) in wanted]
        if not out:
            raise ConfigError(f"{path} has no row with --where {' '.join(where)}.")
    return out


def _comparable(value):
    try:
        return float(value)
    except (TypeError, ValueError):
        return str(value).strip()


def _table(path: Path, rows: list[tuple[int, dict]], columns: Columns) -> tuple[Runs, list, list[dict], list[int]]:
    if not columns.n or not columns.loss or not (columns.d or columns.flops):
        raise ConfigError(
            f"{path} needs --n, --loss, and --d or --flops with names of its columns: {', '.join(map(str, rows[0][1]))}."
        )
    found = {}
    for option in ("n", "d", "loss", "flops", "unique"):
        if (name := getattr(columns, option)) is not None:
            found[option] = _numbers(path, rows, name, option)
    n, flops = found["n"], found.get("flops")
    runs = Runs(
        n=n,
        d=found["d"] if "d" in found else flops / (6 * n),
        loss=found["loss"],
        unique=found.get("unique"),
        flops=flops,
        names=tuple(str(_first(row, NAMES) or f"row {i}") for i, row in rows),
        n_name=columns.n,
        d_name=columns.d or DERIVED,
        tasks={name: _numbers(path, rows, name, "task", positive=False) for name in columns.tasks},
    )
    return runs, [], [row for _, row in rows], [number for number, _ in rows]


def from_ladder(ladder: runs_.Ladder, size: str) -> tuple[dict[str, Runs], list[str]]:
    """By architecture, the ends of the finished runs: held-out loss if it was measured, else training loss."""
    if size not in SIZES:
        raise ConfigError(f"--n is {size!r}; for a ladder it must be one of {', '.join(SIZES)}.")
    groups, notes = {}, []
    finished = [run for run in ladder.runs if run.finished and len(run.last)]
    for run in finished:
        groups.setdefault(run.arch, []).append(run)
    if left := [run.name for run in ladder.runs if run not in finished] + list(ladder.missing):
        notes.append(f"Not finished, so not in the fit: {', '.join(left)}.")
    for field, text in (("tokenizer", "tokenizers: their losses per token"), ("fingerprint", "data: their losses")):
        if len({run.data.get(field) for run in finished}) > 1:
            notes.append(f"The runs use different {text} are not comparable.")
    if len({bool(len(run.heldout)) for run in finished}) > 1:
        notes.append("Some runs have held-out loss and others only training loss, which are not comparable.")
    if any(run.config.optimizer.schedule == "constant" for run in finished):
        notes.append("The learning rate of some runs is constant, not annealed: their last losses are too high.")
    tables = {}
    for arch, members in groups.items():
        tables[arch] = Runs(
            n=np.array([getattr(run.parameters, size) for run in members], np.float64),
            d=np.array([run.last.tokens[0] for run in members], np.float64),
            loss=np.array([run.last.loss[0] for run in members], np.float64),
            flops=np.array([run.last.flops[0] for run in members], np.float64),
            names=tuple(run.name for run in members),
            n_name=runs_.SIZES[size],
            d_name="tokens seen",
        )
    return tables, notes


def doubts(runs: Runs, rows: list[dict] = (), numbers: list[int] = ()) -> list[str]:
    """Sentences on duplicates, tokenizers, units and schedules that a law should not be fitted to unseen."""
    notes, seen, copies = [], {}, []
    numbers = numbers or range(1, len(runs) + 1)
    for i, key in enumerate(zip(runs.n, runs.d, runs.loss)):
        if key in seen:
            copies.append(f"row {numbers[i]} repeats row {numbers[seen[key]]}")
        seen.setdefault(key, i)
    if copies:
        more = f" and {len(copies) - 5} more" if len(copies) > 5 else ""
        notes.append(f"Duplicated runs: {', '.join(copies[:5])}{more}; all are counted, so intervals are too narrow.")
    notes += _tokenizers(rows)
    values = {str(value) for row in rows if (value := _first(row, SCHEDULES)) not in (None, "")}
    if any(value.lower() in ("constant", "none", "wsd-stable") for value in values):
        notes.append("The learning rate of some runs is constant, not annealed: their last losses are too high.")
    groups = {}
    for i, name in enumerate(runs.names):
        groups.setdefault((name, runs.n[i]), set()).add(runs.d[i])
    named = rows and any("run" in row or "step" in row for row in rows)
    if named and any(len(d) > 1 for d in groups.values()):
        notes.append(
            "Some rows are checkpoints inside one run: before its end the learning rate has not annealed and the loss "
            "is too high; fit the last row of each run."
        )
    return notes + _units(runs)


def _tokenizers(rows: list[dict]) -> list[str]:
    values = {str(value) for row in rows if (value := _first(row, TOKENIZERS)) not in (None, "")}
    if len(values) < 2:
        return []
    return [
        f"The runs use different tokenizers ({', '.join(sorted(values)[:4])}): their losses per token are not "
        "comparable; fit them apart, or bits per byte."
    ]


def _units(runs: Runs) -> list[str]:
    notes = []
    if runs.flops is not None:
        least = 6 * runs.n * runs.d
        if np.median(runs.flops) < 1e9 and np.median(runs.n) > 1e4:
            notes.append(
                f"The FLOPs look wrong (median {np.median(runs.flops):.3g}): PFLOP/s-days? One is 8.64e19 FLOPs; "
                "multiply the column."
            )
        elif not 0.1 < np.median(runs.flops / least) < 20:
            notes.append(f"The FLOPs are {np.median(runs.flops / least):.3g} times 6 N D (median): check the units.")
    if np.median(runs.n) < 1e4:
        notes.append(f"N looks wrong (median {np.median(runs.n):.3g} parameters): given in millions or billions?")
    if np.median(runs.d) < 1e5:
        notes.append(f"D looks wrong (median {np.median(runs.d):.3g} tokens): given in millions or billions?")
    if np.median(runs.loss) > 8:  # a guess over 3,000 tokens; models that have learnt anything are below
        notes.append(f"The loss looks wrong (median {np.median(runs.loss):.3g} nats per token): a perplexity?")
    return notes


def _rows(path: Path) -> list[dict]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; give a CSV or JSONL file, or the folder of a ladder.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as text: {error}.") from error
    if path.suffix.lower() in (".jsonl", ".ndjson", ".json"):
        rows = []
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                raise ConfigError(f"{path} line {number} is not a JSON object; JSONL has one object a line.")
            rows.append(row)
    else:
        rows = _csv(path, text)
    if not rows:
        raise ConfigError(f"{path} has no rows.")
    return rows


def _csv(path: Path, text: str) -> list[dict]:
    """Refused, as a law should not be fitted to the wrong column: two columns of one name, rows longer than the header."""
    reader = csv.DictReader(text.splitlines())
    try:
        names = reader.fieldnames or []
        if not names and text.strip():
            raise ConfigError(f"{path} begins with an empty line; its first line must name the columns.")
        if twice := [name for name in names if names.count(name) > 1]:
            raise ConfigError(f"{path} has the column {twice[0]!r} twice; rename one.")
        rows = list(reader)
    except csv.Error as error:
        raise ConfigError(f"{path} cannot be read as CSV, near line {reader.line_num}: {error}.") from error
    for i, row in enumerate(rows, 1):
        if None in row:  # where the reader puts what is too much
            raise ConfigError(
                f"{path}, row {i} has {len(names) + len(row[None])} cells, but the header {len(names)}: is there a comma "
                "in a number or a text without quotes?"
            )
    return rows


def _numbers(path: Path, rows: list[tuple[int, dict]], column: str, option: str, positive: bool = True) -> np.ndarray:
    """A column as finite numbers."""
    if not any(column in row for _, row in rows):
        known = ", ".join(map(str, rows[0][1]))
        raise ConfigError(f"{path} has no column {column!r} (--{option}); it has {known}.")
    out = np.empty(len(rows))
    for i, (place, row) in enumerate(rows):
        value = row.get(column)
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not (math.isfinite(number) and (number > 0 or not positive)):
            kind = "a positive finite" if positive else "a finite"
            raise ConfigError(
                f"{path}: column {column!r} (--{option}), row {place}: {value!r:.60} is not {kind} number."
            )
        out[i] = number
    return out


def _first(row: dict, names: tuple[str, ...]):
    return next((row[name] for name in names if row.get(name) not in (None, "")), None)
