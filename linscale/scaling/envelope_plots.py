"""The figures of envelope laws (laws.py): side by side, N_opt and D_opt, and the curves of each group with its law."""

import numpy as np
from matplotlib.figure import Figure

from linscale.scaling import laws
from linscale.scaling.appearance import COLOURS, MARKERS, plain, style_of
from linscale.scaling.drawing import INK, MUTED, decades, hover, loss_axis, styled
from linscale.scaling.fit import short

COMPUTE_LABEL = "training compute C (PFLOP/s-days)"


def law(fit: laws.Fit) -> str:
    return f"{fit.a:.3f} C^{fit.b:.4f}".replace("-", "\N{MINUS SIGN}")


@styled
def comparison(fits: dict[str, laws.Fit], loss_label: str) -> Figure:
    """All laws with their bands, and the envelope points that they are fitted to."""
    figure = Figure(figsize=(9.2, 4.9), layout="constrained")
    axes = figure.subplots()
    everything = [fit.compute for fit in fits.values()]
    low, high = min(c[0] for c in everything), max(c[-1] for c in everything)
    for i, (name, fit) in enumerate(fits.items()):
        key, label = style_of(name, i)
        colour = COLOURS[key][0]
        axes.fill_between(fit.compute, *fit.band, color=colour, alpha=0.13, linewidth=0)
        axes.plot(fit.compute, fit(fit.compute), color=colour, linewidth=2.0)
        beyond = np.array([fit.compute[-1], high * 3])
        axes.plot(beyond, fit(beyond), color=colour, linewidth=1.2, dashes=(4, 3))
        axes.plot(fit.compute, fit.envelope, MARKERS[key], color=colour, markersize=4, markeredgewidth=0, alpha=0.8)
        texts = [
            f"{label + ', ' if label else ''}envelope by {run}\nC = {c:.3g} PFLOP/s-days\nloss {loss:.4f}\n"
            f"law {fit(c):.4f}, 95 % {low_:.4f} to {high_:.4f}"
            for c, loss, run, low_, high_ in zip(fit.compute, fit.envelope, fit.best, *fit.band)
        ]
        hover(axes, fit.compute, fit.envelope, texts, key)
        text = f"{plain(label)}: {law(fit)}" if label else law(fit)
        axes.plot([], [], color=colour, marker=MARKERS[key], markersize=5, linewidth=2, label=text)
    axes.set_xlim(low / 1.3, high * 3)
    loss_axis(axes, loss_label)
    decades(axes, COMPUTE_LABEL)
    axes.legend(loc="upper right", handlelength=2.4)
    return figure


@styled
def best_sizes(fits: dict[str, laws.Fit], which: str, label: str) -> Figure:
    """N_opt or D_opt (`which` is a field of laws.Fit) of every group: points of the envelope, laws and bands."""
    figure = Figure(figsize=(6.0, 4.3), layout="constrained")
    axes = figure.subplots()
    for i, (name, fit) in enumerate(fits.items()):
        key, shown = style_of(name, i)
        found: laws.Power = getattr(fit, which)
        axes.fill_between(fit.compute, *found.band, color=COLOURS[key][0], alpha=0.13, linewidth=0)
        text = f"{plain(shown)}: " if shown else ""
        text += f"{found.coefficient:.3g} C^{found.exponent:.3f}".replace("-", "\N{MINUS SIGN}").replace("e+", "e")
        axes.plot(fit.compute, found(fit.compute), color=COLOURS[key][0], linewidth=1.8, label=text)
        axes.plot(fit.compute, found.points, MARKERS[key], color=COLOURS[key][0], markersize=4, markeredgewidth=0)
        texts = [
            f"{shown + ', ' if shown else ''}envelope by {run}\nC = {c:.3g} PFLOP/s-days\n{short(y)}; law {short(found(c))}"
            for c, y, run in zip(fit.compute, found.points, fit.best)
        ]
        hover(axes, fit.compute, found.points, texts, key)
    axes.set_yscale("log")
    axes.set_ylabel(label)
    decades(axes, COMPUTE_LABEL)
    axes.legend(loc="upper left", fontsize=8)
    return figure


@styled
def against_compute(
    name: str, index: int, lines: list[laws.Line], fit: laws.Fit | None, loss_label: str, n: str
) -> Figure:
    """The curves of one group's runs, their envelope, and the law with its band. n: what the runs' sizes are."""
    figure = Figure(figsize=(6.0, 4.3), layout="constrained")
    axes = figure.subplots()
    key, label = style_of(name, index)
    colour = COLOURS[key][0]
    lines = sorted(lines, key=lambda line: line.n)
    for i, line in enumerate(lines):
        strength = 0.35 + 0.5 * i / max(1, len(lines) - 1)
        axes.plot(line.compute, line.loss, color=colour, alpha=strength, linewidth=1.1, zorder=2)
        texts = [f"{line.name}\nC = {c:.3g} PFLOP/s-days\nloss {y:.4f}" for c, y in zip(line.compute, line.loss)]
        hover(axes, line.compute, line.loss, texts, key)
        size = short(line.n) + ("" if line.finished else " (unfinished)")
        place = dict(textcoords="offset points", ha="center", va="top", fontsize=8, color=MUTED)
        axes.annotate(size, (line.compute[-1], line.loss[-1]), (-4, -9), **place)
    axes.plot([], [], color=colour, alpha=0.6, linewidth=1.1, label=f"runs, with {plain(n)}")
    if fit is not None:
        axes.fill_between(fit.compute, *fit.band, color=INK, alpha=0.14, linewidth=0, zorder=3)
        axes.plot(fit.compute, fit(fit.compute), color=INK, linewidth=1.5, zorder=4)
        axes.plot(
            fit.compute, fit.envelope, MARKERS[key], color=colour, markersize=4.5, markeredgewidth=0, zorder=5,
            label="envelope",
        )  # fmt: skip
        axes.plot([], [], color=INK, linewidth=1.5, label=f"law {law(fit)}, 95 % band")
    if label:
        axes.set_title(plain(label))
    if lines:
        # The first steps fall from ln(vocabulary): of interest to nobody, and they squeeze the rest.
        start = fit.compute[0] / 10 if fit else min(line.compute[-1] for line in lines) / 100
        axes.set_xlim(start, max(line.compute[-1] for line in lines) * 3)
        visible = np.concatenate([line.loss[line.compute >= start] for line in lines])
        axes.set_ylim(visible.min() * 0.92, visible.max() * 1.03)
    loss_axis(axes, loss_label)
    decades(axes, COMPUTE_LABEL)
    axes.legend(loc="upper right")
    return figure
