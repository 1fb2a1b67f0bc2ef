"""Launches that repeat: the kept kernel gets what Triton's own launcher would hand it, on a stand-in for a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.compiler import host_cost
from benchmarks.compiler.ahead_of_time import target
from benchmarks.compiler.stand_in_driver import stand_in_driver
from dual_lora_kernels.backends import Estimator, ParameterGradients
from dual_lora_kernels.backends.triton import launch, launches
from dual_lora_kernels.backends.triton.architecture import Architecture
from dual_lora_kernels.backends.triton.arguments import Constants, Hashes, Matrix
from dual_lora_kernels.backends.triton.launch import Launch
from dual_lora_kernels.backends.triton.shapes import TABLE
from dual_lora_kernels.self_check.problems import Problem, gaussian

CHIP = Architecture("sm_90", compute_units=132)
SHAPES = TABLE["sm_90"]
ESTIMATOR = Estimator("clip", 1.0)
HASHES = Hashes(torch.zeros(2048, dtype=torch.int32), torch.zeros(2048, dtype=torch.int32))


def _effective_weight(problem: Problem) -> Launch:
    out = torch.empty_like(problem.weight)
    return launches.effective_weight(out, problem.block(), HASHES, SHAPES.effective_weight, CHIP)


def _factor_gradients(problem: Problem) -> Launch:
    h = torch.zeros(problem.weight.shape)
    partials = (torch.zeros(4, 4, 4), torch.zeros(4, 4, 4))
    gradients = ParameterGradients(*problem.factors[:4])
    return launches.factor_gradients(h, problem.block(), ESTIMATOR, gradients, partials, SHAPES.factor_gradients, CHIP)


def _forward(problem: Problem) -> Launch:
    shape = SHAPES.forward[0]
    out = problem.x.new_empty(len(problem.x), problem.weight.shape[0])
    return launches.weight_product("forward", out, problem.x, problem.block(), problem.bias, HASHES, shape, CHIP)


def _token_product(problem: Problem) -> Launch:
    partials = (torch.zeros(4, 4, 4), torch.zeros(4, 4, 4))
    gradients = ParameterGradients(*problem.factors[:4])
    return launches.token_product(
        problem.grad, problem.x, problem.block(), ESTIMATOR, gradients, partials, SHAPES.token_product, CHIP
    )


MAKERS = [_effective_weight, _factor_gradients, _forward, _token_product]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    """The arguments of every launch on a stand-in for an H100, from an empty store of kept kernels."""
    monkeypatch.setattr(launch, "_kept", {})
    arguments: list[tuple[Any, ...]] = []
    with stand_in_driver(target("sm_90"), arguments.append):
        yield arguments


@pytest.mark.parametrize("make", MAKERS)
def test_a_repetition_launches_what_triton_would(
    make: Callable[[Problem], Launch], launched: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other tensors of the same kind: the kept kernel is handed exactly what Triton's own launcher hands on."""
    make(gaussian(8, 256, 320, 16, 16, dtype=torch.bfloat16, seed=1)).run()
    assert len(launch._kept) == 1
    repeated = make(gaussian(8, 256, 320, 16, 16, dtype=torch.bfloat16, seed=2))
    repeated.run()
    assert len(launch._kept) == 1
    monkeypatch.setattr(launch, "_kept", {})
    repeated.run()
    first, kept, fresh = launched
    assert len(_flat(fresh)) > 20
    for one, other in zip(_flat(kept), _flat(fresh), strict=True):
        assert one is other if isinstance(one, torch.Tensor) else one == other
    assert _flat(kept)[0] is not _flat(first)[0]
    assert [type(each) for each in kept] == [type(each) if not isinstance(each, Matrix) else tuple for each in fresh]


def _flat(arguments: tuple[Any, ...]) -> list[Any]:
    """The arguments without their nesting; a kernel's constants are one."""
    if isinstance(arguments, Constants) or not isinstance(arguments, tuple):
        return [arguments]
    return [value for each in arguments for value in _flat(each)]


@pytest.mark.parametrize("make", MAKERS)
def test_what_a_kernel_depends_on_is_told_apart(make: Callable[[Problem], Launch], launched: list[Any]) -> None:
    """Sizes, strides, ranks, dtypes and alignment each get a kernel, or at least an entry, of their own."""
    sizes = [(8, 256, 320, 16, 16), (7, 256, 320, 16, 16), (8, 257, 320, 16, 16), (8, 256, 320, 12, 16)]
    problems = [gaussian(*each, dtype=torch.bfloat16) for each in sizes]
    problems.append(gaussian(8, 256, 320, 16, 16, dtype=torch.float16))
    problems.append(gaussian(8, 256, 320, 16, 16, dtype=torch.bfloat16, factor_dtype=torch.bfloat16))
    problems.append(_misaligned(gaussian(8, 256, 320, 16, 16, dtype=torch.bfloat16)))
    for problem in problems:
        make(problem).run()
    tokens_matter = make in (_forward, _token_product)
    assert len(launch._kept) == len(problems) - (not tokens_matter)


def _misaligned(problem: Problem) -> Problem:
    """The same numbers, with a factor that starts 4 bytes after a multiple of 16."""
    room = torch.empty(problem.B.numel() + 1)
    return replace(problem, B=room[1:].view_as(problem.B).copy_(problem.B))


def test_settings_of_a_launch_are_told_apart(launched: list[Any]) -> None:
    """Rounding and estimators are constants of a kernel."""
    problem = gaussian(8, 256, 320, 16, 16, dtype=torch.bfloat16)
    out = torch.empty_like(problem.weight)
    for rounding in ("dither", "nearest"):
        launches.effective_weight(out, problem.block(rounding), HASHES, SHAPES.effective_weight, CHIP).run()
    gradients, partials = ParameterGradients(*problem.factors[:4]), (torch.zeros(4, 4, 4), torch.zeros(4, 4, 4))
    h = torch.zeros(problem.weight.shape)
    for estimator in (ESTIMATOR, Estimator("clip", 2.0), Estimator("xnor", 1.0)):
        for wanted in (gradients, gradients._replace(A=None, B=None)):
            launches.factor_gradients(
                h, problem.block(), estimator, wanted, partials, SHAPES.factor_gradients, CHIP
            ).run()
    assert len(launch._kept) == 2 + 6


def test_kept_launches_are_bounded(launched: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of ever new lengths do not fill the memory."""
    monkeypatch.setattr(launch, "_MOST_KEPT", 3)
    for tokens in range(1, 9):
        _forward(gaussian(tokens, 64, 64, 16, 16, dtype=torch.bfloat16)).run()
        assert len(launch._kept) <= 3


def test_a_steps_launches_are_counted() -> None:
    """Fused, each of the three passes is one launch without a vendor's product, and one adds the gradients' parts.

    Panels need several of both. All that PyTorch runs besides is zeroing the gradients.
    """
    assert host_cost.step_counts(256, 256, 4) == (4, 0, 1)
    # One panel of W twice, four of H, of each of which a contraction and a sum.
    assert host_cost.step_counts(4096, 4096, 8192) == (2 + 4 * 2, 2 + 4, 1)
    assert host_cost.step_counts(14336, 4096, 8192) == (2 * 4 + 14 * 2, 2 * 4 + 14, 1)
