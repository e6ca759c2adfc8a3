"""`linscale report`: what a ladder has shown, as one HTML page with its figures, and the fits as JSON.

FOLDER/report/index.html is self-contained: figures are inlined and nothing is loaded. Beside the envelope laws it has
the law L(N, D) of every architecture with enough finished runs.
"""

import argparse
import datetime
import json
from pathlib import Path

from linscale.config import Config, ConfigError
from linscale.scaling import envelope_page, hardware_days, laws, plots, runs
from linscale.scaling.appearance import LABELS
from linscale.scaling.drawing import save
from linscale.scaling.fit import COMPUTE_NAMES, LOSS_NAMES, add_options, as_json, as_text, chosen, short
from linscale.scaling.flops import PF_DAY
from linscale.scaling.page import Markup, chip, element, escape, figure, page, power, table

DEFAULTS = laws.Options()
HARDWARE = hardware_days.Hardware(hardware_days.parse(hardware_days.DEFAULT[0]), hardware_days.MFU)
NONE = envelope_page.NONE


def main(argv: list[str]) -> int:
    """Writes the report, prints the laws and, last, the path of the page. ConfigError if there is nothing to report."""
    parser = argparse.ArgumentParser(
        prog="linscale report", description="Write an HTML report with plots of a ladder's runs and laws."
    )
    parser.add_argument("folder", help="output folder of a ladder; the report goes to FOLDER/report")
    add_options(parser)
    hardware_days.add_options(parser)
    parser.add_argument("--budget", type=float, nargs="+", default=[], metavar="FLOPS", help="of the table of budgets")
    arguments = parser.parse_args(argv)
    budgets = hardware_days.budgets(arguments.budget)
    print(write(Path(arguments.folder), chosen(arguments), print, hardware_days.chosen(arguments)[0], budgets))
    return 0


def write(
    folder: Path,
    options: laws.Options = DEFAULTS,
    say=lambda text: None,
    hardware: hardware_days.Hardware = HARDWARE,
    budgets: tuple[float, ...] = (),
) -> Path:
    """Writes folder/report and says the laws as a table; see write_to."""
    return write_to(folder / "report", runs.read([folder]), str(folder), options, say, hardware, budgets)


