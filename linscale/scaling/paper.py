"""The results of the paper (arXiv 2406.16690v1) as data: its tables, as printed, in paper_tables/*.csv.

The paper's loss is in nats per token of a 100,280-entry vocabulary on its own corpus, C in PFLOP/s-days in the paper's
accounting (full n x n attention, no head), N without the embedding. It gives no error bars. `hybrid` is the same
authors' later model of 7 lightning layers to 1 softmax layer (MiniMax-01, arXiv 2501.08313), fitted by the same method.

Where the paper contradicts itself, the files hold what is printed:
- table 2 has 8 heads of 128 channels at widths 512 and 768, and 16 at 1536; table 7's counts come out with width / 128;
- the 1B rows of table 4 mix two models: benchmarks and perplexities are those of width 2048 in table 5, needle and
  SCROLLS those of width 1536, which is the 1B model of table 7;
- SCROLLS of cosFormer2 160M is 8.71 in table 4 and 7.71 in table 8; the mean of its scores is 7.71. The scores of
  HGRN2 70M and 160M have the means 7.38 and 8.19, and 7.32 and 8.29 are printed;
- the needle accuracy of HGRN2 160M is 0.2 in table 4 and 0.3 in table 11.

Tables 9, 10, 12 and 13 (SCROLLS and needle of the studies of shape and context, task by task) are not here; tables 5
and 6 hold their averages.
"""

import csv
import dataclasses
import functools
from pathlib import Path

FOLDER = Path(__file__).with_name("paper_tables")
# name of the file: what it holds, with units
TABLES = {
    "table2_sizes": "Table 2: layers, width and heads as printed (see models.sizes for those that give table 7)",
    "table3_laws": "Table 3: y = coefficient C^exponent, C in PFLOP/s-days; loss in nats per token, parameters without "
    "the embedding, tokens; hybrid from arXiv 2501.08313",
    "table4_main": "Table 4: accuracies in per cent, csr their mean; perplexities; weighted needle accuracy (easy mode); "
    "mean of SCROLLS",
    "table5_aspect": "Table 5: the same for four shapes of the 1B model",
    "table6_context": "Table 6: the same for pre-training context lengths, 1B model of width 1536",
    "table7_counts": "Table 7: millions of parameters without the embedding, PFLOPs a step of 480 x 8192 tokens",
    "table8_scrolls": "Table 8: SCROLLS, ROUGE-1/2/L, F1 and exact match; empty where the task failed",
    "table11_needle": "Table 11: needle in a haystack, accuracies in per cent; easy mode at and up to lengths, averages "
    "and score; weighted accuracy of the standard mode",
}
_WORDS = ("arch", "size", "source")


@functools.cache
def table(name: str) -> tuple[dict, ...]:
    """Rows of a table: str under arch, size and source, float or None under the others. KeyError: no such table."""
    TABLES[name]
    with (FOLDER / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return tuple(
            {key: value if key in _WORDS else float(value) if value else None for key, value in row.items()}
            for row in csv.DictReader(file)
        )


@functools.cache
def printed(name: str) -> tuple[dict, ...]:
    """The same rows with the digits as printed."""
    with (FOLDER / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return tuple(csv.DictReader(file))


@dataclasses.dataclass(frozen=True)
class PowerLaw:
    """y = coefficient * C^exponent, C in PFLOP/s-days."""

    coefficient: float
    exponent: float
    # Half of the last printed digit of each: what the print leaves open.
    coefficient_half: float = 0.0
    exponent_half: float = 0.0

    def __call__(self, compute):
        """compute in PFLOP/s-days, a number or an array -> y."""
        return self.coefficient * compute**self.exponent


@dataclasses.dataclass(frozen=True)
class Laws:
    loss: PowerLaw  # L(C), nats per token
    parameters: PowerLaw  # N_opt(C), non-embedding parameters
    tokens: PowerLaw  # D_opt(C), tokens


def _half(text: str) -> float:
    """'1.82e8' -> 0.005e8."""
    mantissa, _, exponent = text.partition("e")
    return 0.5 * 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))


def _law(row: dict, name: str) -> PowerLaw:
    texts = row[f"{name}_coefficient"], row[f"{name}_exponent"]
    return PowerLaw(*map(float, texts), *map(_half, texts))


_LAWS = {
    row["arch"]: Laws(*(_law(row, name) for name in ("loss", "parameters", "tokens"))) for row in printed("table3_laws")
}
TABLE3 = {arch: law for arch, law in _LAWS.items() if arch != "hybrid"}
HYBRID = _LAWS["hybrid"]


def laws(arch: str) -> Laws | None:
    """The published laws of an architecture, None if there are none."""
    return _LAWS.get(arch)


def _columns(name: str, column: str) -> dict[str, tuple[float, ...]]:
    """By architecture the column's values in the order of sizes."""
    out = {}
    for row in table(name):
        out.setdefault(row["arch"], []).append(row[column])
    return {arch: tuple(values) for arch, values in out.items()}


TABLE7_SIZES = ("70m", "160m", "410m", "1b", "3b", "7b")
TABLE7_BATCH, TABLE7_SEQUENCE = 480, 8192
TOKENS = 300e9  # that the paper's models were trained on
TABLE7_PARAMETERS = _columns("table7_counts", "nonembedding_millions")  # one printed decimal
TABLE7_PFLOPS = _columns("table7_counts", "pflops_per_step")


def compute_range() -> tuple[float, float]:
    """PFLOP/s-days of the least and the greatest of the paper's runs at their end (table 7 x 300B tokens)."""
    steps = TOKENS / (TABLE7_BATCH * TABLE7_SEQUENCE)
    ends = [pflops * steps / 86_400 for row in TABLE7_PFLOPS.values() for pflops in row]
    return min(ends), max(ends)
