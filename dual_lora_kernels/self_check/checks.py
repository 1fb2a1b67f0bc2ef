"""The checks, each a function of a backend on a device that returns (passed, or None for information; a figure)."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

import torch

from .. import reference
from ..backends import Backend, Estimator, ParameterGradients, Settings, resolve_backend
from ..functional import dual_lora_linear
from ..merging import dual_lora_merge_
from ..runtime_settings import STRATEGIES, settings
from .problems import Problem, autograd_gradients, exact, gaussian, naive_gradients

NAIVE_ERRORS = 2.0
"""How many times the naive implementation's rms error is allowed: FlashAttention's criterion.

Two correct implementations in one dtype differ in the order of their sums and in what is fused. 1.0 to 1.4 times was
seen across processors; TF32 instead of fp32, or sums in bf16, multiply an error by hundreds.
"""
_RANKS = (4, 16, 64, 100)
_RANK = 16
"""The layer's default."""
_ROUNDS = 7
_WORKSPACES = (1 << 25, 1 << 18, 1)
_FEW_TOKENS = (1, 16, 64)
"""As in decoding, which has kernels of its own."""
_LAYERS = (
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
)
"""Compute and factors' dtypes of the layers whose errors are measured, the default one last."""
_STEP = ("x", "A", "B", "C", "D")
_WANTED = {"step": _STEP, "input alone": ("x",), "factors alone": _STEP[1:], "weight and bias": ("weight", "bias")}
"""Gradients that are wanted together, which may run other kernels than each by itself."""

_QUANTITIES = ("output", *reference.Gradients._fields)

_Result = TypeVar("_Result")

Verdict = tuple[bool | None, str]


class Subject(NamedTuple):
    """What is checked."""

    device: str
    backend: str
    small: bool

    def dtypes(self) -> list[torch.dtype]:
        """The compute dtypes that the device has."""
        return [torch.float32, torch.bfloat16, *([] if self.device.startswith("mps") else [torch.float64])]

    def thorough(self, problem: Problem) -> bool:
        """Whether time allows all shapes: Triton compiles a kernel for each, so only default layers meet them all."""
        return self.backend != "triton" or (problem.A.shape[0] == _RANK and problem.x.dtype != torch.float64)

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
            for index, (top, bottom, left, right) in enumerate(_blocks(size, subject.thorough(problem))):
                workspace = _WORKSPACES[index % len(_WORKSPACES)]
                block = _weight(subject, problem, top, bottom, left, right, workspace)
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
            for used, part in _weights_used(subject, problem, merged):
                differing += int((used != part).sum())
                total += part.numel()
    return differing == 0, f"{_share(differing, total)} weights used differ from the merged ones"


def specification(subject: Subject) -> Verdict:
    """Where arithmetic is exact, W, the output and all gradients are the specification's to the bit."""
    wrong: list[str] = []
    for ste in ("clip", "dorefa", "xnor"):
        problem = exact(7, 90, 70, 6, 5, seed=3)
        expected = dict(zip(_QUANTITIES, autograd_gradients(problem, ste=ste), strict=True))
        wrong += [
            f"{quantity} ({way}, {ste})"
            for quantity, way, own in _results(subject, problem.to(subject.device), ste)
            if not torch.equal(own.cpu(), expected[quantity])
        ]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        problem = exact(1, 90, 70, 6, 5, dtype=dtype)
        truth = reference.effective_weight(problem.weight, *problem.factors, dtype, "dither")
        if _differing(_weight(subject, problem.to(subject.device), 0, 90, 0, 70).cpu(), truth):
            wrong.append(f"W in {_name(dtype)}")
    return not wrong, f"differ from the specification: {', '.join(wrong)}" if wrong else "bit for bit"


