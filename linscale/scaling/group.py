"""One fit of a group of runs and what was asked of it: what the terminal, JSON and pages show."""

import dataclasses

from linscale.scaling import isoflop, optimum, parametric
from linscale.scaling.tasks import Task


@dataclasses.dataclass(frozen=True)
class Group:
    """One fit and what was asked of it."""

    name: str  # empty: the only table of a file
    found: parametric.Fit | isoflop.Fit
    notes: tuple[str, ...]
    optima: tuple[optimum.Optimum, ...] = ()
    backtest: optimum.Backtest | None = None
    tasks: tuple[Task, ...] = ()
    profile: dict[str, tuple[float, float]] | None = None

    @property
    def law(self) -> bool:
        return isinstance(self.found, parametric.Fit)
