"""Merging one layer's adapter into its weight in memory, every method, beside copying the weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dual_lora_kernels import DualLoraLinear, dual_lora_merge_

from .methods import NaiveDualLora

COPY = "copy"
"""The reference: W0 read and written once, what no method can avoid."""
SUBJECTS = ("lora", "dora", "loha", "hira", "naive", "dual_lora_eager", "dual_lora")


def copying(weight: torch.Tensor) -> Callable[[], object]:
    """W0 into memory that is there already."""
    target = torch.empty_like(weight)
    return lambda: target.copy_(weight)


def merging(name: str, module: nn.Module) -> Callable[[], object]:
    """Merges subject `name`, as `methods.build` has made it, into its weight, at every call once more.

    PEFT's own methods do (``merge`` without its check for NaNs); the package's is `dual_lora_merge_`, which checks that
    nothing overflows before it changes anything. The naive way is in the layer's dtype.
    """
    if isinstance(module, NaiveDualLora):
        return torch.no_grad()(lambda: _merge_naively(module))
    if isinstance(module, DualLoraLinear):
        backend = "eager" if name == "dual_lora_eager" else None
        factors = (module.A, module.B, module.C, module.D)
        return lambda: dual_lora_merge_(module.weight, *factors, module.scale, backend=backend)
    layer: Any = module.get_submodule("base_model.model.layer")

    def run() -> None:
        layer.merged_adapters.clear()  # or it would say that there is nothing left to merge
        layer.merge()

    return torch.no_grad()(run)


def merged_weight(module: nn.Module) -> torch.Tensor:
    """The weight that `merging` writes to."""
    found: Any = module if hasattr(module, "weight") else module.get_submodule("base_model.model.layer.base_layer")
    weight: torch.Tensor = found.weight.detach()
    return weight


def _merge_naively(module: NaiveDualLora) -> None:
    module.weight.add_(module.update())
