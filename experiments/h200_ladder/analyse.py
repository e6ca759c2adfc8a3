"""Tables of a finished ladder of configs/books.py: its runs as CSV, its laws, the largest rung predicted, the noise.

    python experiments/h200_ladder/analyse.py runs/books --unique TOKENS --seeds runs/books_seeds --sweep runs/books_sweep --out DIR

Writes DIR/runs.csv (a row a run), DIR/points.csv (a row a held-out evaluation), DIR/sweep.csv and DIR/laws.json, and
prints the tables of a report. The largest rung is predicted from the smaller ones: by the envelope law L(C) at its
compute, and by two laws fitted to their held-out evaluations from --from tokens on (the learning rate is constant, so
every one of them is the end of a run of that length): L(N, D) = E + A / N^alpha + B / D^beta, and the same with the
lesser worth of repeated tokens (Muennighoff et al., arXiv 2305.16264), of which --unique are new.
"""

import argparse
import csv
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from linscale.scaling import fit, laws, parametric, runs
from linscale.scaling.appearance import LABELS
from linscale.scaling.flops import PF_DAY


def write(path: Path, rows: list[dict]) -> None:
    with open(path, "w", newline="") as file:
        out = csv.DictWriter(file, rows[0], lineterminator="\n")
        out.writeheader()
        out.writerows(rows)


def row(run: runs.Run) -> dict:
    config = run.config
    return {
        "run": run.name,
        "arch": run.arch,
        "seed": config.seed,
        "layers": config.model.layers,
        "width": config.model.width,
        "parameters": run.parameters.total,
        "nonembedding": run.parameters.nonembedding,
        "learning_rate": f"{config.optimizer.learning_rate:.4g}",
        "tokens_per_step": config.tokens_per_step,
        "tokens": int(run.last.tokens[0]),
        "flops": f"{run.last.flops[0]:.5e}",
        "heldout_loss": f"{run.last.loss[0]:.5f}",
        "heldout_bpb": f"{run.heldout_bpb:.5f}",
        "tokens_per_s": f"{run.tokens_per_s:.0f}",
        "seconds": f"{run.seconds:.1f}" if run.seconds else "",
    }


def points(run: runs.Run) -> list[dict]:
    curve = run.heldout
    return [
        {
            "run": run.name,
            "arch": run.arch,
            "nonembedding": run.parameters.nonembedding,
            "tokens": int(tokens),
            "flops": f"{flops:.5e}",
            "heldout_loss": f"{loss:.5f}",
        }
        for tokens, flops, loss in zip(curve.tokens, curve.flops, curve.loss)
    ]


def predictions(group: list[runs.Run], start: float, unique: float) -> str:
    """One row: the largest run's loss and what the smaller ones say of it."""
    *smaller, largest = sorted(group, key=lambda run: run.parameters.nonembedding)
    end = largest.last
    envelope = laws.fit_runs(smaller, laws.Options(resamples=200))
    said = [envelope.a * (end.flops[0] / PF_DAY) ** envelope.b]
    rows = [p for run in smaller for p in points(run) if p["tokens"] >= start]
    n, d, loss = (np.array([float(p[key]) for p in rows]) for key in ("nonembedding", "tokens", "heldout_loss"))
    shown = [str(len(rows))]
    for form, new in (("chinchilla", None), ("data-constrained", unique)):
        table = parametric.Runs(n, d, loss, unique=None if new is None else np.minimum(d, new))
        surface = parametric.fit(form, table, resamples=0)
        said.append(float(surface.predict(largest.parameters.nonembedding, end.tokens[0], new)))
        shown.append(", ".join(f"{name} {value:.3g}" for name, value in surface.coefficients.items()))
    cells = [LABELS[largest.arch], f"{end.loss[0]:.4f}"]
    cells += [f"{loss:.4f} ({100 * (loss / end.loss[0] - 1):+.2f} %)" for loss in said]
    return f"| {' | '.join([*cells, *shown])} |"


def noise(group: list[runs.Run]) -> str:
    losses = np.array([run.last.loss[0] for run in group])
    shown = ", ".join(f"{loss:.4f}" for loss in losses)
    return f"| {LABELS[group[0].arch]} | {shown} | {losses.std(ddof=1):.4f} | {100 * np.ptp(losses) / losses.mean():.2f} % |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ladder")
    parser.add_argument("--seeds", help="folder of further seeds of one rung")
    parser.add_argument("--sweep", help="folder of the sweep")
    parser.add_argument("--from", dest="start", type=float, default=4e6, help="tokens, of the evaluations in L(N, D)")
    parser.add_argument("--unique", type=float, required=True, help="tokens of the training text")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    ladder = runs.read([args.ladder])
    ordered = [sorted((r for r in ladder.runs if r.arch == a), key=lambda r: r.parameters.nonembedding) for a in LABELS]
    ordered = [group for group in ordered if group]
    seeds = [run for run in runs.read([args.seeds]).runs if run.finished] if args.seeds else []
    write(args.out / "runs.csv", [row(run) for group in [*ordered, seeds] for run in group])
    write(args.out / "points.csv", [p for group in ordered for run in group for p in points(run)])
    fits, notes = laws.fit_ladder(ladder)
    content = fit.as_json(ladder, fits, notes, laws.Options())
    (args.out / "laws.json").write_text(json.dumps(content, indent=1) + "\n")

    print("| architecture |", " | ".join(run.name.rpartition("-")[2] for run in ordered[0]), "|")
    for group in ordered:
        losses = " | ".join(f"{run.last.loss[0]:.3f}" for run in group)
        print(f"| {LABELS[group[0].arch]} | {losses} |")
    print("\n" + fit.as_text(ladder, fits, notes, laws.Options()))
    print(
        "\n| architecture | largest rung | by L(C) | by L(N, D) | with repeats | evaluations | L(N, D) | with repeats |"
    )
    for group in ordered:
        print(predictions(group, args.start, args.unique))
    if seeds:
        print("\n| architecture | seeds 0, 1, 2 | sd | range |")
        for group in ordered:
            again = [run for run in seeds if run.arch == group[0].arch]
            first = [run for run in group if again and run.config.model == again[0].config.model]
            if first:
                print(noise(first + sorted(again, key=lambda run: run.config.seed)))
    if args.sweep:
        rows = [row(run) for run in runs.read([args.sweep]).runs if run.finished]
        write(args.out / "sweep.csv", rows)


if __name__ == "__main__":
    main()
