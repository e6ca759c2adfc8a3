"""The figures that only a ladder has: loss against size, and training curves against tokens."""

import numpy as np
from matplotlib.figure import Figure

from linscale.scaling import laws
from linscale.scaling.appearance import COLOURS, LABELS, MARKERS
from linscale.scaling.drawing import decades, hover, loss_axis, styled
from linscale.scaling.fit import short
from linscale.scaling.runs import Curve, Run, compute


def lines(group: list[Run], options: laws.Options) -> list[laws.Line]:
    """The curves of runs, thinned, as they go into a figure; empty ones left out."""
    curves = [(run, _curve(run, options)) for run in group]
    return [
        laws.Line(
            run.name, getattr(run.parameters, options.n), compute(run, curve, options.compute), curve.loss, run.finished
        )
        for run, curve in curves
        if len(curve)
    ]


@styled
def against_parameters(runs: list[Run]) -> Figure:
    """Loss at the end of every finished run against its size; a line through the least of each size."""
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
            style = dict(color=COLOURS[arch][0], linewidth=1.4, markersize=6, label=LABELS[arch])
            least = [min(y[x == size]) for size in np.unique(x)]
            axes.plot(np.unique(x), least, MARKERS[arch] + "-", **style)
            axes.plot(x, y, MARKERS[arch], color=COLOURS[arch][0], markersize=4.5, markeredgewidth=0, alpha=0.6)
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
