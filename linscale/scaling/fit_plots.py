"""The figures of fits of L(N, D): optimum against compute, contours, isoFLOP curves, residuals, laws of tasks.

Every point says under the pointer which run it is, its N, D and loss, and what the law gives.
"""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from linscale.scaling import isoflop, optimum, parametric, tasks
from linscale.scaling.appearance import COLOURS, MARKERS, plain, style_of
from linscale.scaling.drawing import INK, MUTED, decades, hover, loss_axis, styled
from linscale.scaling.fit import short

LOSS = "loss (nats per token)"


def about(runs: parametric.Runs, predicted=None) -> list[str]:
    """What the pointer shows of each run."""
    out = []
    for i in range(len(runs)):
        lines = [str(runs.names[i]) if runs.names else f"run {i + 1}"]
        lines.append(f"N {short(runs.n[i])}, D {short(runs.d[i])}, C {runs.compute[i]:.3g} FLOPs")
        lines.append(f"loss {runs.loss[i]:.4f}" + (f", law {predicted[i]:.4f}" if predicted is not None else ""))
        out.append("\n".join(lines))
    return out


def size_label(runs: parametric.Runs) -> str:
    return "N" if runs.n_name == "N" else f"N ({plain(runs.n_name)})"


def predicted(found: parametric.Fit) -> np.ndarray:
    return found.predict(found.runs.n, found.runs.d, found.runs.unique)


def budgets(found: parametric.Fit, count: int, beyond: float = 1.0) -> np.ndarray:
    """Compute over the range of the runs, and `beyond` times as far."""
    compute = found.runs.compute
    return np.geomspace(compute.min(), compute.max() * beyond, count)


@styled
def optimal_loss(fits: dict[str, parametric.Fit], frontiers: dict[str, list[optimum.Optimum]], compute: str) -> Figure:
    """The least loss of every budget under each law, with its band, and the runs."""
    figure = Figure(figsize=(9.2, 4.9), layout="constrained")
    axes = figure.subplots()
    for i, (name, found) in enumerate(fits.items()):
        key, label = style_of(name, i)
        colour = COLOURS[key][0]
        runs = found.runs
        hover(axes, runs.compute, runs.loss, about(runs, predicted(found)), key)
        axes.plot(
            runs.compute, runs.loss, MARKERS[key], color=colour, markersize=3.6, markeredgewidth=0, alpha=0.55,
            label="" if len(fits) > 1 else "runs",
        )  # fmt: skip
        line = frontiers.get(name, [])
        if not line:
            continue
        x, y = np.array([best.flops for best in line]), np.array([best.loss for best in line])
        low, high = np.array([best.loss_interval for best in line]).T
        axes.fill_between(x, low, high, color=colour, alpha=0.16, linewidth=0)
        inside = x <= runs.compute.max() * 1.001
        label = f"{plain(label)}, least loss of a budget" if label else "least loss of a budget, 95 % band"
        axes.plot(x[inside], y[inside], color=colour, linewidth=2, label=label)
        axes.plot(x[~inside | (x == x[inside][-1])], y[~inside | (x == x[inside][-1])], color=colour, dashes=(4, 3))
        texts = [
            f"{name + ': ' if name else ''}optimum at C {b.flops:.3g} FLOPs\nN {short(b.n)}, D {short(b.d)}\n"
            f"loss {b.loss:.4f}, 95 % {b.loss_interval[0]:.4f} to {b.loss_interval[1]:.4f}"
            for b in line
        ]
        hover(axes, x, y, texts, key)
    loss_axis(axes, LOSS)
    decades(axes, f"training compute C (FLOPs, {compute})")
    axes.legend(loc="upper right")
    return figure


