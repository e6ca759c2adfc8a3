"""The figures of a report, drawn once with matplotlib and saved twice: PNG files, and SVG that a page can inline.

One colour and one marker an architecture everywhere (Okabe and Ito's colours, told apart by colour-blind readers).
The SVG names its colours as CSS variables, so that the page decides about light and dark, and leaves the font to it.
"""

import io
import re
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from linscale.scaling import laws
from linscale.scaling.fit import short
from linscale.scaling.runs import Curve, Run, compute

LABELS = {"llama": "LLaMA", "tnl": "TNL", "hgrn2": "HGRN2", "cosformer2": "cosFormer2", "hybrid": "Hybrid"}
COLOURS = {  # light page, dark page
    "llama": ("#0072b2", "#56b4e9"),
    "tnl": ("#d55e00", "#ff8f45"),
    "hgrn2": ("#009e73", "#2fcf9f"),
    "cosformer2": ("#b0508f", "#e59ac8"),
    "hybrid": ("#a88400", "#f0d54a"),
}
NEUTRALS = {"ink": ("#1c2127", "#e8ebef"), "muted": ("#5c6670", "#a3adb8"), "grid": ("#dfe3e8", "#333b45")}
MARKERS = {"llama": "o", "tnl": "s", "hgrn2": "^", "cosformer2": "D", "hybrid": "v"}
INK, MUTED, GRID = (NEUTRALS[name][0] for name in ("ink", "muted", "grid"))

_STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "svg.fonttype": "none",
    "svg.hashsalt": "linscale",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.solid_capstyle": "round",
}
COMPUTE_LABEL = "training compute C (PFLOP/s-days)"
LOSS_LABEL = {"heldout": "held-out loss (nats per token)", "train": "training loss (nats per token)"}


def power_of_ten(exponent: int) -> str:
    """-8 -> '10⁻⁸': plain characters, so that text in SVG needs no layout of its own."""
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def scientific(x: float) -> str:
    """2e-10 -> '2·10⁻¹⁰', 1e-10 -> '10⁻¹⁰'."""
    mantissa, exponent = f"{x:.0e}".split("e")
    return ("" if mantissa == "1" else f"{mantissa}·") + power_of_ten(int(exponent))


def law(fit: laws.Fit) -> str:
    return f"{fit.a:.3f} C^{fit.b:.4f}".replace("-", "\N{MINUS SIGN}")


def styled(draw):
    """A drawing function under the common style."""

    def wrapper(*args, **kwargs):
        with matplotlib.rc_context(_STYLE):
            return draw(*args, **kwargs)

    wrapper.__doc__ = draw.__doc__
    return wrapper


@styled
def comparison(fits: dict[str, laws.Fit], options: laws.Options) -> Figure:
    """All laws with their bands, and the envelope points that they are fitted to."""
    figure = Figure(figsize=(9.2, 4.9), layout="constrained")
    axes = figure.subplots()
    everything = [fit.compute for fit in fits.values()]
    low, high = min(c[0] for c in everything), max(c[-1] for c in everything)
    for arch, fit in fits.items():
        colour = COLOURS[arch][0]
        axes.fill_between(fit.compute, *fit.band, color=colour, alpha=0.13, linewidth=0)
        axes.plot(fit.compute, fit(fit.compute), color=colour, linewidth=2.0)
        beyond = np.array([fit.compute[-1], high * 3])
        axes.plot(beyond, fit(beyond), color=colour, linewidth=1.2, dashes=(4, 3))
        axes.plot(fit.compute, fit.envelope, MARKERS[arch], color=colour, markersize=4, markeredgewidth=0, alpha=0.8)
        label = f"{LABELS[arch]}: {law(fit)}"
        axes.plot([], [], color=colour, marker=MARKERS[arch], markersize=5, linewidth=2, label=label)
    axes.set_xlim(low / 1.3, high * 3)
    _loss_axis(axes, LOSS_LABEL[options.loss])
    _decades(axes, COMPUTE_LABEL)
    axes.legend(loc="upper right", handlelength=2.4)
    return figure


@styled
def against_compute(arch: str, runs: list[Run], fit: laws.Fit | None, options: laws.Options) -> Figure:
    """The curves of one architecture's runs, their envelope, and the law with its band."""
    figure = Figure(figsize=(6.0, 4.3), layout="constrained")
    axes = figure.subplots()
    colour = COLOURS[arch][0]
    runs = sorted(runs, key=lambda run: run.parameters.nonembedding)
    shown = []
    for i, run in enumerate(runs):
        curve = _curve(run, options)
        if not len(curve):
            continue
        x = compute(run, curve, options.compute)
        strength = 0.35 + 0.5 * i / max(1, len(runs) - 1)
        axes.plot(x, curve.loss, color=colour, alpha=strength, linewidth=1.1, zorder=2)
        size = short(run.parameters.nonembedding) + ("" if run.finished else " (unfinished)")
        place = dict(textcoords="offset points", ha="center", va="top", fontsize=8, color=MUTED)
        axes.annotate(size, (x[-1], curve.loss[-1]), (-4, -9), **place)
        shown.append((x, curve.loss))
    axes.plot([], [], color=colour, alpha=0.6, linewidth=1.1, label="runs, with parameters without embedding")
    if fit is not None:
        axes.fill_between(fit.compute, *fit.band, color=INK, alpha=0.14, linewidth=0, zorder=3)
        axes.plot(fit.compute, fit(fit.compute), color=INK, linewidth=1.5, zorder=4)
        axes.plot(
            fit.compute, fit.envelope, MARKERS[arch], color=colour, markersize=4.5, markeredgewidth=0, zorder=5,
            label="envelope",
        )  # fmt: skip
        axes.plot([], [], color=INK, linewidth=1.5, label=f"law {law(fit)}, 95 % band")
    axes.set_title(LABELS[arch])
    if shown:
        # The first steps fall from ln(vocabulary): of interest to nobody, and they squeeze the rest.
        start = fit.compute[0] / 10 if fit else min(x[-1] for x, _ in shown) / 100
        axes.set_xlim(start, max(x[-1] for x, _ in shown) * 3)
        visible = np.concatenate([loss[x >= start] for x, loss in shown])
        axes.set_ylim(visible.min() * 0.92, visible.max() * 1.03)
    _loss_axis(axes, LOSS_LABEL[options.loss])
    _decades(axes, COMPUTE_LABEL)
    axes.legend(loc="upper right")
    return figure


