"""Never materialised: every allocation of forward, backward and merge stays under the workspace's bound."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from benchmarks.layers.memory import AllocationTrace, peak_temporary_bytes
from dual_lora_kernels import dual_lora_linear, dual_lora_merge_, settings, strategy
from dual_lora_kernels.self_check.problems import Problem, gaussian
from dual_lora_kernels.validation import STRAIGHT_THROUGH_ESTIMATORS

from .conftest import IS_INTERPRETED

WORKSPACE = 1 << (16 if IS_INTERPRETED else 22)
"""The second is what the eager backend's tiles need at least, in fp64, and its panels of one row of tiles."""
TOKENS, ROWS, COLUMNS, RANK = 16, *((384, 512, 4) if IS_INTERPRETED else (3072, 4096, 16))
THIN = 4 * RANK * (ROWS + COLUMNS) * 4
"""Bytes of the four factors' fp32 gradients, twice over: what is rank-sized may be copied."""
HASHES = 4 * 8 * (ROWS + COLUMNS)
"""Bytes of the dither's row and column hashes while they are made in int64."""


@pytest.fixture(autouse=True)
def _small_workspace() -> Iterator[None]:
    with settings(workspace_bytes=WORKSPACE):
        yield


def _problem(dtype: torch.dtype, device: torch.device) -> Problem:
    """Fused passes keep partial sums, one row of tiles of which must fit the workspace: at rank 4 it does."""
    rank = 4 if strategy() == "fused" else RANK
    return gaussian(TOKENS, ROWS, COLUMNS, rank, rank, dtype=dtype, device=device).requiring_grad()


def vendor_scratch(problem: Problem) -> int:
    """Bytes that the vendor's own products of these operands take: oneDNN packs bf16 operands where there are bf16
    units, through PyTorch's allocator. MKL's packing is not seen at all."""
    x, weight, grad = problem.x.detach(), problem.weight.detach(), problem.grad

    def products() -> list[torch.Tensor]:
        return [x @ weight.t(), grad @ weight, grad.t() @ x]

    products()
    return peak_temporary_bytes(products, x.device).peak_temporary


def _step(problem: Problem, ste: str, backend: str) -> AllocationTrace:
    def step() -> list[torch.Tensor]:
        wanted = (problem.x, *problem.factors[:4])
        out = dual_lora_linear(problem.x, problem.weight, *problem.factors, ste=ste, backend=backend)
        return [out, *torch.autograd.grad(out, wanted, problem.grad)]

    step()
    return peak_temporary_bytes(step, problem.x.device)


@pytest.mark.parametrize(
    ("dtype", "ste"),
    [(torch.bfloat16, "clip"), (torch.float32, "clip")]
    if IS_INTERPRETED
    else [(torch.float32, ste) for ste in STRAIGHT_THROUGH_ESTIMATORS]
    + [(dtype, "clip") for dtype in (torch.bfloat16, torch.float16, torch.float64)],
    ids=str,
)
def test_a_step_stays_within_the_workspace(device: torch.device, backend: str, dtype: torch.dtype, ste: str) -> None:
    problem = _problem(dtype, device)
    problem.weight.requires_grad_(False)
    whole = ROWS * COLUMNS * dtype.itemsize
    assert whole >= 6 * WORKSPACE  # else the test could not fail
    trace = _step(problem, ste, backend)
    activations = TOKENS * (ROWS + COLUMNS) * 8  # what is token-sized may be copied or widened
    scratch = vendor_scratch(problem)
    assert WORKSPACE + scratch < whole
    assert trace.peak_temporary <= WORKSPACE + THIN * dtype.itemsize // 2 + HASHES + activations + scratch
    assert trace.largest <= max(WORKSPACE, scratch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merging_stays_within_the_workspace(device: torch.device, backend: str, dtype: torch.dtype) -> None:
    problem = gaussian(1, ROWS, COLUMNS, RANK, RANK, dtype=dtype, device=device)

    def merge() -> torch.Tensor:
        return dual_lora_merge_(problem.weight, *problem.factors, backend=backend)

    merge()
    trace = peak_temporary_bytes(merge, device)
    assert trace.peak_temporary <= WORKSPACE + HASHES


def test_a_trained_weights_gradient_is_the_only_large_allocation(device: torch.device, backend: str) -> None:
    """∂W0 is a result of that size; nothing else is."""
    problem = _problem(torch.float32, device)
    trace = _step_with_weight(problem, backend)
    assert trace.largest == ROWS * COLUMNS * 4
    assert trace.peak_temporary <= WORKSPACE + 2 * THIN + TOKENS * (ROWS + COLUMNS) * 8


def _step_with_weight(problem: Problem, backend: str) -> AllocationTrace:
    def step() -> list[torch.Tensor]:
        wanted = problem.differentiable[:-1]
        out = dual_lora_linear(problem.x, problem.weight, *problem.factors, backend=backend)
        return [out, *torch.autograd.grad(out, wanted, problem.grad)]

    step()
    return peak_temporary_bytes(step, problem.x.device)


def test_the_tracer_sees_what_naive_dual_lora_materialises(device: torch.device) -> None:
    """The measurement can fail: the plain composition allocates several N×K tensors."""
    from benchmarks.layers.methods import NaiveDualLora, frozen_linear

    layer = NaiveDualLora(frozen_linear(COLUMNS, ROWS, torch.float32, device), RANK, RANK)
    x = torch.randn(TOKENS, COLUMNS, device=device)
    trace = peak_temporary_bytes(lambda: layer(x).sum().backward(), device)
    assert trace.peak_temporary >= 4 * ROWS * COLUMNS * 4
