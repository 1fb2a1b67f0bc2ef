"""The checks, each a function of a backend on a device that returns (passed, or None for information; a figure)."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from .. import reference
from ..backends import Backend, FactorGradients, resolve_backend
from ..functional import dual_lora_linear
from ..merging import dual_lora_merge_
from ..panels import set_workspace_bytes
from ..passes import STRATEGIES, set_strategy
from .problems import Problem, autograd_gradients, exact, gaussian, naive_gradients

NAIVE_ERRORS = 2.0
"""How many times the naive implementation's rms error is allowed: FlashAttention's criterion.

Two correct implementations in one dtype differ in the order of their sums and in what is fused. 1.0 to 1.4 times was
seen across processors; TF32 instead of fp32, or sums in bf16, multiply an error by hundreds.
"""
_RANKS = (4, 16, 64, 100)
_ROUNDS = 7
_WORKSPACES = (1 << 25, 1 << 18, 1)

Verdict = tuple[bool | None, str]


class Subject(NamedTuple):
    """What is checked."""

    device: str
    backend: str
    small: bool

    def dtypes(self) -> list[torch.dtype]:
        """The compute dtypes that the device has."""
        return [torch.float32, torch.bfloat16, *([] if self.device.startswith("mps") else [torch.float64])]

    def resolve(self, problem: Problem) -> Backend:
        return resolve_backend(self.backend, problem.x.device, problem.x.dtype, problem.A.dtype)


class Check(NamedTuple):
    """A check's name in reports, and the function that makes it."""

    name: str
    function: Callable[[Subject], Verdict]


def blocks(subject: Subject) -> Verdict:
    """W has the same bits in blocks of any shape as whole: single rows and columns, odd sizes, panels either way."""
    size = 150 if subject.small else 600
    differing = total = 0
    for dtype in subject.dtypes():
        for rank in _RANKS:
            problem = gaussian(1, size, size + 7, rank, rank, dtype=dtype, device=subject.device)
            whole = _weight(subject, problem, 0, size, 0, size + 7)
            for top, bottom, left, right in _blocks(size):
                block = _weight(subject, problem, top, bottom, left, right)
                differing += _differing(block, whole[top:bottom, left:right])
                total += block.numel()
    return differing == 0, f"{_share(differing, total)} elements have other bits in a block"


def passes(subject: Subject) -> Verdict:
    """Identity inputs read W out of the forward pass and of ∂X; merging writes the same."""
    n, k = (60, 50) if subject.small else (400, 330)
    differing = total = 0
    for dtype in subject.dtypes():
        for rank in _RANKS[:2]:
            problem = gaussian(1, n, k, rank, rank, dtype=dtype, device=subject.device)
            merged = dual_lora_merge_(problem.weight.clone(), *problem.factors, backend=subject.backend)
            for weight in _weights_used(subject, problem):
                differing += int((weight != merged).sum())
                total += merged.numel()
    return differing == 0, f"{_share(differing, total)} weights used differ from the merged ones"


def specification(subject: Subject) -> Verdict:
    """Where arithmetic is exact, W, the output and all gradients are the specification's to the bit."""
    wrong: list[str] = []
    for ste in ("clip", "dorefa", "xnor"):
        problem = exact(7, 90, 70, 6, 5, seed=3)
        expected = autograd_gradients(problem, ste=ste)
        computed = _gradients(subject, problem.to(subject.device), ste)
        names = ("output", *reference.Gradients._fields)
        wrong += [
            f"{name} ({ste})"
            for name, own, truth in zip(names, computed, expected, strict=True)
            if not torch.equal(own.cpu(), truth)
        ]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        problem = exact(1, 90, 70, 6, 5, dtype=dtype)
        truth = reference.effective_weight(problem.weight, *problem.factors, dtype, "dither")
        if _differing(_weight(subject, problem.to(subject.device), 0, 90, 0, 70).cpu(), truth):
            wrong.append(f"W in {_name(dtype)}")
    return not wrong, f"differ from the specification: {', '.join(wrong)}" if wrong else "bit for bit"


def errors(subject: Subject) -> Verdict:
    """Errors against fp64, at most twice the naive implementation's in the same dtype."""
    largest = (0.0, "")
    for dtype in subject.dtypes()[:2]:
        squares: dict[str, list[float]] = {}
        for seed in range(2 if subject.small else 8):
            problem = gaussian(64, 130, 120, 16, 16, dtype=dtype, factor_dtype=dtype, seed=seed)
            truths = autograd_gradients(problem.to(torch.float64))
            local = problem.to(subject.device)
            names = ("output", *reference.Gradients._fields)
            for name, *values, truth in zip(
                names, _gradients(subject, local), naive_gradients(local), truths, strict=True
            ):
                sums = squares.setdefault(name, [0.0, 0.0])
                for index, value in enumerate(values):
                    sums[index] += (value.cpu().double() - truth).square().sum().item()
        ratios = ((own / naive) ** 0.5 if own else 0.0 for own, naive in squares.values())
        largest = max(largest, *zip(ratios, (f"{name}, {_name(dtype)}" for name in squares), strict=True))
    ratio, where = largest
    return (
        ratio <= NAIVE_ERRORS,
        f"at most {ratio:.2f} × the naive implementation's ({where}), {NAIVE_ERRORS:g} allowed",
    )


