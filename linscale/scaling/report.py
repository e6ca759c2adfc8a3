"""`linscale report`: what a ladder has shown, as one HTML page with its figures, PNG files, and the fit as JSON.

FOLDER/report/index.html is self-contained: figures are inlined and nothing is loaded.
"""

import argparse
import datetime
import json
from pathlib import Path

from linscale.config import Config, ConfigError
from linscale.scaling import laws, paper, plots, runs
from linscale.scaling.appearance import LABELS
from linscale.scaling.drawing import Drawn, save
from linscale.scaling.fit import COMPUTE_NAMES, LOSS_NAMES, add_options, as_json, as_text, chosen, short
from linscale.scaling.flops import PF_DAY
from linscale.scaling.page import Markup, Number, chip, element, escape, figure, minus, page, power, table

DEFAULTS = laws.Options()
NONE = "\N{EN DASH}"  # a cell without a value


def main(argv: list[str]) -> int:
    """Writes the report, prints the laws and, last, the path of the page. ConfigError if there is nothing to report."""
    parser = argparse.ArgumentParser(
        prog="linscale report", description="Write an HTML report with plots of a ladder's runs and laws."
    )
    parser.add_argument("folder", help="output folder of a ladder; the report goes to FOLDER/report")
    add_options(parser)
    arguments = parser.parse_args(argv)
    print(write(Path(arguments.folder), chosen(arguments), print))
    return 0


def write(folder: Path, options: laws.Options = DEFAULTS, say=lambda text: None) -> Path:
    """Writes folder/report: index.html, PNG files, fit.json. Returns the path of index.html; says the laws as a table.

    Without two finished runs of any architecture there are no laws, but still a report.
    """
    ladder = runs.read([folder])
    begun = [run for run in ladder.runs if len(run.last)]
    if not begun:
        raise ConfigError(f"{folder} has no run with a logged loss; train first, with `linscale ladder` or `train`.")
    fits, notes = laws.fit_ladder(ladder, options)
    say(as_text(ladder, fits, notes, options) if fits else "No law can be fitted. " + " ".join(notes))
    target = folder / "report"
    try:
        target.mkdir(exist_ok=True)
        for old in [*target.glob("*.png"), *target.glob("*.svg")]:  # of architectures that are no longer there
            old.unlink()
        figures = _figures(begun, fits, options, target)
        content = json.dumps(as_json(ladder, fits, notes, options), indent=1)
        (target / "fit.json").write_text(content + "\n", encoding="utf-8")
        index = target / "index.html"
        index.write_text(_document(ladder, begun, fits, notes, figures, options), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"The report cannot be written to {target}: {error.strerror}.") from error
    return index


def _archs(begun: list[runs.Run]) -> list[str]:
    return [arch for arch in LABELS if any(run.arch == arch for run in begun)]


def _figures(begun: list[runs.Run], fits: dict[str, laws.Fit], options: laws.Options, target: Path) -> dict[str, Drawn]:
    """Figures for the page by name; PNG and SVG of the same name lie in target."""
    drawn = {"comparison": plots.comparison(fits, options)} if fits else {}
    for arch in _archs(begun):
        group = [run for run in begun if run.arch == arch]
        drawn[f"compute-{arch}"] = plots.against_compute(arch, group, fits.get(arch), options)
    drawn["parameters"] = plots.against_parameters([run for run in begun if run.finished] or begun)
    drawn["training"] = plots.training_curves(begun)
    return {name: save(drawing, name, target) for name, drawing in drawn.items()}


def _document(ladder, begun, fits, notes, figures, options) -> str:
    archs = _archs(begun)
    title = f"Scaling laws of {_count(len(archs), 'architecture')}"
    body = [
        element("header", element("h1", title), element("p", _lead(begun), class_="lead"), element("p", _how(options))),
        _notes(notes),
        _cards(fits),
    ]
    if fits:
        caption = (
            "Solid: the law over the compute it was fitted to, with its 95 % band. Points: the lower envelope of the "
            "training curves. Dashed: extrapolation."
        )
        body += [
            element("h2", "The laws side by side"),
            element("p", _verdict(fits)),
            figure(figures["comparison"], caption),
            element("h2", "Coefficients"),
            _coefficients(fits),
            element("p", _COMPARABLE, class_="muted"),
        ]
    per_arch = [figure(figures[f"compute-{arch}"], "") for arch in archs]
    body += [
        element("h2", "Loss against compute"),
        element("p", "Every curve is one run and ends with its number of parameters without embedding."),
        element("div", *per_arch, class_="pair"),
        element("h2", "Loss against size"),
        figure(figures["parameters"], "Held-out loss at the end of each run. Runs of different size may also differ in "
               "the number of tokens: see the table."),
        element("h2", "Training curves"),
        figure(figures["training"], "Lines: training loss of single batches. Points: held-out loss. "
               "The stronger the colour, the larger the model."),
        element("h2", "All runs"),
        _runs(ladder),
        element("h2", "How the laws were fitted"),
        _method(options),
        element("p", Markup(_FILES), class_="muted"),
    ]  # fmt: skip
    return page(title, body)


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


def _how(options: laws.Options) -> Markup:
    return Markup(
        f"The law <i>L</i>(<i>C</i>) = <i>a C<sup>b</sup></i> of an architecture says what loss <i>L</i> the best of its "
        f"models reaches with compute <i>C</i>; the more negative <i>b</i>, the more compute helps. <i>L</i> is the "
        f"{escape(LOSS_NAMES[options.loss])} in nats per token, <i>C</i> is in PFLOP/s-days, in "
        f"{escape(COMPUTE_NAMES[options.compute])}."
    )


def _notes(notes: list[str]) -> Markup:
    if not notes:
        return Markup("")
    return element(
        "div", element("b", "To keep in mind"), element("ul", *(element("li", n) for n in notes)), class_="notes"
    )


