"""Inputs for numerical checks, and what they are compared with: the specification and the naive implementation."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from .. import reference
from ..backends import Block, DenseBase, Factors

FUSED_RANK = 16
"""A rank that fused kernels serve on every chip and for every dtype."""


@dataclass(frozen=True)
class Problem:
    """One call and the gradient that comes back to it. X [M, K], W0 [N, K], G [M, N]."""

    x: torch.Tensor
    weight: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    D: torch.Tensor
    bias: torch.Tensor
    scale: torch.Tensor
    grad: torch.Tensor

    @property
    def factors(self) -> Factors:
        return Factors(self.A, self.B, self.C, self.D, self.scale)

    @property
    def differentiable(self) -> tuple[torch.Tensor, ...]:
        """In the order of `reference.Gradients`."""
        return self.x, self.weight, self.A, self.B, self.C, self.D, self.bias

    def to(self, target: torch.dtype | torch.device | str) -> Problem:
        """Everything in one dtype, or on one device."""
        return Problem(*(getattr(self, field.name).to(target) for field in fields(self)))

    def block(self, rounding: str = "dither") -> Block:
        """The weight as one block, W in W0's dtype."""
        return Block(DenseBase(self.weight), self.factors, rounding, self.weight.dtype)

    def requiring_grad(self) -> Problem:
        """Copies that are leaves and require grad, but for the scale and G."""
        names = ("x", "weight", "A", "B", "C", "D", "bias")
        return replace(self, **{name: getattr(self, name).detach().clone().requires_grad_() for name in names})


def gaussian(
    m: int,
    n: int,
    k: int,
    r1: int,
    r2: int,
    *,
    dtype: torch.dtype = torch.float32,
    factor_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Problem:
    """Sizes as in training: weights of 0.02, an update of comparable size, gradients that clipping sometimes meets."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, std: float = 1.0, of: torch.dtype = dtype) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * std).to(of).to(device)

    of = factor_dtype or torch.promote_types(dtype, torch.float32)
    return Problem(
        x=draw(m, k),
        weight=draw(n, k, std=0.02),
        A=draw(r1, k, std=0.3, of=of),
        B=draw(n, r1, std=0.3, of=of),
        C=draw(r2, k, std=0.3, of=of),
        D=draw(n, r2, std=0.3, of=of),
        bias=draw(n),
        scale=torch.tensor(0.7, dtype=torch.promote_types(of, torch.float32), device=device),
        grad=draw(m, n),
    )


def exact(
    m: int, n: int, k: int, r1: int, r2: int, *, dtype: torch.dtype = torch.float32, device: Any = "cpu", seed: int = 0
) -> Problem:
    """Small integers times powers of two: every product and sum is exact in fp32 in any order (docs/numerics.md).

    Q is zero, and P zero or negative, at many entries, so the conventions at the kinks are exercised as well.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, high: int = 3, step: float = 1.0, of: torch.dtype = torch.float32) -> torch.Tensor:
        return (torch.randint(-high, high + 1, shape, generator=generator) * step).to(of).to(device)

    return Problem(
        x=draw(m, k, of=dtype),
        weight=draw(n, k, high=64, step=2.0**-6, of=dtype),
        A=draw(r1, k, step=0.5),
        B=draw(n, r1, step=0.5),
        C=draw(r2, k, high=1),
        D=draw(n, r2, high=1),
        bias=draw(n, of=dtype),
        scale=torch.tensor(2.0**-4, device=device),
        grad=draw(m, n, high=1, of=dtype),
    )


def autograd_gradients(problem: Problem, **options: Any) -> tuple[torch.Tensor, ...]:
    """(output, *gradients) of `reference.linear` by autograd."""
    leaf = problem.requiring_grad()
    out = reference.linear(leaf.x, leaf.weight, *leaf.factors, leaf.bias, **options)
    return out.detach(), *torch.autograd.grad(out, leaf.differentiable, leaf.grad)


def naive_gradients(problem: Problem) -> list[torch.Tensor]:
    """(output, *gradients) of Dual LoRA as adopters write it: all in the layer's dtype, N×K tensors throughout."""
    leaf = problem.requiring_grad()
    sign = reference.SignStraightThrough.apply(leaf.D @ leaf.C, "clip", 1.0)
    delta = leaf.scale.to(leaf.x.dtype) * torch.relu(leaf.B @ leaf.A) * sign
    output = torch.nn.functional.linear(leaf.x, leaf.weight + delta, leaf.bias)
    return [output.detach(), *torch.autograd.grad(output, leaf.differentiable, leaf.grad)]


def relative_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """‖value − truth‖ / ‖truth‖, in fp64; absolute where the truth is zero."""
    truth = truth.double()
    norm = float(truth.detach().norm())
    return float((value.double() - truth).detach().norm()) / (norm or 1.0)
