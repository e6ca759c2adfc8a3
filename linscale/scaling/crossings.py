"""Where power laws of compute cross, which of them is best at which compute, and how much compute one saves another.

Two laws y = a C^b cross once, at C = (a_2 / a_1)^(1 / (b_1 - b_2)): a small difference of the exponents throws the
crossing far, so that already the rounding of printed coefficients leaves it open by a factor. `crossing` gives that
interval; it holds the rounding only, no error of the fit.
"""

import dataclasses
import itertools
import math

from linscale.scaling.paper import PowerLaw


@dataclasses.dataclass(frozen=True)
class Crossing:
    """Below `compute` the law `before` is the lower one, above it `after`."""

    before: str
    after: str
    compute: float
    low: float  # by the rounding of the coefficients; 0 and inf where it leaves even the order of the exponents open
    high: float
    value: float  # of both laws there


def crossing(names: tuple[str, str], one: PowerLaw, other: PowerLaw) -> Crossing | None:
    """None for parallel laws. compute may be as large or small as a float holds (0 or inf beyond)."""
    slope = one.exponent - other.exponent
    if slope == 0:
        return None
    at = _solve(math.log(other.coefficient / one.coefficient), slope)
    places = []
    halves = one.coefficient_half, other.coefficient_half, one.exponent_half, other.exponent_half
    for a, b, c, d in itertools.product((-1, 1), repeat=4):
        gap = math.log((other.coefficient + b * halves[1]) / (one.coefficient + a * halves[0]))
        steep = slope + c * halves[2] - d * halves[3]
        places.append(_solve(gap, steep) if steep * slope > 0 else None)
    low, high = (0.0, math.inf) if None in places else (min(places), max(places))
    before, after = names if slope > 0 else names[::-1]
    return Crossing(before, after, at, low, high, one(at) if 0 < at < math.inf else math.nan)


def _solve(gap: float, slope: float) -> float:
    power = gap / slope
    return math.inf if power > 700 else 0.0 if power < -700 else math.exp(power)


def crossings(laws: dict[str, PowerLaw]) -> list[Crossing]:
    """Of all pairs, by compute."""
    pairs = itertools.combinations(laws, 2)
    found = [crossing(pair, laws[pair[0]], laws[pair[1]]) for pair in pairs]
    return sorted((c for c in found if c), key=lambda c: c.compute)


def lowest(laws: dict[str, PowerLaw]) -> list[tuple[str, float, float]]:
    """The lower envelope of the laws: (name, from, to) in order of compute, from 0 to inf."""
    remaining = max(laws, key=lambda name: (laws[name].exponent, -laws[name].coefficient))  # lowest at C -> 0
    out, begin = [], 0.0
    while True:
        now = laws[remaining]
        steeper = [name for name in laws if laws[name].exponent < now.exponent]
        places = {name: crossing((remaining, name), now, laws[name]).compute for name in steeper}
        following = min(places, key=lambda name: (places[name], laws[name].exponent), default=None)
        end = math.inf if following is None else max(begin, places[following])
        if end > begin:
            out.append((remaining, begin, end))
        if following is None or end == math.inf:
            return out
        remaining, begin = following, end


def equal_compute(law: PowerLaw, other: PowerLaw, compute: float) -> float:
    """How many times `compute` the other law needs for the value that `law` has at it."""
    return (law(compute) / other.coefficient) ** (1 / other.exponent) / compute
