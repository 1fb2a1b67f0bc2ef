"""Spectra from panels: of matrices whose singular values are known, small and large, and against the plain SVD."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dual_lora_kernels import spectra
from dual_lora_kernels.spectra import spectrum

SHAPES = [(300, 520), (520, 300), (400, 400)]


def panels_of(matrix: torch.Tensor, rows: int = 100) -> Callable[[], Iterator[torch.Tensor]]:
    """Row panels in one buffer, so that who keeps one instead of using it finds other numbers in it."""

    def panels() -> Iterator[torch.Tensor]:
        buffer = torch.empty(rows, matrix.shape[1], dtype=matrix.dtype)
        for part in matrix.split(rows):
            buffer.fill_(math.nan)
            buffer[: len(part)] = part
            yield buffer[: len(part)]

    return panels


def known(values: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """A matrix of fp32 with these singular values, and no others but zero."""
    generator = torch.Generator().manual_seed(1)
    left, right = (
        torch.linalg.qr(torch.randn(size, len(values), generator=generator, dtype=torch.float64)).Q for size in shape
    )
    return ((left * values) @ right.T).float()


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices of the tests count as large."""
    monkeypatch.setattr(spectra, "EXACT_LIMIT", 64)


@pytest.mark.parametrize("shape", SHAPES)
def test_all_values_of_a_small_matrix(shape: tuple[int, int]) -> None:
    """To fp32's rounding of the matrix, which moves no singular value by more than its own norm, 1e-7 · ‖M‖_F."""
    values = torch.logspace(0, -3, min(shape), dtype=torch.float64)
    found = spectrum(panels_of(known(values, shape)), shape, 10)
    squares = values.square()
    rounding = 1e-7 * float(squares.sum().sqrt())
    assert (found.is_exact, found.rank, found.largest_rank) == (True, min(shape), min(shape))
    assert found.stable_rank == pytest.approx(float(squares.sum()), rel=4 * rounding)
    assert found.energy == pytest.approx(float(squares[:10].sum() / squares.sum()), rel=4 * rounding)
    assert found.positions[0] == 1
    assert found.positions[-1] == min(shape)
    assert list(found.positions) == sorted(set(found.positions))
    for position, value in zip(found.positions, found.values, strict=True):
        assert value == pytest.approx(float(values[position - 1]), abs=2 * rounding)


@given(n=st.integers(1, 24), k=st.integers(1, 24), rows=st.integers(1, 24), seed=st.integers(0, 100))
def test_a_small_matrix_against_the_plain_svd(n: int, k: int, rows: int, seed: int) -> None:
    matrix = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    values = torch.linalg.svdvals(matrix.double())
    found = spectrum(panels_of(matrix, rows), (n, k), 3)
    assert found.rank == int((values > max(n, k) * torch.finfo(torch.float32).eps * values[0]).sum())
    # Values from a Gram matrix in fp64 are exact to the root of its ε, 1.5e-8, times a small number.
    expected = [float(values[position - 1] / values[0]) for position in found.positions]
    assert found.values == pytest.approx(expected, abs=1e-6)
    assert found.energy == pytest.approx(float(values[:3].square().sum() / values.square().sum()), rel=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 7])
def test_the_rank_of_a_product_of_factors(rank: int, shape: tuple[int, int]) -> None:
    """LoRA's B A in fp32: what rounding adds to its singular values is below the tolerance."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape[0], rank, generator=generator) @ torch.randn(rank, shape[1], generator=generator)
    found = spectrum(panels_of(matrix), shape, rank)
    assert (found.rank, found.is_exact) == (rank, True)
    assert found.energy == pytest.approx(1.0, abs=1e-6)


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 7])
def test_a_sketch_knows_a_rank_below_its_own(rank: int, shape: tuple[int, int]) -> None:
    test_the_rank_of_a_product_of_factors(rank, shape)


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("shape", SHAPES)
def test_a_sketch_of_full_rank_is_a_lower_bound(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its values are none too large, and the listed half is close, for a spectrum that falls slowly."""
    monkeypatch.setattr(spectra, "_SKETCH", 100)
    values = torch.linspace(1, 0.1, min(shape), dtype=torch.float64)
    found = spectrum(panels_of(known(values, shape)), shape, 10)
    squares = values.square()
    energy, stable = float(squares[:10].sum() / squares.sum()), float(squares.sum())
    assert (found.rank, found.is_exact) == (100, False)
    assert 0.9 * energy < found.energy <= energy * (1 + 1e-5)  # fp32's products
    assert stable * (1 - 1e-5) <= found.stable_rank < 1.05 * stable
    assert found.positions[-1] == 50
    for position, value in zip(found.positions, found.values, strict=True):
        assert value == pytest.approx(float(values[position - 1]), rel=0.1)


@pytest.mark.usefixtures("large")
def test_a_sketch_finds_a_steep_spectrum() -> None:
    """Four orders of magnitude, and 20 values that matter: as if it were exact."""
    values = torch.logspace(0, -4, 20, dtype=torch.float64)
    shape = (520, 300)
    found = spectrum(panels_of(known(values, shape)), shape, 5)
    tolerance = 520 * torch.finfo(torch.float32).eps
    assert (found.rank, found.is_exact) == (int((values > tolerance).sum()), True)
    for position, value in zip(found.positions, found.values, strict=True):
        expected = float(values[position - 1]) if position <= 20 else 0.0
        assert value == pytest.approx(expected, abs=1e-6)  # fp32's products


@pytest.mark.usefixtures("large")
def test_the_same_matrix_gives_the_same_report_whatever_was_drawn_before() -> None:
    matrix = torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    first = spectrum(panels_of(matrix), (200, 300), 4)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert spectrum(panels_of(matrix), (200, 300), 4) == first
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state), "it draws nothing from the global generator"


@pytest.mark.parametrize("limit", [64, 1024])
def test_zeros_have_no_values(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectra, "EXACT_LIMIT", limit)
    found = spectrum(panels_of(torch.zeros(200, 300)), (200, 300), 4)
    assert (found.rank, found.is_exact, found.stable_rank, found.energy) == (0, True, 0.0, 1.0)
    assert (found.positions, found.values) == ((), ())


@pytest.mark.parametrize("limit", [64, 1024])
def test_an_energy_rank_beyond_the_matrix_is_all_of_it(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectra, "EXACT_LIMIT", limit)
    matrix = torch.randn(70, 90, generator=torch.Generator().manual_seed(0))
    assert spectrum(panels_of(matrix, 30), (70, 90), 1000).energy == pytest.approx(1.0, abs=1e-5)  # fp32's products
