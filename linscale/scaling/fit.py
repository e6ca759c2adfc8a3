"""`linscale fit`: the scaling law of every architecture of a ladder, or of any table of runs, as a table and as JSON.

The envelope law (laws.py) is the default for ladders; the forms of L(N, D) are in fit_forms.py, which needs jax.
"""

import argparse
import json
import math
from pathlib import Path

from linscale.config import ConfigError
from linscale.scaling import hardware_days, laws, paper, runs

LOSS_NAMES = {"heldout": "held-out loss", "train": "smoothed training loss"}
COMPUTE_NAMES = {
    "exact": "the exact accounting (as the trainer counted: causal attention, output head)",
    "paper": "the paper's accounting (full n x n attention, no output head)",
}


def as_json(ladder: runs.Ladder, fits: dict[str, laws.Fit], notes: list[str], options: laws.Options) -> dict:
    """Everything that a later stage may want of the fits; plain numbers, strings and lists."""
    by_name = {run.name: run for run in ladder.runs}
    results = []
    for arch, fit in fits.items():
        published = paper.laws(arch)
        results.append(
            {
                "arch": arch,
                "coefficients": {"a": fit.a, "b": fit.b},
                "intervals": {"a": list(fit.a_interval), "b": list(fit.b_interval)},
                "paper": published and {"a": published.loss.coefficient, "b": published.loss.exponent},
                "n_runs": len(fit.runs),
                "runs": list(fit.runs),
                "params_nonembedding": [by_name[name].parameters.nonembedding for name in fit.runs],
                "rms_log_residual": fit.rms,
                "draws": fit.draws,
                "failed_draws": fit.failed,
                "envelope": {
                    "compute": fit.compute.tolist(),
                    "loss": fit.envelope.tolist(),
                    "run": list(fit.best),
                    "law_low": fit.band[0].tolist(),
                    "law_high": fit.band[1].tolist(),
                    "n": [float(n) if n == n else None for n in fit.n_opt.points],
                    "d": [float(d) if d == d else None for d in fit.d_opt.points],
                },
                "n_opt": power_as_json(fit.n_opt, published and published.parameters),
                "d_opt": power_as_json(fit.d_opt, published and published.tokens),
            }
        )
    return {
        "form": "L(C) = a C^b",
        "method": "lower envelope of training curves, least squares in logarithms, bootstrap over runs",
        "loss": {"kind": options.loss, "unit": "nats per token"},
        "bins_per_decade": options.bins,
        "smoothing_decades": options.window,
        "skipped_share": options.skip,
        "compute": {"accounting": options.compute, "unit": "PFLOP/s-days"},
        "parameters": f"{runs.SIZES[options.n]}, exact",
        "n": options.n,
        "seed": options.seed,
        "fits": results,
        "warnings": notes,
    }


def power_as_json(law: laws.Power, published: paper.PowerLaw | None) -> dict:
    return {
        "coefficient": law.coefficient,
        "exponent": law.exponent,
        "intervals": {"coefficient": list(law.coefficient_interval), "exponent": list(law.exponent_interval)},
        "paper": published and {"coefficient": published.coefficient, "exponent": published.exponent},
    }


def as_text(ladder: runs.Ladder, fits: dict[str, laws.Fit], notes: list[str], options: laws.Options) -> str:
    by_name = {run.name: run for run in ladder.runs}
    lines = [
        f"L(C) = a C^b on the lower envelope of the {LOSS_NAMES[options.loss]}, nats per token.",
        f"C in PFLOP/s-days, {COMPUTE_NAMES[options.compute]}. N is {runs.SIZES[options.n]}.",
        f"Intervals: 95 %, {options.resamples} draws of the runs with replacement, seed {options.seed}.",
        "",
        f"{'arch':<10}  {'runs':>4}  {'N':>13}  {'C':>17}  {'a':>8}  {'95 %':>18}  {'b':>8}  {'95 %':>18}"
        f"  {'paper a':>8}  {'paper b':>8}",
    ]
    lines.append("-" * len(lines[-1]))
    for arch, fit in fits.items():
        sizes = [getattr(by_name[name].parameters, options.n) for name in fit.runs]
        published = paper.laws(arch)
        theirs = (f"{published.loss.coefficient:.4f}", f"{published.loss.exponent:.4f}") if published else ("", "")
        lines.append(
            f"{arch:<10}  {len(fit.runs):>4}  {short(min(sizes)) + ' - ' + short(max(sizes)):>13}  "
            f"{f'{fit.compute[0]:.1e} - {fit.compute[-1]:.1e}':>17}  {fit.a:>8.4f}  "
            f"{interval(fit.a_interval):>18}  {fit.b:>8.4f}  {interval(fit.b_interval):>18}"
            f"  {theirs[0]:>8}  {theirs[1]:>8}"
        )
    lines += ["", "Of the run on the envelope: N_opt(C) = coefficient C^exponent, D_opt(C) likewise.", ""]
    lines.append(
        f"{'arch':<10}  {'':>5}  {'coefficient':>11}  {'95 %':>22}  {'exponent':>8}  {'95 %':>18}  {'paper':>17}"
    )
    lines.append("-" * len(lines[-1]))
    for arch, fit in fits.items():
        published = paper.laws(arch)
        for name, law, theirs in (
            ("N_opt", fit.n_opt, published and published.parameters),
            ("D_opt", fit.d_opt, published and published.tokens),
        ):
            low, high = law.coefficient_interval
            lines.append(
                f"{arch:<10}  {name:>5}  {law.coefficient:>11.4g}  {f'[{low:.3g}, {high:.3g}]':>22}  {law.exponent:>8.4f}"
                f"  {interval(law.exponent_interval):>18}"
                f"  {f'{theirs.coefficient:.3g} C^{theirs.exponent:.4f}' if theirs else '':>17}"
            )
    lines += ["", "The paper's a is per token of its own tokenizer and corpus; compare b rather than a."]
    return "\n".join(lines + [f"Note: {note}" for note in notes])


