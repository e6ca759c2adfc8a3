"""`linscale fit` of a form of L(N, D): options, the table on the terminal, and the JSON file."""

import argparse
import dataclasses
import json
import math
from pathlib import Path

import numpy as np

from linscale.config import ConfigError
from linscale.scaling import forms, hardware_days, isoflop, joint, optimum, parametric, printing, profile, tables, tasks
from linscale.scaling import group as group_
from linscale.scaling import runs as runs_
from linscale.scaling.minimise import Loss

KIND_NAMES = {
    "huber": "Huber loss of log L, delta {delta:g}, {reduction} over runs",
    "lsq": "least squares of log L, {reduction} over runs",
    "lsq-unlogged": "least squares of L, {reduction} over runs",
    "huber-scale": "Huber likelihood of log L with a fitted scale, delta {delta:g} of the scale, {reduction} over runs",
}
ISOFLOP = "parabolas of L in log N by least squares, one a budget, straight lines of logarithms through them"


def main(arguments: argparse.Namespace) -> int:
    loss = Loss(arguments.loss_kind, arguments.delta, arguments.reduction)
    if not (math.isfinite(loss.delta) and loss.delta > 0):
        raise ConfigError(f"--delta is {loss.delta}; it must be a positive number.")
    if not 1 <= arguments.starts <= 1_000_000:
        raise ConfigError(f"--starts is {arguments.starts}; it must lie between 1 and 1000000.")
    if arguments.drop_worst < 0:
        raise ConfigError(f"--drop-worst is {arguments.drop_worst}; it must be at least 0.")
    for budget in arguments.budget:
        if not (math.isfinite(budget) and budget > 0):
            raise ConfigError(f"--budget is {budget}; it must be a positive number of FLOPs.")
    groups = {name: (_without_worst(runs, notes, arguments)) for name, (runs, notes) in _groups(arguments).items()}
    if arguments.joint:
        _check_joint(arguments, groups)
    if arguments.report and not arguments.budget and arguments.form != "isoflop":
        arguments.budget = optimum.round_budgets([runs for runs, _ in groups.values()])
    results, shown, compared = {}, [], None
    for name, (runs, notes) in groups.items():
        if results:
            print()
        results[name], group = _one(name, runs, loss, arguments, notes)
        shown.append(group)
    if arguments.joint:
        tables_ = {name: runs for name, (runs, _) in groups.items()}
        found = joint.fit(arguments.form, tables_, arguments.resamples, arguments.seed)
        compared = found
        print("\n" + "\n".join(joint.as_lines(found)))
    content = next(iter(results.values())) if len(results) == 1 else {"fits": list(results.values())}
    if compared:
        content["joint"] = joint.as_json(compared)
    if arguments.json:
        try:
            Path(arguments.json).write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--json {arguments.json} cannot be written: {error.strerror}.") from error
    if arguments.report:
        print(_report(shown, loss, arguments, compared, content))
    return 0


def _report(shown: list[group_.Group], loss: Loss, arguments, compared, content: dict) -> Path:
    from linscale.scaling import fit_page  # draws: matplotlib

    first = shown[0].found
    about = fit_page.About(
        source=", ".join(Path(path).resolve().name for path in arguments.folder),
        formula=isoflop.FORMULA if arguments.form == "isoflop" else first.form.formula,
        method=ISOFLOP if arguments.form == "isoflop" else KIND_NAMES[loss.kind].format(**dataclasses.asdict(loss)),
        intervals=f"95 %, {arguments.resamples:,} draws of the runs with replacement, seed {arguments.seed}.",
        compute=arguments.compute_model,
        hardware=hardware_days.chosen(arguments)[0],
        columns=Path(arguments.folder[0]).is_file(),
    )
    return fit_page.write(Path(arguments.report), shown, about, compared, content)


