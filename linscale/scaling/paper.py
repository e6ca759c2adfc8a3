"""The results of the paper that reports compare with (arXiv 2406.16690v1, tables 3 and 7), as data.

The paper's loss is in nats per token of a 100,280-entry vocabulary on its own corpus, C in PFLOP/s-days in the paper's
accounting, N without the embedding. It gives no error bars.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class PowerLaw:
    """y = coefficient * C^exponent, C in PFLOP/s-days."""

    coefficient: float
    exponent: float

    def __call__(self, compute):
        """compute in PFLOP/s-days, a number or an array -> y."""
        return self.coefficient * compute**self.exponent


@dataclasses.dataclass(frozen=True)
class Laws:
    loss: PowerLaw  # L(C), nats per token
    parameters: PowerLaw  # N_opt(C), non-embedding parameters
    tokens: PowerLaw  # D_opt(C), tokens


TABLE3 = {
    "llama": Laws(PowerLaw(3.7087, -0.0798), PowerLaw(1.82e8, 0.7118), PowerLaw(2.56e10, 0.5102)),
    "tnl": Laws(PowerLaw(3.5391, -0.0768), PowerLaw(2.74e8, 0.6470), PowerLaw(4.43e10, 0.4684)),
    "hgrn2": Laws(PowerLaw(3.4788, -0.0753), PowerLaw(2.66e8, 0.6427), PowerLaw(4.80e10, 0.4500)),
    "cosformer2": Laws(PowerLaw(3.5877, -0.0756), PowerLaw(2.65e8, 0.6516), PowerLaw(4.23e10, 0.4529)),
}
# The authors' later hybrid of 7 lightning layers to 1 softmax layer (MiniMax-01, arXiv 2501.08313); not in table 3.
HYBRID = Laws(PowerLaw(3.4797, -0.0763), PowerLaw(2.57e8, 0.6670), PowerLaw(3.70e10, 0.4707))


def laws(arch: str) -> Laws | None:
    """The published laws of an architecture, None if there are none."""
    return HYBRID if arch == "hybrid" else TABLE3.get(arch)


TABLE7_SIZES = ("70m", "160m", "410m", "1b", "3b", "7b")
TABLE7_BATCH, TABLE7_SEQUENCE = 480, 8192
# Non-embedding parameters in millions, one printed decimal.
TABLE7_PARAMETERS = {
    "llama": (20.5, 85.0, 334.1, 906.2, 2775.8, 6476.5),
    "tnl": (21.2, 87.3, 327.7, 918.6, 2798.4, 6509.6),
    "hgrn2": (20.5, 84.9, 334.0, 906.0, 2775.5, 6476.1),
    "cosformer2": (21.3, 87.5, 328.0, 919.1, 2799.0, 6511.0),
}
# PFLOPs of a step of TABLE7_BATCH sequences, one printed decimal.
TABLE7_PFLOPS = {
    "llama": (1.6, 5.6, 18.0, 40.4, 99.6, 202.7),
    "tnl": (0.5, 2.2, 7.9, 22.3, 66.6, 154.4),
    "hgrn2": (0.5, 2.1, 8.0, 22.0, 66.0, 153.6),
    "cosformer2": (0.5, 2.3, 8.1, 22.7, 67.4, 155.6),
}
