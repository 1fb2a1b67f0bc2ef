"""Time budgets, and signals that end a part of a run without losing what it has.

A `Guard` turns SIGINT, SIGTERM and a part's deadline into `Stopped`, raised in the main thread wherever in the part it
is. Outside of parts, where results are written, nothing is raised.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE = 5.0
"""Seconds past its deadline after which a part that has not looked at it is interrupted: a compilation, say."""


class Stopped(BaseException):
    """A part is to end now. Not an Exception: nothing that survives a failing measurement may swallow it."""


@dataclass(frozen=True)
class Deadline:
    """A moment of `clock`, in its seconds."""

    at: float
    clock: Callable[[], float] = time.monotonic

    @classmethod
    def after(cls, seconds: float, clock: Callable[[], float] = time.monotonic) -> Deadline:
        """The moment `seconds` from now."""
        return cls(clock() + seconds, clock)

    def left(self) -> float:
        """Seconds until then, negative afterwards."""
        return self.at - self.clock()

    @property
    def passed(self) -> bool:
        """Whether the moment is over."""
        return self.left() <= 0


def part_seconds(left: float, shares: Sequence[float]) -> float:
    """What the first of the remaining parts may take of `left` seconds, `shares` being those parts' usual needs.

    All that the later parts leave over, or, where that is less, its proportional share: late parts do not starve
    because of early ones, nor the other way round.
    """
    if left <= 0:
        return 0.0
    return max(left - sum(shares[1:]), left * shares[0] / sum(shares))


class Guard:
    """Installs the handlers while entered. `told` is the signal that asked the whole run to stop, None so far."""

    def __init__(self) -> None:
        self.told: str | None = None
        self._is_in_part = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Guard:
        for number in _SIGNALS:
            self._before[number] = signal.signal(number, self._on_signal)
        self._before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._on_alarm)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        first, self.told = self.told is None, self.told or signal.Signals(number).name
        if first and self._is_in_part:
            raise Stopped(f"stopped by {self.told}")

    def _on_alarm(self, number: int, frame: FrameType | None) -> None:
        if self._is_in_part:
            raise Stopped("its time was up")

    @contextmanager
    def part(self, seconds: float) -> Iterator[None]:
        """Raise `Stopped` in the body when a signal comes, or `GRACE` after `seconds`."""
        try:
            self._is_in_part = True
            signal.setitimer(signal.ITIMER_REAL, seconds + GRACE)
            yield
        finally:
            self._is_in_part = False
            signal.setitimer(signal.ITIMER_REAL, 0)
