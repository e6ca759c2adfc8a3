"""Tasks by name: the paper's nine from local files, everything else as lm-evaluation-harness has it.

The nine carry the harness's names, prompts and metrics; only where their rows come from differs. With a data folder
they are read from it; without one the harness fetches its own data sets.
"""

import contextlib
import dataclasses
import difflib
import hashlib
import json
import logging
import math
import os
from pathlib import Path

import numpy as np

from linscale.config import ConfigError
from linscale.evaluation import scrolls, task_rows


@dataclasses.dataclass(frozen=True)
class LocalTask:
    rows: callable  # a row of the file -> the fields below, None if it cannot be read
    files: tuple[str, ...]  # names looked for in the data folder, in this order
    origin: str  # where the file comes from
    metrics: tuple[str, ...] = ("acc", "acc_norm")


_HUB = "huggingface.co/datasets/{} (save the split as JSON lines or parquet)"
TASKS = {
    "boolq": LocalTask(
        task_rows.boolq,
        ("boolq.jsonl", "boolq.mosaic.jsonl", "boolq.parquet"),
        _HUB.format("aps/super_glue, boolq, validation"),
        ("acc",),
    ),
    "piqa": LocalTask(
        task_rows.piqa,
        ("piqa.jsonl", "piqa.mosaic.jsonl", "piqa.parquet"),
        _HUB.format("baber/piqa, validation"),
    ),
    "hellaswag": LocalTask(
        task_rows.hellaswag,
        ("hellaswag.jsonl", "hellaswag_val.jsonl", "hellaswag.parquet"),
        _HUB.format("Rowan/hellaswag, validation"),
    ),
    "winogrande": LocalTask(
        task_rows.winogrande,
        ("winogrande.jsonl", "winogrande.mosaic.jsonl", "winogrande.parquet"),
        _HUB.format("allenai/winogrande, winogrande_xl, validation"),
        ("acc",),
    ),
    "arc_easy": LocalTask(
        task_rows.arc,
        ("arc_easy.jsonl", "arc_easy.mosaic.jsonl", "arc_easy.parquet"),
        _HUB.format("allenai/ai2_arc, ARC-Easy, test"),
    ),
    "arc_challenge": LocalTask(
        task_rows.arc,
        ("arc_challenge.jsonl", "arc_challenge.mosaic.jsonl", "arc_challenge.parquet"),
        _HUB.format("allenai/ai2_arc, ARC-Challenge, test"),
    ),
    "openbookqa": LocalTask(
        task_rows.openbookqa,
        ("openbookqa.jsonl", "openbookqa.mosaic.jsonl", "openbookqa.parquet"),
        _HUB.format("allenai/openbookqa, main, test"),
    ),
    "wikitext": LocalTask(
        task_rows.wikitext,
        ("wikitext.jsonl", "wikitext2_test_docs.jsonl", "wikitext-2/wikitext2_test_docs.jsonl", "wikitext.parquet"),
        _HUB.format("EleutherAI/wikitext_document_level, wikitext-2-raw-v1, test"),
        ("word_perplexity", "byte_perplexity", "bits_per_byte"),
    ),
    "lambada_openai": LocalTask(
        task_rows.lambada,
        ("lambada_openai.jsonl", "lambada_test.jsonl", "lambada_openai.parquet"),
        _HUB.format("EleutherAI/lambada_openai, default, test"),
        ("perplexity", "acc"),
    ),
}
PAPER = tuple(TASKS)


def load(names: list[str], data_dir: str | None, limit: int | None = None) -> list:
    """The harness's task objects. limit: rows read of a local file; None: all.

    Raises ConfigError: an unknown name, files that are missing or cannot be read, no network for the others.
    """
    names = list(dict.fromkeys(names))
    if data_dir is not None and not Path(data_dir).is_dir():
        raise ConfigError(f"--data-dir is {data_dir!r}, which is no folder (from {os.getcwd()}); correct the path.")
    if not names:
        raise ConfigError(f"--tasks is empty; name one or more, as {', '.join(PAPER)}.")
    files = {name: file_of(name, data_dir) for name in names}  # all of them before any work
    others = [name for name in names if files[name] is None]
    out = []
    with quiet_harness():
        loaded = _from_harness(others) if others else {}
        for name in names:
            if files[name] is None:
                out.extend(loaded[name])
            elif name in scrolls.TASKS:
                out.append(scrolls.build(name, files[name], limit))
            else:
                out.append(_build(name, _read(name, files[name], limit)))
    return out


def file_of(name: str, data_dir: str | None) -> Path | None:
    """The local file that a task is read from; None if the harness fetches it."""
    known = data_dir is not None and (name in TASKS or name in scrolls.TASKS)
    return _find(name, Path(data_dir)) if known else None


def source_of(name: str, data_dir: str | None) -> str:
    """The file of a task and a sum of its content, or "harness": what tells one version of the data from another."""
    path = file_of(name, data_dir)
    if path is None:
        return "harness"
    with open(path, "rb") as file:
        return f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"


def _find(name: str, folder: Path) -> Path:
    task = TASKS.get(name) or scrolls.TASKS[name]
    for file in task.files:
        if (folder / file).is_file():
            return folder / file
    raise ConfigError(
        f"the task {name} needs {folder / task.files[0]} (or, in {folder}, {' or '.join(task.files[1:])}), which is "
        f"missing; it comes from {task.origin}."
    )


def read_rows(path: Path, limit: int | None = None) -> list[dict]:
    """Rows of a .jsonl or .parquet file. Raises ConfigError where it is broken."""
    number = 0
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            return pyarrow.parquet.read_table(path).slice(0, limit).to_pylist()
        with open(path, encoding="utf-8") as lines:
            rows = []
            for line in lines:
                number += 1
                if limit is not None and len(rows) >= limit:
                    break
                if line.strip():
                    rows.append(json.loads(line))
            return rows
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text ({error.reason}); fetch it again.") from error
    except ValueError as error:
        where = f" line {number}" if path.suffix != ".parquet" else ""
        raise ConfigError(f"{path}{where} cannot be read ({error}); fetch it again.") from error


