"""Quantising a merged weight anew, as PEFT does when it merges, and what that loses."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from . import bitsandbytes
from .layers import is_quantised, quantised_weight


class Loss(NamedTuple):
    """What quantising W = W0 + ΔW to Ŵ has left of the update.

    kept = ⟨Ŵ − W0, ΔW⟩ / ⟨ΔW, ΔW⟩, error = ‖Ŵ − W‖ / ‖ΔW‖, in Frobenius norms.
    """

    kept: float
    error: float

    def __str__(self) -> str:
        return f"{self.kept:.0%} of the update is kept, with an error of {self.error:.3g} times its size"


def loss(base: torch.Tensor, trained: torch.Tensor, merged: torch.Tensor) -> Loss:
    """The loss between three matrices [n, k], summed in fp64 a few rows at a time."""
    product = size = error = 0.0
    for rows in zip(base.split(256), trained.split(256), merged.split(256), strict=True):
        w0, w, other = (part.double() for part in rows)
        update = w - w0
        product += ((other - w0) * update).sum().item()
        size += update.square().sum().item()
        error += (other - w).square().sum().item()
    return Loss(product / size, (error / size) ** 0.5) if size else Loss(1.0, 0.0)


def refuse_requantising(layer: nn.Module) -> None:
    """Raise ValueError unless the layer's library quantises weights here."""
    if type(layer) is nn.Linear and not is_quantised(layer):
        raise ValueError(
            "base_layer: got a dense Linear, expected a quantised layer: the model has been dequantised since it was "
            "adapted; merge_and_dequantize() merges it"
        )
    if not (bitsandbytes.is_four_bit(layer) or bitsandbytes.is_eight_bit(layer)):
        raise ValueError(
            f"base_layer: got {type(layer).__name__} with a weight of {_kind_of_weight(layer)}, expected bitsandbytes' "
            "Linear4bit or Linear8bitLt, whose weights can be quantised anew: merge_and_dequantize() merges this one"
        )


def _kind_of_weight(layer: nn.Module) -> str:
    weight = getattr(layer, "weight", None)
    return "packed integers" if weight is None else type(weight).__name__


@torch.no_grad()
def merge_into_layer(layer: Any, weight: torch.Tensor) -> Loss:
    """Quantise `weight` [out_features, in_features] by the layer's own parameters, in its place; returns the loss."""
    base = quantised_weight(layer).dequantised()
    bitsandbytes.quantise(layer, weight)
    return loss(base, weight, quantised_weight(layer).dequantised())
