"""`linscale paper`: the paper's own laws read: which architecture is best at which compute, where lines cross; its tables.

The laws are taken as printed; the paper gives no error bars. What the rounding of its coefficients leaves open is shown
as an interval, and so is which statements lie outside the compute of its runs.
"""

import argparse
import json
import math
from pathlib import Path

from linscale.config import ConfigError
from linscale.scaling import crossings, hardware_days, paper
from linscale.scaling.flops import PF_DAY

BUDGETS = (0.1, 1.0, 10.0, 100.0, 1000.0)
QUANTITIES = {  # field of paper.Laws: what it is
    "loss": "loss L, nats per token of the paper's tokenizer and corpus",
    "parameters": "N_opt, parameters without the embedding (the paper's formula)",
    "tokens": "D_opt, tokens",
}
CONVENTION = (
    "C is training compute in PFLOP/s-days, in the paper's accounting (full n x n attention, no output head); it is not "
    "6 N D. N is parameters without the embedding."
)
MISMATCH = (
    "6ND/C: what N_opt and D_opt cost together by 6 N D, over C. Above 1 they cannot be had for C: the three laws are "
    "fitted apart and do not agree there."
)
SOURCE = "arXiv 2406.16690v1, table 3; hybrid (7 lightning layers to 1 softmax layer): arXiv 2501.08313"


def quantity(name: str) -> dict[str, paper.PowerLaw]:
    """The laws of one quantity by architecture, the paper's four and the hybrid."""
    return {arch: getattr(paper.laws(arch), name) for arch in (*paper.TABLE3, "hybrid")}


def budget_rows(compute: float) -> list[dict]:
    """What each law says at one compute in PFLOP/s-days."""
    rows = []
    for arch in quantity("loss"):
        law = paper.laws(arch)
        n, d = law.parameters(compute), law.tokens(compute)
        rows.append(
            {
                "arch": arch,
                "loss": law.loss(compute),
                "n": n,
                "d": d,
                "tokens_per_parameter": d / n,
                "6nd_over_c": 6 * n * d / (compute * PF_DAY),
                "compute_llama_needs": crossings.equal_compute(law.loss, paper.laws("llama").loss, compute),
            }
        )
    return rows


def read(budgets: tuple[float, ...], hardware: list[hardware_days.Hardware]) -> dict:
    """Everything that the text and the page say, as plain JSON values; None stands for an unbounded end."""
    low, high = paper.compute_range()
    out = {
        "source": SOURCE,
        "convention": CONVENTION,
        "units": QUANTITIES,
        "compute_range": [low, high],
        "laws": {
            arch: {
                name: {"coefficient": law.coefficient, "exponent": law.exponent}
                for name in QUANTITIES
                for law in [getattr(paper.laws(arch), name)]
            }
            for arch in quantity("loss")
        },
        "lowest_loss": [
            {"arch": arch, "from": begin, "to": _end(end)}
            for arch, begin, end in crossings.lowest({arch: law.loss for arch, law in paper.TABLE3.items()})
        ],
        "lowest_loss_with_hybrid": [
            {"arch": arch, "from": begin, "to": _end(end)} for arch, begin, end in crossings.lowest(quantity("loss"))
        ],
        "crossings": {
            name: [
                {
                    "below": c.before,
                    "above": c.after,
                    "compute": _end(c.compute),
                    "interval_of_rounding": [c.low, _end(c.high)],
                    "value": c.value if math.isfinite(c.value) else None,
                    "inside_the_runs": low <= c.compute <= high,
                }
                for c in crossings.crossings(quantity(name))
            ]
            for name in QUANTITIES
        },
        "budgets": [
            {
                "compute": compute,
                "flops": compute * PF_DAY,
                "extrapolated": not low <= compute <= high,
                "days": {h.name: h.days(compute * PF_DAY) for h in hardware},
                "rows": budget_rows(compute),
            }
            for compute in budgets
        ],
        "mfu": hardware[0].mfu if hardware else None,
    }
    return out


def _end(value: float) -> float | None:
    return value if math.isfinite(value) else None


