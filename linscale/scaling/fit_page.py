"""The page of `linscale fit ... --report DIR`: laws L(N, D) or isoFLOP parabolas of one or several groups of runs.

DIR/index.html is self-contained; figures lie beside it as PNG and SVG, the numbers of the fit as fit.json.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np

from linscale.config import ConfigError
from linscale.scaling import fit_plots, hardware_days, joint, optimum, paper, parametric, tables, tasks
from linscale.scaling.appearance import style_of
from linscale.scaling.drawing import Drawn, save
from linscale.scaling.fit import short
from linscale.scaling.flops import PF_DAY
from linscale.scaling.group import Group
from linscale.scaling.page import Markup, Number, amount, element, escape, figure, minus, page, power, table

FOLDED = 60  # rows of the table of runs, above which it opens by a click
NONE = "\N{EN DASH}"
FRONTIER = 25  # budgets of a line
BEYOND = 100.0  # times the greatest compute of the runs
COMPUTES = {"6nd": "C = 6 N D", "counted": "C as counted"}


@dataclasses.dataclass(frozen=True)
class About:
    """What the page says of the whole."""

    source: str  # of the runs
    formula: str
    method: str
    intervals: str
    compute: str  # 6nd | counted
    hardware: hardware_days.Hardware
    columns: bool = False  # runs.n_name is a column of a file


def frontier(group: Group, compute: str) -> list[optimum.Optimum]:
    """Optima over the compute of the runs and beyond; none if the exponents cannot be told apart."""
    if not group.law or not group.found.identified:
        return []
    line = [optimum.optimum(group.found, c, compute) for c in fit_plots.budgets(group.found, FRONTIER, BEYOND)]
    return [best for best in line if not best.edge]


def write(folder: Path, groups: list[Group], about: About, compared: joint.Joint | None, numbers: dict) -> Path:
    """Writes the page, its figures and fit.json; returns the path of the page."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "fit.json").write_text(json.dumps(numbers, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        body = [
            _head(groups, about),
            *sections(groups, about, folder),
            *_joint(compared),
            *_runs(groups),
            _method(about),
        ]
        files = 'Figures lie beside this page as PNG and SVG files; <a href="fit.json">fit.json</a> holds the numbers.'
        body.append(element("p", Markup(files), class_="muted"))
        index = folder / "index.html"
        index.write_text(page(_title(groups, about), body), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"The report cannot be written to {folder}: {error.strerror}.") from error
    return index


def sections(groups: list[Group], about: About, folder: Path, of: str = "") -> list[Markup]:
    """Coefficients, budgets and figures, as a part of a page; figures are saved in folder. of: after the headings."""
    lines = {group.name: frontier(group, about.compute) for group in groups}
    laws = [group for group in groups if group.law]
    body = [element("h2", f"Coefficients{of}"), _coefficients(groups), _exponents(laws)]
    if laws and any(lines.values()):
        shown = fit_plots.optimal_loss({g.name: g.found for g in laws}, lines, COMPUTES[about.compute])
        body += [
            element("h2", f"The least loss of a budget{', by the optimum' + of if of else ''}"),
            figure(
                save(shown, "optimal-loss", folder),
                "Lines: the law at the best N and D of every budget, with its 95 % band; dashed beyond the runs. Points: "
                "the runs, which lie above the line where their N and D are not the best for their compute.",
            ),
            element("h2", f"What to train with a budget{', by the optimum' + of if of else ''}"),
            element("p", convention(laws[0].found.runs, about)),
            _optima(laws, about),
        ]
    for i, group in enumerate(groups):
        body += _of_group(i, group, lines[group.name], about, folder, len(groups) > 1)
    return body


