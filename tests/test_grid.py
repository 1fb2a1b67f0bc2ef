"""The eager backend's grid: parts cover a block once, and products have the same bits in every block."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dual_lora_kernels.backends import Settings
from dual_lora_kernels.backends.eager import EagerBackend
from dual_lora_kernels.backends.grid import TILE, RankProducts, parts, tile_count
from dual_lora_kernels.self_check.problems import Problem, gaussian, relative_error

origins = st.tuples(st.integers(0, 3 * TILE), st.integers(0, 3 * TILE))
extents = st.tuples(st.integers(0, 3 * TILE), st.integers(0, 3 * TILE))


def _products(problem: Problem, origin: tuple[int, int], most: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """P and Q of a block whose factors are `problem`'s."""
    products = RankProducts(problem.factors, origin)
    shape = problem.weight.shape
    results = torch.zeros(2, *shape, dtype=products.dtype)
    scratch = torch.empty(2, most * TILE * TILE, dtype=products.dtype)
    for part in parts(origin, shape, most):
        for result, tiles in zip(results, products.write(part, *scratch), strict=True):
            part.tiles(part.of(result)).copy_(tiles)
    return results[0], results[1]


@given(origin=origins, shape=extents, most=st.integers(1, 8))
def test_parts_cover_a_block_once(origin: tuple[int, int], shape: tuple[int, int], most: int) -> None:
    """And each lies at its absolute place on the grid."""
    covered, seen = torch.zeros(shape, dtype=torch.int8), 0
    for part in parts(origin, torch.Size(shape), most):
        part.of(covered).add_(1)
        seen += part.rows.tiles * part.columns.tiles
        assert part.rows.tiles * part.columns.tiles <= most
        for first, span in zip(origin, part, strict=True):
            inside = (first + span.lines.start) % TILE
            assert span.inside.start == inside
            assert span.tiles * (span.inside.stop - inside) == span.lines.stop - span.lines.start
            assert span.first == (first + span.lines.start) // TILE - first // TILE
    assert bool((covered == 1).all())
    if covered.numel():
        assert seen == tile_count(origin, torch.Size(shape))


@pytest.mark.parametrize("rank", [1, 3, 16, 64, 100, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@given(n=st.integers(1, 600), k=st.integers(1, 600), seed=st.integers(0, 9), data=st.data())
def test_products_have_the_same_bits_in_every_block(
    dtype: torch.dtype, rank: int, n: int, k: int, seed: int, data: st.DataObject
) -> None:
    """The sign of Q must not depend on the block, on any BLAS: single rows and columns and other shapes included."""
    problem = gaussian(1, n, k, rank, rank, dtype=dtype, factor_dtype=dtype, seed=seed)
    row, col = data.draw(st.integers(0, n - 1)), data.draw(st.integers(0, k - 1))
    row_end, col_end = data.draw(st.integers(row + 1, n)), data.draw(st.integers(col + 1, k))
    block = Problem(
        x=problem.x, weight=problem.weight[row:row_end, col:col_end], bias=problem.bias, scale=problem.scale,
        A=problem.A[:, col:col_end], B=problem.B[row:row_end], C=problem.C[:, col:col_end],
        D=problem.D[row:row_end], grad=problem.grad,
    )  # fmt: skip
    for whole, part in zip(_products(problem, (0, 0)), _products(block, (row, col), most=1), strict=True):
        assert torch.equal(part, whole[row:row_end, col:col_end])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_products_are_the_factors(dtype: torch.dtype) -> None:
    problem = gaussian(1, 300, 517, 7, 5, dtype=dtype)
    p, q = _products(problem, (130, 2000))
    for product, up, down in ((p, problem.B, problem.A), (q, problem.D, problem.C)):
        assert relative_error(product, up.double() @ down.double()) < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("setting", ["high", "medium"])
def test_products_ignore_reduced_matmul_precision(setting: str) -> None:
    """torch.set_float32_matmul_precision rounds fp32 operands to TF32 or bf16, which would flip signs of Q."""
    problem = gaussian(1, 256, 256, 16, 16)
    expected = _products(problem, (0, 0))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        computed = _products(problem, (0, 0))
        assert torch.get_float32_matmul_precision() == setting
    finally:
        torch.set_float32_matmul_precision(before)
    for product, truth in zip(computed, expected, strict=True):
        assert torch.equal(product, truth)


def test_a_tile_at_a_time_is_the_least_workspace() -> None:
    """Below six tiles of scratch the workspace's bound is exceeded, as `set_workspace_bytes` says."""
    problem = gaussian(1, 700, 900, 4, 4)
    outs = [torch.empty(700, 900) for _ in range(2)]
    for out, workspace in zip(outs, (1, 1 << 30), strict=True):
        EagerBackend().effective_weight(out, problem.block()._replace(row0=5, col0=70), Settings("auto", workspace))
    assert torch.equal(*outs)
