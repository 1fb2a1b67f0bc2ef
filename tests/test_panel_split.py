"""Panels: they cover a weight once, within the budget, and take whole waves of a GPU's product where they can."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dual_lora_kernels.panel_split import Waves, product_waves, split, total_waves

H200 = 132
MI300X = 304


@given(
    extent=st.integers(1, 5000),
    bytes_per_line=st.integers(1, 4000),
    budget=st.integers(1, 100_000),
    units=st.none() | st.integers(1, 400),
)
def test_panels_cover_once_within_the_budget(extent: int, bytes_per_line: int, budget: int, units: int | None) -> None:
    waves = None if units is None else Waves(units, 512)
    panels = split(extent, bytes_per_line, budget, waves=waves)
    assert [start for start, _ in panels] == [0, *(stop for _, stop in panels[:-1])]
    assert panels[-1][1] == extent
    sizes = [stop - start for start, stop in panels]
    assert max(sizes) * bytes_per_line <= max(budget, bytes_per_line)
    unit = next(lines for lines in (64, 2, 1) if lines <= max(1, budget // bytes_per_line))
    assert all(start % unit == 0 for start, _ in panels)
    assert max(sizes) - min(sizes) < 2 * unit  # a unit, and what the last one lacks
    fewest = -(-extent // (max(1, budget // bytes_per_line) // unit * unit))
    assert len(panels) == fewest if waves is None else fewest <= len(panels) <= 2 * fewest


@given(st.integers(64, 20_000), st.integers(64, 5000), st.builds(Waves, st.integers(1, 400), st.integers(1, 20_000)))
def test_waves_never_take_longer_than_the_fewest_panels(extent: int, lines: int, waves: Waves) -> None:
    assert total_waves(split(extent, 1, lines, waves=waves), waves) <= total_waves(split(extent, 1, lines), waves)


@pytest.mark.parametrize(
    ("extent", "other", "units", "filled"),
    [(4096, 4096, H200, 0.96), (14336, 4096, H200, 0.96), (11008, 4096, H200, 0.9), (4096, 4096, MI300X, 0.7)],
)
def test_panels_of_h_fill_a_gpu(extent: int, other: int, units: int, filled: float) -> None:
    """20 MiB of fp32 H at 4096 columns hold 1280 rows: 160 tiles, two waves on 132 SMs where 1024 rows take one."""
    panels = split(extent, 4 * other, 20 << 20, waves=Waves(units, other))
    assert max(stop - start for start, stop in panels) <= 1024
    work = extent * other / (128 * 256 * units)
    assert work / total_waves(panels, Waves(units, other)) >= filled


def test_a_products_waves_are_counted_in_its_best_tiles() -> None:
    assert product_waves(1024, 4096, H200) == 1.0
    assert product_waves(1344, 4096, H200) > 1.5
    assert product_waves(64, 64, H200) < 0.5  # a small tile is done sooner than a large one