def _of_group(i: int, group: Group, line: list, about: About, folder: Path, several: bool) -> list[Markup]:
    suffix = f"-{i + 1}" if several else ""
    body = [element("h2", _chip(group, i))] if several else []

    def drawn(name: str, sheet) -> Drawn:
        return save(sheet, name + suffix, folder)

    if not group.law:
        sheet = fit_plots.parabolas(group.name, i, group.found)
        return [
            *body,
            element("h2", "IsoFLOP curves") if not several else "",
            figure(
                drawn("isoflop", sheet),
                "Left: each parabola is a budget, in FLOPs at its left end; bars: the best N. Right: the best N and D against compute, "
                "the laws through them and their 95 % bands.",
            ),
        ]
    pair = [
        figure(
            drawn("contours", fit_plots.contours(group.name, i, group.found, line, about.compute)),
            "Lines of equal loss. "
            + (
                "Bold: the best N and D of every budget; dashed beside it: its 95 % interval."
                if line
                else "No best N and D: see above."
            ),
        ),
        figure(
            drawn("slices", fit_plots.slices(group.name, i, group.found, line, about.compute)),
            "IsoFLOP curves of the law, compute in FLOPs at the right end; points: runs of nearly that compute; bars: best N.",
        ),
    ]
    spread = 100 * float(np.std(group.found.residuals))
    body += [
        element("h2", "Contours and isoFLOP curves") if not several else "",
        element("div", *pair, class_="pair"),
        element("h2" if not several else "h3", "Residuals"),
        figure(
            drawn("residuals", fit_plots.residuals(group.name, i, group.found)),
            f"Standard deviation {spread:.2f} %; shaded: two of them. A trend says that the form does not hold there.",
        ),
    ]
    if group.backtest:
        body += _backtest(group.backtest, several)
    drawings = []
    for number, law in enumerate(group.tasks):
        sheet = fit_plots.task(group.name, i, law, group.found.runs)
        values = ", ".join(f"{key} {value:.4g}" for key, value in law.coefficients.items())
        caption = f"{tasks.FORMULAS[law.form]}: {values}. Scatter {law.rms:.4f}; from N and D by both steps {law.rms_both:.4f}."
        drawings.append(figure(drawn(f"task-{number + 1}", sheet), caption))
    predictions = _tasks(group)
    if drawings:
        body += [
            element("h2" if not several else "h3", "From loss to tasks"),
            element("div", *drawings, class_="pair"),
            predictions,
        ]
    return body


def _tasks(group: Group) -> Markup | str:
    """The tasks at the best N and D of every budget."""
    rows = []
    for law in group.tasks:
        for best in group.optima if group.found.identified else ():
            y, low, high = (float(v) for v in tasks.predict(law, group.found, np.float64(best.n), np.float64(best.d)))
            rows.append([law.name, power(best.flops, 1), Number(short(best.n), best.n), _value(y, low, high)])
    if not rows:
        return ""
    return Markup(
        element("p", "At the N and D that are best for the loss; intervals of both laws, without the scatter of a run:")
        + table(["task", "budget, FLOPs", "N", "predicted"], rows)
    )


def _chip(group: Group, i: int) -> Markup:
    key, label = style_of(group.name, i)
    return element("span", element("i", style=f"background:var(--{key})"), label, class_="chip")


def _title(groups: list[Group], about: About) -> str:
    names = [group.name for group in groups if group.name]
    return f"Scaling laws of {about.source}" + (f": {', '.join(names)}" if 1 < len(names) < 6 else "")


def convention(runs: parametric.Runs, about: About) -> str:
    counted = "C is counted, from the file's or the trainer's FLOPs" if runs.flops is not None else "C is 6 N D"
    n = f"the column {runs.n_name!r}, as the file counts parameters" if about.columns else runs.n_name
    d = f" D is {runs.d_name}." if runs.d_name == tables.DERIVED else ""
    best = " The budgets take C = 6 N D." if about.compute == "6nd" and runs.flops is not None else ""
    return f"N is {n}; {counted}.{d}{best} Loss is in nats per token unless the data say otherwise."


def _head(groups: list[Group], about: About) -> Markup:
    total = sum(len(group.found.runs) for group in groups)
    notes = [(group.name, note) for group in groups for note in group.notes]
    items = [element("li", f"{name}: {note}" if name else note) for name, note in dict.fromkeys(notes)]
    warnings = element("div", element("b", "To keep in mind"), element("ul", *items), class_="notes") if items else ""
    return Markup(
        element("h1", _title(groups, about))
        + element("p", f"{about.formula}, fitted to {total} runs by {about.method}.", class_="lead")
        + element("p", convention(groups[0].found.runs, about))
        + warnings
    )


def _value(value: float, low: float, high: float, digits: int = 4) -> Number:
    inner = NONE if not np.isfinite(low) else f"{_plain(low, digits)} … {_plain(high, digits)}"
    return Number(Markup(f"{_plain(value, digits)}{element('small', Markup(inner))}"), value)


