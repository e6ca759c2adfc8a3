"""The figures of a ladder's report: laws side by side, curves against compute and tokens, loss against size."""

import numpy as np
from matplotlib.figure import Figure

from linscale.scaling import laws
from linscale.scaling.appearance import COLOURS, LABELS, MARKERS
from linscale.scaling.drawing import INK, MUTED, decades, hover, loss_axis, styled
from linscale.scaling.fit import short
from linscale.scaling.runs import Curve, Run, compute

COMPUTE_LABEL = "training compute C (PFLOP/s-days)"
LOSS_LABEL = {"heldout": "held-out loss (nats per token)", "train": "training loss (nats per token)"}


def law(fit: laws.Fit) -> str:
    return f"{fit.a:.3f} C^{fit.b:.4f}".replace("-", "\N{MINUS SIGN}")


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
        texts = [
            f"{LABELS[arch]}, envelope by {run}\nC = {c:.3g} PFLOP/s-days\nloss {loss:.4f}\n"
            f"law {fit(c):.4f}, 95 % {low_:.4f} to {high_:.4f}"
            for c, loss, run, low_, high_ in zip(fit.compute, fit.envelope, fit.best, *fit.band)
        ]
        hover(axes, fit.compute, fit.envelope, texts, arch)
        label = f"{LABELS[arch]}: {law(fit)}"
        axes.plot([], [], color=colour, marker=MARKERS[arch], markersize=5, linewidth=2, label=label)
    axes.set_xlim(low / 1.3, high * 3)
    loss_axis(axes, LOSS_LABEL[options.loss])
    decades(axes, COMPUTE_LABEL)
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
        texts = [f"{run.name}\nC = {c:.3g} PFLOP/s-days\nloss {y:.4f}" for c, y in zip(x, curve.loss)]
        hover(axes, x, curve.loss, texts, arch)
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
    loss_axis(axes, LOSS_LABEL[options.loss])
    decades(axes, COMPUTE_LABEL)
    axes.legend(loc="upper right")
    return figure


@styled
def against_parameters(runs: list[Run]) -> Figure:
    """Loss at the end of every finished run against its size."""
    figure = Figure(figsize=(9.2, 4.4), layout="constrained")
    axes = figure.subplots()
    for arch in LABELS:
        group = [run for run in runs if run.arch == arch and len(run.last)]
        group.sort(key=lambda run: run.parameters.nonembedding)
        if group:
            x = np.array([run.parameters.nonembedding for run in group])
            y = np.array([run.last.loss[0] for run in group])
            texts = [
                f"{run.name}\n{n:,} parameters without embedding\n{short(run.last.tokens[0])} tokens\nloss {loss:.4f}"
                for run, n, loss in zip(group, x, y)
            ]
            hover(axes, x, y, texts, arch)
            axes.plot(
                x, y, MARKERS[arch] + "-", color=COLOURS[arch][0], markersize=6, linewidth=1.4, label=LABELS[arch]
            )
    loss_axis(axes, "final held-out loss (nats per token)")
    decades(axes, "parameters without embedding", between=2.5)
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
            texts = [
                f"{run.name}\n{short(t)} tokens\nheld-out {y:.4f}" for t, y in zip(run.heldout.tokens, run.heldout.loss)
            ]
            hover(axes, run.heldout.tokens, run.heldout.loss, texts, arch)
            axes.plot(run.heldout.tokens, run.heldout.loss, "o", markersize=3.2, markeredgewidth=0, **style)
        axes.set_title(LABELS[arch])
        decades(axes, "tokens")
        loss_axis(axes, "loss (nats per token)")
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