def _read(name: str, path: Path, limit: int | None) -> list[dict]:
    task, out = TASKS[name], []
    for number, row in enumerate(read_rows(path, limit), 1):
        try:
            converted = task.rows(row)
        except (KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
            raise ConfigError(
                f"{path} row {number} is no row of {name} ({error!r}); it comes from {task.origin}."
            ) from error
        if converted is None:
            raise ConfigError(
                f"{path} row {number} has the fields {', '.join(sorted(row))}, which are not those of {name}; it comes "
                f"from {task.origin}."
            )
        out.append(converted)
    if not out:
        raise ConfigError(f"{path} holds no rows; it comes from {task.origin}.")
    return out


def _build(name: str, rows: list[dict]):
    import datasets
    from lm_eval.api.task import ConfigurableTask

    higher = {"acc", "acc_norm"}
    metrics = [
        {"metric": m, "aggregation": "mean", "higher_is_better": True} for m in TASKS[name].metrics if m in higher
    ]
    config = {
        "task": name,
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(rows)},
        "test_split": "test",
        "num_fewshot": 0,
        "metadata": {"version": 1.0},
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_target": "{{gold}}",
        "doc_to_choice": "{{choices}}",
        "metric_list": metrics,
    }
    if name == "winogrande":
        config |= {"doc_to_text": _gold, "doc_to_target": "{{ending}}", "doc_to_choice": "{{contexts}}"}
    elif name == "lambada_openai":
        perplexity = {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}
        config |= {
            "output_type": "loglikelihood",
            "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
            "doc_to_target": "{{' ' + text.split(' ')[-1]}}",
            "metric_list": [perplexity, *metrics],
        }
        del config["doc_to_choice"]
    elif name == "wikitext":
        from lm_eval.tasks.wikitext import preprocess_wikitext

        config |= {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": preprocess_wikitext.wikitext_detokenizer,
            "process_results": preprocess_wikitext.process_results,
            "metric_list": [{"metric": metric} for metric in TASKS[name].metrics],
        }
        del config["doc_to_choice"]
    return ConfigurableTask(config=config)


def _gold(row: dict) -> int:
    return row["gold"]


def _from_harness(names: list[str]) -> dict[str, list]:
    """name -> tasks (a group has several), with the data the harness fetches."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    for name in names:
        if name not in manager.all_tasks:
            close = difflib.get_close_matches(name, {*PAPER, *scrolls.TASKS, *manager.all_tasks}, 4, 0.5)
            hint = f"did you mean {' or '.join(close)}?" if close else f"the paper's are {', '.join(PAPER)}."
            raise ConfigError(f"{name!r} is not a task of the harness; {hint}")
    out = {}
    for name in names:
        try:
            out[name] = list(manager.load([name])["tasks"].values())
        except ImportError as error:
            raise ConfigError(f"the task {name} needs the package {error.name}; pip install it.") from error
        except Exception as error:  # what the data set library raises without a network has many names
            task = TASKS.get(name) or scrolls.TASKS.get(name)
            advice = "connect to a network once"
            if task:
                advice = f"put {task.files[0]} from {task.origin} into a folder and name it with --data-dir"
            text = " ".join(str(error).split())[:200]
            raise ConfigError(f"the data of the task {name} could not be fetched ({text}); {advice}.") from error
    return out


def run(lm, tasks: list, limit: int | None = None) -> dict[str, dict]:
    """What the harness finds: {task: {scores, errors, documents, samples}}.

    errors: standard errors over documents, of ratios and exponentials by the delta method (the harness draws bootstrap
    samples there). samples: the harness's, one a document.
    """
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager

    with quiet_harness():
        result = evaluator.simple_evaluate(
            model=lm,
            tasks=tasks,
            limit=limit,
            bootstrap_iters=0,
            log_samples=True,
            task_manager=TaskManager(include_defaults=False),
        )
    out = {}
    for name, metrics in result["results"].items():
        samples = result["samples"].get(name, [])
        scores = {
            key.removesuffix(",none"): float(value)
            for key, value in metrics.items()
            if key.endswith(",none") and isinstance(value, (int, float)) and "_stderr" not in key
        }
        errors = {metric: standard_error(metric, value, samples) for metric, value in scores.items()}
        errors = {metric: error for metric, error in errors.items() if error is not None}
        out[name] = {"scores": scores, "errors": errors, "documents": len(samples), "samples": samples}
    return out


def standard_error(metric: str, score: float, samples: list[dict]) -> float | None:
    """Of a task's score over its documents; None where the samples do not say."""
    values = [sample[metric] for sample in samples if metric in sample]
    if len(values) < 2:
        return None
    if all(isinstance(value, (tuple, list)) and len(value) == 2 for value in values):  # sum a / sum b
        a, b = np.array(values, np.float64).T
        residual = a - (a.sum() / b.sum()) * b
        error = math.sqrt(len(a) / (len(a) - 1) * float(residual @ residual)) / abs(float(b.sum()))
        return score * error if metric.endswith("perplexity") else error / math.log(2)
    if not all(isinstance(value, (int, float)) for value in values):
        return None
    error = float(np.std(np.array(values, np.float64), ddof=1)) / math.sqrt(len(values))
    return score * error if metric == "perplexity" else error  # the perplexity is exp(-mean)


@contextlib.contextmanager
def quiet_harness():
    """Keeps the harness's log to errors; it prints pages otherwise."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
