"""The specification: Dual LoRA's formula and its gradients in plain PyTorch (arXiv 2512.03402, sections 3.1 and 3.2).

    P = B A        Q = D C        ΔW = s · max(P, 0) ⊙ sgn(Q)        W = round(W0 + ΔW)        Y = X Wᵀ + b

A [r1, K], B [N, r1]: magnitude group. C [r2, K], D [N, r2]: direction group. X [M, K], W0 [N, K], s a scalar.

Two independent ways to the gradients, which the tests hold against each other in fp64: `linear`, a composition that
autograd differentiates, and `linear_gradients`, the explicit formulas that every backend implements. Both materialise
N×K tensors: they are for tests and small problems only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .precision import accumulation_dtype
from .rounding import round_to


class Gradients(NamedTuple):
    """Gradients of a Dual LoRA linear layer, each shaped like the tensor it belongs to."""

    input: torch.Tensor
    weight: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    D: torch.Tensor
    bias: torch.Tensor


def rank_product(up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """up [n, r] @ down [r, k], accumulated in fp32 (fp64 for fp64 factors), as one product of the vendor's.

    Its last bits may depend on the block's shape (docs/numerics.md), which no backend's do.
    """
    dtype = accumulation_dtype(up.dtype)
    return up.to(dtype) @ down.to(dtype)


def sign(q: torch.Tensor) -> torch.Tensor:
    """+1 where q > 0, −1 otherwise (the paper's convention: sgn(0) = −1)."""
    one = torch.ones((), dtype=q.dtype, device=q.device)
    return torch.where(q > 0, one, -one)


def estimator_gradient(grad_sign: torch.Tensor, q: torch.Tensor, ste: str, clip_bound: float = 1.0) -> torch.Tensor:
    """Gradient that a straight-through estimator passes from sgn(q) to q.

    ``"clip"``: Clip(∂L/∂sgn, −clip_bound, clip_bound), the paper's with a bound of 1. ``"dorefa"``: identity
    (DoReFa-Net). ``"xnor"``: identity where |q| ≤ 1, else 0 (XNOR-Net). The last two are the paper's ablation.
    """
    if ste == "clip":
        return grad_sign.clamp(-clip_bound, clip_bound)
    if ste == "dorefa":
        return grad_sign
    return torch.where(q.abs() <= 1, grad_sign, 0)


class SignStraightThrough(torch.autograd.Function):
    """`sign` with `estimator_gradient` as its derivative."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, ste: str, clip_bound: float) -> torch.Tensor:
        ctx.save_for_backward(q)
        ctx.ste, ctx.clip_bound = ste, clip_bound
        return sign(q)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        (q,) = ctx.saved_tensors
        return estimator_gradient(grad, q, ctx.ste, ctx.clip_bound), None, None


class _RoundStraightThrough(torch.autograd.Function):
    """`round_to` with the identity as its derivative."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, dtype: torch.dtype, rounding: str) -> torch.Tensor:
        ctx.dtype = values.dtype
        return round_to(values, dtype, rounding)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        return grad.to(ctx.dtype), None, None


def delta(
    p: torch.Tensor,
    q: torch.Tensor,
    scale: torch.Tensor | float,
    sign_function: Callable[[torch.Tensor], torch.Tensor] = sign,
) -> torch.Tensor:
    """ΔW = s · max(P, 0) ⊙ sgn(Q). A NaN in P stays one."""
    return scale * torch.relu(p) * sign_function(q)


def effective_weight(
    weight: torch.Tensor | None,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    scale: torch.Tensor,
    dtype: torch.dtype,
    rounding: str,
    row0: int = 0,
    col0: int = 0,
) -> torch.Tensor:
    """round(W0 + ΔW) of one block [n, k] in `dtype`; only round(ΔW) where `weight` is None.

    `weight` [n, k], `B` [n, r1] and `D` [n, r2] are the block's rows, `A` [r1, k] and `C` [r2, k] its columns;
    `row0`, `col0` say where the block lies in the full weight.
    """
    update = delta(rank_product(B, A), rank_product(D, C), scale)
    return round_to(update if weight is None else weight + update, dtype, rounding, row0, col0)


def product_gradients(
    h: torch.Tensor, p: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, ste: str, clip_bound: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(∂P, ∂Q) of one block from its complete H = Gᵀ X [n, k]."""
    scaled = scale * h
    grad_p = torch.where(p > 0, scaled * sign(q), 0)
    grad_q = estimator_gradient(scaled * torch.relu(p), q, ste, clip_bound)
    return grad_p, grad_q


def linear(
    input: torch.Tensor,
    weight: torch.Tensor | None,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    ste: str = "clip",
    rounding: str = "dither",
    clip_bound: float = 1.0,
) -> torch.Tensor:
    """The layer as a composition that autograd differentiates. `input` [..., K] → [..., N] in the input's dtype."""
    update = delta(
        rank_product(B, A), rank_product(D, C), scale, lambda q: SignStraightThrough.apply(q, ste, clip_bound)
    )
    effective = _RoundStraightThrough.apply(update if weight is None else weight + update, input.dtype, rounding)
    return torch.nn.functional.linear(input, effective, None if bias is None else bias.to(input.dtype))


def linear_gradients(
    grad: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor | None,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    scale: torch.Tensor,
    *,
    ste: str = "clip",
    rounding: str = "dither",
    clip_bound: float = 1.0,
    weights: torch.Tensor | None = None,
) -> Gradients:
    """The layer's gradients by explicit formulas, for G = `grad` [M, N] and X = `input` [M, K].

    The factors' gradients accumulate in fp32 (fp64 for fp64) and come back in the factors' dtype. With `weights` [K],
    zeros mostly, they are estimates: column k of ∂P and ∂Q, exact and clipped, counts `weights[k]` times.
    """
    h = grad.t().to(accumulation_dtype(grad.dtype)) @ input.to(accumulation_dtype(input.dtype))
    grad_p, grad_q = product_gradients(h, rank_product(B, A), rank_product(D, C), scale, ste, clip_bound)
    wide = grad_p.dtype
    if weights is not None:
        grad_p, grad_q = grad_p * weights.to(wide), grad_q * weights.to(wide)
    return Gradients(
        input=grad @ effective_weight(weight, A, B, C, D, scale, input.dtype, rounding),
        weight=h.to(h.dtype if weight is None else weight.dtype),
        A=(B.t().to(wide) @ grad_p).to(A.dtype),
        B=(grad_p @ A.t().to(wide)).to(B.dtype),
        C=(D.t().to(wide) @ grad_q).to(C.dtype),
        D=(grad_q @ C.t().to(wide)).to(D.dtype),
        bias=grad.sum(0),
    )
