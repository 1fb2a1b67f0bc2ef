"""Adapting a whole model, and turning it back into plain linear layers."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from .adaptable import is_linear, linear_features
from .adapter import dual_lora_adapters, unwrapped
from .adapter_state import mark_as_saved, saved_modules
from .config import ALL_LINEAR, DualLoraConfig
from .hooks import move_hook
from .linear import DualLoraLinear, dual_lora_layers, layers_to
from .pretrained import save_adapters_by_save_pretrained, save_models_by_save_pretrained
from .quantised.layers import is_quantised
from .quantised.models import dequantised_dtypes, forget_quantisation, let_trainer_train, report_compute_dtypes
from .quantised_linear import QuantisedDualLoraLinear
from .sharding import described, is_sharded, reshard
from .targets import find_targets, find_whole, report_stacked_experts, shared_weights
from .validation import check_dtype, check_fraction

_logger = logging.getLogger("dual_lora_kernels")


def apply_dual_lora(model: nn.Module, config: DualLoraConfig) -> nn.Module:
    """Replace the layers that `config` names by `DualLoraLinear` in place, freeze the rest, and return `model`.

    The new layers share the base weights of the layers that they replace; nothing is copied. The package's logger says
    which layers were matched. From now on ``save_pretrained`` of `model`, if it is one of transformers', and of such
    models within it saves the adapter, as in PEFT. Give the outermost model: one around it would save its whole state.

    Raises:
        ValueError: `config` matches no layer, one of its names matches none, or a layer that it names cannot be
            adapted; the model already has layers of Dual LoRA or PEFT, has parameters without a shape, is in the hands
            of a distributed engine, or is a linear layer itself; a module to be trained whole is tied to another.
            Nothing has been changed then.
        TypeError: `config` is no `DualLoraConfig` of this package's (PEFT's are for ``get_peft_model``).
    """
    if not isinstance(config, DualLoraConfig):
        raise TypeError(
            f"config: got {type(config).__module__}.{type(config).__name__}, expected dual_lora_kernels.DualLoraConfig("
            "r1=…, r2=…, alpha=…, target_modules=…); configurations of PEFT are for get_peft_model"
        )
    if next(dual_lora_layers(model), None) is not None:
        raise ValueError(
            f"model: got {type(model).__name__} with Dual LoRA layers, expected one without; merge them first"
        )
    if is_linear(model):
        raise ValueError("model: got a linear layer itself, expected a model; use DualLoraLinear.from_linear")
    check_not_distributed(model)
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ValueError(f"model: {name} has no shape yet, expected an initialised model: run it once first")
    whole = find_whole(unwrapped(model), config.modules_to_save)
    chosen, refused = find_targets(unwrapped(model), config.target_modules, config.exclude_modules, whole)
    adapt(model, {name: (module, config) for name, module in chosen.items()}, list(whole.values()))
    _report(model, list(chosen), list(whole), refused)
    if config.target_modules == ALL_LINEAR:
        report_stacked_experts(unwrapped(model))
    return model


def check_not_distributed(model: nn.Module) -> None:
    """Raise ValueError for a model that an engine has taken over, which would not know of factors that come later."""
    for name, module in model.named_modules():
        wrapper = next((kind.__name__ for kind in type(module).__mro__ if kind.__name__ in _ENGINES), None)
        if wrapper is not None:
            raise ValueError(
                f"model: got {name or 'a model'} in the hands of {_ENGINES[wrapper]}, expected one that is not yet: it "
                "would neither synchronise nor shard factors that come later. Adapt the model first"
            )


_ENGINES = {
    "DistributedDataParallel": "DistributedDataParallel",
    "FullyShardedDataParallel": "FullyShardedDataParallel",
    "FSDPModule": "fully_shard",
    "DeepSpeedEngine": "DeepSpeed",
}
"""Classes of modules that engines wrap or turn into theirs, and what people call these engines."""


def adapt(
    model: nn.Module, chosen: dict[str, tuple[nn.Module, DualLoraConfig]], whole: Sequence[nn.Module] = ()
) -> None:
    """Replace each chosen layer by an adapted one, and freeze everything but the adapters and the modules in `whole`.

    Every layer is built before the first one is replaced.
    """
    built: dict[int, DualLoraLinear] = {}
    for module, config in chosen.values():
        if id(module) not in built:
            built[id(module)] = DualLoraLinear.from_linear(module, **config.layer_options())
    model.requires_grad_(False)
    _replace(model, built)
    for module in whole:
        mark_as_saved(module)
    save_adapters_by_save_pretrained(model)
    let_trainer_train(model)


def _replace(model: nn.Module, new: Mapping[int, nn.Module]) -> None:
    """Replace modules, found by identity, under every name that the model has for them."""
    inner = unwrapped(model)
    for name, module in list(inner.named_modules(remove_duplicate=False)):
        if id(module) in new:
            parent, _, last = name.rpartition(".")
            setattr(inner.get_submodule(parent), last, new[id(module)])


def set_gradient_columns(model: nn.Module, fraction: float) -> None:
    """Estimate the factors' gradients from this part of the columns, in every Dual LoRA layer of either door.

    With 1 they are exact: for the last steps of a run, say. Raises ValueError or TypeError unless 0 < `fraction` <= 1,
    and ValueError where the model has no Dual LoRA layers.
    """
    fraction = check_fraction("fraction", fraction)
    adapters = [adapter for _, adapter in dual_lora_adapters(model)]
    if not adapters:
        raise ValueError(f"model: got {type(model).__name__} without Dual LoRA layers, expected an adapted model")
    for adapter in adapters:
        adapter.gradient_columns = fraction
    for config in getattr(unwrapped(model), "peft_config", {}).values():  # what PEFT saves
        if hasattr(config, "gradient_columns"):
            config.gradient_columns = fraction


def merge_dual_lora(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Replace every `DualLoraLinear` in place by a plain layer with the merged weight, and return `model`.

    The plain layer is an ``nn.Linear``, or transformers' Conv1D where one was adapted. The state dict therefore has the
    names and shapes of the original model's. Weights are merged in their own storage, block by block. A weight that
    shares memory with another tensor of the model is copied first, so no other tensor changes. A layer that is merged
    already keeps its merged weight, and tensors that share its memory get their own values back. Merged weights require
    a gradient only if they did before.

    A quantised layer becomes an ``nn.Linear`` with round(W0 + ΔW) in `dtype`: by default the one of the model's
    configuration if transformers quantised it, else W0's (fp32 for int8). Where that is the dtype that the layer
    computed in, these are the weights that it trained with, bit for bit. In a model that transformers quantised, layers
    without an adapter are dequantised as well, all other parameters get the same dtype (a warning names those that this
    rounds), and the model forgets that it was quantised. Elsewhere dense layers keep their dtype.

    Raises:
        ValueError: the model has no Dual LoRA layers, or sharded ones; an adapter, a scale or a merged weight would not
            be finite. Nothing has been changed.
        TypeError: `dtype` is not one that the package computes with.
    """
    if isinstance(model, DualLoraLinear):
        raise ValueError("model: got a DualLoraLinear itself, expected a model; use its to_linear()")
    reshard(model)
    layers = layers_to("merge", model, "merge_and_unload(), and merge_and_dequantize() for quantised models")
    if dtype is not None:
        check_dtype("dtype", dtype)
    for name, layer in layers:
        if not isinstance(layer, QuantisedDualLoraLinear) and is_sharded(layer.weight):
            raise ValueError(
                f"model: got {name} with a sharded weight ({described(layer.weight)}), expected whole ones: "
                "dual_lora_kernels.distributed.save_merged writes a merged model from its parts"
            )
    around = dequantised_dtypes(unwrapped(model), dtype)  # dense layers elsewhere keep their dtype
    quantised = [layer for _, layer in layers if isinstance(layer, QuantisedDualLoraLinear)]
    for name, layer in layers:
        try:
            own = dtype if isinstance(layer, QuantisedDualLoraLinear) else None
            layer.check_mergeable(around.get(id(layer), own))
        except ValueError as error:
            raise ValueError(f"{name}.{error}") from None
    tied = shared_weights(model)
    # All are copied before the first is merged or unmerged, which may change another's.
    dense = [layer for _, layer in layers if not isinstance(layer, QuantisedDualLoraLinear)]
    weights = [_copied(layer.weight) if id(layer.weight) in tied else layer.weight for layer in dense]
    plain: dict[int, nn.Module] = {}
    for layer, weight in zip(dense, weights, strict=True):
        other = around.get(id(layer))
        if not layer.merged and other not in (None, weight.dtype):  # cast up for training in a quantised model
            weight = _merged_in(layer, weight, other)
        elif not layer.merged:
            layer.merge_into(weight.detach().t() if layer.transposed else weight.detach())
        elif weight is not layer.weight:
            layer.unmerge()
        plain[id(layer)] = _plain(layer, weight)
    _replace(model, plain)
    for layer in quantised:  # one after the other: each new weight is several times as large as the one it replaces
        _replace(model, {id(layer): layer.to_plain(around.get(id(layer), dtype))})
    if quantised:
        report_compute_dtypes((layer.base_layer, around.get(id(layer), dtype)) for layer in quantised)
        forget_quantisation(model, dtype)
    for _, module in list(saved_modules(model)):
        mark_as_saved(module, False)
    save_models_by_save_pretrained(model)
    return model


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[nn.Module]:
    """Within this ``with`` block, every Dual LoRA layer of `model` computes as its base layer does.

    This is for the reference logits of DPO and the like. Merged layers are unmerged meanwhile. Modules that
    `DualLoraConfig.modules_to_save` names were trained in place, and stay as they are. A model that PEFT adapted has
    ``disable_adapter()`` itself. Raises ValueError where the model has no Dual LoRA layers.
    """
    layers = [layer for _, layer in layers_to("disable", model, "disable_adapter()")]
    merged = [layer for layer in layers if layer.merged]
    were_enabled = [layer.enabled for layer in layers]
    for layer in merged:
        layer.unmerge()
    for layer in layers:
        layer.enabled = False
    try:
        yield model
    finally:
        for layer, enabled in zip(layers, were_enabled, strict=True):
            layer.enabled = enabled
        for layer in merged:
            layer.merge()


