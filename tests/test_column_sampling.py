"""Which columns are drawn: chances as the norms, exactly accounted for, whatever the input."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dual_lora_kernels import draw_columns
from dual_lora_kernels.column_sampling import choose, sample_size

DRAWS, STEPS = 4000, 2048
PLACES = 1 << 31


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
    assert int(columns[0]) >= 0
    assert int(columns[-1]) < k
    assert weights.isfinite().all()
    assert weights.min() > 0.99  # the inverse of a chance; strata are equal up to rounding


@pytest.mark.parametrize("outliers", [0, 3, 20])
@pytest.mark.parametrize(("k", "n"), [(40, 1), (40, 2), (64, 13), (33, 30), (100, 50), (7, 7)])
def test_every_column_counts_once_on_average(k: int, n: int, outliers: int) -> None:
    """No draws here: every stratum is walked through in equal steps, so that the mean has no noise but the steps'."""
    x = _activations(k, outliers)
    total = torch.zeros(k, dtype=torch.float64)
    for step in range(STEPS):
        columns, weights = choose(x, torch.full((n,), (2 * step + 1) * PLACES // (2 * STEPS)))
        total.index_add_(0, columns, weights.double() / STEPS)
    # A column's edges cut a step each, of a weight of 10 k / n at most.
    assert (total - 1).abs().max() <= 20 * max(1, k / n) / STEPS


@pytest.mark.parametrize(("k", "n", "outliers"), [(4096, 1024, 300), (4096, 820, 90), (1000, 500, 8)])
def test_large_columns_come_once_in_every_sample(k: int, n: int, outliers: int) -> None:
    x = _activations(k, outliers)
    for seed in range(20):
        columns, weights = choose(x, draw_columns(k, n / k, generator=torch.Generator().manual_seed(seed)))
        assert columns[:outliers].equal(torch.arange(outliers))
        assert (weights[:outliers] == 1).all()
        assert int(columns[outliers]) >= outliers


def test_the_mean_would_show_a_bias() -> None:
    """The check above can fail: weights 5 % too large are seen."""
    x, k, n = _activations(100, 3), 100, 50
    total = torch.zeros(k, dtype=torch.float64)
    for step in range(STEPS):
        columns, weights = choose(x, torch.full((n,), (2 * step + 1) * PLACES // (2 * STEPS)))
        total.index_add_(0, columns, 1.05 * weights.double() / STEPS)
    assert (total - 1).abs().max() > 2 * 20 * k / n / STEPS


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
    assert (weights == 1).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_default_dtype_does_not_matter(dtype: torch.dtype) -> None:
    x, draws = _activations(256, 4), draw_columns(256, 0.5)
    expected = choose(x, draws)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        found = choose(x, draws)
    finally:
        torch.set_default_dtype(before)
    assert found.weights.dtype == torch.float32
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))


@pytest.mark.parametrize("length", [32, 33, 65, 99, 128])
def test_first_tokens_do_not_decide_alone(length: int) -> None:
    """1024 sequences whose first tokens are alike: a step as long as a sequence would see nothing else."""
    x = torch.ones(1024, length, 1024, dtype=torch.bfloat16)
    x[:, 0, :512], x[:, 1:, 512:] = 100, 10
    columns, _ = choose(x.view(-1, 1024), draw_columns(1024, 0.25))
    assert (columns >= 512).float().mean() > 0.2


def test_a_column_that_overflows_is_large() -> None:
    x = torch.randn(5, 40, dtype=torch.float64)
    x[:, 7] = 1e200
    for seed in range(9):
        columns, weights = choose(x, draw_columns(40, 0.25, generator=torch.Generator().manual_seed(seed)))
        assert (columns == 7).sum() == 1
        assert weights[columns == 7] == 1


def test_draws_out_of_range_are_the_nearest() -> None:
    x = _activations(20, 1)
    for value, nearest in ((-5, 0), (1 << 40, PLACES - 1)):
        found, expected = (choose(x, torch.full((7,), number)) for number in (value, nearest))
        assert torch.equal(found.columns, expected.columns)


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
    """As wide as layers get."""
    k = 53_248
    x = torch.ones(600, k, dtype=dtype)
    columns, weights = choose(x, draw_columns(k, 0.5))
    assert len(columns) == k // 2
    assert (weights - 2).abs().max() < 1e-3


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
