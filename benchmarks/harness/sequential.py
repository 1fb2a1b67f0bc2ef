"""A decision by repeated batches: pass with the first good one, fail when several in a row agree on what is bad."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

Batch = Mapping[str, float]
"""What was compared → its value; too large is bad."""


@dataclass(frozen=True)
class Decision:
    """`above`: what was above its bound in every batch, with its smallest value there; empty where the check passed."""

    above: Mapping[str, float]
    batches: int

    @property
    def passed(self) -> bool:
        """Whether nothing was."""
        return not self.above


def decide(batches: Iterable[Batch], bounds: Mapping[str, float], most: int) -> Decision:
    """Take up to `most` batches, no more than it needs.

    Raises:
        ValueError: the batches ended before there was a decision.
    """
    above: dict[str, float] | None = None
    taken = 0
    for taken, batch in enumerate(islice(batches, most), 1):
        now = {name: value for name, value in batch.items() if value > bounds[name]}
        above = now if above is None else {name: min(above[name], now[name]) for name in above.keys() & now.keys()}
        if not above:
            return Decision({}, taken)
    if above is None or taken < most:
        raise ValueError(f"batches: got {taken}, expected {most} or one within the bounds")
    return Decision(above, taken)


def decisions(batches: Iterable[Batch], bounds: Mapping[str, float], most: int) -> Iterator[Decision]:
    """The decisions of checks run one after another, each on the batches that the one before has left."""
    left = iter(batches)
    while True:
        try:
            yield decide(left, bounds, most)
        except ValueError:  # the last one's batches are too few, or none
            return


def upper_limit(events: int, trials: int, confidence: float = 0.95) -> float:
    """The largest rate at which so few events in so many trials still happen one time in twenty (Clopper-Pearson)."""
    if events >= trials:
        return 1.0
    low, high = events / trials, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        probability = sum(math.comb(trials, k) * middle**k * (1 - middle) ** (trials - k) for k in range(events + 1))
        low, high = (middle, high) if probability > 1 - confidence else (low, middle)
    return high
