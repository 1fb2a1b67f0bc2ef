"""The tuner's layer: a base layer and any number of named adapters."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn

from ..adaptable import is_transposed, linear_features
from ..adapter import DualLoraAdapter
from ..hooks import call_within_hooks, computing_device
from ..peft_files import PEFT_PREFIX
from ..quantised.weight import QuantisedWeight
from ..sharding import check_gathered, copy_into, is_sharded
from ..tensor_parallel import base_linear, split_adapter, split_of_weight
from ..transformers_parallel import rules_of

BASE = "__base__"
"""In mixed batches, the adapter's name for rows that no adapter is for; PEFT's."""


class DualLoraLayer(BaseTunerLayer):  # type: ignore[misc]  # mypy skips PEFT
    """What every layer of the tuner is, for PEFT to find."""

    adapter_layer_names: tuple[str, ...] = (PEFT_PREFIX,)
    other_param_names: tuple[str, ...] = ()


class Linear(nn.Module, DualLoraLayer):
    """y = x round(W0 + ΔW)ᵀ + b around an ``nn.Linear`` or Conv1D, as `DualLoraLinear` computes it.

    With several active adapters the first is added to W0 as above, and the others add x ΔWᵀ. Adapters merge one after
    the other; each is rounded by itself then. `unmerge` restores W0 bit for bit.
    """

    if TYPE_CHECKING:  # they are BaseTunerLayer's
        merged: bool
        disable_adapters: bool
        active_adapters: list[str]
        base_layer: Any  # nn.Linear or Conv1D
        set_adapter: Callable[..., None]

    def __init__(self, base_layer: nn.Module, adapter_name: str, options: Mapping[str, Any]) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = linear_features(self.base_layer)
        self.transposed = is_transposed(self.base_layer)
        self.dual_adapter = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self._unmerged_weight: torch.Tensor | None = None
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.cast_input_dtype_enabled = False  # peft.helpers sets it; inputs are never cast, whatever it says
        self.update_layer(adapter_name, options)

    def update_layer(self, adapter_name: str, options: Mapping[str, Any], inference_mode: bool = False) -> None:
        """Add the adapter `adapter_name`, or replace it. `options`: those of `DualLoraAdapter`, ranks to clip_bound."""
        adapter = DualLoraAdapter(
            self.in_features, self.out_features, **options, device=None, adapter_dtype=torch.float32
        )
        adapter.reset_adapter_parameters()
        dtype = self._base_dtype()
        if not adapter.A.is_meta and dtype.is_floating_point:
            adapter.to(dtype)  # PEFT casts 16-bit ones up, unless told not to
        self.dual_adapter[adapter_name] = adapter.train(self.training)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        rules = rules_of(self.base_layer)
        if rules is not None:
            split_adapter(adapter, rules.split)
        elif self._is_split_by_itself():
            split_adapter(adapter, split_of_weight(self.base_layer.weight, self.transposed))
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    @torch.no_grad()
    def begin(self, adapter_name: str, warmup_steps: int, is_active: bool, like: str | None) -> None:
        """Set the scale with which a new adapter begins.

        An active one is warmed up at once, another when it first trains. One that is `like` another, from the very
        same configuration, takes its scale: TRL makes its reference so, and copies the parameters alone.
        """
        (adapter,) = self._adapters([adapter_name])
        if warmup_steps > 0:
            adapter.warm_up(warmup_steps, now=is_active)
        for other in self._adapters([like] if like is not None and not is_active else []):
            adapter.scale.copy_(other.scale)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Put an adapter where the base layer computes. Its dtype stays: in 16 bits, loaded factors would lose some."""
        (adapter,) = self._adapters([adapter_name])
        if not adapter.A.is_meta:
            adapter.to(computing_device(self.base_layer) if device is None else device)

    def _base_dtype(self) -> torch.dtype:
        """The dtype that new factors get at first."""
        dtype: torch.dtype = self.base_layer.weight.dtype
        return dtype

    def _oriented_weight(self) -> torch.Tensor | QuantisedWeight:
        """W0 [out_features, in_features]; a view."""
        weight: torch.Tensor = self.base_layer.weight
        return weight.t() if self.transposed else weight

    def _every_adapter(self) -> list[DualLoraAdapter]:
        return list(self.dual_adapter.values())  # type: ignore[arg-type]

    def _is_split_by_itself(self) -> bool:
        """Whether this layer was split by `parallelize_dual_lora`, of which the base layer's forward knows nothing."""
        return is_sharded(self.base_layer._parameters.get("weight")) and rules_of(self.base_layer) is None

    def _adapters(self, names: list[str]) -> list[DualLoraAdapter]:
        """Those of the named adapters that this layer has."""
        own = self.dual_adapter
        return [own[name] for name in names if name in own]  # type: ignore[misc]

    def forward(self, input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """[..., in_features] → [..., out_features], by the active adapters or, with ``adapter_names``, row by row."""
        names = kwargs.pop("adapter_names", None) if kwargs else None
        if names is not None:
            self._check_mixed_batch(input, names)
        if self.merged and self.disable_adapters:
            self.unmerge()
        active = self._adapters(self.active_adapters)
        if self.merged and self.training and torch.is_grad_enabled() and any(adapter.trains() for adapter in active):
            raise RuntimeError("the adapter is merged, so it cannot train: call unmerge_adapter() first")
        if self.disable_adapters or self.merged or (names is None and not active):
            return self._base(input, *args, **kwargs)
        if names is not None:
            return self._mixed_batch(input, names)
        return self._adapted(input, active)

    def _base(self, input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x W0ᵀ + b."""
        if self._is_split_by_itself():
            weight, bias = self._oriented_weight(), self.base_layer.bias
            assert isinstance(weight, torch.Tensor), "quantised weights are not split"
            own = self._every_adapter()
            return own[0].base_linear(input, weight, bias) if own else base_linear(input, weight, bias)
        result: torch.Tensor = self.base_layer(input, *args, **kwargs)
        return result

    def _adapted(self, input: torch.Tensor, adapters: list[DualLoraAdapter]) -> torch.Tensor:
        compute = partial(self._compute, adapters)
        rules = rules_of(self.base_layer)
        if rules is not None:
            return rules.call(self, input, compute)
        return call_within_hooks((self.base_layer, *adapters), input, compute)

    def _compute(self, adapters: list[DualLoraAdapter], input: torch.Tensor) -> torch.Tensor:
        """The adapters' sum on an input where the weights are."""
        result = adapters[0].adapted_linear(input, self._oriented_weight(), self.base_layer.bias)
        for adapter in adapters[1:]:
            result = result + adapter.adapted_linear(input, None, None)
        return result

    def _check_mixed_batch(self, input: torch.Tensor, names: list[str]) -> None:
        """Raise ValueError, with PEFT's words, where a batch cannot be shared by these adapters."""
        if len(input) != len(names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(names)} and {len(input)} respectively."
            )
        if any(is_sharded(adapter.A) for adapter in self._every_adapter()):
            raise ValueError("adapter_names: got some for a layer of tensor parallelism, which computes whole batches")
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )

    def _mixed_batch(self, input: torch.Tensor, names: list[str]) -> torch.Tensor:
        """Each row of the batch by the adapter that is named for it; a call for each name."""
        results: dict[str, tuple[list[int], torch.Tensor]] = {}
        for name in dict.fromkeys(names):
            rows = [row for row, of in enumerate(names) if of == name]
            adapters = self._adapters([name])
            alone = name == BASE or not adapters
            results[name] = rows, self._base(input[rows]) if alone else self._adapted(input[rows], adapters)
        order = torch.tensor([row for rows, _ in results.values() for row in rows]).argsort().to(input.device)
        return torch.cat([result for _, result in results.values()])[order]

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """ΔW of a named adapter, oriented like the base layer's weight."""
        (update,) = self._adapters([adapter])
        return update.delta_weight().t() if self.transposed else update.delta_weight()

    def check_merge(self, adapter_names: list[str] | None = None) -> None:
        """Raise ValueError where `merge` would meet numbers that are not finite, with PEFT's words and the reason."""
        weight = self.base_layer._parameters.get("weight")  # quantised layers of some libraries have none
        if weight is not None:
            check_gathered("weight", weight)
        for name in self.active_adapters if adapter_names is None else adapter_names:
            for adapter in self._adapters([name] if name not in self.merged_adapters else []):
                try:
                    adapter.check_merge_into(self._oriented_weight())
                except ValueError as error:
                    message = f"NaNs detected in the merged weights. The adapter {name} seems to be broken"
                    raise ValueError(f"{message}: {error}") from error

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write round(W0 + ΔW) of the named (by default the active) adapters into the base weight, block by block.

        W0 is kept in host memory for `unmerge`. Every merge is safe, whatever `safe_merge` says: ValueError, before
        anything is changed, where a factor or the merged weight is not finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.dual_adapter]
        if not names:
            return
        self.check_merge(names)
        if self._unmerged_weight is None:
            self._unmerged_weight = self.base_layer.weight.detach().to("cpu", copy=True)
        self._merge_into_base(names)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore W0 bit for bit."""
        if self._unmerged_weight is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        copy_into(self.base_layer.weight, self._unmerged_weight)
        self._unmerged_weight = None
        self.merged_adapters.clear()

    @torch.no_grad()
    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base layer, merged if asked, for PEFT's ``merge_and_unload`` and ``unload``. Keeps no copy of W0."""
        if self._is_split_by_itself():
            raise ValueError(
                "model: got a layer that parallelize_dual_lora has split, whose base layer cannot run alone; expected "
                "a whole one: save the adapter, and merge that into the base model"
            )
        if merge:
            names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.dual_adapter]
            self.check_merge(names)
            self._merge_into_base(names)
        base: nn.Module = self.base_layer
        return base

    def check_plain(self, dtype: torch.dtype | None, adapter_names: list[str] | None = None) -> None:
        """Raise ValueError where `plain` would meet numbers that are not finite."""
        for adapter in self._adapters(self.active_adapters if adapter_names is None else adapter_names):
            adapter.check_merge_into(self._oriented_weight(), dtype)

    def becomes_plain(self, dtype: torch.dtype | None) -> bool:
        """Whether merging in `dtype` takes another weight than the base layer's."""
        return dtype not in (None, self.base_layer.weight.dtype)

    @torch.no_grad()
    def plain(self, dtype: torch.dtype | None = None, adapter_names: list[str] | None = None) -> nn.Module:
        """A plain layer with round(W0 + ΔW) in `dtype` (default: W0's, which is fp32 for int8).

        For one adapter, in the dtype that the layer computed in, these are the weights that it trained with, bit for
        bit. Several are added one after the other, each rounded by itself.
        """
        adapters = self._adapters(self.active_adapters if adapter_names is None else adapter_names)
        base = self._oriented_weight()
        if adapters:
            weight = adapters[0].merged_with(base, dtype)
        else:
            weight = base.dequantised() if isinstance(base, QuantisedWeight) else base.detach()
            weight = weight if dtype is None else weight.to(dtype)
        for adapter in adapters[1:]:
            adapter.merge_into(weight)
        return self._in_place(weight).train(self.training)

    def _in_place(self, weight: torch.Tensor) -> nn.Module:
        """The plain layer with this weight [out_features, in_features]."""
        base: nn.Module = self.base_layer
        base.weight = nn.Parameter(weight.t().contiguous() if self.transposed else weight, requires_grad=False)
        return base

    def _merge_into_base(self, names: list[str]) -> None:
        for name in names:
            (adapter,) = self._adapters([name])
            weight = self._oriented_weight()
            assert isinstance(weight, torch.Tensor), "quantised layers merge in their own way"
            adapter.merge_into(weight.detach())
            self.merged_adapters.append(name)

    def _apply(self, fn: Any, recurse: bool = True) -> Linear:
        super()._apply(fn, recurse)
        if self._unmerged_weight is not None:
            self._unmerged_weight = self._unmerged_weight.to(self.base_layer.weight.dtype)
        return self

    def __repr__(self) -> str:
        return "dual_lora." + super().__repr__()
