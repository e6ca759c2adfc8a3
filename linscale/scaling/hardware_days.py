"""Days of training on named hardware: FLOPs over peak times utilisation (MFU), from the counting module's peaks."""

import argparse
import dataclasses
import math

from linscale.config import ConfigError
from linscale.launch.hardware import CHIPS, Topology, parse
from linscale.scaling.page import Markup, Number, element

DEFAULT = ("h100:8", "h100:256", "v5e:16x16")
MFU = 0.4  # what a large run should reach; say your own


@dataclasses.dataclass(frozen=True)
class Hardware:
    """days(flops) at the bfloat16 peak of all devices times mfu."""

    topology: Topology
    mfu: float

    @property
    def name(self) -> str:
        return self.topology.name

    @property
    def speed(self) -> float:
        """FLOP/s that training is expected to reach."""
        return self.topology.chip.peak * self.topology.devices * self.mfu

    def days(self, flops: float) -> float:
        return flops / self.speed / 86_400


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--hardware", nargs="+", default=list(DEFAULT), metavar="CHIP:N", help=f"for days ({' '.join(DEFAULT)})"
    )
    parser.add_argument("--mfu", type=float, default=MFU, help=f"share of the peak that training reaches ({MFU})")


def chosen(arguments: argparse.Namespace) -> list[Hardware]:
    """Raises ConfigError for an unknown chip, a shape it cannot have, or an --mfu outside of 0 to 1."""
    if not (math.isfinite(arguments.mfu) and 0 < arguments.mfu <= 1):
        raise ConfigError(f"--mfu is {arguments.mfu}; it must lie above 0 and at most at 1.")
    try:
        return [Hardware(parse(text), arguments.mfu) for text in arguments.hardware]
    except ConfigError as error:
        raise ConfigError(str(error).replace("--topology", "--hardware")) from None


def time(days: float) -> str:
    """'3.2 hours', '41 days', '12 years'."""
    for unit, size in (("seconds", 1 / 86_400), ("minutes", 1 / 1440), ("hours", 1 / 24), ("days", 1.0)):
        if days < {"seconds": 90 / 86_400, "minutes": 90 / 1440, "hours": 2.0, "days": 1000.0}[unit]:
            return f"{days / size:.3g} {unit}"
    return f"{days / 365.25:.3g} years" if days < 1e9 else f"{days / 365.25:.1e} years"


def cell(flops: float, hardware: Hardware) -> Number:
    """Of a table below a `form`, which changes it."""
    days = hardware.days(flops)
    out = Number(time(days), days)
    out.attributes["data-flops"] = repr(float(flops))
    return out


def form(hardware: Hardware) -> Markup:
    """The choice of chip, number and utilisation for all cells of days in the same element; begins with `hardware`."""
    topology = hardware.topology
    options = []
    for chip in CHIPS.values():
        chosen_ = {"selected": ""} if chip == topology.chip else {}
        label = f"{chip.name} ({chip.peak * chip.devices_per_chip / 1e12:,.0f} TFLOP/s)"
        options.append(element("option", label, value=f"{chip.peak * chip.devices_per_chip:g}", **chosen_))
    count = element("input", name="count", type="number", min="1", max="1000000", value=str(topology.chips))
    share = element("input", name="mfu", type="number", min="1", max="100", step="any", value=f"{100 * hardware.mfu:g}")
    return element(
        "form",
        element("label", "chip", element("select", *options, name="chip")),
        element("label", "number", count),
        element("label", "% of peak (MFU)", share),
        class_="hardware",
    )


def budgets(values: list[float]) -> tuple[float, ...]:
    """--budget in FLOPs. Raises ConfigError for what is no amount of FLOPs."""
    for value in values:
        if not (math.isfinite(value) and 1 <= value < 1e40):
            raise ConfigError(f"--budget is {value}; it must be a positive number of FLOPs.")
    return tuple(values)
