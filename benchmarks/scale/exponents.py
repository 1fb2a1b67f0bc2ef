"""Exponents of growth: the slope of log(seconds) over log(size), from the raw seconds of a preset's cases.

Fitted to the larger half of the sizes, where what is proportional to the size outweighs what every call costs. The
interval comes from drawing rounds anew, at every size by itself: sizes are timed one after the other, so their rounds
have nothing to do with each other.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..harness.results import Case, Setting

DRAWS = 500
_INTERVAL = (0.05, 0.95)
AXES: Mapping[str, Callable[[Mapping[str, Setting]], int]] = {
    "tokens": lambda at: int(at["tokens"]),
    "size": lambda at: int(at["out_features"]) * int(at["in_features"]),
    "rank": lambda at: int(at["rank"]),
    "depth": lambda at: int(at["layers"]),
}
"""What grows along each axis, from a case's settings."""


@dataclass(frozen=True)
class Exponent:
    """`value`: of the medians; `lower` and `upper`: between them are 90 % of the draws. `sizes`: those it is from."""

    lower: float
    value: float
    upper: float
    sizes: tuple[int, ...]


def larger_half(sizes: Sequence[int]) -> tuple[int, ...]:
    """The larger half of the sizes, of an odd number of them the one in the middle too, and never fewer than two.

    Raises:
        ValueError: there are fewer than two.
    """
    ordered = sorted(set(sizes))
    if len(ordered) < 2:
        raise ValueError(f"sizes: got {list(sizes)}, expected two different ones or more")
    return tuple(ordered[-max(2, (len(ordered) + 1) // 2) :])


def exponent(seconds: Mapping[int, Sequence[float]]) -> Exponent:
    """From size → seconds of every round.

    Raises:
        ValueError: there are fewer than two sizes.
    """
    sizes = larger_half(list(seconds))
    drawn = random.Random(0)
    slopes = sorted(
        _slope(sizes, [statistics.median(drawn.choices(seconds[size], k=len(seconds[size]))) for size in sizes])
        for _ in range(DRAWS)
    )
    lower, upper = (slopes[round(part * (DRAWS - 1))] for part in _INTERVAL)
    return Exponent(lower, _slope(sizes, [statistics.median(seconds[size]) for size in sizes]), upper, sizes)


def exponents(cases: Iterable[Case], axis: str) -> dict[str, Exponent]:
    """Subject → its exponent along `axis`, of the cases of that axis; without subjects that were timed at one size."""
    seconds: dict[str, dict[int, Sequence[float]]] = {}
    for case in cases:
        if case.settings.get("axis") == axis:
            for name in case.timed():
                seconds.setdefault(name, {})[AXES[axis](case.settings)] = case.subjects[name].seconds
    return {name: exponent(points) for name, points in seconds.items() if len(points) > 1}


def _slope(sizes: Sequence[int], seconds: Sequence[float]) -> float:
    return statistics.linear_regression([math.log(size) for size in sizes], [math.log(time) for time in seconds]).slope
