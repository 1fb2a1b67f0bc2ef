"""Stacks of square layers that one autograd graph goes through; a stack of one is a layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from ..layers.methods import build, frozen_linear


def frozen_layers(size: int, depth: int, dtype: torch.dtype, device: torch.device) -> list[nn.Linear]:
    """As many frozen layers [size, size], each with a weight of its own, W0 ~ N(0, 1 / size).

    So wide that numbers keep their size from layer to layer: those that leave the normal range take longer.
    """
    layers = [frozen_linear(size, size, dtype, device) for _ in range(depth)]
    for layer in layers:
        nn.init.normal_(layer.weight, std=size**-0.5)
    return layers


def stack(name: str, layers: Sequence[nn.Linear], rank: int) -> nn.Sequential:
    """The layers under method `name` of `methods.METHODS`, sharing their weights."""
    return nn.Sequential(*(build(name, layer, rank, rank) for layer in layers))


def stack_floor(
    weights: Sequence[torch.Tensor], x: torch.Tensor, grad: torch.Tensor
) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    """X W0ᵀ, Gᵀ X and G W0 of each layer, with what backward needs of forward kept: every layer's X."""
    x = x.detach()
    token_product = torch.empty_like(weights[0])

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        inputs = [x]
        for weight in weights:
            inputs.append(nn.functional.linear(inputs[-1], weight))
        output, gradient = inputs.pop(), grad
        for weight in reversed(weights):
            torch.mm(gradient.t(), inputs.pop(), out=token_product)
            gradient = gradient @ weight
        return output, gradient

    return run
