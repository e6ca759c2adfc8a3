"""What a page says of envelope laws (laws.py), of a ladder or of anyone's curves: cards, coefficients, budgets, method."""

import dataclasses
import json
from pathlib import Path

import numpy as np

from linscale.config import ConfigError
from linscale.scaling import envelope_plots, hardware_days, laws, paper
from linscale.scaling.appearance import style_of
from linscale.scaling.drawing import save
from linscale.scaling.fit import short
from linscale.scaling.flops import PF_DAY
from linscale.scaling.page import Markup, Number, amount, chip, element, escape, figure, minus, page, power, table

NONE = "\N{EN DASH}"  # a cell without a value


@dataclasses.dataclass(frozen=True)
class About:
    """The conventions of the page; every one is named on it."""

    loss: str  # "held-out loss"
    compute: str  # how C is counted
    n: str  # what N is
    options: laws.Options
    hardware: hardware_days.Hardware
    budgets: tuple[float, ...] = ()  # PFLOP/s-days; empty: round ones

    @property
    def loss_label(self) -> str:
        return f"{self.loss} (nats per token)"


def sections(fits: dict[str, laws.Fit], about: About, folder: Path) -> list[Markup]:
    """The laws side by side, as a part of a page; figures are saved in folder."""
    if not fits:
        return []
    caption = (
        "Solid: the law over the compute it was fitted to, with its 95 % band. Points: the lower envelope of the "
        "training curves. Dashed: extrapolation."
    )
    sizes = [
        figure(save(envelope_plots.best_sizes(fits, "n_opt", "N_opt"), "n-opt", folder), f"N_opt: {about.n}."),
        figure(save(envelope_plots.best_sizes(fits, "d_opt", "D_opt (tokens)"), "d-opt", folder), "D_opt: tokens."),
    ]
    return [
        element("h2", "The laws side by side"),
        element("p", _verdict(fits)),
        figure(save(envelope_plots.comparison(fits, about.loss_label), "comparison", folder), caption),
        element("h2", "Coefficients"),
        _coefficients(fits),
        element("p", _COMPARABLE, class_="muted") if any(paper.laws(name) for name in fits) else "",
        element("h2", "Best size and tokens"),
        element(
            "p",
            "The size of the run on the envelope, and the tokens that it had seen there; laws as those of the loss.",
        ),
        element("div", *sizes, class_="pair"),
        element("h2", "What to train with a budget"),
        element("p", f"From the laws of loss, N_opt and D_opt. N is {about.n}; C is {about.compute}."),
        _budgets(fits, about),
    ]


def against_compute(
    groups: dict[str, list[laws.Line]], fits: dict[str, laws.Fit], about: About, folder: Path
) -> list[Markup]:
    drawn = []
    for i, (name, lines) in enumerate(groups.items()):
        sheet = envelope_plots.against_compute(name, i, lines, fits.get(name), about.loss_label, about.n)
        file = f"compute-{name}" if name in paper.TABLE3 or name == "hybrid" else f"compute-{i + 1}"
        drawn.append(figure(save(sheet, file, folder), ""))
    return [
        element("h2", "Loss against compute"),
        element("p", f"Every curve is one run and ends with its size, {about.n}."),
        element("div", *drawn, class_="pair"),
    ]


def write(
    folder: Path, source: str, groups: dict[str, list[laws.Line]], fits, notes: list[str], about: About, numbers
) -> Path:
    """The page of curves of a file: folder/index.html, figures, fit.json. Returns the path of the page."""
    title = f"Envelope laws of {source}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "fit.json").write_text(json.dumps(numbers, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        total = sum(map(len, groups.values()))
        body = [
            element("h1", title),
            element("p", f"{total} training curves{_of(groups)}.", class_="lead"),
            element("p", how(about)),
            warnings(notes),
            cards(fits),
            *sections(fits, about, folder),
            *against_compute(groups, fits, about, folder),
            element("h2", "How the laws were fitted"),
            method(about),
            element("p", Markup(FILES), class_="muted"),
        ]
        index = folder / "index.html"
        index.write_text(page(title, body), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"The report cannot be written to {folder}: {error.strerror}.") from error
    return index


FILES = (
    'The figures lie beside this page as PNG and SVG files; <a href="fit.json">fit.json</a> holds laws and envelopes.'
)


def _of(groups) -> str:
    names = [name for name in groups if name]
    return f" of {', '.join(names)}" if names else ""


