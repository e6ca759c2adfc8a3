"""Results of runs in the layout of the paper's Table 4: a row a checkpoint, its cost and loss, then task by task.

CSR is the plain mean of the seven commonsense tasks, SCROLLS that of its thirteen numbers, as in the paper; either is
left open while a part is missing. Where a task was measured with several settings, the newest counts.
"""

import csv
import io
from pathlib import Path

from linscale.evaluation import results, runs

# heading: (task, metric, factor). The paper takes these metrics.
CSR = {
    "BoolQ": ("boolq", "acc", 100),
    "PIQA": ("piqa", "acc", 100),
    "HS": ("hellaswag", "acc_norm", 100),
    "WG": ("winogrande", "acc", 100),
    "ARC-e": ("arc_easy", "acc", 100),
    "ARC-c": ("arc_challenge", "acc_norm", 100),
    "OBQA": ("openbookqa", "acc_norm", 100),
}
OTHERS = {
    "WIKI": ("wikitext", "word_perplexity", 1),
    "LAMB": ("lambada_openai", "perplexity", 1),
    "NIAH": ("needle_easy", "weighted_accuracy", 100),
}
COLUMNS = (*CSR, "CSR", *OTHERS, "SCROLLS")
LEAD = ("run", "arch", "parameters", "step", "tokens", "flops", "heldout_loss")


def rows(run: runs.Run) -> list[dict]:
    """A dict for each step with results, ascending: LEAD, then COLUMNS, None where there is nothing, and `errors`."""
    by_step: dict[int, dict[str, dict]] = {}
    for line in results.read(run.folder):
        by_step.setdefault(line["step"], {})[line["task"]] = line
    out = []
    for step, lines in sorted(by_step.items()):
        row = {
            "run": run.name,
            "arch": run.config.model.arch,
            "parameters": run.content.get("parameters", {}).get("total"),
            "step": step,
        }
        row |= {key: run.cost(step)[key] for key in ("tokens", "flops", "heldout_loss")}
        row["errors"] = {}
        for heading, (task, metric, factor) in (CSR | OTHERS).items():
            line = lines.get(task, {"scores": {}, "errors": {}})
            value, error = line["scores"].get(metric), line["errors"].get(metric)
            row[heading] = None if value is None else factor * value
            if error is not None:
                row["errors"][heading] = factor * error
        parts = [row[heading] for heading in CSR]
        row["CSR"] = None if None in parts else sum(parts) / len(parts)
        if row["CSR"] is not None and all(heading in row["errors"] for heading in CSR):
            row["errors"]["CSR"] = sum(row["errors"][heading] ** 2 for heading in CSR) ** 0.5 / len(CSR)
        row["SCROLLS"] = _scrolls(lines)
        out.append(row)
    return out


def of_ladder(folder: str | Path) -> list[dict]:
    """The rows of all runs in a ladder, or of one run. Raises ConfigError if the folder holds none."""
    return [row for run in runs.open_runs(folder) for row in rows(run)]


def markdown(table: list[dict]) -> str:
    """The rows as a table; columns without any number are left out."""
    if not table:
        return "no results yet"
    columns = [name for name in COLUMNS if any(row[name] is not None for row in table)]
    head = ["run", "step", "FLOPs", "loss", *columns]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in table:
        cells = [row["run"], f"{row['step']:,}", _number(row["flops"], ".2e"), _number(row["heldout_loss"], ".3f")]
        cells += [_number(row[name], ".1f" if name in ("WIKI", "LAMB", "NIAH") else ".2f") for name in columns]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def comma_separated(table: list[dict]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, [*LEAD, *COLUMNS], extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return out.getvalue()


def _scrolls(lines: dict[str, dict]) -> float | None:
    from linscale.evaluation import scrolls

    if not set(scrolls.TASKS) <= set(lines):
        return None
    return scrolls.average({task: lines[task]["scores"] for task in scrolls.TASKS})


def _number(x: float | None, form: str) -> str:
    if x is None:
        return "-"
    return format(x, form if abs(x) < 1e5 or "e" in form else ".2e")
