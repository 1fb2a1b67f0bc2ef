"""The tuner's layer around a base layer whose weight a library keeps quantised."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from ..adapter import DualLoraAdapter
from ..hooks import call_within_hooks
from ..quantised.bitsandbytes import kept_state, restore
from ..quantised.layers import compute_in_own_dtype, plain_layer, weight_of
from ..quantised.requantising import Loss, merge_into_layer, refuse_requantising
from ..quantised.weight import QuantisedWeight
from .layer import Linear


class QuantisedLinear(Linear):
    """y = x round(W0 + ΔW)ᵀ + b, W0 dequantised block by block, in the base layer's compute dtype.

    Merging quantises W anew, as PEFT does; `losses` says what that has left of each adapter's update, and the model
    warns of it. `unmerge` puts the quantised weight back that was there before. `plain` is the exact way.
    """

    losses: dict[str, Loss]

    def __init__(self, base_layer: nn.Module, adapter_name: str, options: Mapping[str, Any]) -> None:
        super().__init__(base_layer, adapter_name, options)
        self.losses = {}
        self._before_merging: tuple[Any, ...] | None = None

    def _base_dtype(self) -> torch.dtype:
        return torch.float32

    def _oriented_weight(self) -> torch.Tensor | QuantisedWeight:
        return weight_of(self.base_layer)

    def _compute(self, adapters: list[DualLoraAdapter], input: torch.Tensor) -> torch.Tensor:
        adapters[0].warn_if_narrow()
        return compute_in_own_dtype(self.base_layer, input, partial(super()._compute, adapters))

    def _base(self, input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x W0ᵀ + b by the adapters' own products: the base of what an adapter computes, to the bit.

        bitsandbytes' products are others: int8's round the activations, and a CPU's 4-bit ones round the absmax.
        """
        adapter = next(iter(self.dual_adapter.values()), None)
        if not isinstance(adapter, DualLoraAdapter) or args or kwargs:
            return super()._base(input, *args, **kwargs)

        def compute(x: torch.Tensor) -> torch.Tensor:
            return adapter.base_linear(x, self._oriented_weight(), self.base_layer.bias)

        return call_within_hooks(
            (self.base_layer,), input, partial(compute_in_own_dtype, self.base_layer, compute=compute)
        )

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Quantise round(W0 + ΔW) of the named (by default the active) adapters anew.

        Raises ValueError, before anything is changed, where a factor or the merged weight is not finite, or where the
        base layer's format cannot be quantised here.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.dual_adapter]
        if names:
            self.check_merge(names)
            if self._before_merging is None:
                self._before_merging = kept_state(self.base_layer)
            self._merge_into_base(names)

    def check_merge(self, adapter_names: list[str] | None = None) -> None:
        if self._adapters(self.active_adapters if adapter_names is None else adapter_names):
            refuse_requantising(self.base_layer)
        super().check_merge(adapter_names)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the quantised weight back that was there before merging."""
        if self._before_merging is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        restore(self.base_layer, self._before_merging)
        self._before_merging = None
        self.merged_adapters.clear()
        self.losses.clear()

    def becomes_plain(self, dtype: torch.dtype | None) -> bool:
        """Whether merging exactly takes another layer than the base layer: always."""
        return True

    def _in_place(self, weight: torch.Tensor) -> nn.Module:
        return plain_layer(self.base_layer, weight)

    def _merge_into_base(self, names: list[str]) -> None:
        for name in names:
            (adapter,) = self._adapters([name])
            self.losses[name] = merge_into_layer(self.base_layer, adapter.merged_with(self._oriented_weight()))
            self.merged_adapters.append(name)

    def _apply(self, fn: Any, recurse: bool = True) -> QuantisedLinear:
        nn.Module._apply(self, fn, recurse)
        return self