def how(about: About) -> Markup:
    return Markup(
        f"The law <i>L</i>(<i>C</i>) = <i>a C<sup>b</sup></i> of an architecture says what loss <i>L</i> the best of its "
        f"models reaches with compute <i>C</i>; the more negative <i>b</i>, the more compute helps. <i>L</i> is the "
        f"{escape(about.loss)} in nats per token, <i>C</i> is in PFLOP/s-days, {escape(about.compute)}; <i>N</i> is "
        f"{escape(about.n)}."
    )


def warnings(notes: list[str]) -> Markup:
    if not notes:
        return Markup("")
    items = element("ul", *(element("li", note) for note in notes))
    return element("div", element("b", "To keep in mind"), items, class_="notes")


def _chip(name: str, index: int) -> Markup | str:
    key, label = style_of(name, index)
    return chip(key, label) if name else "all"


def cards(fits: dict[str, laws.Fit]) -> Markup:
    out = []
    for i, (name, fit) in enumerate(fits.items()):
        law = Markup(f"{fit.a:#.3g} <i>C</i>&#8201;<sup>{minus(fit.b, 4)}</sup>")
        span = f"b between {minus(fit.b_interval[0], 4)} and {minus(fit.b_interval[1], 4)} (95 %)"
        best = Markup(f"loss {fit.envelope[-1]:.4f} at C = {power(fit.compute[-1], 1)}")
        children = _chip(name, i), element("b", law), element("small", span), element("small", best)
        out.append(element("div", *children, class_="card", style=f"border-color:var(--{style_of(name, i)[0]})"))
    return element("div", *out, class_="cards") if out else Markup("")


def _at_common_compute(fits: dict[str, laws.Fit]) -> tuple[float, dict[str, tuple[float, float, float]]]:
    """The largest compute that every envelope reaches, and there loss, low, high of each law; {} if there is none."""
    shared = set.intersection(*(set(fit.compute.tolist()) for fit in fits.values()))
    if not shared:
        return 0.0, {}
    at = max(shared)
    places = {name: fit.compute.tolist().index(at) for name, fit in fits.items()}
    return at, {name: (fit(at), *map(float, fit.band[:, places[name]])) for name, fit in fits.items()}


def _verdict(fits: dict[str, laws.Fit]) -> Markup:
    """One paragraph: who is lowest at the largest common compute, and who cannot be told from it."""
    at, losses = _at_common_compute(fits)
    if len(losses) < 2:
        return Markup("")
    labels = {name: escape(style_of(name, i)[1]) for i, name in enumerate(fits)}
    best = min(losses, key=lambda name: losses[name][0])
    loss, low, high = losses[best]
    rivals = [labels[name] for name in losses if name != best and losses[name][1] <= high]
    text = (
        f"At C = {power(at, 1)} PFLOP/s-days, the largest compute that all of them reached, {labels[best]} has the "
        f"lowest fitted loss: {loss:.3f} nats per token, 95 % from {low:.3f} to {high:.3f}. "
    )
    if rivals:
        overlap = f"The bands of {' and '.join(rivals)} overlap" if rivals[1:] else f"The band of {rivals[0]} overlaps"
        return Markup(f"{text}{overlap} with it.")
    return Markup(text + "No other band overlaps with it.")


_COMPARABLE = (
    "Paper: table 3 of arXiv 2406.16690 (hybrid: MiniMax-01, arXiv 2501.08313), models of 70M to 7B parameters, without "
    "intervals. Its coefficients are values at C = 1, which for a small ladder is a far extrapolation, its loss is per "
    "token of its own tokenizer and corpus, and its C uses the paper's accounting: compare exponents, and the order of the "
    "architectures, rather than coefficients."
)


def _coefficients(fits: dict[str, laws.Fit]) -> Markup:
    published = {name: paper.laws(name) for name in fits}
    head = ["architecture", "law", "coefficient", "exponent"]
    head += ["paper's coefficient", "paper's exponent"] if any(published.values()) else []
    head += ["fitted over C", "scatter"]
    rows = []
    for i, (name, fit) in enumerate(fits.items()):
        for title, law, field in (
            ("L(C) = a C^b", fit.law, "loss"),
            ("N_opt(C)", fit.n_opt, "parameters"),
            ("D_opt(C)", fit.d_opt, "tokens"),
        ):
            row = [_chip(name, i), title, _big(law.coefficient, *law.coefficient_interval)]
            row.append(_with_interval(law.exponent, *law.exponent_interval))
            if any(published.values()):
                theirs = getattr(published[name], field) if published[name] else None
                row += [_big(theirs.coefficient), minus(theirs.exponent, 4)] if theirs else [NONE, NONE]
            span = f"{power(fit.compute[0], 1)} … {power(fit.compute[-1], 1)}<small>{len(fit.runs)} runs</small>"
            row.append(Number(Markup(span), fit.compute[-1]))
            row.append(f"{100 * fit.rms:.1f} %" if field == "loss" else NONE)
            rows.append(row)
    return table(head, rows, words=2)


