"""The model's own floor: every adapted layer costs the three products X W0ᵀ, G W0 and Gᵀ X, and nothing else."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .base import adapted_linears, replace_linears


class _ThreeProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, weight: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(input, weight)
        ctx.scratch = scratch
        return nn.functional.linear(input, weight)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        input, weight = ctx.saved_tensors
        rows = grad.reshape(-1, weight.shape[0])
        # No method has to return Gᵀ X, so it goes where the layer before wrote its own.
        torch.mm(rows.t(), input.reshape(-1, weight.shape[1]), out=ctx.scratch[: weight.numel()].view_as(weight))
        return (rows @ weight).view_as(input), None, None


class FloorLinear(nn.Module):
    """A frozen linear layer without bias. `scratch`: numbers enough for the weight, shared among layers."""

    def __init__(self, linear: nn.Linear, scratch: torch.Tensor) -> None:
        super().__init__()
        self.weight = linear.weight
        self.register_buffer("scratch", scratch, persistent=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in_features] → [..., out_features]."""
        output: torch.Tensor = _ThreeProducts.apply(input, self.weight, self.scratch)
        return output


def floor_model(model: nn.Module) -> nn.Module:
    """`model` with the linear layers of its blocks replaced, in place."""
    weights = [linear.weight for _, linear in adapted_linears(model)]
    scratch = torch.empty(max(weight.numel() for weight in weights), dtype=weights[0].dtype, device=weights[0].device)
    replace_linears(model, lambda linear: FloorLinear(linear, scratch))
    return model
