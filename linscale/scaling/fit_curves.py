"""`linscale fit curves.csv --form envelope`: L(C), N_opt(C) and D_opt(C) from anyone's training curves (laws.py).

A row is a point of a curve: the run (--run), its N, the tokens seen or the compute spent until then, the loss there.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np

from linscale.config import ConfigError
from linscale.scaling import hardware_days, laws, printing, tables
from linscale.scaling.flops import PF_DAY

RUNS = ("run", "run_name", "name", "run_id")


def main(arguments: argparse.Namespace) -> int:
    smoothing = laws.SMOOTHING if arguments.smoothing is None else arguments.smoothing
    options = laws.Options("train", "exact", arguments.resamples, arguments.seed, smoothing, arguments.bins)
    columns = tables.Columns(
        *(getattr(arguments, option) for option in ("n", "d", "loss", "flops")), where=tuple(arguments.where)
    )
    results, fits, lines, said = [], {}, {}, []
    counted = "6 N D" if arguments.flops is None else "as counted"
    groups = read(arguments.folder[0], columns, arguments.run, arguments.group)
    if arguments.skip is None:
        options = laws.settled([group for group, _ in groups.values()], options)
    else:
        options = dataclasses.replace(options, skip=arguments.skip)
    for name, (group, notes) in groups.items():
        try:
            found = laws.fit_curves(name or "The file", group, options)
        except ConfigError as error:
            if arguments.group is None:
                raise
            print(f"{error}\n")
            continue
        if len(group) < 4:
            notes.append(f"Only {len(group)} curves: the intervals cannot be trusted.")
        if found.ends_taken:
            notes.append(laws.ENDS_TAKEN.format(name or "the file"))
        if found.late:
            notes.append(laws.LATE.format(name or "the file") + " Give a lower --skip if the curves are good there.")
        if found.failed:
            notes.append(f"{found.failed} of {found.draws} draws of the runs could not be fitted.")
        fits[name], lines[name] = found, [laws.Line(c.name, c.n, c.compute, c.loss) for c in group]
        said += [f"{name}: {note}" if name else note for note in notes]
        print("\n".join(as_lines(name, found, options, arguments.n, counted, notes)) + "\n")
        results.append(as_json(name, found, options, arguments.n, counted, notes))
    if not results:
        raise ConfigError("No group of curves can be fitted; the sentences above say why.")
    if arguments.json:
        content = results[0] if arguments.group is None else {"fits": results}
        Path(arguments.json).write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if arguments.report:
        print(_report(arguments, options, fits, lines, said, counted, results))
    return 0


def _report(arguments, options: laws.Options, fits, lines, notes: list[str], counted: str, results: list[dict]) -> Path:
    from linscale.scaling import envelope_page  # draws: matplotlib

    about = envelope_page.About(
        loss="loss",
        compute={"6 N D": "6 N D", "as counted": f"the column {arguments.flops!r}"}[counted],
        n=f"the column {arguments.n!r}",
        options=options,
        hardware=hardware_days.chosen(arguments)[0],
    )
    source = Path(arguments.folder[0]).name
    return envelope_page.write(Path(arguments.report), source, lines, fits, notes, about, {"fits": results})


def read(path, columns: tables.Columns, run: str | None, group: str | None) -> dict[str, tuple[list[laws.Curve], list]]:
    """Curves and notes by group. Raises ConfigError for a run of two sizes, and what tables.py refuses."""
    out = {}
    for name, (points, notes, rows) in tables.read_points(path, columns, group).items():
        column = run or next((key for key in RUNS if key in rows[0]), None)
        if column is None or not any(column in row for row in rows):
            raise ConfigError(
                f"{path} needs --run COLUMN, which tells the curves apart: {', '.join(map(str, rows[0]))}."
            )
        members = {}
        for i, row in enumerate(rows):
            members.setdefault(str(row.get(column)), []).append(i)
        curves, short = [], []
        for key, places in members.items():
            sizes = np.unique(points.n[places])
            if len(sizes) > 1:
                raise ConfigError(
                    f"{path}: the run {key!r} has {len(sizes)} sizes N; --run must tell the curves apart."
                )
            # A point that occurs twice counts as last seen.
            last = {points.compute[i]: i for i in places}
            places = [last[c] for c in sorted(last)]
            if len(places) < 2:
                short.append(key)
                continue
            part = points.take(np.array(places))
            curves.append(laws.Curve(key, float(sizes[0]), part.compute / PF_DAY, part.d, part.loss))
        if short:
            notes.append(f"Curves of a single point are left out: {', '.join(short[:5])}{' ...' * (len(short) > 5)}.")
        if len(curves) < laws.MIN_RUNS:
            raise ConfigError(f"{path}{': ' + name if name else ''} has {len(curves)} curves; an envelope needs two.")
        out[name] = curves, notes
    return out


def settings(options: laws.Options) -> str:
    smooth = f"smoothed by local lines, Gaussian sd {options.window:g} decades" if options.window else "not smoothed"
    return f"{options.bins} bins a decade of C; {smooth}; the first {options.skip:.0%} of each run left out"


def as_lines(name: str, found: laws.Fit, options: laws.Options, n: str, counted: str, notes) -> list[str]:
    rows = [(key, value, *ends) for key, (value, ends) in found.coefficients.items()]
    return [
        f"{name + ': ' if name else ''}L, N_opt and D_opt = coefficient C^exponent on the envelope of {len(found.runs)} curves",
        f"C in PFLOP/s-days, {counted}; N is {n}; {settings(options)}.",
        f"Least squares of logarithms over {len(found.compute)} bins, C {found.compute[0]:.2g} to {found.compute[-1]:.2g}.",
        f"Intervals: 95 %, {found.draws} draws of the curves with replacement, seed {options.seed}.",
        "",
        *printing.table(("coefficient", "value", "95 % low", "95 % high"), rows),
        f"rms of log L about the law: {found.rms:.4g}",
        *(f"Warning: {note}" for note in notes),
    ]


def as_json(name: str, found: laws.Fit, options: laws.Options, n: str, counted: str, notes) -> dict:
    values = found.coefficients
    out = {
        "form": "envelope",
        "coefficients": {key: value for key, (value, _) in values.items()},
        "intervals": {key: list(map(printing.finite, ends)) for key, (_, ends) in values.items()},
        "objective": float(len(found.compute) * found.rms**2 / 2),
        "loss": {"kind": "lsq", "delta": None, "reduction": "sum"},
        "n_runs": len(found.runs),
        "n": n,
        "compute": {"accounting": counted, "unit": "PFLOP/s-days"},
        "bins_per_decade": options.bins,
        "smoothing_decades": options.window,
        "skipped_share": options.skip,
        "envelope": {
            "compute": found.compute.tolist(),
            "loss": found.envelope.tolist(),
            "n": list(map(printing.finite, found.n_opt.points)),
            "d": list(map(printing.finite, found.d_opt.points)),
            "run": list(found.best),
        },
        "warnings": list(notes),
    }
    return out | ({"arch": name} if name else {})