def _with_interval(value: float, low: float, high: float) -> Number:
    return Number(Markup(f"{minus(value, 4)}<small>{minus(low, 4)} … {minus(high, 4)}</small>"), value)


def _big(value: float, low: float = np.nan, high: float = np.nan) -> Number:
    def text(x):
        return f"{x:.4f}" if 0.01 <= x < 100 else power(x, 2)

    interval = f"<small>{text(low)} … {text(high)}</small>" if np.isfinite([low, high]).all() else ""
    return Number(Markup(text(value) + interval), value)


def round_budgets(fits: dict[str, laws.Fit]) -> tuple[float, ...]:
    """Powers of ten in PFLOP/s-days from within the envelopes to a hundred times beyond."""
    most = max(fit.compute[-1] for fit in fits.values())
    return tuple(float(f"1e{int(np.floor(np.log10(most))) + i}") for i in range(4))


def _budgets(fits: dict[str, laws.Fit], about: About) -> Markup:
    head = ["architecture", "C, PFLOP/s-days", "FLOPs", "loss", "N_opt", "D_opt", "tokens per parameter", "time"]
    rows, best = [], []
    for compute in about.budgets or round_budgets(fits):
        least = min(fit(compute) for fit in fits.values())
        for i, (name, fit) in enumerate(fits.items()):
            if len(fits) > 1 and fit(compute) == least:
                best.append((len(rows), 3))
            beyond = "" if fit.compute[0] <= compute <= fit.compute[-1] * 1.001 else " (extrapolated)"
            n, d = fit.n_opt(compute), fit.d_opt(compute)
            rows.append(
                [
                    _chip(name, i),
                    Number(Markup(amount(compute) + beyond), compute),
                    power(compute * PF_DAY, 1),
                    _with_interval(fit(compute), *fit.law.interval(compute)),
                    _short(n, *fit.n_opt.interval(compute)),
                    _short(d, *fit.d_opt.interval(compute)),
                    Number(f"{d / n:.3g}", d / n),
                    hardware_days.cell(compute * PF_DAY, about.hardware),
                ]
            )
    return element("section", hardware_days.form(about.hardware), table(head, rows, best=best))


def _short(value: float, low: float, high: float) -> Number | str:
    if not np.isfinite(value):
        return NONE
    inner = f"{short(low)} … {short(high)}" if np.isfinite([low, high]).all() else NONE
    return Number(Markup(f"{short(value)}{element('small', inner)}"), value)


def method(about: About) -> Markup:
    options = about.options
    smoothing = (
        f"smoothed by a local straight line with Gaussian weights of {options.window:g} decades"
        if options.window
        else "interpolated linearly in logarithms"
    )
    points = {
        "Curves": f"{about.loss.capitalize()} of every finished run against compute, without the warm-up where it is known "
        f"(twice its length) and the first {options.skip:.0%} of a run's tokens; {smoothing}.",
        "Envelope": f"The least loss of any run in bins of {1 / options.bins:.3g} decade of compute, from where a "
        "second run begins to speak, without bins whose loss was reached with less compute.",
        "Laws": "Least squares of logarithms over the bins, without an irreducible loss, as in the paper. N_opt and D_opt: "
        "from the bins whose best run is neither of the smallest nor of the largest size, unless too few are left.",
        "Intervals": f"{options.resamples:,} times the runs of an architecture are drawn again with replacement, and "
        f"envelope and laws are made anew; percentiles of 95 %, further out by two degrees of freedom (seed {options.seed}). They hold what the choice of runs "
        "changes, not another corpus or another form of the law; with few runs they are rather too narrow.",
        "Scatter": "Root mean square of the envelope about the law, in per cent of the loss.",
        "Compute": f"C is {about.compute}; 1 PFLOP/s-day is 8.64e19 operations.",
        "Parameters": f"N is {about.n}.",
        "Time": "FLOPs over the bfloat16 peak of all chips times the share of it that training reaches (MFU).",
    }
    items = [part for name, text in points.items() for part in (element("dt", name), element("dd", text))]
    return element("dl", *items)