def _plain(value: float, digits: int) -> str:
    return power(value, 2) if value and not 1e-3 <= abs(value) < 1e5 else minus(f"{value:.{digits}g}")


def _coefficients(groups: list[Group]) -> Markup:
    names = list(dict.fromkeys(name for group in groups for name in group.found.coefficients))
    rows = []
    for i, group in enumerate(groups):
        values, ends = group.found.coefficients, group.found.intervals
        spread = f"{100 * np.std(group.found.residuals):.2f} %" if group.law else NONE
        row = [_chip(group, i) if group.name else "all", len(group.found.runs)]
        for name in names:
            cell = _value(values[name], *ends[name]) if name in values else NONE
            if name in (group.profile or {}):
                low, high = group.profile[name]
                cell = Number(Markup(cell + element("small", f"profile {_bound(low)} … {_bound(high)}")), values[name])
            row.append(cell)
        rows.append([*row, spread])
    note = element(
        "p", "Below each value: its 95 % interval by the bootstrap, and by profile likelihood where it says so."
    )
    return Markup(
        table(["runs of", "number", *names, "scatter"], rows) + (note if any(g.profile for g in groups) else "")
    )


def _bound(value: float) -> str:
    return f"{value:.4g}" if np.isfinite(value) else "open"


def _exponents(groups: list[Group]) -> Markup:
    """Exponents of N_opt and D_opt in C that a law of Chinchilla's form implies, beside the paper's."""
    rows = []
    for i, group in enumerate(groups):
        found = group.found
        if not {"alpha", "beta"} <= set(found.form.names) or not found.identified:
            continue
        alpha, beta = (found.form.names.index(name) for name in ("alpha", "beta"))
        draws = (
            found.draws[:, beta] / (found.draws[:, alpha] + found.draws[:, beta]) if len(found.draws) else found.draws
        )
        value = found.values[beta] / (found.values[alpha] + found.values[beta])
        low, high = map(float, found.interval(draws)) if len(found.draws) else (np.nan, np.nan)
        published = paper.laws(group.name.lower())
        theirs = (published.parameters, published.tokens) if published else ()
        row = [
            _chip(group, i) if group.name else "all",
            _value(value, low, high, 3),
            _value(1 - value, 1 - high, 1 - low, 3),
        ]
        rows.append(row + [f"{law.exponent:.4f}" for law in theirs])
    if not rows:
        return Markup("")
    with_paper = any(len(row) == 5 for row in rows)
    head = ["runs of", "N_opt grows as C to the", "D_opt grows as C to the"]
    if with_paper:
        head += ["the paper's, N_opt", "the paper's, D_opt"]
        rows = [row + [NONE] * (5 - len(row)) for row in rows]
    text = (
        "With C = 6 N D the law gives N_opt as C to the power beta / (alpha + beta), D_opt to alpha / (alpha + beta)."
    )
    if with_paper:
        text += (
            " The paper fits both apart to its envelope, C in its own accounting with attention, so its two need not add "
            "up to 1."
        )
    return element("section", element("p", text), table(head, rows))


def _optima(groups: list[Group], about: About) -> Markup:
    rows, best = [], []
    head = ["runs of", "budget, FLOPs", "PFLOP/s-days", "loss", "N", "D", "tokens per parameter", "time"]
    optima = [(i, group, found) for i, group in enumerate(groups) for found in group.optima]
    least = {}
    for _, _, found in optima:
        least[found.flops] = min(least.get(found.flops, np.inf), found.loss)
    for i, group, found in sorted(optima, key=lambda entry: entry[2].flops):
        beyond = " (extrapolated)" if found.flops > group.found.runs.compute.max() else ""
        if len(groups) > 1 and found.loss == least[found.flops]:
            best.append((len(rows), 3))
        low, high = (np.array(found.flops) / 6 / np.array(found.n_interval[::-1]) ** 2).tolist()
        rows.append(
            [
                _chip(group, i) if group.name else "all",
                Number(Markup(power(found.flops, 1) + escape(beyond)), found.flops),
                amount(found.flops / PF_DAY),
                _value(found.loss, *found.loss_interval),
                _short(found.n, *found.n_interval),
                _short(found.d, *found.d_interval),
                _value(found.d / found.n, low, high, 3) if about.compute == "6nd" else f"{found.d / found.n:.3g}",
                hardware_days.cell(found.flops, about.hardware),
            ]
        )
    return element("section", hardware_days.form(about.hardware), table(head, rows, best=best))


