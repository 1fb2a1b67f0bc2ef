"""Merging the update into a weight in place, after a check that nothing overflows."""

from __future__ import annotations

from typing import Any

import torch

from . import panels
from .backends import Block, Factors, base_of, check_backend_name, resolve_backend
from .calls import Options
from .ops import NAMESPACE
from .precision import accumulation_dtype
from .quantised.weight import QuantisedWeight
from .runtime_settings import current_settings, default_backend
from .validation import (
    ROUNDINGS,
    as_scale_tensor,
    check_choice,
    check_dtype,
    check_factors,
    check_finite,
    check_origin,
    check_weight,
    overlaps_itself,
)

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
    origin: tuple[int, int] = (0, 0),
) -> torch.Tensor:
    """Write round(W0 + ΔW) over `weight` [out_features, in_features], block by block, and return it.

    With the forward pass's `rounding`, these are bit for bit the weights that a forward pass in the weight's dtype
    used; `origin` is as there. Raises as `dual_lora_linear` does, as `check_mergeable` does, and ValueError for a
    weight some of whose elements share memory (an expanded one, say), before anything is changed.
    """
    if isinstance(weight, QuantisedWeight):
        raise TypeError(f"weight: got {weight!r}, expected a tensor; dual_lora_merged makes one of it")
    check_mergeable(weight, A, B, C, D, scale, rounding=rounding, backend=backend, origin=origin)
    if overlaps_itself(weight):
        raise ValueError(
            f"weight: got the strides {weight.stride()}, expected memory of its own for every element: clone() it"
        )
    scale = as_scale_tensor(scale, A)
    backend = default_backend() if backend is None else backend
    _ops.merge_(weight, (A, B, C, D, scale), *Options(rounding, *origin, backend, *current_settings()))
    return weight


@torch.no_grad()
def dual_lora_merged(
    weight: torch.Tensor | QuantisedWeight,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    scale: float | torch.Tensor,
    *,
    dtype: torch.dtype | None = None,
    rounding: str = "dither",
    backend: str | None = None,
    origin: tuple[int, int] = (0, 0),
) -> torch.Tensor:
    """round(W0 + ΔW) as a new tensor [out_features, in_features] of `dtype` (default: W0's), for quantised weights too.

    With the forward pass's `rounding`, these are bit for bit the weights that a forward pass in `dtype` used. Raises as
    `dual_lora_linear` and `check_mergeable` do.
    """
    if dtype is not None:
        check_dtype("dtype", dtype)
    check_mergeable(weight, A, B, C, D, scale, dtype=dtype, rounding=rounding, backend=backend, origin=origin)
    dtype = weight.dtype if dtype is None else dtype
    chosen = resolve_backend(default_backend() if backend is None else backend, weight.device, dtype, A.dtype)
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    block = Block(base_of(weight), Factors(A, B, C, D, as_scale_tensor(scale, A)), rounding, dtype, *origin)
    panels.write_weight(out, block, chosen, current_settings())
    return out


@torch.no_grad()
def check_mergeable(
    weight: torch.Tensor | QuantisedWeight,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    scale: float | torch.Tensor,
    *,
    dtype: torch.dtype | None = None,
    rounding: str = "dither",
    backend: str | None = None,
    origin: tuple[int, int] = (0, 0),
) -> None:
    """Raise ValueError where merging would write a non-finite number of `dtype` (default: W0's) over a finite one.

    That is where a factor or the scale is not finite, or where P, ΔW or W0 + ΔW leaves the range of its dtype. What is
    not finite in W0 already is no reason. Mostly a bound from the largest numbers decides; only where that is too
    large, W is computed, in the workspace, to be looked at. Raises as `dual_lora_linear` does for other arguments.
    """
    check_choice("rounding", rounding, ROUNDINGS)
    backend = default_backend() if backend is None else backend
    check_backend_name(backend)
    check_origin(origin)
    check_weight(weight, A, *check_factors(A, B, C, D))
    factors = Factors(A, B, C, D, as_scale_tensor(scale, A))
    for name, tensor in zip(Factors._fields, factors, strict=True):
        check_finite(name, tensor)
    dtype = weight.dtype if dtype is None else dtype
    if isinstance(weight, torch.Tensor) and dtype == weight.dtype and surely_finite(weight, largest_update(factors)):
        return
    chosen = resolve_backend(backend, weight.device, dtype, A.dtype)
    overflow = panels.first_overflow(
        Block(base_of(weight), factors, rounding, dtype, *origin), dtype, chosen, current_settings()
    )
    if overflow is not None:
        row, column, number = overflow
        raise ValueError(
            f"weight: got {number:g} at [{row}, {column}], which the update makes overflow {dtype}; expected a smaller "
            f"update (scale is {factors.scale.item():g})"
        )


def largest_update(factors: Factors) -> torch.Tensor:
    """What |ΔW| is at most, s·Σᵣ maxₙ|Bₙᵣ|·maxₖ|Aᵣₖ|; infinite where a part is beyond half of the range.

    There are no squares as in norms, since those of small numbers vanish; what the products here lose by that is below
    half of fp16's range for 8000 ranks and the largest scale. Q is read by sign only. A, B and s have half of the range
    as well: the Triton kernels round the larger part of a factor up, and the eager backend doubles s.
    """
    dtype = accumulation_dtype(factors.A.dtype)
    b, a = (
        torch.linalg.vector_norm(factor, torch.inf, dim=dim, dtype=dtype)
        for factor, dim in ((factors.B, 0), (factors.A, 1))
    )
    p = torch.dot(b, a)
    scale = factors.scale.abs().to(dtype)
    within = torch.stack([p, a.max(), b.max(), scale]).max() <= torch.finfo(dtype).max / 2
    return torch.where(within, scale * p, torch.inf)


def surely_finite(weight: torch.Tensor, update: torch.Tensor) -> bool:
    """Whether max|W0| and an update of that size, 0-dim, together stay within half of both dtypes' ranges."""
    least, largest = torch.aminmax(weight)
    total = torch.maximum(-least, largest).to(update.dtype) + update
    return bool(total <= min(torch.finfo(update.dtype).max, torch.finfo(weight.dtype).max) / 2)
