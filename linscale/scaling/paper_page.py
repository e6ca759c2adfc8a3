"""The page of `linscale paper --report DIR`: the paper's laws, where they cross, budgets, and its tables."""

import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from linscale.config import ConfigError
from linscale.scaling import crossings, hardware_days, paper
from linscale.scaling.appearance import COLOURS, LABELS, MARKERS
from linscale.scaling.drawing import MUTED, Drawn, decades, hover, loss_axis, save, styled
from linscale.scaling.fit import short
from linscale.scaling.page import Markup, Number, amount, chip, element, figure, minus, page, power, table
from linscale.scaling.paper_command import CONVENTION, MISMATCH, QUANTITIES, quantity

SPAN = (1e-2, 1e5)  # PFLOP/s-days shown
SHOWN = (1e-6, 1e9)  # crossings listed
COMPUTE = "training compute C (PFLOP/s-days, the paper's accounting)"
AXES = {
    "loss": "loss (nats per token, the paper's tokenizer)",
    "parameters": "N_opt (parameters without embedding)",
    "tokens": "D_opt (tokens)",
}
SCORES = {  # columns of table 4: what they are, whether less is better
    "csr": ("commonsense reasoning, mean of 7 tasks (%)", False),
    "scrolls": ("SCROLLS, mean of its scores", False),
    "niah_weighted": ("needle in a haystack, easy mode, weighted (%)", False),
    "wikitext2_ppl": ("WikiText-2 perplexity", True),
    "lambada_ppl": ("LAMBADA perplexity", True),
}


def write(folder: Path, found: dict, hardware: list[hardware_days.Hardware]) -> Path:
    """Writes folder/index.html, its figures as PNG and SVG, and paper.json. Returns the path of the page."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        drawn = {
            "loss": save(law_lines("loss"), "loss", folder),
            "parameters": save(law_lines("parameters", (6.0, 4.3)), "parameters", folder),
            "tokens": save(law_lines("tokens", (6.0, 4.3)), "tokens", folder),
            "advantage": save(advantage(), "advantage", folder),
            "benchmarks": save(benchmarks(), "benchmarks", folder),
        }
        (folder / "paper.json").write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        index = folder / "index.html"
        index.write_text(_document(found, hardware, drawn), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"The report cannot be written to {folder}: {error.strerror}.") from error
    return index


@styled
def law_lines(name: str, size: tuple[float, float] = (9.2, 4.9)) -> Figure:
    """One quantity against compute: solid over the paper's runs, dashed beyond; crossings within the axes as rings."""
    sheet = Figure(figsize=size, layout="constrained")
    axes = sheet.subplots()
    laws = quantity(name)
    low, high = paper.compute_range()
    for arch, law in laws.items():
        style = dict(color=COLOURS[arch][0], linewidth=1.8)
        axes.plot([low, high], law(np.array([low, high])), label=f"{LABELS[arch]}: {_law(law)}", **style)
        for ends in ((SPAN[0], low), (high, SPAN[1])):
            axes.plot(ends, law(np.array(ends)), dashes=(4, 3), **(style | {"linewidth": 1.1}))
        at = np.geomspace(*SPAN, 57)
        unit = {"loss": lambda y: f"loss {y:.4f}", "parameters": lambda y: f"N_opt {short(y)}"}.get(
            name, lambda y: f"D_opt {short(y)} tokens"
        )
        hover(axes, at, law(at), [f"{LABELS[arch]}\nC = {c:.3g} PFLOP/s-days\n{unit(law(c))}" for c in at], arch)
    for c in crossings.crossings(laws):
        if SPAN[0] < c.compute < SPAN[1]:
            axes.plot(c.compute, c.value, "o", markersize=8, markerfacecolor="none", markeredgecolor=MUTED)
            text = (
                f"{LABELS[c.before]} lower below, {LABELS[c.after]} above\nC = {c.compute:.3g}"
                f" ({c.low:.2g} to {c.high:.2g} by rounding)"
            )
            hover(axes, c.compute, c.value, [text], "ink")
    axes.axvspan(low, high, color=MUTED, alpha=0.07, linewidth=0)
    decades(axes, COMPUTE)
    if name == "loss":
        loss_axis(axes, AXES[name])
    else:
        axes.set_yscale("log")
        axes.set_ylabel(AXES[name])
    axes.set_xlim(*SPAN)
    axes.legend(loc="upper right" if name == "loss" else "lower right")
    return sheet