def _short(value: float, low: float, high: float) -> Number:
    inner = f"{short(low)} … {short(high)}" if np.isfinite(low) else NONE
    return Number(Markup(f"{short(value)}{element('small', inner)}"), value)


def _backtest(test: optimum.Backtest, several: bool) -> list[Markup]:
    rows = [
        [
            name,
            Number(short(n), n),
            Number(short(d), d),
            f"{loss:.4f}",
            _value(predicted, low, high),
            Number(f"{100 * error:+.2f} %".replace("-", "\N{MINUS SIGN}"), error),
            ("yes" if low <= loss <= high else "no") if np.isfinite(low) else NONE,
        ]
        for name, n, d, loss, predicted, low, high, error in zip(
            test.names, test.n, test.d, test.loss, test.predicted, test.low, test.high, test.error
        )
    ]
    bounded = bool(np.isfinite(test.low).all())
    text = (
        f"The law of the other {len(test.fit.runs)} runs, against the {len(test.n)} of greatest compute: mean absolute error "
        f"{100 * np.abs(test.error).mean():.2f} %"
        + (f", {test.covered} of {len(test.n)} inside their 95 % interval for a new run." if bounded else ".")
    )
    head = ["run", "N", "D", "loss", "predicted", "error", "inside"]
    return [element("h3" if several else "h2", "Backtest"), element("p", text), table(head, rows)]


def _joint(compared: joint.Joint | None) -> list[Markup]:
    if compared is None:
        return []
    rows = [
        [model.name, model.parameters, *(minus(value, 2) for value in (model.log_likelihood, model.aicc, model.bic))]
        for model in compared.models
    ]
    chosen = [(i, 3) for i, model in enumerate(compared.models) if model.name == compared.verdict]
    p = "; ".join(f"{pair.replace(' | ', ' against ')}: p = {value:.3g}" for pair, value in compared.p_values.items())
    ends = "; ".join(f"{name} {v:.4f} ({low:.4f} to {high:.4f})" for name, (v, low, high) in compared.exponents.items())
    return [
        element("h2", "One law, shared exponents, or a law each?"),
        element("p", f"Least AICc: {compared.verdict}. Likelihood ratios: {p}."),
        table(["law", "parameters", "log likelihood", "AICc", "BIC"], rows, best=chosen),
        element("p", f"Shared exponents, with 95 % intervals: {ends}.") if ends else "",
        *(element("p", warning) for warning in compared.warnings),
    ]


def _runs(groups: list[Group]) -> list[Markup]:
    head = ["run", "runs of", "N", "D", "C, FLOPs", "loss", "law", "loss over law"]
    rows = []
    for i, group in enumerate(groups):
        runs = group.found.runs
        law = fit_plots.predicted(group.found) if group.law else np.full(len(runs), np.nan)
        for j in range(len(runs)):
            off = runs.loss[j] / law[j] - 1
            rows.append(
                [
                    str(runs.names[j]) if runs.names else f"run {j + 1}",
                    _chip(group, i) if group.name else "all",
                    Number(short(runs.n[j]), runs.n[j]),
                    Number(short(runs.d[j]), runs.d[j]),
                    power(runs.compute[j]),
                    f"{runs.loss[j]:.4f}",
                    f"{law[j]:.4f}" if group.law else NONE,
                    Number(f"{100 * off:+.2f} %".replace("-", "\N{MINUS SIGN}"), off) if group.law else NONE,
                ]
            )
    whole = table(head, rows, words=2)
    if len(rows) > FOLDED:
        whole = element("details", element("summary", f"{len(rows)} runs"), whole)
    return [element("h2", "All runs"), whole]


def _method(about: About) -> Markup:
    points = {
        "Fit": f"{about.formula}: {about.method}.",
        "Intervals": f"{about.intervals} They hold what the choice of runs changes, not another corpus or another form.",
        "Budgets": f"The N of least loss on the line {COMPUTES[about.compute]}; all tokens taken as unique.",
        "Time": "FLOPs over the bfloat16 peak of all chips times the share of it that training reaches (MFU).",
    }
    items = [part for name, text in points.items() for part in (element("dt", name), element("dd", text))]
    return Markup(element("h2", "How the laws were fitted") + element("dl", *items))