def as_text(read_: dict) -> str:
    low, high = read_["compute_range"]
    lines = [f"The paper's laws ({read_['source']}).", read_["convention"], ""]
    lines.append(f"{'arch':<10}  {'L(C), nats per token':<22}  {'N_opt(C)':<20}  {'D_opt(C)':<20}")
    lines.append("-" * len(lines[-1]))
    for arch, laws in read_["laws"].items():
        forms = [f"{laws[name]['coefficient']:g} C^{laws[name]['exponent']:.4f}" for name in QUANTITIES]
        lines.append(f"{arch:<10}  {forms[0]:<22}  {forms[1]:<20}  {forms[2]:<20}")
    lines += ["", "Lowest loss of the paper's four:"]
    for part in read_["lowest_loss"]:
        lines.append(f"  {part['arch']:<10}  {_span(part['from'], part['to'])}")
    lines.append("With the hybrid:")
    for part in read_["lowest_loss_with_hybrid"]:
        lines.append(f"  {part['arch']:<10}  {_span(part['from'], part['to'])}")
    lines.append(f"The paper's runs end between C = {low:.2g} and {high:.3g}; all else is extrapolation, marked *.")
    for name, what in QUANTITIES.items():
        lines += ["", f"Crossings of {what}:"]
        lines.append(
            f"  {'lower below':<12}  {'lower above':<12}  {'at C':>9}  {'left open by rounding':>24}  {'value':>9}"
        )
        for c in read_["crossings"][name]:
            if c["compute"] is None or not 1e-6 <= c["compute"] <= 1e9:
                continue
            a, b = c["interval_of_rounding"]
            lines.append(
                f"  {c['below']:<12}  {c['above']:<12}  {c['compute']:>9.3g}  "
                f"{f'{a:.2g} - {b:.2g}' if b else 'everything':>24}  {c['value']:>9.3g}{'' if c['inside_the_runs'] else ' *'}"
            )
    for budget in read_["budgets"]:
        times = ", ".join(f"{name} {hardware_days.time(days)}" for name, days in budget["days"].items())
        lines += ["", f"At C = {budget['compute']:g} PFLOP/s-days ({budget['flops']:.3g} FLOPs)"
                  f"{' *' if budget['extrapolated'] else ''}; at MFU {read_['mfu']:g}: {times}"]  # fmt: skip
        lines.append(
            f"  {'arch':<10}  {'loss':>7}  {'N_opt':>9}  {'D_opt':>9}  {'D/N':>6}  {'6ND/C':>6}  {'LLaMA needs':>11}"
        )
        best = min(row["loss"] for row in budget["rows"])
        for row in budget["rows"]:
            lines.append(
                f"  {row['arch']:<10}  {row['loss']:>7.4f}  {row['n']:>9.3g}  {row['d']:>9.3g}  "
                f"{row['tokens_per_parameter']:>6.1f}  {row['6nd_over_c']:>6.2f}  "
                f"{row['compute_llama_needs']:>9.2f} C{'  lowest loss' if row['loss'] == best else ''}"
            )
    lines += ["", "LLaMA needs: the compute at which LLaMA's law reaches the same loss.", MISMATCH]
    return "\n".join(lines)


def _span(begin: float, end: float | None) -> str:
    if not begin:
        return f"below C = {end:.3g}" if end else "at any C"
    return f"from C = {begin:.3g}" + (f" to {end:.3g}" if end else " on")


def tables_text() -> str:
    """The paper's tables as printed."""
    out = []
    for name, what in paper.TABLES.items():
        rows = paper.printed(name)
        heads = list(rows[0])
        wide = [max(len(head), *(len(row[head]) for row in rows)) for head in heads]
        out += [f"{what} ({name}.csv)", "  ".join(head.ljust(w) for head, w in zip(heads, wide))]
        out += ["  ".join((row[head] or "-").rjust(w) for head, w in zip(heads, wide)) for row in rows]
        out.append("")
    return "\n".join(out).rstrip()


def main(argv: list[str]) -> int:
    """Prints the reading, or the tables; writes --json and --report."""
    parser = argparse.ArgumentParser(
        prog="linscale paper",
        description="Read the paper's own laws: which architecture has the lowest loss at which compute, where the "
        "lines of loss, N_opt and D_opt cross, and what they say of a budget.",
    )
    parser.add_argument(
        "--budget", type=float, nargs="+", default=list(BUDGETS), metavar="C", help="in PFLOP/s-days (0.1 ... 1000)"
    )
    hardware_days.add_options(parser)
    parser.add_argument("--tables", action="store_true", help="print all tables of the paper instead")
    parser.add_argument("--json", metavar="FILE", help="write laws, crossings, budgets and all tables")
    parser.add_argument("--report", metavar="DIR", help="write an HTML page and its figures")
    arguments = parser.parse_args(argv)
    for budget in arguments.budget:
        if not (math.isfinite(budget) and 1e-30 < budget < 1e30):
            raise ConfigError(f"--budget is {budget}; it must be a positive number of PFLOP/s-days.")
    hardware = hardware_days.chosen(arguments)
    found = read(tuple(arguments.budget), hardware)
    print(tables_text() if arguments.tables else as_text(found))
    if arguments.json:
        content = found | {
            "tables": {name: {"what": what, "rows": list(paper.table(name))} for name, what in paper.TABLES.items()}
        }
        try:
            Path(arguments.json).write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--json {arguments.json} cannot be written: {error.strerror}.") from error
    if arguments.report:
        from linscale.scaling import paper_page

        print(paper_page.write(Path(arguments.report), found, hardware))
    return 0