@styled
def against_parameters(runs: list[Run]) -> Figure:
    """Loss at the end of every finished run against its size."""
    figure = Figure(figsize=(9.2, 4.4), layout="constrained")
    axes = figure.subplots()
    for arch in LABELS:
        ends = [(run.parameters.nonembedding, run.last.loss[0]) for run in runs if run.arch == arch and len(run.last)]
        if ends:
            x, y = np.array(sorted(ends)).T
            axes.plot(
                x, y, MARKERS[arch] + "-", color=COLOURS[arch][0], markersize=6, linewidth=1.4, label=LABELS[arch]
            )
    _loss_axis(axes, "final held-out loss (nats per token)")
    _decades(axes, "parameters without embedding", between=2.5)
    axes.legend(loc="upper right")
    return figure


@styled
def training_curves(runs: list[Run]) -> Figure:
    """Training loss (lines) and held-out loss (dots) of every run against tokens, a panel an architecture."""
    archs = [arch for arch in LABELS if any(run.arch == arch for run in runs)]
    columns = min(2, len(archs))
    rows = -(-len(archs) // columns)
    figure = Figure(figsize=(9.2, 3.1 * rows + 0.3), layout="constrained")
    panels = np.atleast_1d(figure.subplots(rows, columns, sharex=True, sharey=True)).ravel()
    for axes, arch in zip(panels, archs):
        group = sorted((run for run in runs if run.arch == arch), key=lambda run: run.parameters.nonembedding)
        for i, run in enumerate(group):
            strength = 0.35 + 0.6 * i / max(1, len(group) - 1)
            style = dict(color=COLOURS[arch][0], alpha=strength)
            thinned = _thin(run.train)
            axes.plot(thinned.tokens, thinned.loss, linewidth=0.9, **style)
            axes.plot(run.heldout.tokens, run.heldout.loss, "o", markersize=3.2, markeredgewidth=0, **style)
        axes.set_title(LABELS[arch])
        _decades(axes, "tokens")
        _loss_axis(axes, "loss (nats per token)")
        axes.label_outer()
    for axes in panels[len(archs) :]:
        axes.set_visible(False)
    return figure


def _curve(run: Run, options: laws.Options) -> Curve:
    return run.heldout if options.loss == "heldout" else _thin(run.train)


def _thin(curve: Curve, most: int = 240) -> Curve:
    """At most about `most` points, evenly in log(tokens): a figure cannot show more, and a page must stay small."""
    if len(curve) <= most:
        return curve
    wanted = np.geomspace(curve.tokens[0], curve.tokens[-1], most)
    keep = np.unique(np.searchsorted(curve.tokens, wanted).clip(0, len(curve) - 1))
    return Curve(curve.tokens[keep], curve.flops[keep], curve.loss[keep])


def _decades(axes, label: str, between: float = 2.0) -> None:
    axes.set_xscale("log")
    axes.set_xlabel(label)
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(numticks=9))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: power_of_ten(round(np.log10(x)))))
    if np.log10(high / low) < between:  # few decades: name the values between
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=15))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short(x) if x >= 1 else scientific(x)))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _loss_axis(axes, label: str) -> None:
    """Logarithmic with round numbers; a loss seldom spans a decade."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylabel(label)


def save(figure: Figure, name: str, folder: Path) -> str:
    """Writes folder/name.png and returns the figure as an SVG element with the ids of `name`."""
    with matplotlib.rc_context(_STYLE):
        figure.savefig(folder / f"{name}.png", dpi=160, facecolor="white")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return themed(buffer.getvalue(), name)


def themed(svg: str, name: str) -> str:
    """matplotlib's SVG file as an element for a page: no prologue or metadata, own ids, CSS colours, the page's font."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-')
    svg = re.sub(r"font-family: [^;\"]*;?", "", svg)
    svg = re.sub(r"(font: [^;\"]*?)'DejaVu Sans'[^;\"]*", r"\1var(--font)", svg)
    for variable, (light, _) in (COLOURS | NEUTRALS).items():
        svg = re.sub(light, f"var(--{variable})", svg, flags=re.IGNORECASE)
    size = re.search(r'<svg[^>]*?width="([\d.]+)pt" height="([\d.]+)pt"', svg)
    svg = svg.replace(f' width="{size[1]}pt" height="{size[2]}pt"', "", 1)
    return svg.replace("<svg", f'<svg role="img" aria-label="figure {name}"', 1)