def errors(subject: Subject) -> Verdict:
    """Errors against fp64, at most twice the naive implementation's in the same dtype."""
    squares: dict[str, list[float]] = {}
    for dtype, factor_dtype in _LAYERS:
        layer = _name(dtype) if factor_dtype == dtype else f"{_name(dtype)} with {_name(factor_dtype)} factors"
        for seed in range(2 if subject.small else 8):
            problem = gaussian(64, 130, 120, _RANK, _RANK, dtype=dtype, factor_dtype=factor_dtype, seed=seed)
            truths = dict(zip(_QUANTITIES, autograd_gradients(problem.to(torch.float64)), strict=True))
            local = problem.to(subject.device)
            naive = dict(zip(_QUANTITIES, naive_gradients(local.to(dtype)), strict=True))
            for quantity, way, own in _results(subject, local):
                sums = squares.setdefault(f"{quantity}, {layer}, {way}", [0.0, 0.0])
                for index, value in enumerate((own, naive[quantity])):
                    sums[index] += (value.cpu().double() - truths[quantity]).square().sum().item()
    ratios = {where: _ratio(*sums) ** 0.5 for where, sums in squares.items()}
    # A NaN compares false with every number, so it would never be the largest.
    where, ratio = max(ratios.items(), key=lambda item: math.inf if math.isnan(item[1]) else item[1])
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
        problem = gaussian(1, size, size, _RANK, _RANK, dtype=dtype)
        wide = torch.promote_types(problem.A.dtype, torch.float32)
        h = torch.randn(size, size, dtype=wide, generator=torch.Generator().manual_seed(0))
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            sums = ParameterGradients(*(torch.zeros_like(factor, dtype=wide) for factor in problem.factors[:4]))
            run_with = Settings("auto", _WORKSPACES[0])
            backend, estimator = subject.resolve(problem), Estimator("clip", 1.0)
            backend.factor_gradients(h.clone(), problem.block(), estimator, sums, run_with)
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
        problem = gaussian(tokens, size, size, _RANK, _RANK, dtype=dtype, device=subject.device)
        leaf = _requiring_grad(problem, _STEP)
        step, floor = [], []
        for _ in range(_ROUNDS):
            floor.append(_seconds(subject, functools.partial(_products, problem)))
            step.append(_seconds(subject, functools.partial(_step, subject, leaf)))
        absurd = [seconds for seconds in (*step, *floor) if not 0 < seconds < math.inf]
        if absurd:
            return False, f"{_name(dtype)} took {absurd[0]} s, expected more than 0 and a finite number"
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