def _groups(arguments) -> dict[str, tuple[parametric.Runs, list[str]]]:
    """Tables and notes by name; the name of a file's only table is empty."""
    files = [path for path in arguments.folder if not Path(path).is_dir()]
    if files and len(arguments.folder) > 1:
        raise ConfigError(
            f"Give one file, or folders of runs; {files[0]} is a file among {len(arguments.folder)} paths."
        )
    if files:
        columns = tables.Columns(
            *(getattr(arguments, option) for option in ("n", "d", "loss", "flops", "unique")),
            tasks=tuple(arguments.task),
            where=tuple(arguments.where),
        )
        return tables.read_groups(files[0], columns, arguments.group)
    for option in ("d", "flops", "unique", "group", "where", "task"):
        if getattr(arguments, option):
            raise ConfigError(f"--{option} names a column of a file; {arguments.folder[0]} is a folder of runs.")
    groups, notes = tables.from_ladder(runs_.read(arguments.folder), arguments.n or "nonembedding")
    if not groups:
        raise ConfigError(" ".join(["No run has finished, so there is nothing to fit.", *notes]))
    return {name: (runs, notes) for name, runs in groups.items()}


def _check_joint(arguments, groups) -> None:
    if arguments.form == "isoflop":
        raise ConfigError("--joint compares laws L(N, D); isoflop is none. Use --form chinchilla.")
    if len(groups) < 2:
        raise ConfigError("--joint compares groups of runs: give a ladder of several architectures, or --group COLUMN.")
    if arguments.loss_kind == "lsq-unlogged":
        raise ConfigError("--joint compares by the likelihood of log L; it cannot go with --loss-kind lsq-unlogged.")


def _without_worst(runs, notes, arguments) -> tuple[parametric.Runs, list[str]]:
    if not arguments.drop_worst:
        return runs, notes
    if arguments.drop_worst >= len(runs):
        raise ConfigError(f"--drop-worst is {arguments.drop_worst}, but there are only {len(runs)} runs.")
    worst = np.sort(np.argsort(-runs.loss, kind="stable")[: arguments.drop_worst])
    names = ", ".join(runs.names[i] for i in worst)
    note = f"Left out for their loss, the highest {arguments.drop_worst}: {names}."
    return runs.take(np.setdiff1d(np.arange(len(runs)), worst)), [*notes, note]


