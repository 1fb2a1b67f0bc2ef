"""The three passes of a layer, each as one fused kernel or over panels, whichever its backend expects to be faster."""

from __future__ import annotations

import torch

from . import panels
from .backends import Backend, DoesNotFit, FactorGradients, Factors, FusedPasses
from .validation import check_choice

STRATEGIES = ("auto", "fused", "panels")
_strategy = "auto"


def set_strategy(name: str) -> None:
    """Choose how passes run: ``"panels"``, ``"fused"``, or ``"auto"``, the one that the backend expects to be faster.

    ``"fused"`` raises ValueError in calls that cannot run so. The weights used are the same bits either way.
    """
    global _strategy
    check_choice("strategy", name, STRATEGIES)
    _strategy = name


def strategy() -> str:
    """What `set_strategy` chose; ``"auto"`` at first."""
    return _strategy


def _fused(operation: str, input: torch.Tensor, factors: Factors, backend: Backend) -> FusedPasses | None:
    """The backend's fused passes if this one is to use them."""
    if _strategy == "panels":
        return None
    fused = backend.fused
    if fused is None:
        reason: str | None = "it has no fused kernels"
    else:
        reason = fused.serves(operation, input, factors, panels.workspace_bytes())
        if reason is None and (_strategy == "fused" or fused.preferred(operation, input)):
            return fused
    if _strategy == "fused":
        raise ValueError(f"strategy: got 'fused', which backend {backend.name!r} does not serve here: {reason}")
    return None


def forward(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    factors: Factors,
    bias: torch.Tensor | None,
    rounding: str,
    backend: Backend,
) -> torch.Tensor:
    """Y = X Wᵀ + b, [M, N]."""
    fused = _fused("forward", x, factors, backend)
    if fused is not None:
        try:
            return fused.weight_product("forward", x, weight, factors, bias, rounding, panels.workspace_bytes())
        except DoesNotFit:
            return forward(x, weight, factors, bias, rounding, backend)
    return panels.forward(x, weight, factors, bias, rounding, backend)


def gradients(
    grad: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor | None,
    factors: Factors,
    rounding: str,
    ste: str,
    clip_bound: float,
    accumulators: FactorGradients,
    grad_weight: torch.Tensor | None,
    wants_input: bool,
    backend: Backend,
) -> torch.Tensor | None:
    """∂X = G W [M, K] if it is wanted; adds the factors' gradients to `accumulators` and writes ∂W0 to `grad_weight`.

    `x` may be None where no parameter's gradient is wanted.
    """
    if x is None or not (accumulators.wanted or grad_weight is not None):
        return input_gradient(grad, weight, factors, rounding, backend) if wants_input else None
    shared = backend.shared_products
    if shared is not None and wants_input and accumulators.wanted and _strategy != "fused":
        return panels.gradients(
            grad, x, weight, factors, rounding, ste, clip_bound, accumulators, grad_weight, backend, shared
        )
    grad_x = input_gradient(grad, weight, factors, rounding, backend) if wants_input else None
    parameter_gradients(grad, x, factors, ste, clip_bound, accumulators, grad_weight, backend)
    return grad_x


def input_gradient(
    grad: torch.Tensor, weight: torch.Tensor | None, factors: Factors, rounding: str, backend: Backend
) -> torch.Tensor:
    """∂X = G W, [M, K]."""
    fused = _fused("input_gradient", grad, factors, backend)
    if fused is not None:
        try:
            workspace = panels.workspace_bytes()
            return fused.weight_product("input_gradient", grad, weight, factors, None, rounding, workspace)
        except DoesNotFit:
            return input_gradient(grad, weight, factors, rounding, backend)
    return panels.input_gradient(grad, weight, factors, rounding, backend)


def parameter_gradients(
    grad: torch.Tensor,
    x: torch.Tensor,
    factors: Factors,
    ste: str,
    clip_bound: float,
    gradients: FactorGradients,
    grad_weight: torch.Tensor | None,
    backend: Backend,
) -> None:
    """The factors' gradients, and ∂W0 if given; that one needs H itself, so it always runs over panels."""
    fused = _fused("token_product", x, factors, backend) if grad_weight is None else None
    if fused is not None:
        try:
            fused.token_product(grad, x, factors, ste, clip_bound, gradients, panels.workspace_bytes())
        except DoesNotFit:
            parameter_gradients(grad, x, factors, ste, clip_bound, gradients, grad_weight, backend)
    else:
        panels.parameter_gradients(grad, x, factors, ste, clip_bound, gradients, grad_weight, backend)