def write_to(target: Path, ladder: runs.Ladder, source: str, options, say, hardware, budgets=()) -> Path:
    """Writes target/index.html, figures, fit.json. Returns the path of index.html; says the laws as a table.

    source: of the runs, for errors; budgets: in FLOPs. Without two finished runs of any architecture there are no laws,
    but still a report.
    """
    begun = [run for run in ladder.runs if len(run.last)]
    if not begun:
        raise ConfigError(f"{source} has no run with a logged loss; train first, with `linscale ladder` or `train`.")
    fits, notes = laws.fit_ladder(ladder, options)
    say(as_text(ladder, fits, notes, options) if fits else "No law can be fitted. " + " ".join(notes))
    about = envelope_page.About(
        loss=LOSS_NAMES[options.loss],
        compute=COMPUTE_NAMES[options.compute],
        n=runs.SIZES[options.n],
        options=options,
        hardware=hardware,
        budgets=tuple(budget / PF_DAY for budget in budgets),
    )
    try:
        target.mkdir(parents=True, exist_ok=True)
        for old in [*target.glob("*.png"), *target.glob("*.svg")]:  # of architectures that are no longer there
            old.unlink()
        content = as_json(ladder, fits, notes, options)
        body = _body(ladder, begun, fits, notes, about, target)
        surface = _surface(ladder, about, budgets, target)
        if surface:
            parts, content["L(N, D)"] = surface
            body[-3:-3] = parts  # before the table of runs
        (target / "fit.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        index = target / "index.html"
        index.write_text(page(_title(begun), [part for part in body if part]), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"The report cannot be written to {target}: {error.strerror}.") from error
    return index


def _archs(begun: list[runs.Run]) -> list[str]:
    return [arch for arch in LABELS if any(run.arch == arch for run in begun)]


def _title(begun: list[runs.Run]) -> str:
    return f"Scaling laws of {_count(len(_archs(begun)), 'architecture')}"


def _body(ladder, begun, fits, notes, about: envelope_page.About, target: Path) -> list[Markup]:
    lines = {arch: plots.lines([run for run in begun if run.arch == arch], about.options) for arch in _archs(begun)}
    sizes = plots.against_parameters([run for run in begun if run.finished] or begun)
    return [
        element(
            "header",
            element("h1", _title(begun)),
            element("p", _lead(begun), class_="lead"),
            element("p", envelope_page.how(about)),
        ),
        envelope_page.warnings(notes),
        envelope_page.cards(fits),
        *envelope_page.sections(fits, about, target),
        *envelope_page.against_compute(lines, fits, about, target),
        element("h2", "Loss against size"),
        figure(save(sizes, "parameters", target), "Held-out loss at the end of each run. Runs of different size may also "
               "differ in the number of tokens: see the table."),
        element("h2", "Training curves"),
        figure(save(plots.training_curves(begun), "training", target), "Lines: training loss of single batches. Points: "
               "held-out loss. The stronger the colour, the larger the model."),
        Markup(element("h2", "All runs") + _runs(ladder)),
        Markup(element("h2", "How the laws were fitted") + envelope_page.method(about)),
        element("p", Markup(envelope_page.FILES), class_="muted"),
    ]  # fmt: skip


def _surface(ladder, about: envelope_page.About, budgets, target: Path) -> tuple[list[Markup], list[dict]] | None:
    """L(N, D) of the ends of the runs, for architectures with more runs than coefficients; None if there are none."""
    counts = [sum(run.finished and run.arch == arch for run in ladder.runs) for arch in LABELS]
    if max(counts) <= 5:
        return None
    from linscale.scaling import ladder_surface  # needs jax

    return ladder_surface.sections(ladder, about, budgets, target)


def _count(number: int, noun: str) -> str:
    words = ("no", "one", "two", "three", "four", "five", "six")
    return f"{words[number] if number < len(words) else number} {noun}{'' if number == 1 else 's'}"


def _lead(begun: list[runs.Run]) -> Markup:
    """What was trained, on which data, when."""
    names = ", ".join(LABELS[arch] for arch in _archs(begun))
    sizes = [run.parameters.nonembedding for run in begun]
    tokens = [run.last.tokens[0] for run in begun]
    day = datetime.datetime.fromtimestamp(max(run.changed for run in begun))
    size = short(sizes[0]) if len(set(sizes)) == 1 else f"{short(min(sizes))} to {short(max(sizes))}"
    length = short(tokens[0]) if len(set(tokens)) == 1 else f"{short(min(tokens))} to {short(max(tokens))}"
    total = sum(run.last.flops[0] for run in begun)
    seconds = sum(run.seconds or 0 for run in begun)
    return Markup(
        f"{len(begun)} language model{'' if len(begun) == 1 else 's'} ({names}) with {size} parameters without embedding, "
        f"trained on {length} tokens each of {escape(_data(begun))}. "
        f"The last one ended on {day.day} {day:%B %Y}; together they took {_time(seconds)} and {power(total)} FLOPs, "
        f"which is {power(total / PF_DAY)} PFLOP/s-days."
    )


def _data(begun: list[runs.Run]) -> str:
    def name(config: Config) -> str:
        data = config.data
        text = "the text of the Python standard library" if data.source == "stdlib" else f"{data.source} {data.path}"
        return f"{text}, {'one token a byte' if data.tokenizer == 'bytes' else f'tokenizer {data.tokenizer}'}"

    names = " and ".join(dict.fromkeys(name(run.config) for run in begun))
    ratios = {round(run.data["bytes_per_token"], 2) for run in begun if run.data.get("bytes_per_token")}
    return names + (f" ({ratios.pop():g} bytes a token)" if len(ratios) == 1 and ratios != {1.0} else "")


def _time(seconds: float) -> str:
    if seconds < 5400:
        return f"{seconds / 60:.1f} minutes"
    return f"{seconds / 3600:.1f} hours" if seconds < 200_000 else f"{seconds / 86_400:.1f} days"


def _runs(ladder: runs.Ladder) -> Markup:
    head = ["run", "architecture", "parameters", "without embedding", "without it, with head", "tokens", "FLOPs"]
    head += ["held-out loss, nats/token", "bits per byte", "tokens/s", "minutes"]
    order = {arch: i for i, arch in enumerate(LABELS)}
    rows = []
    for run in sorted(ladder.runs, key=lambda run: (order[run.arch], run.parameters.nonembedding)):
        end, counted = run.last, run.parameters
        rows.append(
            [
                run.name + ("" if run.finished else " (unfinished)"),
                chip(run.arch, LABELS[run.arch]),
                f"{counted.total:,}",
                f"{counted.nonembedding:,}",
                f"{counted.nonembedding_with_head:,}",
                f"{int(end.tokens[0]):,}" if len(end) else NONE,
                power(end.flops[0]) if len(end) else NONE,
                f"{run.heldout.loss[-1]:.4f}" if len(run.heldout) else NONE,
                f"{run.heldout_bpb:.4f}" if run.heldout_bpb is not None else NONE,
                f"{run.tokens_per_s:,.0f}" if run.tokens_per_s is not None else NONE,
                f"{run.seconds / 60:.2f}" if run.seconds is not None else NONE,
            ]
        )
    rows += [[f"{name} (not started)", *[NONE] * (len(head) - 1)] for name in ladder.missing]
    return table(head, rows, words=2)