def threads(subject: Subject) -> Verdict:
    """The same bits on 1, 2 and 3 threads. The native backend promises it; eager products are the library's."""
    if subject.device != "cpu":
        return None, "no CPU threads compute there"
    size = 200 if subject.small else 700
    differing = total = 0
    for dtype in subject.dtypes():
        problem = gaussian(1, size, size, 16, 16, dtype=dtype)
        wide = torch.promote_types(problem.A.dtype, torch.float32)
        h = torch.randn(size, size, dtype=wide, generator=torch.Generator().manual_seed(0))
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            sums = FactorGradients(*(torch.zeros_like(factor, dtype=wide) for factor in problem.factors[:4]))
            backend = subject.resolve(problem)
            if subject.backend == "native":
                backend.factor_gradients(h.clone(), problem.factors, 0, 0, "clip", 1.0, sums, dtype, _WORKSPACES[0])
            kept = [t for t in sums if t is not None]
            results.append([_weight(subject, problem, 0, size, 0, size), *kept])
        for other in results[1:]:
            differing += sum(_differing(one, two) for one, two in zip(other, results[0], strict=True))
            total += sum(one.numel() for one in other)
    passed = differing == 0 if subject.backend == "native" else None
    return passed, f"{_share(differing, total)} results change with the number of threads (1, 2, 3)"


def speed(subject: Subject) -> Verdict:
    """A step's time over that of the three matrix products that no implementation can avoid, in the same run."""
    size, tokens = (128, 32) if subject.small else (1024, 256) if subject.device == "cpu" else (4096, 4096)
    figures = []
    for dtype in subject.dtypes()[:2]:
        problem = gaussian(tokens, size, size, 16, 16, dtype=dtype, device=subject.device)
        step, floor = [], []
        for _ in range(_ROUNDS):
            floor.append(_seconds(subject, functools.partial(_products, problem)))
            step.append(_seconds(subject, functools.partial(_step, subject, problem)))
        ratio = statistics.median(own / other for own, other in zip(step[2:], floor[2:], strict=True))
        figures.append(f"{_name(dtype)} {ratio:.2f} ({1e3 * statistics.median(step[2:]):.1f} ms)")
    return None, f"{', '.join(figures)} × the three products; {size}², {tokens} tokens"


CHECKS = (
    Check("W across blocks", blocks),
    Check("forward, ∂X and merge", passes),
    Check("exact arithmetic", specification),
    Check("error against fp64", errors),
    Check("thread counts", threads),
    Check("step's time", speed),
)
"""In the order in which they run."""


def _blocks(size: int) -> Iterator[tuple[int, int, int, int]]:
    """(first row, end of rows, first column, end of columns) in a weight of `size` × `size` + 7."""
    last = size + 7
    for line in (0, size // 3, size - 1):
        yield line, line + 1, 0, last
        yield 0, size, line, line + 1
    for width in (64, size // 2 + 1):
        for start in range(0, size, width):
            yield start, min(start + width, size), 0, last
            yield 0, size, start, min(start + width, last)
    yield 3, 10, 5, 16
    yield size // 4, size // 2 + 3, size // 5, size - 1


def _weight(subject: Subject, problem: Problem, top: int, bottom: int, left: int, right: int) -> torch.Tensor:
    """One block of W in the weight's dtype."""
    base = problem.weight[top:bottom, left:right]
    out = torch.empty(base.shape, dtype=base.dtype, device=base.device)
    factors = problem.factors.rows(top, bottom).columns(left, right)
    subject.resolve(problem).effective_weight(out, base, factors, top, left, "dither", _WORKSPACES[0])
    return out


def _weights_used(subject: Subject, problem: Problem) -> Iterator[torch.Tensor]:
    """W as forward and ∂X use it, with every strategy that serves the call and from large panels to small."""
    n, k = problem.weight.shape
    zeros = torch.zeros_like(problem.weight)
    identity = {features: torch.eye(features, dtype=zeros.dtype, device=zeros.device) for features in (n, k)}
    for name in STRATEGIES:
        for workspace in _WORKSPACES:
            set_strategy(name)
            set_workspace_bytes(workspace)
            x = zeros.clone().requires_grad_()
            try:
                y = dual_lora_linear(identity[k], problem.weight, *problem.factors, backend=subject.backend)
                nothing = dual_lora_linear(x, problem.weight, *problem.factors, backend=subject.backend)
                (grad,) = torch.autograd.grad(nothing, x, identity[n])
            except ValueError:
                if name != "fused":  # which says by that what it does not serve
                    raise
                continue
            yield y.t()
            yield grad


def _gradients(subject: Subject, problem: Problem, ste: str = "clip") -> list[torch.Tensor]:
    """(output, *gradients) in the order of `reference.Gradients`."""
    leaf = problem.requiring_grad()
    out = dual_lora_linear(leaf.x, leaf.weight, *leaf.factors, leaf.bias, ste=ste, backend=subject.backend)
    return [out.detach(), *torch.autograd.grad(out, leaf.differentiable, leaf.grad)]


def _step(subject: Subject, problem: Problem) -> list[torch.Tensor]:
    """A training step's passes, the weight frozen."""
    leaf = problem.requiring_grad()
    out = dual_lora_linear(leaf.x, leaf.weight.detach(), *leaf.factors, backend=subject.backend)
    return list(torch.autograd.grad(out, (leaf.x, *leaf.factors[:4]), leaf.grad))


def _products(problem: Problem) -> list[torch.Tensor]:
    return [problem.x @ problem.weight.t(), problem.grad @ problem.weight, problem.grad.t() @ problem.x]


def _seconds(subject: Subject, function: Callable[[], object]) -> float:
    def wait() -> None:
        if subject.device != "cpu":
            torch.accelerator.synchronize()

    wait()
    start = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - start


def _differing(one: torch.Tensor, other: torch.Tensor) -> int:
    """How many elements have other bits."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.itemsize]
    return int((one.contiguous().view(integers) != other.contiguous().view(integers)).sum())


def _share(differing: int, total: int) -> str:
    return f"{differing:,} of {total:,}" + (f" ({100 * differing / total:.2g} %)" if differing else "")


def _name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}[dtype]