def _law(law: paper.PowerLaw) -> str:
    mantissa, _, exponent = f"{law.coefficient:g}".partition("e+")
    times = f"{mantissa}e{int(exponent)}" if exponent else mantissa
    return f"{times} C^{law.exponent:.4f}".replace("-", "\N{MINUS SIGN}")


@styled
def advantage() -> Figure:
    """How many times the compute LLaMA needs for the loss of the others."""
    sheet = Figure(figsize=(9.2, 3.9), layout="constrained")
    axes = sheet.subplots()
    low, high = paper.compute_range()
    llama = paper.laws("llama").loss
    at = np.geomspace(*SPAN, 57)
    for arch, law in quantity("loss").items():
        times = np.array([crossings.equal_compute(law, llama, c) for c in at])
        inside = (at >= low) & (at <= high)
        axes.plot(at, times, color=COLOURS[arch][0], linewidth=1.1, dashes=(4, 3))
        axes.plot(at[inside], times[inside], color=COLOURS[arch][0], linewidth=2, label=LABELS[arch])
        texts = [f"{LABELS[arch]}\nC = {c:.3g} PFLOP/s-days\nLLaMA needs {t:.3g} times that" for c, t in zip(at, times)]
        hover(axes, at, times, texts, arch)
    axes.axvspan(low, high, color=MUTED, alpha=0.07, linewidth=0)
    decades(axes, COMPUTE)
    axes.set_xlim(*SPAN)
    axes.set_ylabel("compute LLaMA needs for the same loss / C")
    axes.legend(loc="upper right")
    return sheet


@styled
def benchmarks() -> Figure:
    """Table 4 against size, a panel a score."""
    sheet = Figure(figsize=(9.2, 8.2), layout="constrained")
    panels = sheet.subplots(3, 2).ravel()
    sizes = {(row["arch"], row["size"]): row["nonembedding_millions"] * 1e6 for row in paper.table("table7_counts")}
    for axes, (column, (what, less)) in zip(panels, SCORES.items()):
        for arch in paper.TABLE3:
            rows = [row for row in paper.table("table4_main") if row["arch"] == arch]
            x = np.array([sizes[arch, row["size"]] for row in rows])
            y = np.array([row[column] for row in rows])
            axes.plot(
                x, y, MARKERS[arch] + "-", color=COLOURS[arch][0], markersize=4.5, linewidth=1.3, label=LABELS[arch]
            )
            hover(axes, x, y, [f"{LABELS[arch]} {row['size'].upper()}\n{what}\n{row[column]:g}" for row in rows], arch)
        decades(axes, "parameters without embedding", between=1.0)
        axes.set_title(what, fontsize=9.5)
        if less:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
            axes.yaxis.set_minor_locator(NullLocator())
    panels[0].legend(loc="upper left")
    panels[-1].set_visible(False)
    return sheet


def _document(found: dict, hardware: list[hardware_days.Hardware], drawn: dict[str, Drawn]) -> str:
    low, high = found["compute_range"]
    body = [
        element(
            "header",
            element("h1", "What the paper's own laws say"),
            element("p", _lead(found), class_="lead"),
            element("p", f"Source: {found['source']}; no error bars are printed there. {CONVENTION}"),
        ),
        element("h2", "Loss"),
        figure(drawn["loss"], Markup(
            f"Solid and shaded: the compute at which the paper's runs end, {amount(low)} to {amount(high)} PFLOP/s-days. "
            "Dashed: extrapolation. Rings: crossings."
        )),
        element("h2", "How much compute the linear models save"),
        figure(drawn["advantage"], "Above 1: LLaMA's law needs more compute for the loss that the architecture has at C."),
        element("h2", "Optimal size and tokens"),
        element("div", figure(drawn["parameters"], ""), figure(drawn["tokens"], ""), class_="pair"),
        element("h2", "Where the laws cross"),
        element(
            "p",
            "Two power laws cross once. Where their exponents are close, the printed digits already leave the place open: "
            "the interval is that of the rounding alone, without the unknown errors of the fits.",
        ),
        _crossings(found),
        element("h2", "At a budget"),
        _budgets(found, hardware),
        element("p", f"LLaMA needs: the compute at which LLaMA's law reaches the same loss, over C. {MISMATCH}", class_="muted"),
        element("h2", "Benchmarks"),
        figure(drawn["benchmarks"], "Table 4 of the paper; its 1B rows mix two models, see below."),
        element("h2", "The paper's tables"),
        *_tables(),
        element("p", Markup('Figures lie beside this page as PNG and SVG files; <a href="paper.json">paper.json</a> holds '
                            "laws, crossings and budgets."), class_="muted"),
    ]  # fmt: skip
    return page("What the paper's own laws say", body)


