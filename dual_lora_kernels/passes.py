"""The three passes of a layer, each as one fused kernel or over panels, whichever its backend expects to be faster."""

from __future__ import annotations

import torch

from . import panels, shared_work
from .backends import Backend, Block, DoesNotFit, Estimator, FusedPasses, ParameterGradients, Settings


def forward(
    x: torch.Tensor, block: Block, bias: torch.Tensor | None, backend: Backend, settings: Settings
) -> torch.Tensor:
    """Y = X Wᵀ + b, [M, N]."""
    fused = _fused("forward", x, block, backend, settings)
    if fused is not None:
        try:
            return fused.weight_product("forward", x, block, bias, settings)
        except DoesNotFit:
            return forward(x, block, bias, backend, settings)
    return shared_work.forward(x, block, bias, backend, settings)


def gradients(
    grad: torch.Tensor,
    x: torch.Tensor | None,
    wants_input: bool,
    block: Block,
    estimator: Estimator,
    gradients: ParameterGradients,
    backend: Backend,
    settings: Settings,
) -> torch.Tensor | None:
    """∂X = G W [M, K] if it is wanted; the parameters' go to `gradients`.

    `x` may be None where no parameter's gradient is wanted.
    """
    if x is None or not (gradients.factors_wanted or gradients.weight is not None):
        return input_gradient(grad, block, backend, settings) if wants_input else None
    shared = backend.shared_products
    if shared is not None and wants_input and gradients.factors_wanted and settings.strategy != "fused":
        return panels.gradients(grad, x, block, estimator, gradients, backend, shared, settings)
    grad_x = input_gradient(grad, block, backend, settings) if wants_input else None
    parameter_gradients(grad, x, block, estimator, gradients, backend, settings)
    return grad_x


def input_gradient(grad: torch.Tensor, block: Block, backend: Backend, settings: Settings) -> torch.Tensor:
    """∂X = G W, [M, K]."""
    fused = _fused("input_gradient", grad, block, backend, settings)
    if fused is not None:
        try:
            return fused.weight_product("input_gradient", grad, block, None, settings)
        except DoesNotFit:
            return input_gradient(grad, block, backend, settings)
    return shared_work.input_gradient(grad, block, backend, settings)


def parameter_gradients(
    grad: torch.Tensor,
    x: torch.Tensor,
    block: Block,
    estimator: Estimator,
    gradients: ParameterGradients,
    backend: Backend,
    settings: Settings,
) -> None:
    """The parameters' gradients. That of W0 is H itself, which only panels write to memory."""
    fused = _fused("token_product", x, block, backend, settings) if gradients.weight is None else None
    if fused is None:
        return shared_work.parameter_gradients(grad, x, block, estimator, gradients, backend, settings)
    try:
        return fused.token_product(grad, x, block, estimator, gradients, settings)
    except DoesNotFit:
        return parameter_gradients(grad, x, block, estimator, gradients, backend, settings)


def _fused(
    operation: str, input: torch.Tensor, block: Block, backend: Backend, settings: Settings
) -> FusedPasses | None:
    """The backend's fused passes if this one is to use them."""
    if settings.strategy == "panels":
        return None
    fused = backend.fused
    if fused is None:
        reason: str | None = "it has no fused kernels"
    elif operation != "token_product" and block.base is not None and not backend.reads(block.base):
        reason = "fused kernels read W0 where it lies, and this one has to be loaded first"
    else:
        reason = fused.why_not(operation, input, block, settings)
        if reason is None and (settings.strategy == "fused" or fused.preferred(operation, input)):
            return fused
    if settings.strategy == "fused":
        raise ValueError(f"strategy: got 'fused', which backend {backend.name!r} does not serve here: {reason}")
    return None
