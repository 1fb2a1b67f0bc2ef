"""Which columns are drawn: chances as the norms, exactly accounted for, whatever the input."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dual_lora_kernels import draw_columns
from dual_lora_kernels.column_sampling import choose, sample_size

DRAWS = 4000


def _activations(k: int, outliers: int, tokens: int = 40) -> torch.Tensor:
    """Columns of different norms, the first of which are 30 times as large as the others."""
    generator = torch.Generator().manual_seed(k)
    x = torch.randn(tokens, k, generator=generator) * (torch.rand(k, generator=generator) + 0.2)
    x[:, :outliers] *= 30
    return x


@given(k=st.integers(1, 300), fraction=st.floats(0.001, 1.0), outliers=st.integers(0, 9), seed=st.integers(0, 99))
def test_a_sample_has_its_size_and_order(k: int, fraction: float, outliers: int, seed: int) -> None:
    draws = draw_columns(k, fraction, generator=torch.Generator().manual_seed(seed))
    columns, weights = choose(_activations(k, outliers, 5), draws)
    assert len(draws) == len(columns) == len(weights) == sample_size(k, fraction) == max(1, round(k * fraction))
    assert (columns.diff() >= 0).all()
    assert columns[0] >= 0
    assert columns[-1] < k
    assert weights.isfinite().all()
    # A column's weight is the inverse of its chance, and no chance is above 1. 14 bits are kept of chances.
    assert weights.min() >= 1 - k / 2**13


@pytest.mark.parametrize(("k", "fraction", "outliers"), [(512, 0.5, 0), (512, 0.25, 10), (100, 0.3, 3), (33, 0.9, 1)])
def test_every_column_counts_once_on_average(k: int, fraction: float, outliers: int) -> None:
    torch.manual_seed(0)
    x = _activations(k, outliers)
    total, squares = torch.zeros(k), torch.zeros(k)
    for _ in range(DRAWS):
        columns, weights = choose(x, draw_columns(k, fraction))
        counted = torch.zeros(k).index_add_(0, columns, weights)
        total += counted / DRAWS
        squares += counted.square() / DRAWS
    errors = ((squares - total.square()).clamp(min=0) / DRAWS).sqrt()
    # The largest of 512 standard normal numbers is 4.5 in one case in a thousand.
    assert ((total - 1).abs() <= 4.5 * errors + k / 2**13).all()


def test_large_columns_are_always_drawn_once() -> None:
    x = _activations(256, 8)
    for seed in range(50):
        columns, weights = choose(x, draw_columns(256, 0.25, generator=torch.Generator().manual_seed(seed)))
        assert columns[:8].equal(torch.arange(8))
        assert (weights[:8] - 1).abs().max() < 1e-2
        assert columns[8] >= 8


def test_norms_decide() -> None:
    """A column of half of another's norm is drawn half as often."""
    x = torch.ones(4, 64)
    x[:, ::2] = 2
    count = torch.zeros(64)
    torch.manual_seed(0)
    for _ in range(DRAWS):
        count.index_add_(0, choose(x, draw_columns(64, 0.25)).columns, torch.ones(16))
    assert (count[::2].sum() / count[1::2].sum()).item() == pytest.approx(2, rel=0.02)


def test_the_whole_is_a_sample_of_itself() -> None:
    columns, weights = choose(_activations(64, 2), draw_columns(64, 1.0))
    assert columns.equal(torch.arange(64))
    assert (weights - 1).abs().max() <= 64 / 2**13


@pytest.mark.parametrize("value", [0.0, math.inf, math.nan, 1e30, 1e-30])
def test_any_input(value: float) -> None:
    """Zeros, numbers whose squares overflow or vanish, and none at all."""
    for x in (torch.full((3, 20), value), torch.randn(3, 20).index_fill(1, torch.tensor([4]), value)):
        columns, weights = choose(x, draw_columns(20, 0.5))
        assert len(columns) == 10
        assert 0 <= columns.min() <= columns.max() < 20
        assert (weights > 0).all()
    assert len(choose(torch.empty(0, 20), draw_columns(20, 0.5)).columns) == 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_many_columns_and_tokens(dtype: torch.dtype) -> None:
    """As wide as layers get: sums of chances stay exact."""
    k = 53_248
    x = torch.ones(600, k, dtype=dtype)
    columns, weights = choose(x, draw_columns(k, 0.5))
    assert len(columns) == k // 2
    assert (weights - 2).abs().max() < 0.01


def test_draws_follow_the_generator() -> None:
    one, two = (draw_columns(64, 0.5, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert one.equal(two)
    torch.manual_seed(3)
    assert draw_columns(64, 0.5).equal(one)
    assert not draw_columns(64, 0.5).equal(one)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0.5), "in_features: got 0"),
        ((4.0, 0.5), "in_features: got 4.0"),
        ((4, 0.0), "fraction: got 0.0"),
        ((4, 1.5), "fraction: got 1.5"),
        ((4, -0.1), "fraction: got -0.1"),
        ((4, "half"), "fraction: got 'half'"),
    ],
)
def test_bad_arguments(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        draw_columns(*arguments)  # type: ignore[arg-type]
