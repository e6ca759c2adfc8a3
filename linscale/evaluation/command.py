"""`linscale eval`."""

import argparse
import contextlib
import dataclasses
import importlib.util
import os
import time

from linscale.config import ConfigError
from linscale.evaluation import results, runs

HELP = """\
Judge checkpoints: one, all of a run, or all of a ladder. Results are appended to evals/results.jsonl of each run; what
is there already is not measured again, so the same command continues after an interruption.

  linscale eval runs/demo/llama-450k --tasks lambada_openai,wikitext --data-dir DIR
  linscale eval runs/demo --tasks paper,scrolls --data-dir DIR --steps all

Tasks: those of lm-evaluation-harness by its names, and of ours
  paper              the paper's nine: boolq, piqa, hellaswag, winogrande, arc_easy, arc_challenge, openbookqa,
                     wikitext, lambada_openai
  scrolls            the seven of SCROLLS
  needle_easy, needle_standard
                     a needle in a haystack, lengths x depths, scored as the paper does; with heat maps
  positions          loss by position in held-out text, up to 16 times the training length
With --data-dir the paper's tasks and SCROLLS are read from files there; a missing one is named, with where it comes from.
"""


@dataclasses.dataclass(frozen=True)
class Task:
    """What is measured of each checkpoint under one name."""

    name: str
    settings: dict  # everything beside the checkpoint on which the scores depend
    measure: callable  # (adapter.LinscaleLM, runs.Run, step) -> {scores, errors, documents, samples}