def interval(bounds: tuple[float, float]) -> str:
    return f"[{bounds[0]:.4f}, {bounds[1]:.4f}]"


def short(number: float) -> str:
    """61234 -> '61.2k', 2.1e9 -> '2.1B', 999,700 -> '1M'."""
    number = float(f"{number:.3g}")
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


# Named here, so that --help needs no jax; fit_forms has the same, and a test compares.
FORMS = ("chinchilla", "chinchilla-no-e", "chinchilla-tied", "kaplan", "data-constrained", "isoflop")
KINDS = ("huber", "lsq", "lsq-unlogged", "huber-scale")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The choices that change an envelope fit; the report has the same."""
    parser.add_argument("--loss", choices=laws.LOSSES, default="heldout", help="which loss to fit (heldout)")
    parser.add_argument("--n", choices=runs.SIZES, default="nonembedding", help="which parameters N is (nonembedding)")
    add_shared_options(parser)


def add_shared_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--compute", choices=runs.ACCOUNTINGS, default="exact", help="how FLOPs are counted (exact)")
    parser.add_argument("--resamples", type=int, default=1000, help="bootstrap draws (1000)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (0)")


def chosen(options: argparse.Namespace) -> laws.Options:
    if not 1 <= options.resamples <= 1_000_000:
        raise ConfigError(f"--resamples is {options.resamples}; it must lie between 1 and 1000000.")
    if options.seed < 0:
        raise ConfigError(f"--seed is {options.seed}; it must be at least 0.")
    smoothing, bins = getattr(options, "smoothing", None), getattr(options, "bins", laws.BINS_PER_DECADE)
    if smoothing is not None and not (math.isfinite(smoothing) and 0 <= smoothing <= 1):
        raise ConfigError(f"--smoothing is {smoothing}; it must lie between 0 (none) and 1 decade of compute.")
    if not 1 <= bins <= 1000:
        raise ConfigError(f"--bins is {bins}; it must lie between 1 and 1000 bins a decade of compute.")
    skip = getattr(options, "skip", None)
    skip = laws.SKIP_SHARE if skip is None else skip
    if not 0 <= skip < 1:
        raise ConfigError(f"--skip is {skip}; it must be at least 0 and below 1, the share of each run left out.")
    n = options.n if options.n in runs.SIZES else "nonembedding"  # of a file: a column
    return laws.Options(options.loss, options.compute, options.resamples, options.seed, smoothing, bins, skip, n)


def add_form_options(parser: argparse.ArgumentParser) -> None:
    """Fits of L(N, D), by fit_forms."""
    parser.add_argument(
        "--form", choices=("envelope", *FORMS), help="of the law (envelope for a ladder, chinchilla for a file)"
    )
    parser.add_argument("--n", metavar="COLUMN", help="of N; for a ladder total, nonembedding, nonembedding_with_head")
    parser.add_argument("--d", metavar="COLUMN", help="of the tokens seen; without it D = C / (6 N)")
    parser.add_argument("--loss", metavar="COLUMN", help="of the final loss, nats per token; envelope: heldout, train")
    parser.add_argument("--flops", metavar="COLUMN", help="of the compute in FLOPs")
    parser.add_argument("--unique", metavar="COLUMN", help="of the unique tokens, for data-constrained")
    parser.add_argument("--where", nargs="+", default=[], metavar="COLUMN=VALUE", help="only these rows; VALUE,VALUE")
    parser.add_argument("--group", metavar="COLUMN", help="a law for each value of it, e.g. the architecture")
    parser.add_argument("--run", metavar="COLUMN", help="envelope of a file: which curve a row belongs to (run, name)")
    parser.add_argument("--smoothing", type=float, metavar="DECADES", help="envelope: of C, sd of the window (0.05)")
    parser.add_argument("--bins", type=int, default=laws.BINS_PER_DECADE, help="envelope: bins a decade of C (10)")
    parser.add_argument(
        "--skip",
        type=float,
        metavar="SHARE",
        help="envelope: of each run left out (0.1; of curves in a file less, if they are best where they begin)",
    )
    parser.add_argument("--joint", action="store_true", help="do the groups share their exponents, or the whole law?")
    parser.add_argument("--profile", action="store_true", help="also intervals by profile likelihood")
    parser.add_argument("--task", nargs="+", default=[], metavar="COLUMN", help="accuracy or error, a law of the loss")
    parser.add_argument("--task-form", choices=("sigmoid", "exponential"), default="sigmoid", help="(sigmoid)")
    parser.add_argument("--loss-kind", choices=KINDS, default="huber", help="what is minimised (huber)")
    parser.add_argument("--delta", type=float, default=1e-3, help="of the Huber loss, in log loss (1e-3)")
    parser.add_argument("--reduction", choices=("sum", "mean"), default="sum", help="of the printed objective (sum)")
    parser.add_argument(
        "--drop-worst",
        type=int,
        default=0,
        metavar="K",
        help="leave out the K runs of highest loss, as arXiv 2404.10102 did with 5 of 245 (0)",
    )
    parser.add_argument("--starts", type=int, default=144, help="about so many, a grid of the exponents (144)")
    parser.add_argument("--backtest", type=int, default=0, metavar="K", help="predict the K runs of greatest compute")
    parser.add_argument("--budget", type=float, nargs="+", default=[], metavar="FLOPS", help="give the optimal N and D")
    parser.add_argument("--compute-model", choices=("6nd", "counted"), default="6nd", help="C of N and D (6nd)")


def main(argv: list[str]) -> int:
    """Prints the table; writes --json. Raises ConfigError for what cannot be fitted."""
    parser = argparse.ArgumentParser(
        prog="linscale fit",
        description="Fit a scaling law to the runs of a ladder, by architecture, or to a CSV or JSONL file of runs.",
    )
    parser.add_argument("folder", nargs="+", metavar="path", help="folder of a ladder, run directories, or one file")
    parser.add_argument("--json", metavar="FILE", help="also write the fits to FILE")
    parser.add_argument("--report", metavar="DIR", help="also write an HTML page with figures to DIR")
    hardware_days.add_options(parser)
    add_form_options(parser)
    add_shared_options(parser)
    arguments = parser.parse_args(argv)
    file = next((path for path in arguments.folder if Path(path).is_file()), None)
    if arguments.json:
        _check_target(Path(arguments.json), file)
    chosen(arguments)
    hardware_days.chosen(arguments)
    if arguments.form is None:
        arguments.form = "chinchilla" if file else "envelope"
    if arguments.form != "envelope":
        from linscale.scaling import fit_forms

        return fit_forms.main(arguments)
    _only_for_forms(arguments)
    if file:
        from linscale.scaling import fit_curves

        return fit_curves.main(arguments)
    arguments.loss = arguments.loss or "heldout"
    if arguments.loss not in laws.LOSSES:
        raise ConfigError(f"--loss is {arguments.loss!r}; for the envelope it must be {' or '.join(laws.LOSSES)}.")
    if arguments.n is not None and arguments.n not in runs.SIZES:
        raise ConfigError(f"--n is {arguments.n!r}; for a ladder it must be one of {', '.join(runs.SIZES)}.")
    return envelope(arguments)


def _only_for_forms(arguments) -> None:
    for option in ("budget", "backtest", "drop_worst", "unique", "task", "joint", "profile"):
        if getattr(arguments, option):
            raise ConfigError(
                f"--{option.replace('_', '-')} is for laws L(N, D), as --form chinchilla; not the envelope."
            )


def _check_target(target: Path, table: str | None) -> None:
    """ConfigError, before the fit, if --json cannot be written there."""
    if table and target.exists() and target.samefile(table):
        raise ConfigError(f"--json is {target}, the table itself; name another file.")
    if target.is_dir() or not target.parent.is_dir():
        raise ConfigError(f"--json is {target}, where no file can be; name a file in a folder that exists.")


def envelope(arguments: argparse.Namespace) -> int:
    options = chosen(arguments)
    ladder = runs.read(arguments.folder)
    fits, notes = laws.fit_ladder(ladder, options)
    if not fits:
        raise ConfigError(" ".join(["No architecture can be fitted.", *notes]))
    print(as_text(ladder, fits, notes, options))
    if arguments.json:
        content = json.dumps(as_json(ladder, fits, notes, options), indent=1)
        try:
            Path(arguments.json).write_text(content + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--json {arguments.json} cannot be written: {error.strerror}.") from error
    if arguments.report:
        from linscale.scaling import report  # draws: matplotlib

        hardware = hardware_days.chosen(arguments)[0]
        print(report.write_to(Path(arguments.report), ladder, arguments.folder[0], options, lambda _: None, hardware))
    return 0
