"""Axes of charts: where a value stands between 0 and 1, and which few values are written beside the axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .numerals import finite, power_of

_MOST_TICKS, _MOST_WHOLE_TICKS = 6, 7
_DECADES = ((1, 2, 3, 4, 5, 6, 8), (1, 2, 5))
"""Steps of a logarithmic axis that is short."""

_BAND = 0.09
"""Share of a logarithmic axis that is kept below its lowest value for zeros, where there are any."""


@dataclass(frozen=True)
class Axis:
    """An axis from `low` to `high`.

    Attributes:
        label: what the axis shows, with its unit.
        low, high: its ends; of a logarithmic axis, their decimal logarithms.
        ticks: places between 0 and 1, each with its text.
        is_logarithmic: whether places go by the values' logarithms.
        band: on a logarithmic axis, where `low` stands; what is not positive stands at 0.
    """

    label: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    is_logarithmic: bool = False
    band: float = 0.0

    def place(self, value: float) -> float:
        """Where `value` stands, from 0 to 1."""
        if self.is_logarithmic:
            if value <= 0:
                return 0.0
            value = math.log10(value)
        return self.band + (1 - self.band) * _fraction(value, self.low, self.high)


def linear_axis(
    label: str, values: Sequence[float], least_span: float, limits: tuple[float, float] = (-math.inf, math.inf)
) -> Axis:
    """An axis around all `values` that are numbers, at least `least_span` long; within `limits` where they are."""
    known = finite(values) or [0.0]
    low, high = min(known), max(known)
    lacking = max(0.0, least_span - (high - low)) / 2
    shift = max(0.0, limits[0] - (low - lacking)) - max(0.0, (high + lacking) - limits[1])
    low, high = min(low, low - lacking + shift), max(high, high + lacking + shift)
    step = _step((high - low) / (_MOST_TICKS - 1))
    first, last = math.floor(low / step + 1e-12), math.ceil(high / step - 1e-12)
    decimals = max(0, -math.floor(math.log10(step)))
    ends = first * step, last * step
    return Axis(
        label,
        *ends,
        tuple(
            (_fraction(index * step, *ends), _signed(f"{index * step:.{decimals}f}"))
            for index in range(first, last + 1)
        ),
    )


def logarithmic_axis(label: str, values: Sequence[float]) -> Axis:
    """An axis around all positive `values`; it has a place for zero where some are zero or negative."""
    known = finite(values)
    positive = [value for value in known if value > 0]
    has_zeros = len(positive) < len(known)
    band = _BAND if has_zeros else 0.0
    ticks = _logarithmic_ticks(min(positive), max(positive)) if positive else []
    low, high = (ticks[0][0], ticks[-1][0]) if ticks else (0.0, 1.0)
    placed = [(band + (1 - band) * _fraction(exponent, low, high), text) for exponent, text in ticks]
    return Axis(label, low, high, tuple([(0.0, "0")] * has_zeros + placed), is_logarithmic=True, band=band)


def whole_axis(label: str, highest: int, extra: str | None = None) -> Axis:
    """An axis of the whole numbers from 0 to `highest`; `extra` names one more place, `extra_place`, to their right."""
    step = max(1, round(_step(highest / _MOST_WHOLE_TICKS)))
    low, high = -0.5, (highest if extra is None else extra_place(highest)) + 0.5
    values: list[tuple[float, str]] = [(value, str(value)) for value in range(0, highest + 1, step)]
    if extra is not None:
        values.append((extra_place(highest), extra))
    return Axis(label, low, high, tuple((_fraction(value, low, high), text) for value, text in values))


def extra_place(highest: int) -> float:
    """A value so far right of `highest` that their texts stand apart on a phone."""
    return highest + max(2.0, 0.15 * highest)


def _logarithmic_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Logarithms and texts: as many steps in a decade as leaves few ticks, or powers of ten some decades apart."""
    least, most = math.log10(low), math.log10(high)
    first, last = math.floor(least), math.ceil(most)
    for steps in _DECADES:
        fine = [(e + math.log10(step), _decimal(step, e)) for e in range(first, last + 1) for step in steps]
        start = max(index for index, (exponent, _) in enumerate(fine) if exponent <= least + 1e-12)
        stop = min(index for index, (exponent, _) in enumerate(fine) if exponent >= most - 1e-12)
        stop += start == stop
        if stop - start < _MOST_TICKS:
            return fine[start : stop + 1]
    stride = math.ceil((last - first) / (_MOST_TICKS - 1))
    return [(e, _decimal(1, e)) for e in range(first, last + stride, stride)]


def _decimal(step: int, exponent: int) -> str:
    if -4 <= exponent <= 4:
        return f"{step * 10.0**exponent:.{max(0, -exponent)}f}"
    return power_of(10, exponent) if step == 1 else f"{step}·{power_of(10, exponent)}"


def _step(least: float) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that is not below `least`."""
    power = 10.0 ** math.floor(math.log10(least)) if least > 0 else 1.0
    return next(m * power for m in (1, 2, 5, 10) if m * power >= least * (1 - 1e-12))


def _fraction(value: float, low: float, high: float) -> float:
    return (value - low) / (high - low) if high > low else 0.5


def _signed(text: str) -> str:
    return text.lstrip("-") if float(text) == 0 else text.replace("-", "−")