def main(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    found = [run for folder in args.folder for run in runs.open_runs(folder)]
    steps = {run.folder: _steps(run, args.steps, len(found) > 1) for run in found}
    tasks = load_tasks(args)
    for run in found:
        _ = run.tokenizer  # before any compile: it may be missing
    for run in found:
        for step in steps[run.folder]:
            evaluate(run, step, tasks, args)
    from linscale.evaluation import table

    print(table.markdown([row for run in found for row in table.rows(run) if row["step"] in steps[run.folder]]))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "linscale eval", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("folder", nargs="+", help="a run, or a ladder of runs")
    add("--tasks", default="paper", help="names, separated by commas (default: paper)")
    add("--data-dir", metavar="DIR", help="where the files of the paper's tasks and of SCROLLS lie")
    add("--steps", default="last", help="last, all, or numbers separated by commas (default: last)")
    add("--limit", type=int, metavar="N", help="only the first N documents of each task")
    add("--samples", action="store_true", help="also write the answer to each document, to evals/samples/")
    add("--separator", action="store_true", help="begin every context with the token between training documents")
    add(
        "--context", type=int, metavar="N", help="tokens read at most (default: the training length for softmax models)"
    )
    add(
        "--batch-tokens", type=int, default=0, metavar="N", help="tokens of a batch (default: 4,096; 65,536 on devices)"
    )
    add("--needle-lengths", default="", help="FROM:TO:COUNT in tokens (default: 1000:16000:35, the paper's)")
    add("--needle-depths", type=int, default=35, metavar="N", help="depths from 0 to 100 %% (default: 35, the paper's)")
    add("--haystack", metavar="FILE", help="text around the needle (default: the run's held-out text)")
    return parser


def load_tasks(args) -> list[Task]:
    """Everything the command line names, checked and read. Raises ConfigError."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("linscale eval needs lm-evaluation-harness; pip install 'linscale[eval]'.")
    from linscale.evaluation import needle, positions, scrolls, tasks

    if args.limit is not None and args.limit < 1:
        raise ConfigError(f"--limit is {args.limit}; it must be positive, or left out for all documents.")
    groups = {"paper": list(tasks.PAPER), "scrolls": list(scrolls.TASKS)}
    own = {"needle_easy": needle.task, "needle_standard": needle.task, "positions": positions.task}
    names: list[str] = []
    for name in filter(None, (part.strip() for part in args.tasks.split(","))):
        names += groups.get(name, [name])
    names = list(dict.fromkeys(names))
    harness = [name for name in names if name not in own]
    common = {"limit": args.limit, "separator": args.separator, "context": args.context}
    out = [own[name](name, args) for name in names if name in own]
    if harness or not names:
        _quiet_libraries()
        for task in tasks.load(harness, args.data_dir, args.limit):
            name = task.config.task
            out.append(
                Task(name, common | {"data": tasks.source_of(name, args.data_dir)}, _through_harness(task, args))
            )
    return out


def _through_harness(task, args):
    from linscale.evaluation import tasks

    def measure(lm, run, step):
        return tasks.run(lm, [task], args.limit)[task.config.task]

    return measure


def evaluate(run: runs.Run, step: int, tasks: list[Task], args) -> None:
    """Measures what is not in the run's results yet and appends it, task by task."""
    known = results.read(run.folder)
    todo = [task for task in tasks if results.find(known, task.name, step, task.settings) is None]
    print(f"{run.name} step {step}: {len(todo)} of {len(tasks)} tasks to measure", flush=True)
    if not todo:
        return
    lm = language_model(run, step, args)
    for task in todo:
        begin = time.perf_counter()
        with _named(task, run, step):
            measured = task.measure(lm, run, step)
        line = {"task": task.name, "step": step, "settings": task.settings}
        line |= {key: measured[key] for key in ("scores", "errors", "documents")}
        line |= run.cost(step) | {"seconds": round(time.perf_counter() - begin, 3), "versions": _versions()}
        if args.samples and measured.get("samples"):
            results.write_samples(run.folder, task.name, step, measured["samples"])
        results.append(run.folder, line)
        shown = "  ".join(_shown(name, line) for name in list(line["scores"])[:6])
        print(f"  {task.name}: {shown}  ({line['documents']} documents, {line['seconds']:.1f} s)", flush=True)


def language_model(run: runs.Run, step: int, args):
    """A checkpoint behind the harness's interface, spread over all devices."""
    from linscale.evaluation import placement
    from linscale.evaluation.adapter import LinscaleLM
    from linscale.evaluation.scoring import Scorer

    if args.context is not None and args.context < 2:
        raise ConfigError(f"--context is {args.context}; it must be at least 2 tokens.")
    rows, arrays, multiple = placement.over_devices(run.config.model)
    context = run.context if args.context is None or run.context is None else args.context
    params = run.params(step, arrays)
    scorer = Scorer(run.config.model, params, context, args.batch_tokens, rows, multiple)
    return LinscaleLM(scorer, run.tokenizer, separator=args.separator, read=args.context)


def _steps(run: runs.Run, text: str, skip_empty: bool) -> list[int]:
    """Raises ConfigError for a text that is no step, and steps that the run does not have."""
    if text in ("last", "all"):
        if not run.steps and skip_empty:  # of a ladder still in training
            print(f"{run.name}: no checkpoint yet, skipped")
            return []
        return [run.step(None)] if text == "last" else run.steps or [run.step(None)]
    try:
        wanted = [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--steps is {text!r}; it must be last, all, or numbers separated by commas.") from None
    return [run.step(step) for step in wanted]


@contextlib.contextmanager
def _named(task: Task, run: runs.Run, step: int):
    """Says which task and checkpoint an error of the user's belongs to."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{task.name} of {run.folder} at step {step}: {error}") from error


def _shown(name: str, line: dict) -> str:
    value, error = line["scores"][name], line["errors"].get(name)
    return f"{name} {value:.4g}" + (f" ± {error:.2g}" if error is not None else "")


def _versions() -> dict[str, str]:
    from importlib import metadata

    import linscale

    out = {"linscale": linscale.__version__}
    for name in ("jax", "lm_eval"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            out[name] = metadata.version(name)
    return out


def _quiet_libraries() -> None:
    """The harness and its data set library draw a bar for every few rows."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    with contextlib.suppress(ImportError):
        import datasets

        datasets.disable_progress_bars()