def _one(name: str, runs: parametric.Runs, loss: Loss, arguments, notes: list[str]) -> tuple[dict, group_.Group]:
    """Prints the fit; returns it for JSON and for a page."""
    notes, best, test, ends, laws = list(notes), [], None, None, []
    if arguments.form == "isoflop":
        for option in ("backtest", "budget", "task", "profile"):
            if getattr(arguments, option):
                raise ConfigError(f"--{option} needs a law L(N, D); isoflop is none. Use --form chinchilla.")
        found = isoflop.fit(runs, arguments.resamples, arguments.seed)
        formula, loss, method = isoflop.FORMULA, Loss("lsq", loss.delta, "sum"), ISOFLOP
    else:
        if arguments.backtest:  # before the fit, which takes longer
            optimum.check_backtest(runs, arguments.backtest)
        grid = math.ceil(math.sqrt(arguments.starts))
        found = parametric.fit(arguments.form, runs, loss, arguments.resamples, arguments.seed, grid=grid)
        formula, method = found.form.formula, KIND_NAMES[loss.kind].format(**dataclasses.asdict(loss))
    notes += found.warnings
    lines = [
        f"{name + ': ' if name else ''}{formula}",
        f"{method}; {len(runs)} runs; N is {runs.n_name}; C {runs.counted}; D is {runs.d_name}.",
    ]
    lines += [f"Intervals: 95 %, {arguments.resamples} draws of the runs with replacement, seed {arguments.seed}.", ""]
    lines += printing.table(
        ("coefficient", "value", "95 % low", "95 % high"),
        [(key, value, *found.intervals[key]) for key, value in found.coefficients.items()],
    )
    lines.append(f"objective {found.objective:.8g}")
    out = {
        "form": arguments.form,
        "coefficients": found.coefficients,
        "intervals": {key: list(map(printing.finite, pair)) for key, pair in found.intervals.items()},
        "objective": found.objective,
        "loss": dataclasses.asdict(loss)
        if not loss.kind.startswith("lsq")
        else dataclasses.asdict(loss) | {"delta": None},
        "n_runs": len(runs),
        "n": runs.n_name,
        "d": runs.d_name,
        "compute": runs.counted,
    }
    if name:
        out["arch"] = name
    if arguments.profile:
        ends = profile.profile(found)
        lines += ["", "Profile likelihood, 95 % (Huber likelihood with a fitted scale, delta 1.345; - : no end):"]
        lines += printing.table(("coefficient", "95 % low", "95 % high"), [(key, *pair) for key, pair in ends.items()])
        out["profile"] = {key: list(map(printing.finite, pair)) for key, pair in ends.items()}
    for column in arguments.task:
        task = tasks.fit(column, arguments.task_form, runs.tasks[column], found, arguments.resamples, arguments.seed)
        laws.append(task)
        lines += ["", *tasks.as_lines(task)]
        notes += task.warnings
        out.setdefault("tasks", []).append(tasks.as_json(task, found, arguments.budget, arguments.compute_model))
    if arguments.budget:
        best = [optimum.optimum(found, budget, arguments.compute_model) for budget in arguments.budget]
        lines += ["", f"Optimum of a budget, C {arguments.compute_model}:"]
        lines += printing.table(
            ("C, FLOPs", "N", "low", "high", "D", "low", "high", "loss", "low", "high"),
            [(b.flops, b.n, *b.n_interval, b.d, *b.d_interval, b.loss, *b.loss_interval) for b in best],
        )
        notes += [f"At {b.flops:.3g} FLOPs the law has no optimum within the searched sizes." for b in best if b.edge]
        hardware = hardware_days.chosen(arguments)
        lines += ["", f"Time at {arguments.mfu:.0%} of the bfloat16 peak (MFU):"]
        lines += printing.table(
            ("C, FLOPs", *(h.name for h in hardware)),
            [(f"{b.flops:.5g}", *(hardware_days.time(h.days(b.flops)) for h in hardware)) for b in best],
        )
        out["mfu"] = arguments.mfu
        out["optimal"] = [
            printing.plain(dataclasses.asdict(b))
            | {"compute": arguments.compute_model, "days": {h.name: h.days(b.flops) for h in hardware}}
            for b in best
        ]
    if arguments.backtest:
        test = optimum.backtest(arguments.form, runs, arguments.backtest, loss, arguments.resamples, arguments.seed)
        lines += ["", *_backtest(test, out)]
    out["warnings"] = notes
    print("\n".join(lines + [f"Warning: {note}" for note in notes]))
    return out, group_.Group(name, found, tuple(notes), tuple(best), test, tuple(laws), ends)


def _backtest(test: optimum.Backtest, out: dict) -> list[str]:
    mean = float(np.abs(test.error).mean())
    bounded = bool(np.isfinite(test.low).all())
    out["backtest"] = {
        "mean_absolute_error": mean,
        "covered": test.covered if bounded else None,
        "runs": [
            printing.plain({"name": m, "n": n, "d": d, "loss": y, "predicted": p, "interval": (a, b), "error": e})
            for m, n, d, y, p, a, b, e in zip(
                test.names, test.n, test.d, test.loss, test.predicted, test.low, test.high, test.error
            )
        ],
    }
    held = "no interval" if not bounded else f"{test.covered} of {len(test.n)} inside their 95 % interval"
    return [
        f"Backtest: fitted to {len(test.fit.runs)} runs, the {len(test.n)} of greatest compute predicted; mean absolute "
        f"error {100 * mean:.3f} %, {held}.",
        *printing.table(
            ("run", "N", "D", "loss", "predicted", "low", "high", "error %"),
            list(zip(test.names, test.n, test.d, test.loss, test.predicted, test.low, test.high, 100 * test.error)),
        ),
    ]


FORMS = (*forms.FORMS, "isoflop")
