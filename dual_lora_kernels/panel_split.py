"""How a weight is cut into panels: few, within the workspace, and in whole waves of the product that consumes them.

A GPU's product runs as tiles, one to an SM or CU at a time. A panel of 1344 × 4096 is 176 tiles on an H200's 132 SMs:
two waves, the second a third full. 1024 × 4096 are 128 tiles, and one wave. So equal panels of 1024 lines may beat
fewer and larger ones, although each costs launches.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import NamedTuple

import torch

from .backends import PANEL_UNIT

Panels = tuple[tuple[int, int], ...]
"""(first line, line after the last) of each panel."""
_TILES = ((256, 128, 1.0), (128, 256, 1.0), (128, 128, 0.87), (64, 128, 0.6), (128, 64, 0.6), (64, 64, 0.4))
"""Tiles of vendors' 16-bit products, and their rate to the largest's: smaller ones read more for each multiplication.
The rates are estimates; no GPU has measured them for this project yet."""
WAVE_TILE = 256 * 128
"""Elements of the largest tile, in which waves are counted."""


class Waves(NamedTuple):
    """What decides a product's waves besides a panel's lines: the chip's SMs or CUs, and the result's other extent."""

    compute_units: int
    other: int


@cache
def compute_units(device: torch.device) -> int | None:
    """SMs or CUs of a GPU; None for a device whose products are not cut so."""
    if device.type != "cuda":
        return None
    return torch.cuda.get_device_properties(device).multi_processor_count


def waves_for(device: torch.device, other: int) -> Waves | None:
    """`Waves` of products on `device`, if it has any."""
    units = compute_units(device)
    return None if units is None else Waves(units, other)


def product_waves(rows: int, columns: int, compute_units: int, parts: int = 1) -> float:
    """The time of a product with a result of rows × columns, in waves of the largest tiles.

    With the sum cut into `parts`, a wave is that much shorter.
    """
    return min(
        _ceil_div(_ceil_div(rows, m) * _ceil_div(columns, n) * parts, compute_units) * m * n / WAVE_TILE / rate
        for m, n, rate in _TILES
    )


@lru_cache(maxsize=1024)
def split(extent: int, bytes_per_line: int, budget: int, unit: int = PANEL_UNIT, waves: Waves | None = None) -> Panels:
    """Split `extent` lines into nearly equal panels of at most `budget` bytes, or of one line.

    As few as possible, or with `waves` those whose products take the least time, of which as few as possible. They
    start at multiples of `unit` lines where that many fit, else of `PANEL_UNIT`, else of 2, so that they share no byte
    of a 4-bit weight, else anywhere.
    """
    largest = max(1, budget // max(1, bytes_per_line))
    unit = next(lines for lines in (unit, PANEL_UNIT, 2, 1) if lines <= largest)
    units = _ceil_div(extent, unit)
    fewest = _ceil_div(units, largest // unit)
    if not fewest or waves is None:
        return _equal(extent, unit, units, fewest)
    counts = range(fewest, min(2 * fewest, units) + 1)
    return min((_equal(extent, unit, units, count) for count in counts), key=lambda panels: total_waves(panels, waves))


def total_waves(panels: Panels, waves: Waves) -> float:
    """The time of the products that consume `panels`, as `product_waves`."""
    return sum(product_waves(stop - start, waves.other, waves.compute_units) for start, stop in panels)


def longest(panels: Panels) -> int:
    """Lines of the longest panel."""
    return max(stop - start for start, stop in panels)


def _equal(extent: int, unit: int, units: int, count: int) -> Panels:
    starts = [units * i // count * unit for i in range(count)]
    return tuple(zip(starts, [*starts[1:], extent], strict=True)) if count else ()


def _ceil_div(count: int, size: int) -> int:
    return -(-count // size)