def _cards(fits: dict[str, laws.Fit]) -> Markup:
    cards = []
    for arch, fit in fits.items():
        law = Markup(f"{fit.a:#.3g} <i>C</i>&#8201;<sup>{minus(fit.b, 4)}</sup>")
        span = f"b between {minus(fit.b_interval[0], 4)} and {minus(fit.b_interval[1], 4)} (95 %)"
        best = Markup(f"loss {fit.envelope[-1]:.4f} at C = {power(fit.compute[-1], 1)}")
        children = chip(arch, LABELS[arch]), element("b", law), element("small", span), element("small", best)
        cards.append(element("div", *children, class_="card", style=f"border-color:var(--{arch})"))
    return element("div", *cards, class_="cards") if cards else Markup("")


def _at_common_compute(fits: dict[str, laws.Fit]) -> tuple[float, dict[str, tuple[float, float, float]]]:
    """The largest compute that every envelope reaches, and there loss, low, high of each law; {} if there is none."""
    shared = set.intersection(*(set(fit.compute.tolist()) for fit in fits.values()))
    if not shared:
        return 0.0, {}
    at = max(shared)
    places = {arch: fit.compute.tolist().index(at) for arch, fit in fits.items()}
    return at, {arch: (fit(at), *map(float, fit.band[:, places[arch]])) for arch, fit in fits.items()}


def _verdict(fits: dict[str, laws.Fit]) -> Markup:
    """One paragraph: who is lowest at the largest common compute, and who cannot be told from it."""
    at, losses = _at_common_compute(fits)
    if len(losses) < 2:
        return Markup("")
    best = min(losses, key=lambda arch: losses[arch][0])
    loss, low, high = losses[best]
    rivals = [arch for arch in losses if arch != best and losses[arch][1] <= high]
    text = (
        f"At C = {power(at, 1)} PFLOP/s-days, the largest compute that all of them reached, {LABELS[best]} has the "
        f"lowest fitted loss: {loss:.3f} nats per token, 95 % from {low:.3f} to {high:.3f}. "
    )
    if rivals:
        names = " and ".join(LABELS[arch] for arch in rivals)
        return Markup(
            text + (f"The bands of {names} overlap" if rivals[1:] else f"The band of {names} overlaps") + " with it."
        )
    return Markup(text + "No other band overlaps with it.")


_COMPARABLE = (
    "Paper: table 3 of arXiv 2406.16690 (hybrid: MiniMax-01, arXiv 2501.08313), models of 70M to 7B parameters, without "
    "intervals. Its a is a loss per token of its own tokenizer and corpus at C = 1, which for a small ladder is a far "
    "extrapolation, and its C uses the paper's accounting: compare b, and the order of the architectures, rather than a."
)


_FILES = (
    'The figures lie beside this page as PNG and SVG files; <a href="fit.json">fit.json</a> holds laws and envelopes.'
)


def _coefficients(fits: dict[str, laws.Fit]) -> Markup:
    at, losses = _at_common_compute(fits)
    head = ["architecture", "runs", "a", "b", "paper's a", "paper's b", "fitted over C", "scatter"]
    if losses:
        head.append(Markup(f"loss at C = {power(at, 1)}"))
    rows = []
    for arch, fit in fits.items():
        published = paper.laws(arch)
        row = [
            chip(arch, LABELS[arch]),
            len(fit.runs),
            _with_interval(fit.a, *fit.a_interval),
            _with_interval(fit.b, *fit.b_interval),
            f"{published.loss.coefficient:.4f}" if published else NONE,
            minus(published.loss.exponent, 4) if published else NONE,
            Number(Markup(f"{power(fit.compute[0], 1)} … {power(fit.compute[-1], 1)}"), fit.compute[-1]),
            f"{100 * fit.rms:.1f} %",
        ]
        if losses:
            row.append(_with_interval(*losses[arch]))
        rows.append(row)
    return table(head, rows)


def _with_interval(value: float, low: float, high: float) -> Number:
    return Number(Markup(f"{minus(value, 4)}<small>{minus(low, 4)} … {minus(high, 4)}</small>"), value)


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


def _method(options: laws.Options) -> Markup:
    smoothing = (
        f"smoothed by a local straight line with Gaussian weights of {laws.SMOOTHING:g} decades"
        if options.loss == "train"
        else "interpolated linearly in logarithms"
    )
    points = {
        "Curves": f"{LOSS_NAMES[options.loss].capitalize()} of every finished run against compute, without the warm-up "
        f"(twice its length) and the first {laws.SKIP_SHARE:.0%} of a run's tokens; {smoothing}.",
        "Envelope": f"The least loss of any run in bins of {1 / laws.BINS_PER_DECADE:g} decade of compute, from where a "
        "second run begins to speak, without bins whose loss was reached with less compute.",
        "Law": "Least squares of log L on log C over the bins, without an irreducible loss, as in the paper.",
        "Intervals": f"{options.resamples:,} times the runs of an architecture are drawn again with replacement, and "
        f"envelope and law are made anew; 95 % percentiles (seed {options.seed}). They hold what the choice of runs "
        "changes, not another corpus or another form of the law; with few runs they are rather too narrow.",
        "Scatter": "Root mean square of the envelope about the law, in per cent of the loss.",
        "Compute": f"{COMPUTE_NAMES[options.compute].capitalize()}; 1 PFLOP/s-day is 8.64e19 operations. FLOPs in the "
        "table of runs are always in the exact accounting.",
        "Parameters": "Input and output embedding are one matrix; 'with head' counts it once, as output.",
    }
    return element(
        "dl", *(item for name, text in points.items() for item in (element("dt", name), element("dd", text)))
    )