@contextmanager
def prepared(model: nn.Module) -> Iterator[nn.Module]:
    """Within this ``with`` block, every Dual LoRA layer of `model` keeps W in memory: see `DualLoraLinear.prepare`.

    This is for generating text from an adapter that stays as it is: a token then takes the base model's time, at the
    price of a second copy of the adapted weights. Layers that are merged, or prepared already, stay as they are. Raises
    ValueError where the model has no Dual LoRA layers.
    """
    own = layers_to("prepare", model, "merge_adapter(), which unmerge_adapter() takes back exactly")
    layers = [layer for _, layer in own if not (layer.merged or layer.prepared)]
    around = dequantised_dtypes(unwrapped(model), None)
    try:
        for layer in layers:
            if isinstance(layer, QuantisedDualLoraLinear):
                layer.prepare(around.get(id(layer)))
            else:
                layer.prepare()
        yield model
    finally:
        for layer in layers:
            layer.release()


def _copied(weight: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)


def _merged_in(layer: DualLoraLinear, weight: nn.Parameter, dtype: torch.dtype | None) -> nn.Parameter:
    """round(W0 + ΔW) in another dtype than W0's, rounded once, oriented like `weight`."""
    own = weight.detach()
    merged = layer.merged_with(own.t() if layer.transposed else own, dtype)
    return nn.Parameter(merged.t().contiguous() if layer.transposed else merged, requires_grad=weight.requires_grad)


