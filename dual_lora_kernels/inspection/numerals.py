"""Numbers as a reader wants them: in few digits, with no zero that is none and no whole that is not one."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable

from .report import Spectrum

UNKNOWN = "–"
"""Stands where a figure is not known, or is no number."""

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_UNITS = ("bytes", "kB", "MB", "GB", "TB")


def percentage(share: float, decimals: int = 1) -> str:
    """A share as a number of percents, without the sign; "<0.1" and ">99.9" where rounding would say none or all."""
    if not math.isfinite(share):
        return UNKNOWN
    least = 10.0**-decimals
    text = f"{100 * share:.{decimals}f}"
    if share > 0 and float(text) == 0:
        return f"<{least:.{decimals}f}"
    if share < 1 and float(text) == 100:
        return f">{100 - least:.{decimals}f}"
    return text.replace("-", "−")


def number(value: float) -> str:
    """Three significant digits, as a decimal number where that is short."""
    if math.isnan(value):
        return UNKNOWN
    if math.isinf(value):
        return "∞"
    if value == 0:
        return "0"
    mantissa, _, power = f"{value:.2e}".partition("e")
    exponent = int(power)
    if -4 <= exponent < 6:
        return f"{value:,.{max(0, 2 - exponent)}f}".replace("-", "−")
    return f"{mantissa} × {power_of(10, exponent)}".replace("-", "−")


def power_of(base: int, exponent: int) -> str:
    """`base` with `exponent` as a superscript."""
    return f"{base}{str(exponent).translate(_SUPERSCRIPTS)}"


def tied(text: str) -> str:
    """`text` with formulas and percentages that no line break can part."""
    return re.sub(r" (?=[≤>=+·⊙×/%])|(?<=[≤>=+·⊙×/]) ", "\N{NO-BREAK SPACE}", text)


def size(count: int) -> str:
    """Bytes in decimal units."""
    amount, unit = float(count), 0
    while amount >= 999.5 and unit < len(_UNITS) - 1:
        amount, unit = amount / 1000, unit + 1
    return f"{count} bytes" if unit == 0 else f"{amount:.3g} {_UNITS[unit]}"


def several(count: int, noun: str) -> str:
    """ "1 layer", "2 layers"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def is_bound(spectrum: Spectrum) -> bool:
    """Whether the true rank may be larger than what was found."""
    return not spectrum.is_exact and spectrum.rank < spectrum.largest_rank


def rank(spectrum: Spectrum | None) -> str:
    """A numerical rank, "≥ 512" where it is a lower bound."""
    if spectrum is None:
        return UNKNOWN
    return f"≥ {spectrum.rank:,}" if is_bound(spectrum) else f"{spectrum.rank:,}"


def finite(values: Iterable[float]) -> list[float]:
    """Those that are numbers."""
    return [value for value in values if math.isfinite(value)]


def median(values: Iterable[float]) -> float:
    """The median of those that are numbers; NaN where there are none."""
    known = finite(values)
    return statistics.median(known) if known else math.nan
