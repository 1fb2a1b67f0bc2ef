"""Saving and loading the adapter without its base model, as files and as a state dict."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from . import automatic_warmup
from .adaptable import linear_features, why_not_adaptable
from .adapter import FACTOR_NAMES, dual_lora_adapters, factor_shapes, plain_modules, plain_name, unwrapped
from .adapter_files import Adapter, write_adapter
from .adapter_state import SAVED_TENSORS, adapter_of, adapter_tensors, check_value, saved_modules
from .config import DualLoraConfig
from .linear import dual_lora_layers, layers_to
from .model import adapt, check_not_distributed
from .peft_files import PEFT_CONFIG_FILE
from .saved_adapter import open_adapter
from .sharding import check_gathered, copy_into, full, in_first, reshard
from .targets import refuse_tied
from .validation import check_tensor

_logger = logging.getLogger("dual_lora_kernels")


class _Slot(NamedTuple):
    """What a model has for a saved tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def load_dual_lora_state_dict(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Load what `dual_lora_state_dict` returned into a model with the same Dual LoRA layers.

    Values are cast to the dtype and moved to the device of the model's own tensors. Tensors on the meta device
    (accelerate's ``init_empty_weights``) are replaced by new parameters with the loaded values. These are created on
    the device of the layer's weight, or on the CPU if the weight is on the meta device too.

    Raises:
        ValueError: missing or unexpected names; shapes (ranks) that differ; values that are not floating-point, not
            finite, beyond the range of the model's dtype, or on the meta device; a layer that is merged or that
            accelerate has offloaded. Nothing has been changed then.
        TypeError: a value is no tensor.
    """
    _check_layers(model)
    _check_state("state", _slots(model), state)
    _fill(model, state)


def save_dual_lora(model: nn.Module, folder: str | Path) -> Path:
    """Write the adapters of `model` into `folder` (made if need be) and return it.

    ``dual_lora_model.safetensors`` holds all that loading needs: the tensors of `dual_lora_state_dict`, and in its
    metadata the settings of each layer. It replaces an older file in one step and is flushed to disk. Whatever happens
    to the process or the machine, and whoever reads or saves at the same time, the folder holds either the old adapter
    or the new one, and never a part of one. ``dual_lora_config.json`` repeats the settings for people to read. Loading
    ignores changes that are made there, with a warning.

    Both files get the permissions that the umask leaves. Where one of them or `folder` itself is a symbolic link, a
    file or folder takes the link's place, and what it pointed to (a cache, say) stays as it was; a folder does so in
    two steps. A process that is killed can leave a hidden ``.tmp`` file, which the next save into the folder removes.

    Modules that `DualLoraConfig.modules_to_save` names are saved whole. What else trains (a bias, say) is not saved,
    which is said on the package's logger; nor is the count of averaged steps of an ``AveragedModel``.

    Raises:
        ValueError: `model` has no Dual LoRA layers, or a factor or scale is not finite or has no values (on the meta
            device); `folder` holds an adapter in PEFT's files, from which it could not be told.
        OSError: `folder` is a file, or cannot be written (permissions, a full disk).

    What was saved before is still there, unchanged, after an error; or the new adapter is, whole, where only its JSON
    file or the last flush failed.
    """
    folder = Path(folder)
    adapter = adapter_of(model)
    saved = {id(getattr(layer, name)) for _, layer in dual_lora_layers(model) for name in FACTOR_NAMES}
    saved |= {id(parameter) for _, module in saved_modules(model) for parameter in module.parameters()}
    others = [name for name, p in unwrapped(model).named_parameters() if p.requires_grad and id(p) not in saved]
    if others:
        _logger.warning("%d trainable parameters are no adapter's and are not saved: %s …", len(others), others[0])
    in_first(adapter_tensors(model).values(), lambda: _write(folder, adapter))
    return folder


def _write(folder: Path, adapter: Adapter) -> None:
    if os.path.exists(folder / PEFT_CONFIG_FILE):  # False too where that cannot be known
        raise ValueError(
            f"folder: got {str(folder)!r}, which holds an adapter in PEFT's files, expected another folder"
        )
    write_adapter(folder, adapter)


def load_dual_lora(model: nn.Module, folder: str | Path) -> nn.Module:
    """Load an adapter that `save_dual_lora`, ``save_pretrained`` or PEFT wrote and return `model`.

    A plain model is first adapted in place, with the saved settings. A model that already has Dual LoRA layers must
    have the same layers with the same ranks. It keeps its own settings, and the log says if these compute something
    else than the saved ones.

    A model on the meta device (accelerate's ``init_empty_weights``) gets the adapter's values on the CPU, under a base
    that stays empty: load the adapter first, then the base by accelerate's ``load_checkpoint_and_dispatch``. With
    ``to_empty``, load the adapter afterwards, since that drops the values of every parameter.

    Raises:
        FileNotFoundError: `folder` holds no saved adapter.
        ValueError: the folder holds an adapter in each format; the files are damaged or of another format, or do not
            fit the model (a module saved whole is tied to another in it, say), or hold values that
            `load_dual_lora_state_dict` refuses. Nothing has been changed then.
    """
    folder = Path(folder)
    adapter = open_adapter(folder)
    adapter = adapter._replace(state=dict(adapter.state))  # each tensor is read once
    if next(dual_lora_layers(model), None) is None:
        if next(dual_lora_adapters(model), None) is not None:
            layers_to("load into", model, "load_adapter()")
        check_not_distributed(model)
        chosen = _saved_layers(model, adapter.configs)
        whole = _modules_saved_whole(model, adapter.modules_to_save)
        slots = _slots_after_adapting(chosen)
        for name, module in whole.items():
            slots |= {f"{name}.{plain_name(key)}": _slot(tensor) for key, tensor in module.state_dict().items()}
        _check_state("folder", slots, adapter.state)
        adapt(model, chosen, list(whole.values()))
    else:
        _check_layers(model)
        _check_state("folder", _slots(model), adapter.state)
        _report_other_settings(model, adapter.configs)
    _fill(model, adapter.state)
    _logger.info("loaded %d layers from %s", len(adapter.configs), folder)
    return model


def _modules_saved_whole(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """The modules of a plain model that a saved adapter has whole. Raises ValueError if there is none of that name."""
    modules = dict(plain_modules(model))
    for name in names:
        if name not in modules:
            raise ValueError(f"folder: the saved adapter has a module {name!r}, which the model does not have")
    whole = {name: modules[name] for name in names}
    refuse_tied("folder", unwrapped(model), whole)
    return whole


def _saved_layers(
    model: nn.Module, configs: Mapping[str, DualLoraConfig]
) -> dict[str, tuple[nn.Module, DualLoraConfig]]:
    """The layers of a plain model that a saved adapter is for. Raises ValueError if one of them cannot be adapted."""
    modules = {name: module for name, module in plain_modules(model) if name}
    chosen = {}
    for name, config in configs.items():
        module = modules.get(name)
        reason = "the model has no such layer" if module is None else why_not_adaptable(module)
        if module is None or reason is not None:
            raise ValueError(f"folder: the saved adapter has a layer {name!r}, which does not fit: {reason}")
        chosen[name] = (module, config)
    return chosen


def _slots(model: nn.Module) -> dict[str, _Slot]:
    """By the names of `dual_lora_state_dict`."""
    return {name: _slot(tensor) for name, tensor in adapter_tensors(model).items()}


def _slot(tensor: torch.Tensor) -> _Slot:
    return _Slot(tuple(tensor.shape), tensor.dtype)


def _slots_after_adapting(chosen: Mapping[str, tuple[nn.Module, DualLoraConfig]]) -> dict[str, _Slot]:
    """`_slots` of the model that adapting the chosen layers would make."""
    slots: dict[str, _Slot] = {}
    for name, (module, config) in chosen.items():
        assert config.adapter_dtype is not None  # it is saved
        shapes = factor_shapes(*linear_features(module), config.r1, config.r2)
        slots |= {f"{name}.{factor}": _Slot(shape, config.adapter_dtype) for factor, shape in shapes.items()}
        slots[f"{name}.scale"] = _Slot((), torch.float32)
    return slots


def _check_layers(model: nn.Module) -> None:
    """Raise ValueError where values put into an adapted layer would not be those that it computes with."""
    reshard(model)
    for name, layer in dual_lora_layers(model):
        if layer.merged:
            raise ValueError(f"model: {name} is merged, expected unmerged layers: call unmerge() before loading")
        for factor in FACTOR_NAMES:
            check_gathered(f"model: {name}.{factor}", getattr(layer, factor), 2)
        if layer.A.is_meta and hasattr(layer, "_hf_hook"):
            raise ValueError(
                f"model: {name} is offloaded by accelerate, whose hooks would put the old values back; expected one "
                "without such hooks: load the adapter before dispatching the model"
            )


def _check_state(argument: str, slots: Mapping[str, _Slot], state: Mapping[str, torch.Tensor]) -> None:
    """Raise ValueError or TypeError unless `state` has values for exactly these slots."""
    missing, unexpected = sorted(slots.keys() - state.keys()), sorted(state.keys() - slots.keys())
    if missing or unexpected:
        raise ValueError(
            f"{argument}: missing {missing[:4]}, unexpected {unexpected[:4]}; expected the model's {len(slots)} names"
        )
    for name, (shape, dtype) in slots.items():
        value = state[name]
        check_tensor(f"{argument}[{name!r}]", value)
        if tuple(value.shape) != shape:
            raise ValueError(
                f"{argument}: {name} has shape {tuple(value.shape)}, expected {shape}: "
                "the adapter was trained with other ranks or for another model"
            )
        check_value(argument, name, full(value), dtype)


@torch.no_grad()
def _fill(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Put values that fit into the adapted layers of `model`."""
    for name, layer in dual_lora_layers(model):
        for tensor in SAVED_TENSORS:
            _put(layer, tensor, state[f"{name}.{tensor}"], layer.base_device())
        automatic_warmup.resume(layer)
    for name, module in saved_modules(model):
        for key in module.state_dict():
            owner, _, last = key.rpartition(".")
            _put(module.get_submodule(owner), last, state[f"{name}.{plain_name(key)}"], "cpu")


def _put(module: nn.Module, name: str, value: torch.Tensor, device: torch.device | str) -> None:
    """Give a tensor of `module` new values; one on the meta device is replaced by one on `device`."""
    own: torch.Tensor = getattr(module, name)
    if not own.is_meta:
        copy_into(own, value)
        return
    real = value.to(device, own.dtype, copy=True)
    # Not setattr, which init_empty_weights makes move the values to the meta device again.
    if name in module._parameters:
        module._parameters[name] = nn.Parameter(real, requires_grad=own.requires_grad)
    else:
        module._buffers[name] = real


def _report_other_settings(model: nn.Module, configs: Mapping[str, DualLoraConfig]) -> None:
    """Log where the settings of an adapted model compute something else than the saved ones."""
    different = [
        f"{name} has {field} {own!r}, saved was {saved!r}"
        for name, layer in dual_lora_layers(model)
        if name in configs
        for field in ("alpha", "ste", "rounding", "clip_bound")
        if (own := getattr(layer, field)) != (saved := getattr(configs[name], field))
    ]
    if different:
        _logger.warning("the model keeps settings that differ from the adapter's: %s …", different[0])