def _plain(layer: DualLoraLinear, weight: nn.Parameter) -> nn.Module:
    """A plain layer of `layer`'s kind, with this weight, which is oriented like `layer`'s, and with `layer`'s bias."""
    if layer.transposed:
        from transformers.pytorch_utils import Conv1D  # the layer came from there

        with torch.device("meta"):
            plain: nn.Module = Conv1D(layer.out_features, layer.in_features)
    else:
        plain = nn.Linear(layer.in_features, layer.out_features, device="meta")
    plain.register_parameter("weight", weight)
    plain.register_parameter("bias", layer.bias)
    move_hook(layer.hooked, plain)
    return plain.train(layer.training)


def _report(model: nn.Module, names: list[str], whole: list[str], refused: dict[str, str]) -> None:
    kinds = Counter(name.rpartition(".")[2] for name in names)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    for module in filter(is_quantised, model.modules()):  # whose parameters count bytes
        own = sum(p.numel() for name, p in module.named_parameters(recurse=False) if name == "weight")
        total += math.prod(linear_features(module)) - own
    left = "; ".join(f"{name} ({reason})" for name, reason in refused.items())
    _logger.info(
        "adapted %d layers: %s; %s of %s parameters train (%.2f %%)%s%s",
        len(names),
        ", ".join(f"{kind} x {count}" for kind, count in kinds.items()),
        f"{trainable:,}",
        f"{total:,}",
        100 * trainable / total,
        f"; trained whole and saved: {', '.join(whole)}" if whole else "",
        f"; left alone: {left}" if left else "",
    )
