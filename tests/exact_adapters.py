"""Adapters of small integers times powers of two, and the formula on their whole matrices."""

from __future__ import annotations

import torch
from torch import nn

from dual_lora_kernels import reference
from dual_lora_kernels.adapter import DualLoraAdapter, dual_lora_adapters

SCALE = 2.0**-12
"""Small enough for bf16 to lose updates beside weights of 0.02."""


def make_exact(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every adapter such factors, so that no count depends on the order of sums. It is drawn layer by layer."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, adapter in dual_lora_adapters(model):
            for factor in adapter.factors():
                factor.copy_(torch.randint(-3, 4, factor.shape, generator=generator) * 0.5)
            adapter.set_scale(SCALE)
    return model


def products(adapter: DualLoraAdapter) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """P, Q and ΔW."""
    A, B, C, D = (factor.detach() for factor in adapter.factors())
    p, q = reference.rank_product(B, A), reference.rank_product(D, C)
    return p, q, reference.delta(p, q, adapter.scale)


def lost(update: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Where the update is not zero and rounding W0 + ΔW to nearest, in W0's dtype, gives W0."""
    return (update != 0) & ((weight.to(update.dtype) + update).to(weight.dtype) == weight)
