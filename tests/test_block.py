"""Blocks: slicing moves everything together, and W0 may be stored in a form that has to be loaded."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from dual_lora_kernels import passes
from dual_lora_kernels.backends import Block, DenseBase, Estimator, ParameterGradients, Settings, resolve_backend
from dual_lora_kernels.self_check.problems import Problem, gaussian, relative_error

ROOM = Settings("auto", 64 * 1024)


class EightBits(NamedTuple):
    """W0 as 8-bit integers with a step for every row: what a quantised format has to implement."""

    integers: torch.Tensor
    steps: torch.Tensor

    dense = None

    @property
    def shape(self) -> torch.Size:
        return self.integers.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.steps.dtype

    @property
    def device(self) -> torch.device:
        return self.integers.device

    def rows(self, start: int, stop: int) -> EightBits:
        return EightBits(self.integers[start:stop], self.steps[start:stop])

    def columns(self, start: int, stop: int) -> EightBits:
        return EightBits(self.integers[:, start:stop], self.steps)

    def load(self, out: torch.Tensor) -> None:
        torch.mul(self.integers, self.steps[:, None], out=out)


def _quantised(problem: Problem) -> tuple[Block, Block]:
    """The problem's block on an 8-bit base, and on the tensor that this base stands for."""
    steps = problem.weight.abs().amax(1) / 127
    base = EightBits((problem.weight / steps[:, None]).round().to(torch.int8), steps)
    dense = torch.empty_like(problem.weight)
    base.load(dense)
    return tuple(problem.block()._replace(base=each) for each in (base, DenseBase(dense)))  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [3, 90])
def test_a_base_that_is_loaded_gives_what_its_tensor_gives(
    device: torch.device, backend: str, dtype: torch.dtype, tokens: int
) -> None:
    """In every pass, over several panels: one class is all that a storage format needs."""
    problem = gaussian(tokens, 150, 200, 8, 8, dtype=dtype, device=device)
    chosen = resolve_backend(backend, device, dtype, torch.float32)
    results = []
    for block in _quantised(problem):
        sums = ParameterGradients(*(torch.zeros_like(factor) for factor in problem.factors[:4]))
        y = passes.forward(problem.x, block, problem.bias, chosen, ROOM._replace(strategy="panels"))
        estimator = Estimator("clip", 1.0)
        grad_x = passes.gradients(
            problem.grad, problem.x, True, block, estimator, sums, chosen, ROOM._replace(strategy="panels")
        )
        results.append([y, grad_x, *sums[:4]])
    # Panels are smaller where W0 is loaded, and H and W do not share one, so sums may have another order.
    for loaded, dense in zip(*results, strict=True):
        assert relative_error(loaded, dense) < 8 * torch.finfo(loaded.dtype).eps


def test_fused_kernels_say_that_they_do_not_load(device: torch.device, backend: str) -> None:
    problem = gaussian(3, 40, 50, 4, 4, device=device)
    chosen = resolve_backend(backend, device, torch.float32, torch.float32)
    block, _ = _quantised(problem)
    passes.forward(problem.x, block, None, chosen, ROOM)  # over panels
    with pytest.raises(ValueError, match=r"^strategy: got 'fused', .*(W0 where it lies|no fused kernels)"):
        passes.forward(problem.x, block, None, chosen, ROOM._replace(strategy="fused"))


def test_slices_move_everything_together() -> None:
    problem = gaussian(1, 40, 50, 4, 3)
    block = problem.block().rows(5, 30).columns(7, 20).rows(2, 9)
    assert block.origin == (7, 7)
    assert block.shape == (7, 13)
    assert torch.equal(block.dense_base, problem.weight[7:14, 7:20])
    A, B, C, D, _ = problem.factors
    for factor, expected in zip(block.factors, (A[:, 7:20], B[7:14], C[:, 7:20], D[7:14]), strict=False):
        assert torch.equal(factor, expected)
    assert Block(None, problem.factors, "dither", torch.float32).rows(1, 2).dense_base is None
