"""The tuner: which layers of a model get adapters. PEFT's injection machinery does the rest."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, _maybe_include_all_linear_layers, onload_layer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, AuxiliaryTrainingWrapper
from torch import nn

from ..adaptable import why_not_adaptable
from ..config import ALL_LINEAR
from ..linear import dual_lora_layers
from ..model import check_not_distributed
from ..peft_files import PEFT_PREFIX
from ..quantised.layers import is_quantised
from ..quantised.models import dequantised_dtypes, forget_quantisation, report_compute_dtypes
from ..sharding import reshard
from ..targets import report_stacked_experts, why_not_suited
from ..validation import check_dtype
from .config import DualLoraConfig
from .layer import BASE, DualLoraLayer, Linear
from .quantised_layer import QuantisedLinear

_logger = logging.getLogger("dual_lora_kernels")


class DualLoraModel(BaseTuner):  # type: ignore[misc]  # mypy skips PEFT
    """A model with Dual LoRA adapters; ``get_peft_model`` makes it from a `DualLoraConfig`."""

    prefix: str = PEFT_PREFIX
    tuner_layer_cls = DualLoraLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _prepare_model(self, peft_config: DualLoraConfig, model: nn.Module) -> None:
        """Resolve ``"all-linear"`` as PEFT does, without the layers that cannot be adapted; the log names those.

        It also tells of an adapter that is to train without warm-up.
        """
        check_not_distributed(model)
        if next(dual_lora_layers(model), None) is not None:
            raise ValueError(
                f"model: got {type(model).__name__} with layers of apply_dual_lora, expected one without: call "
                "merge_dual_lora first"
            )
        if peft_config.warmup_steps == 0 and not peft_config.inference_mode:
            _logger.info(
                "no warm-up: the update's scale is full from the start, and training can collapse; set warmup_steps "
                "(20 to 50 are usual), or use DualLoraWarmupCallback"
            )
        targets = peft_config.target_modules
        if not isinstance(targets, str) or targets.lower() != ALL_LINEAR:
            return
        _maybe_include_all_linear_layers(peft_config, model)
        plain = {
            name: module
            for name in sorted(peft_config.target_modules or ())
            if not isinstance(module := model.get_submodule(name), DualLoraLayer)
        }
        refused = why_not_suited(model, plain)
        for name, reason in refused.items():
            _logger.info("left alone: %s (%s)", name, reason)
        peft_config.target_modules = set(peft_config.target_modules or ()) - refused.keys()
        if plain and not peft_config.target_modules:
            name, reason = next(iter(refused.items()))
            raise ValueError(
                f"target_modules: got {ALL_LINEAR!r}, but none of {len(refused)} linear layers can be adapted: "
                f"{name}: {reason}"
            )
        report_stacked_experts(model)

    def _create_and_replace(
        self,
        peft_config: DualLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        options = peft_config.layer_options(current_key)
        is_active = adapter_name in self.active_adapters
        if isinstance(target, Linear):
            layer = target
            layer.update_layer(adapter_name, options, inference_mode=peft_config.inference_mode)
        else:
            reason = why_not_adaptable(target)
            if reason is not None:
                raise ValueError(
                    f"Target module {target} is not supported: {reason}. {current_key!r} matches target_modules; "
                    "expected `torch.nn.Linear` or `transformers.pytorch_utils.Conv1D`, plain ones, or a quantised "
                    "layer that `dual_lora_kernels.quantised_weight` reads."
                )
            kind = QuantisedLinear if is_quantised(target) else Linear
            layer = kind(target, adapter_name, options).train(target.training)
            if not is_active:
                layer.requires_grad_(False)  # an additional adapter does not train before it is active
            self._replace_module(parent, target_name, layer, target)
        names = (name for name, config in self.peft_config.items() if config is peft_config and name != adapter_name)
        layer.begin(adapter_name, peft_config.warmup_steps, is_active, like=next(names, None))

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Put a layer in the place of another. The tuner's layers have put their adapters onto the right device."""
        setattr(parent, child_name, new_module)

    def _dual_lora_layers(self) -> Iterator[Linear]:
        return (module for module in self.model.modules() if isinstance(module, Linear))

    def _without_losses(self) -> list[tuple[str, QuantisedLinear]]:
        """The quantised layers by name, with the losses of earlier merges forgotten."""
        layers = [(name, module) for name, module in self.model.named_modules() if isinstance(module, QuantisedLinear)]
        for _, layer in layers:
            layer.losses.clear()
        return layers

    def _check_names(self, adapter_names: list[str] | None) -> None:
        """Raise ValueError for a name that no adapter has: merging would drop the adapters without it."""
        unknown = sorted(set(adapter_names or ()) - self.peft_config.keys())
        if unknown:
            raise ValueError(f"adapter_names: got {unknown}, expected some of {list(self.peft_config)}")

    def _check_mergeable(self, adapter_names: list[str] | None) -> None:
        """Raise ValueError where one layer could not be merged, before any is."""
        reshard(self.model)
        self._check_names(adapter_names)
        for layer in self._dual_lora_layers():
            with onload_layer(layer):
                layer.check_merge(adapter_names)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As in PEFT; nothing is merged where one layer cannot be."""
        self._check_mergeable(adapter_names)
        quantised = self._without_losses()
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)
        _warn_of_losses(quantised)

    def unmerge_adapter(self) -> None:
        """As in PEFT."""
        reshard(self.model)
        super().unmerge_adapter()

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._check_mergeable(adapter_names)
        quantised = self._without_losses()
        unloaded: nn.Module = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        if merge:
            _warn_of_losses(quantised)
        return unloaded

    def merge_and_dequantize(
        self, dtype: torch.dtype | None = None, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """The base model with every quantised layer as an ``nn.Linear``, the adapters merged exactly.

        `dtype`: of the dequantised weights; by default that of the model's configuration if transformers quantised it,
        else W0's (fp32 for int8). Where the layers computed in it, the merged weights are those that they trained with,
        bit for bit; ``merge_and_unload`` quantises them anew instead, and warns of what that loses. Other parameters
        follow as in `merge_dual_lora`. Raises ValueError as ``merge_and_unload`` does, and TypeError for another dtype
        than the package computes with, before anything is changed.
        """
        if dtype is not None:
            check_dtype("dtype", dtype)
        self._check_names(adapter_names)
        around = dequantised_dtypes(self.model, dtype)

        def dtype_of(layer: Linear) -> torch.dtype | None:
            return around.get(id(layer), dtype if isinstance(layer, QuantisedLinear) else None)

        layers = [(name, module) for name, module in self.model.named_modules() if isinstance(module, Linear)]
        for name, layer in layers:
            if layer.merged:
                raise ValueError("model: got one with merged adapters, expected unmerged ones: call unmerge_adapter()")
            with onload_layer(layer):
                try:
                    layer.check_plain(dtype_of(layer), adapter_names)
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from None
        quantised = [layer for _, layer in layers if isinstance(layer, QuantisedLinear)]
        report_compute_dtypes((layer.base_layer, dtype_of(layer)) for layer in quantised)
        plain: dict[int, nn.Module] = {}
        for name, module in list(self.model.named_modules(remove_duplicate=False)):
            if isinstance(module, Linear) and module.becomes_plain(dtype_of(module)):
                if id(module) not in plain:
                    with onload_layer(module):
                        plain[id(module)] = module.plain(dtype_of(module), adapter_names)
                self.model.set_submodule(name, plain[id(module)])
        unloaded: nn.Module = super()._unload_and_optionally_merge(True, False, False, adapter_names)
        forget_quantisation(unloaded, dtype)
        return unloaded

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused: a sum of updates is no Dual LoRA update of the same ranks."""
        raise NotImplementedError(
            "add_weighted_adapter: ΔW = s · ReLU(B A) ⊙ Sign(D C) is not linear in its factors, so adapters cannot be "
            "combined into one; activate several with base_model.set_adapter([...]), or merge them one after the other"
        )

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT's way of passing ``adapter_names``, an adapter for each row of the batch, to the layers."""
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        known = {name for layer in self._dual_lora_layers() for name in layer.dual_adapter}
        unknown = sorted(set(names) - known - {BASE})
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        beams = kwargs.get("num_beams") or 1
        repeated = [name for name in names for _ in range(beams)]
        encoder = self.model.get_encoder() if beams > 1 and hasattr(self.model, "get_encoder") else None
        in_encoder = set() if encoder is None or encoder is self.model else set(encoder.modules())
        with ExitStack() as hooks:
            for module in self.modules():
                if isinstance(module, DualLoraLayer | AuxiliaryTrainingWrapper):
                    own = names if module in in_encoder else repeated  # the encoder runs once for all beams
                    hook = partial(_pass_adapter_names, adapter_names=own)
                    hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            yield


def _warn_of_losses(layers: Sequence[tuple[str, QuantisedLinear]]) -> None:
    """Warn, once for all layers, of what quantising merged weights anew has left of the update."""
    losses = [(loss, name) for name, layer in layers for loss in layer.losses.values()]
    if losses:
        worst, name = max(losses, key=lambda each: each[0].error)
        kinds = ", ".join(sorted({type(layer.base_layer).__name__ for _, layer in layers}))
        warnings.warn(
            f"Merging has quantised {len(losses)} weights anew ({kinds}), so the model may generate something else. At "
            f"worst, in {name}, {worst}. merge_and_dequantize() keeps the weights that training computed with.",
            stacklevel=3,
        )


def _pass_adapter_names(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], adapter_names: list[str]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, kwargs | {"adapter_names": adapter_names}
