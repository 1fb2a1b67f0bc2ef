"""Panels on every backend: exact arithmetic, the same W in every pass, errors against fp64, and memory bounds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dual_lora_kernels import (
    dual_lora_merge_,
    panel_split,
    panels,
    reference,
    set_strategy,
    set_workspace_bytes,
    settings,
    strategy,
)
from dual_lora_kernels.backends import Backend, Block, Settings, resolve_backend
from dual_lora_kernels.runtime_settings import current_settings
from dual_lora_kernels.self_check.problems import (
    FUSED_RANK,
    Problem,
    autograd_gradients,
    exact,
    gaussian,
    naive_gradients,
)
from dual_lora_kernels.validation import STRAIGHT_THROUGH_ESTIMATORS

from .accuracy import ErrorRatios
from .bits import bits
from .conftest import IS_INTERPRETED

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GENEROUS = 1 << 24


def _backend(name: str, problem: Problem) -> Backend:
    return resolve_backend(name, problem.x.device, problem.x.dtype, problem.A.dtype)


def _blockwise(problem: Problem, backend: Backend, dtype: torch.dtype, rounding: str, rows: int, cols: int):
    """W built block by block, of the given sizes."""
    n, k = problem.weight.shape
    whole = problem.block(rounding)._replace(dtype=dtype)
    out = torch.empty(n, k, dtype=dtype, device=problem.weight.device)
    for n0 in range(0, n, rows):
        for k0 in range(0, k, cols):
            block = whole.rows(n0, n0 + rows).columns(k0, k0 + cols)
            backend.effective_weight(out[n0 : n0 + rows, k0 : k0 + cols], block, Settings("auto", GENEROUS))
    return out


@pytest.mark.parametrize("rounding", ["dither", "nearest"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(
    n=st.integers(1, 40),
    k=st.integers(1, 40),
    r1=st.integers(1, 20),
    r2=st.integers(1, 20),
    rows=st.integers(1, 40),
    cols=st.integers(1, 40),
    seed=st.integers(0, 100),
)
def test_exact_weights_in_any_blocks(
    device: torch.device,
    backend: str,
    dtype: torch.dtype,
    rounding: str,
    n: int,
    k: int,
    r1: int,
    r2: int,
    rows: int,
    cols: int,
    seed: int,
) -> None:
    """Under exact arithmetic W has the reference's bits whatever the block sizes: no tolerance."""
    if IS_INTERPRETED:  # each block is a launch, of a millisecond an operation
        rows, cols = max(rows, n // 6 + 1), max(cols, k // 6 + 1)
    problem = exact(1, n, k, r1, r2, dtype=dtype, device=device, seed=seed)
    expected = reference.effective_weight(problem.weight, *problem.factors, dtype, rounding)
    computed = _blockwise(problem, _backend(backend, problem), dtype, rounding, rows, cols)
    assert torch.equal(bits(computed), bits(expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(n=st.integers(1, 300), k=st.integers(1, 300), rows=st.integers(1, 300), cols=st.integers(1, 300))
def test_gaussian_weights_do_not_depend_on_blocks(
    device: torch.device, backend: str, dtype: torch.dtype, n: int, k: int, rows: int, cols: int
) -> None:
    """The same signs and the same rounding in forward (row panels), ∂X (column panels) and merge, for real factors."""
    rows, cols = max(rows, n // 5 + 1), max(cols, k // 5 + 1)
    problem = gaussian(1, n, k, 16, 16, dtype=dtype, device=device)
    chosen = _backend(backend, problem)
    whole = _blockwise(problem, chosen, dtype, "dither", n, k)
    assert torch.equal(bits(_blockwise(problem, chosen, dtype, "dither", rows, cols)), bits(whole))


@pytest.mark.parametrize("ste", STRAIGHT_THROUGH_ESTIMATORS)
@pytest.mark.parametrize("shape", [(7, 33, 50, 3, 5), (1, 70, 20, 16, 4), (20, 1, 1, 1, 1), (9, 130, 140, 12, 24)])
def test_exact_passes_over_any_panels(
    device: torch.device, backend: str, ste: str, shape: tuple[int, int, int, int, int]
) -> None:
    """Output and all seven gradients equal the reference's bit for bit, from one panel down to one row a panel."""
    workspaces = (GENEROUS, 16 * 1024, 1)
    if strategy() == "fused":  # no panels, a bounded rank, and no less than one row of partial sums
        workspaces, shape = workspaces[:1], (*shape[:3], min(shape[3], FUSED_RANK), min(shape[4], FUSED_RANK))
    elif IS_INTERPRETED and shape[1] > 100:  # one row a panel is a launch each
        workspaces = workspaces[:2]
    problem = exact(*shape, device=device)
    output, *expected = autograd_gradients(problem, ste=ste)
    for workspace in workspaces:
        with settings(workspace_bytes=workspace):
            computed = _passes(problem, backend, ste)
        names = ("output", *reference.Gradients._fields)
        for name, value, truth in zip(names, computed, (output, *expected), strict=True):
            assert torch.equal(value, truth), (name, workspace)


def test_column_panels_of_h_give_the_same_gradients(
    device: torch.device, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a GPU takes them for a weight with many columns; bit for bit under exact arithmetic."""
    problem = exact(20, 70, 150, 4, 6, device=device)
    _, *expected = autograd_gradients(problem)
    columns = tuple((start, min(start + 64, 150)) for start in range(0, 150, 64))
    monkeypatch.setattr(panels, "_token_product_panels", lambda *_: (columns, False))
    with settings(strategy="panels"):
        for name, value, truth in zip(
            reference.Gradients._fields, _passes(problem, backend)[1:], expected, strict=True
        ):
            assert torch.equal(value, truth), name


def test_h_is_cut_where_its_products_fill_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a wide weight would be panels of 320 lines and a third of a wave; a CPU has no waves and takes rows."""
    sizes = (torch.device("cpu"), (4096, 14336), 4, 20 << 20, 64)
    assert panels._token_product_panels(*sizes)[1]
    monkeypatch.setattr(panel_split, "compute_units", lambda _: 132)
    ranges, by_rows = panels._token_product_panels(*sizes)
    assert not by_rows
    assert ranges == tuple((start, start + 1024) for start in range(0, 14336, 1024))


def _passes(problem: Problem, backend: str, ste: str = "clip", rounding: str = "dither") -> list[torch.Tensor]:
    """(output, *gradients) by the operators, in the order of `reference.Gradients`."""
    ops = torch.ops.dual_lora_kernels
    factors, options = tuple(problem.factors), (rounding, 0, 0, backend, *current_settings())
    output = ops.linear(problem.x, [problem.weight], "", factors, problem.bias, *options)

    def gradients(*wanted: bool) -> list[torch.Tensor]:
        given = (problem.grad, problem.x, [problem.weight], "", factors, list(wanted), ste, 1.0, None)
        return ops.gradients(*given, *options)

    # The weight's by itself: with it, the factors' gradients never come from a fused kernel.
    grad_x, *grads = gradients(True, True, True, True, True, False)
    return [output, grad_x, *gradients(*[False] * 5, True), *grads, problem.grad.sum(0)]


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("shape", [(64, 96, 80, 4, 8), (128, 256, 300, 16, 16), (33, 257, 129, 7, 5)])
def test_error_against_fp64_is_near_the_naive_implementations(
    device: torch.device,
    backend: str,
    dtype: torch.dtype,
    shape: tuple[int, int, int, int, int],
    error_ratios: ErrorRatios,
) -> None:
    """Over eight seeds; the naive implementation does everything in the compute dtype."""
    for seed in range(8):
        problem = gaussian(*shape, dtype=dtype, factor_dtype=dtype, device=device, seed=seed)
        truth = autograd_gradients(problem.to(torch.float64))
        computed = _passes(problem, backend), naive_gradients(problem), truth
        for name, own, naive, true in zip(("output", *reference.Gradients._fields), *computed, strict=True):
            error_ratios.add(name, own, naive, true)
    error_ratios.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merging_writes_the_weights_that_the_forward_pass_uses(
    device: torch.device, backend: str, dtype: torch.dtype, small_workspace: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every panel of forward and ∂X is bit for bit the merged weight's, for an update far below its ulp.

    tests/test_triton.py has the same for fused kernels.
    """
    set_strategy("panels")
    problem = gaussian(4, 200, 150, 16, 16, dtype=dtype, device=device)
    problem.scale.fill_(1e-4)
    merged = problem.weight.clone()
    dual_lora_merge_(merged, *problem.factors, backend=backend)
    used: list[tuple[int, int, torch.Tensor]] = []
    chosen = _backend(backend, problem)
    original: Callable[..., None] = chosen.effective_weight

    def spy(out: torch.Tensor, block: Block, settings: Settings) -> None:
        original(out, block, settings)
        used.append((*block.origin, out.clone()))

    monkeypatch.setattr(chosen, "effective_weight", spy)
    _passes(problem, backend)
    assert len({(row, col) for row, col, _ in used}) > 4  # several panels each way
    for row, col, panel in used:
        rows, cols = panel.shape
        assert torch.equal(panel.to(dtype).to(panel.dtype), panel)  # 16-bit numbers may be kept in fp32
        assert torch.equal(bits(panel.to(dtype)), bits(merged[row : row + rows, col : col + cols]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merged_output_differs_by_the_products_rounding_only(
    device: torch.device, backend: str, dtype: torch.dtype, error_ratios: ErrorRatios
) -> None:
    """Merged and unmerged outputs come from the same weights: both are that fp64 product to the vendor's rounding."""
    problem = gaussian(64, 300, 200, 16, 16, dtype=dtype, device=device)
    merged = dual_lora_merge_(problem.weight.clone(), *problem.factors, backend=backend)
    unmerged_output = _passes(problem, backend)[0]
    merged_output = torch.nn.functional.linear(problem.x, merged, problem.bias)
    exact_product = torch.nn.functional.linear(problem.x.double(), merged.double(), problem.bias.double())
    error_ratios.add("unmerged output", unmerged_output, merged_output, exact_product)
    error_ratios.check()


def test_sums_are_deterministic(device: torch.device, backend: str, small_workspace: int) -> None:
    problem = gaussian(50, 300, 200, 8, 8, device=device)
    if strategy() == "fused":  # one row of partial sums must fit
        set_workspace_bytes(4 * small_workspace)
    for first, second in zip(_passes(problem, backend), _passes(problem, backend), strict=True):
        assert torch.equal(first, second)