@styled
def contours(name: str, index: int, found: parametric.Fit, line: list[optimum.Optimum], compute: str) -> Figure:
    """Lines of equal loss over N and D, lines of equal compute, the best N and D of every budget, and the runs."""
    figure = Figure(figsize=(6.0, 4.8), layout="constrained")
    axes = figure.subplots()
    key, label = style_of(name, index)
    colour, runs = COLOURS[key][0], found.runs
    n = np.geomspace(runs.n.min() / 2, runs.n.max() * 4, 90)
    d = np.geomspace(runs.d.min() / 2, runs.d.max() * 4, 90)
    surface = found.predict(*np.meshgrid(n, d))
    # Levels: about evenly in what the law can still gain.
    levels = np.unique(np.quantile(surface, np.linspace(0.02, 0.97, 13)).round(2))
    drawn = axes.contour(n, d, surface, levels=levels, colors=[colour], linewidths=0.9, alpha=0.75)
    axes.clabel(drawn, fmt=lambda level: f"{level:.2f}", fontsize=7.5, colors=[INK])
    k, q = optimum.cost(found, compute)
    low, high = k * n[0] ** (1 + q) * d[0], k * n[-1] ** (1 + q) * d[-1]
    for power in range(int(np.ceil(np.log10(low))), int(np.log10(high)) + 1, max(1, int(np.log10(high / low)) // 6)):
        axes.plot(n, 10.0**power / (k * n ** (1 + q)), color=MUTED, linewidth=0.7, dashes=(2, 3), alpha=0.8)
    if line:
        x, y = np.array([b.n for b in line]), np.array([b.d for b in line])
        axes.plot(x, y, color=INK, linewidth=1.8, label="best N and D of a budget")
        # Along a line of equal compute N and D trade against each other: the band is that of N at each budget.
        ends = np.array([b.n_interval for b in line])
        flops = np.array([b.flops for b in line])
        for side in (0, 1):
            axes.plot(ends[:, side], flops / (k * ends[:, side] ** (1 + q)), color=INK, linewidth=0.9, dashes=(4, 2))
        axes.plot([], [], color=INK, linewidth=0.9, dashes=(4, 2), label="its 95 % interval")
        hover(axes, x, y, [f"optimum at C {b.flops:.3g} FLOPs\nN {short(b.n)} ({short(b.n_interval[0])} to "
                           f"{short(b.n_interval[1])})\nD {short(b.d)}\nloss {b.loss:.4f}" for b in line], "ink")  # fmt: skip
    axes.plot(runs.n, runs.d, MARKERS[key], color=colour, markersize=4, markeredgewidth=0, alpha=0.8, label="runs")
    hover(axes, runs.n, runs.d, about(runs, predicted(found)), key)
    axes.plot([], [], color=MUTED, linewidth=0.7, dashes=(2, 3), label="equal compute")
    axes.set_yscale("log")
    axes.set_ylabel("D (tokens)")
    axes.set_ylim(d[0], d[-1])
    axes.set_xlim(n[0], n[-1])
    decades(axes, size_label(runs))
    axes.yaxis.set_minor_formatter(NullFormatter())
    figure.legend(loc="outside lower center", ncols=4, fontsize=7.5)
    if label:
        axes.set_title(plain(label))
    return figure


@styled
def slices(name: str, index: int, found: parametric.Fit, line: list[optimum.Optimum], compute: str) -> Figure:
    """Loss against N at fixed compute: the law's curves, their minima, and runs of nearly that compute."""
    figure = Figure(figsize=(6.0, 4.8), layout="constrained")
    axes = figure.subplots()
    key, label = style_of(name, index)
    runs = found.runs
    k, q = optimum.cost(found, compute)
    spent = k * runs.n ** (1 + q) * runs.d
    chosen = np.geomspace(np.quantile(spent, 0.05), spent.max(), 6)
    width = min(0.25, np.log10(chosen[1] / chosen[0]) / 2) if chosen[1] > chosen[0] else 0.25
    n = np.geomspace(runs.n.min() / 2, runs.n.max() * 2, 80)
    for i, flops in enumerate(chosen):
        d = flops / (k * n ** (1 + q))
        sensible = (d > runs.d.min() / 8) & (d < runs.d.max() * 8)
        strength = 0.35 + 0.6 * i / 5
        loss = found.predict(n[sensible], d[sensible])
        axes.plot(n[sensible], loss, color=COLOURS[key][0], alpha=strength, linewidth=1.5)
        if sensible.any():
            place = dict(textcoords="offset points", fontsize=7.5, color=MUTED, va="center", ha="left")
            axes.annotate(f"{flops:.0e}".replace("e+", "e"), (n[sensible][-1], loss[-1]), (4, 0), **place)
        near = np.abs(np.log10(spent / flops)) < width
        style = dict(color=COLOURS[key][0], alpha=strength, markersize=4.5, markeredgewidth=0)
        axes.plot(runs.n[near], runs.loss[near], MARKERS[key], **style)
        texts = np.array(about(runs, predicted(found)), object)[near]
        hover(axes, runs.n[near], runs.loss[near], texts, key)
        if line and sensible.any():
            at = int(np.argmin(loss))
            if 0 < at < len(loss) - 1:
                axes.plot(n[sensible][at], loss[at], "_", color=INK, markersize=9, markeredgewidth=1.8)
                text = f"least loss at C {flops:.3g} FLOPs\nN {short(n[sensible][at])}, loss {loss[at]:.4f}"
                hover(axes, n[sensible][at], loss[at], [text], "ink")
    axes.set_xlim(n[0] / 1.2, n[-1] * 2)
    loss_axis(axes, LOSS)
    decades(axes, size_label(runs))
    if label:
        axes.set_title(plain(label))
    return figure


@styled
def parabolas(name: str, index: int, found: isoflop.Fit) -> Figure:
    """Approach 2: the runs of every budget, their parabola in log N, its vertex; N and D of the vertices against C."""
    figure = Figure(figsize=(9.2, 4.8), layout="constrained")
    axes, right = figure.subplots(1, 2)
    key, label = style_of(name, index)
    runs = found.runs
    for i, (budget, best_n, best_loss) in enumerate(zip(found.budgets, found.best_n, found.best_loss)):
        near = np.abs(np.log(runs.compute / budget)) < isoflop.SAME
        strength = 0.35 + 0.6 * i / max(1, len(found.budgets) - 1)
        style = dict(color=COLOURS[key][0], alpha=strength)
        x = np.log(runs.n[near])
        at = np.linspace(x.min() - 0.15, x.max() + 0.15, 60)
        middle = x.mean()
        axes.plot(
            np.exp(at), np.polyval(np.polyfit(x - middle, runs.loss[near], 2), at - middle), linewidth=1.4, **style
        )
        axes.plot(runs.n[near], runs.loss[near], MARKERS[key], markersize=4.5, markeredgewidth=0, **style)
        hover(axes, runs.n[near], runs.loss[near], about(runs.take(np.flatnonzero(near))), key)
        axes.plot(best_n, best_loss, "_", color=INK, markersize=9, markeredgewidth=1.8)
        hover(
            axes, best_n, best_loss, [f"best of C {budget:.3g} FLOPs\nN {short(best_n)}, loss {best_loss:.4f}"], "ink"
        )
        place = dict(textcoords="offset points", fontsize=7.5, color=MUTED, va="bottom", ha="center")
        axes.annotate(
            f"{budget:.0e}".replace("e+", "e"), (np.exp(at[0]), runs.loss[near][np.argmin(x)]), (0, 5), **place
        )
    loss_axis(axes, LOSS)
    decades(axes, size_label(runs))
    if label:
        axes.set_title(plain(label))
    compute = found.budgets
    best_d = compute / (6 * found.best_n)
    for at, y, dashes, text in ((0, found.best_n, (None, None), "best N"), (2, best_d, (4, 2), "best D = C / 6N")):
        law = found.values[at] * compute ** found.values[at + 1]
        if len(found.draws):
            draws = found.draws[:, [at]] * compute ** found.draws[:, [at + 1]]
            right.fill_between(
                compute, *np.percentile(draws, [2.5, 97.5], axis=0), color=COLOURS[key][0], alpha=0.15, lw=0
            )
        right.plot(compute, law, color=COLOURS[key][0], dashes=dashes, linewidth=1.6, label=text)
        right.plot(compute, y, MARKERS[key], color=COLOURS[key][0], markersize=4.5, markeredgewidth=0)
        hover(right, compute, y, [f"{text}\nC {c:.3g} FLOPs\n{short(v)}" for c, v in zip(compute, y)], key)
    right.set_yscale("log")
    decades(right, "training compute C (FLOPs)")
    right.legend(loc="upper left")
    return figure


@styled
def residuals(name: str, index: int, found: parametric.Fit) -> Figure:
    """Loss over law against compute and against D / N: a trend means that the form does not hold."""
    figure = Figure(figsize=(9.2, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    key, label = style_of(name, index)
    runs, off = found.runs, 100 * np.expm1(found.residuals)
    spread = 100 * float(np.std(found.residuals))
    texts = [f"{text}\n{value:+.2f} %" for text, value in zip(about(runs, predicted(found)), off)]
    for axes, x in ((left, runs.compute), (right, runs.d / runs.n)):
        axes.axhline(0, color=INK, linewidth=1)
        axes.axhspan(-2 * spread, 2 * spread, color=MUTED, alpha=0.1, linewidth=0)
        axes.plot(x, off, MARKERS[key], color=COLOURS[key][0], markersize=4.2, markeredgewidth=0, alpha=0.8)
        hover(axes, x, off, texts, key)
    left.set_ylabel("loss over law (%)")
    left.yaxis.set_major_locator(MaxNLocator(7))
    left.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:+g}".replace("-", "\N{MINUS SIGN}")))
    decades(left, "training compute C (FLOPs)")
    decades(right, "D / N (tokens a parameter)")
    if label:
        left.set_title(plain(label))
    return figure


@styled
def task(name: str, index: int, law: tasks.Task, runs: parametric.Runs) -> Figure:
    """A benchmark against the loss of the same runs, and its law."""
    figure = Figure(figsize=(6.0, 3.9), layout="constrained")
    axes = figure.subplots()
    key, label = style_of(name, index)
    at = np.linspace(law.loss.min(), law.loss.max(), 120)
    axes.plot(at, law(at), color=INK, linewidth=1.5)
    axes.plot(law.loss, law.y, MARKERS[key], color=COLOURS[key][0], markersize=4.5, markeredgewidth=0, alpha=0.8)
    texts = [f"{text}\n{law.name} {y:.4f}, law {law(x):.4f}" for text, x, y in zip(about(runs), law.loss, law.y)]
    hover(axes, law.loss, law.y, texts, key)
    axes.set_xlabel(LOSS)
    axes.set_ylabel(plain(law.name))
    axes.set_title(" ".join(filter(None, (plain(label), plain(law.name)))))
    return figure
