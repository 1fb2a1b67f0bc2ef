"""The dither: its field, its bits, and that no update is lost."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dual_lora_kernels.rounding import dither_field, round_to

LOW = [torch.bfloat16, torch.float16]
CPU = torch.device("cpu")


def _mix(u: int) -> int:
    """`mix` of docs/numerics.md on Python integers."""
    u ^= u >> 16
    u = u * 0x21F0AAAD % 2**32
    u ^= u >> 15
    u = u * 0x735A2D97 % 2**32
    return u ^ u >> 15


@given(row0=st.integers(0, 2**31), col0=st.integers(0, 2**31))
def test_field_is_the_specified_one(row0: int, col0: int) -> None:
    field = dither_field(3, 4, row0, col0, CPU)
    for n in range(3):
        for k in range(4):
            row = _mix((row0 + n + 1) % 2**32) | 1
            col = _mix((col0 + k + 0x5BD1E995) % 2**32) | 1
            assert field[n, k].item() % 2**32 == row * col % 2**32


@given(st.integers(0, 50), st.integers(0, 50), st.integers(1, 20), st.integers(1, 20))
def test_a_blocks_field_is_part_of_the_whole(row: int, col: int, rows: int, cols: int) -> None:
    whole = dither_field(80, 80, 0, 0, CPU)
    assert torch.equal(dither_field(rows, cols, row, col, CPU), whole[row : row + rows, col : col + cols])


@pytest.mark.parametrize("dtype", LOW)
@given(row0=st.integers(0, 1000))
def test_values_on_the_grid_stay(dtype: torch.dtype, row0: int) -> None:
    """Every finite value of the dtype survives, whatever the dither: W0 is untouched where ΔW = 0."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    finite = every[every.isfinite()].view(-1, 256 if dtype == torch.bfloat16 else 64)
    rounded = round_to(finite.float(), dtype, "dither", row0, 7)
    assert torch.equal(rounded.view(torch.int16), finite.view(torch.int16))


@pytest.mark.parametrize("dtype", LOW)
def test_rounds_to_a_neighbour_without_bias(dtype: torch.dtype) -> None:
    """Truncation or one step up, with the probability that makes the mean right."""
    eps = torch.finfo(dtype).eps
    for fraction in (0.0625, 0.3, 0.5, 0.9):
        values = torch.full((1024, 1024), 1.0 + fraction * eps)
        rounded = round_to(values, dtype, "dither").double()
        assert set(rounded.unique().tolist()) == {1.0, 1.0 + eps}
        share = (rounded.mean().item() - 1.0) / eps
        # Binomial standard deviation over 2²⁰ elements is below 5e-4.
        assert share == pytest.approx(fraction, abs=4 * math.sqrt(fraction * (1 - fraction) / 2**20))


@pytest.mark.parametrize("dtype", LOW)
def test_non_finite_values_pass_through(dtype: torch.dtype) -> None:
    nans = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7FC00000], dtype=torch.int32).view(torch.float32)
    values = torch.cat([nans, torch.tensor([torch.inf, -torch.inf])]).repeat(64, 1)
    rounded = round_to(values, dtype, "dither")
    assert rounded[:, :4].isnan().all()
    assert (rounded[:, 4] == torch.inf).all()
    assert (rounded[:, 5] == -torch.inf).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *LOW])
def test_nearest_is_the_conversion(dtype: torch.dtype) -> None:
    values = torch.randn(20, 30, dtype=torch.float64)
    assert torch.equal(round_to(values, dtype, "nearest"), values.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_dtypes_are_not_dithered(dtype: torch.dtype) -> None:
    values = torch.randn(20, 30, dtype=torch.float64)
    assert torch.equal(round_to(values, dtype, "dither"), values.to(dtype))


def test_the_input_is_left_alone() -> None:
    values = torch.randn(8, 8)
    before = values.clone()
    round_to(values, torch.bfloat16, "dither")
    assert torch.equal(values, before)