def _blocks(size: int, thorough: bool) -> Iterator[tuple[int, int, int, int]]:
    """(first row, end of rows, first column, end of columns) in a weight of `size` × `size` + 7."""
    last = size + 7
    yield 3, 10, 5, 16
    yield size // 4, size // 2 + 3, size // 5, size - 1
    if not thorough:
        return
    for line in (0, size // 3, size - 1):
        yield line, line + 1, 0, last
        yield 0, size, line, line + 1
    for width in (64, size // 2 + 1):
        for start in range(0, size, width):
            yield start, min(start + width, size), 0, last
            yield 0, size, start, min(start + width, last)


def _weight(
    subject: Subject,
    problem: Problem,
    top: int,
    bottom: int,
    left: int,
    right: int,
    workspace: int = _WORKSPACES[0],
) -> torch.Tensor:
    """One block of W in the weight's dtype."""
    block = problem.block().rows(top, bottom).columns(left, right)
    out = problem.weight.new_empty(block.shape)
    subject.resolve(problem).effective_weight(out, block, Settings("auto", workspace))
    return out


def _weights_used(
    subject: Subject, problem: Problem, merged: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """W as forward and ∂X use it, or part of it, and the same of `merged`.

    With every strategy that serves a pass, from large panels to small, and from few tokens.
    """
    n, k = merged.shape
    workspaces = _WORKSPACES if subject.thorough(problem) else _WORKSPACES[:1]
    ways = [(name, workspace, max(n, k)) for name in STRATEGIES for workspace in workspaces]
    if problem.A.shape[0] == _RANK and subject.thorough(problem):
        ways += [("auto", _WORKSPACES[0], tokens) for tokens in _FEW_TOKENS]
    for name, workspace, tokens in ways:
        x, grad = (
            torch.eye(features, dtype=merged.dtype, device=merged.device)[:tokens].contiguous() for features in (k, n)
        )
        with settings(workspace_bytes=workspace):
            y = _served(name, functools.partial(_output, subject, replace(problem, x=x), bias=False))
        if y is not None:
            yield y.t(), merged[:, : len(x)]
        zeros = grad.new_zeros(len(grad), k)
        leaf = _requiring_grad(replace(problem, x=zeros, grad=grad), ("x",))
        with settings(workspace_bytes=workspace):
            grads = _served(name, functools.partial(_gradients, subject, leaf, ("x",)))
        if grads is not None:
            yield grads[0], merged[: len(grad)]


def _results(subject: Subject, problem: Problem, ste: str = "clip") -> Iterator[tuple[str, str, torch.Tensor]]:
    """Quantity of `_QUANTITIES`, way, value: the output and all gradients, however they can be asked for."""
    for name in STRATEGIES:
        output = _served(name, functools.partial(_output, subject, problem))
        if output is not None:
            yield "output", name, output
        for together, wanted in _WANTED.items():
            leaf = _requiring_grad(problem, wanted)
            grads = _served(name, functools.partial(_gradients, subject, leaf, wanted, ste))
            for each, grad in zip(wanted, grads or (), strict=grads is not None):
                yield "input" if each == "x" else each, f"{name}, {together}", grad


def _served(strategy: str, function: Callable[[], _Result]) -> _Result | None:
    """What `function` returns under a strategy, or None where ``"fused"`` says that it does not serve the pass."""
    try:
        with settings(strategy=strategy):
            return function()
    except ValueError as refusal:
        if strategy == "fused" and str(refusal).startswith("strategy: got 'fused'"):
            return None
        raise


def _requiring_grad(problem: Problem, wanted: Sequence[str]) -> Problem:
    """With copies of the tensors of these names that are leaves and require grad."""
    return replace(problem, **{name: getattr(problem, name).detach().clone().requires_grad_() for name in wanted})


def _output(subject: Subject, problem: Problem, ste: str = "clip", bias: bool = True) -> torch.Tensor:
    added = problem.bias if bias else None
    return dual_lora_linear(problem.x, problem.weight, *problem.factors, added, ste=ste, backend=subject.backend)


def _gradients(subject: Subject, leaf: Problem, wanted: Sequence[str], ste: str = "clip") -> tuple[torch.Tensor, ...]:
    """Gradients of the tensors named `wanted`, which require grad."""
    inputs = [getattr(leaf, name) for name in wanted]
    return torch.autograd.grad(_output(subject, leaf, ste), inputs, leaf.grad)


def _step(subject: Subject, leaf: Problem) -> tuple[torch.Tensor, ...]:
    """A training step's passes, the weight frozen."""
    return _gradients(subject, leaf, _STEP)


def _products(problem: Problem) -> list[torch.Tensor]:
    return [problem.x @ problem.weight.t(), problem.grad @ problem.weight, problem.grad.t() @ problem.x]


def _seconds(subject: Subject, function: Callable[[], object]) -> float:
    def wait() -> None:
        if subject.device != "cpu":
            torch.accelerator.synchronize(torch.device(subject.device))

    wait()
    start = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - start


def _ratio(own: float, naive: float) -> float:
    """How many times `naive` is `own`: 0 where `own` is, infinite where only `naive` is 0."""
    return 0.0 if own == 0 else math.inf if naive == 0 else own / naive


def _differing(one: torch.Tensor, other: torch.Tensor) -> int:
    """How many elements have other bits."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.itemsize]
    return int((one.contiguous().view(integers) != other.contiguous().view(integers)).sum())


def _share(differing: int, total: int) -> str:
    return f"{differing:,} of {total:,}" + (f" ({100 * differing / total:.2g} %)" if differing else "")


def _name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}[dtype]
