"""Merging the update into a weight in place, after a check that nothing overflows."""

from __future__ import annotations

from typing import Any

import torch

from . import panels
from .backends import Factors, check_backend_name, default_backend, resolve_backend
from .ops import NAMESPACE
from .validation import ROUNDINGS, as_scale_tensor, check_choice, check_factors, check_finite, check_weight

_ops: Any = getattr(torch.ops, NAMESPACE)


@torch.no_grad()
def dual_lora_merge_(
    weight: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    scale: float | torch.Tensor,
    *,
    rounding: str = "dither",
    backend: str | None = None,
) -> torch.Tensor:
    """Write round(W0 + ΔW) over `weight` [out_features, in_features], block by block, and return it.

    With the forward pass's `rounding`, these are bit for bit the weights that a forward pass in the weight's dtype
    used. Raises as `dual_lora_linear` does, and as `check_mergeable` does, before anything is changed.
    """
    check_mergeable(weight, A, B, C, D, scale, rounding=rounding, backend=backend)
    scale = as_scale_tensor(scale, A)
    _ops.merge_(weight, A, B, C, D, scale, rounding, default_backend() if backend is None else backend)
    return weight


@torch.no_grad()
def check_mergeable(
    weight: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    scale: float | torch.Tensor,
    *,
    rounding: str = "dither",
    backend: str | None = None,
) -> None:
    """Raise ValueError where merging would write a non-finite number over a finite one.

    That is where a factor or the scale is not finite, or where P, Q or W0 + ΔW leave the range of their dtype. What is
    not finite in W0 already stays so and is no reason. Mostly a bound from norms decides; only where it is too large, W
    is computed, in the workspace, to be looked at. Raises as `dual_lora_linear` does for other arguments.
    """
    check_choice("rounding", rounding, ROUNDINGS)
    backend = default_backend() if backend is None else backend
    check_backend_name(backend)
    check_weight(weight, A, *check_factors(A, B, C, D))
    factors = Factors(A, B, C, D, as_scale_tensor(scale, A))
    for name, tensor in zip(Factors._fields, factors, strict=True):
        check_finite(name, tensor)
    if _surely_finite(weight, factors):
        return
    chosen = resolve_backend(backend, weight.device, weight.dtype, A.dtype)
    overflow = panels.first_overflow(weight, factors, rounding, chosen)
    if overflow is not None:
        row, column = overflow
        raise ValueError(
            f"weight: got {weight[row, column].item():g} at [{row}, {column}], which the update makes overflow "
            f"{weight.dtype}; expected a smaller update (scale is {factors.scale.item():g})"
        )


def _surely_finite(weight: torch.Tensor, factors: Factors) -> bool:
    """Whether |W0| + s·|P| ≤ max|W0| + s·max‖Bₙ‖·max‖Aₖ‖ (Cauchy-Schwarz) and |Q| stay within half of the range."""

    def bound(up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        rows, columns = (
            torch.linalg.vector_norm(lines, dim=dim, dtype=torch.promote_types(lines.dtype, torch.float32)).max()
            for lines, dim in ((up, 1), (down, 0))
        )
        return torch.mul(rows, columns)

    least, largest = torch.aminmax(weight)
    p, q = bound(factors.B, factors.A), bound(factors.D, factors.C)
    range_of_products, range_of_weights = torch.finfo(p.dtype).max / 2, torch.finfo(weight.dtype).max / 2
    total = torch.maximum(-least, largest).to(p.dtype) + factors.scale.abs().to(p.dtype) * p
    return bool((torch.maximum(p, q) <= range_of_products) & (total <= min(range_of_weights, range_of_products)))