def _lead(found: dict) -> Markup:
    parts = [f"{LABELS[part['arch']]} {_span(part)}" for part in found["lowest_loss"]]
    mixed = [f"{LABELS[part['arch']]} {_span(part)}" for part in found["lowest_loss_with_hybrid"]]
    return Markup(
        f"Lowest loss of the paper's four architectures: {'; '.join(parts)} (C in PFLOP/s-days). "
        f"With the later hybrid: {'; '.join(mixed)}."
    )


def _span(part: dict) -> str:
    begin, end = part["from"], part["to"]
    if not begin:
        return f"below C = {amount(end, 1)}" if end else "at any C"
    return f"from {amount(begin, 1)}" + (f" to {amount(end, 1)}" if end else " on")


def _crossings(found: dict) -> Markup:
    rows = []
    for name, what in QUANTITIES.items():
        for c in found["crossings"][name]:
            if c["compute"] is None or not SHOWN[0] <= c["compute"] <= SHOWN[1]:
                continue
            low, high = c["interval_of_rounding"]
            rows.append(
                [
                    what.split(",")[0],
                    chip(c["below"], LABELS[c["below"]]),
                    chip(c["above"], LABELS[c["above"]]),
                    amount(c["compute"]),
                    Number(Markup(f"{amount(low, 1)} … {amount(high, 1)}"), low) if high else "left open",
                    f"{c['value']:.3f}" if name == "loss" else Number(short(c["value"]), c["value"]),
                    "inside" if c["inside_the_runs"] else "extrapolated",
                ]
            )
    head = ["quantity", "lower below", "lower above", "at C, PFLOP/s-days", "by rounding", "value", "the paper's runs"]
    return table(head, rows, words=3)


def _budgets(found: dict, hardware: list[hardware_days.Hardware]) -> Markup:
    chosen = hardware[0]
    head = ["architecture", "C, PFLOP/s-days", "FLOPs", "loss", "N_opt", "D_opt", "tokens per parameter", "6ND/C"]
    head += ["LLaMA needs", "time"]
    rows, best = [], []
    for budget in found["budgets"]:
        least = min(row["loss"] for row in budget["rows"])
        for row in budget["rows"]:
            if row["loss"] == least:
                best.append((len(rows), 3))
            rows.append(
                [
                    chip(row["arch"], LABELS[row["arch"]]),
                    Number(
                        f"{budget['compute']:g}{' (extrapolated)' if budget['extrapolated'] else ''}", budget["compute"]
                    ),
                    power(budget["flops"]),
                    f"{row['loss']:.4f}",
                    Number(short(row["n"]), row["n"]),
                    Number(short(row["d"]), row["d"]),
                    f"{row['tokens_per_parameter']:.1f}",
                    f"{row['6nd_over_c']:.2f}",
                    Number(f"{row['compute_llama_needs']:.2f} C", row["compute_llama_needs"]),
                    hardware_days.cell(budget["flops"], chosen),
                ]
            )
    return element("section", hardware_days.form(chosen), table(head, rows, best=best))


def _tables() -> list[Markup]:
    out = []
    for name, what in paper.TABLES.items():
        rows = paper.printed(name)
        words = 2 if "size" in rows[0] and "arch" in rows[0] else 1
        cells = [[_printed(key, value) for key, value in row.items()] for row in rows]
        out += [element("p", what), table([key.replace("_", " ") for key in rows[0]], cells, words)]
    note = paper.__doc__.split("\n\n", 2)[2].strip()
    intro, *points = note.split("\n- ")
    *points, last = points
    last, missing = last.split("\n\n")
    items = [element("li", " ".join(point.split())) for point in (*points, last)]
    return [*out, element("div", element("b", intro), element("ul", *items), class_="notes"), element("p", missing)]


def _printed(key: str, value: str) -> str:
    if key == "arch":
        return chip(value, LABELS[value])
    if key == "size":
        return Number(value.upper(), paper.TABLE7_SIZES.index(value))
    return minus(value or "\N{EN DASH}")
