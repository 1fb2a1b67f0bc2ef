"""A layer's training step, and the matrix products that no method can avoid.

A step is a forward and a backward pass that returns the input's and the adapter's gradients. The floor is X W0ᵀ, G W0
and Gᵀ X by the vendor's library in the same dtype, the last into a tensor made beforehand, since no method has to
return it. X [M, K], G [M, N], W0 [N, K].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from .methods import trainable_parameters

FLOOR = "floor"


def step(module: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> Callable[[], tuple[torch.Tensor, ...]]:
    """Forward and backward of `module`: its output, the input's gradient and the adapter's gradients.

    The gradients are returned rather than kept on the parameters: they are gone before the next method runs.
    """
    parameters = trainable_parameters(module)

    def run() -> tuple[torch.Tensor, ...]:
        y = module(x)
        return y.detach(), *torch.autograd.grad(y, (x, *parameters), grad)

    return run


def floor_step(
    weight: torch.Tensor, x: torch.Tensor, grad: torch.Tensor
) -> Callable[[], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """The three products: X W0ᵀ, G W0 and Gᵀ X, the last into the same memory in every call."""
    x = x.detach()
    token_product = torch.empty_like(weight)

    def run() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        y = nn.functional.linear(x, weight)
        torch.mm(grad.t(), x, out=token_product)
        return y, grad @ weight, token_product

    return run
