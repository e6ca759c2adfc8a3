"""The law L(N, D) = E + A / N^alpha + B / D^beta of each architecture of a ladder, from the ends of its finished runs."""

import dataclasses
from pathlib import Path

from linscale.scaling import fit_page, optimum, parametric, printing, runs, tables
from linscale.scaling.appearance import LABELS
from linscale.scaling.group import Group
from linscale.scaling.minimise import HUBER
from linscale.scaling.page import Markup, element

FORM = "chinchilla"


def sections(ladder: runs.Ladder, about, budgets: tuple[float, ...], folder: Path) -> tuple[list[Markup], list[dict]]:
    """The parts of the page and what JSON says of them. about: envelope_page.About; budgets in FLOPs."""
    found, notes = tables.from_ladder(ladder, about.options.n)
    enough = {name: found[name] for name in LABELS if len(found.get(name, ())) > 5}
    notes += [
        f"{name} has {len(table)} finished runs; L(N, D) has 5 coefficients and needs more runs."
        for name, table in found.items()
        if name not in enough
    ]
    budgets = budgets or optimum.round_budgets(list(enough.values()))
    groups = []
    for name, table in enough.items():
        law = parametric.fit(FORM, table, HUBER, about.options.resamples, about.options.seed)
        best = tuple(optimum.optimum(law, budget) for budget in budgets) if law.identified else ()
        groups.append(Group(name, law, law.warnings, best))
    shown = fit_page.About(
        source="",
        formula=groups[0].found.form.formula,
        method="Huber loss of log L, delta 0.001, sum over runs",
        intervals="",
        compute="6nd",
        hardware=about.hardware,
    )
    items = [element("li", note) for note in notes]
    items += [element("li", f"{group.name}: {note}") for group in groups for note in group.notes]
    warnings = element("div", element("ul", *items), class_="notes") if items else Markup("")
    text = (
        f"{shown.formula} by {shown.method}, from the last loss of every finished run (held-out where it was measured); "
        f"95 % intervals of {about.options.resamples:,} draws of the runs with replacement. {fit_page.convention(groups[0].found.runs, shown)}"
    )
    parts = [element("h2", "The law of size and tokens"), element("p", text), warnings]
    parts += fit_page.sections(groups, shown, folder, of=" of L(N, D)")
    return parts, [_plain(group) for group in groups]


def _plain(group: Group) -> dict:
    law = group.found
    return {
        "arch": group.name,
        "form": law.form.name,
        "n": law.runs.n_name,
        "coefficients": law.coefficients,
        "intervals": {key: list(map(printing.finite, ends)) for key, ends in law.intervals.items()},
        "objective": law.objective,
        "loss": dataclasses.asdict(law.loss),
        "n_runs": len(law.runs),
        "optimal": [printing.plain(dataclasses.asdict(best)) | {"compute": "6nd"} for best in group.optima],
        "warnings": list(group.notes),
    }
