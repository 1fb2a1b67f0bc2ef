"""Saving and loading the adapter alone: factors, scales and settings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import adapter_files
from ._logging import logger
from .adapter_files import SETTINGS_FILE, WEIGHTS_FILE
from .config import DualLoraConfig
from .linear import (
    FACTOR_NAMES,
    DualLoraLinear,
    dual_lora_layers,
    factor_shapes,
    linear_features,
    unwrapped,
    why_not_adaptable,
)
from .model import adapt
from .validation import SUPPORTED_DTYPES, check_finite

__all__ = [
    "SETTINGS_FILE",
    "WEIGHTS_FILE",
    "dual_lora_state_dict",
    "load_dual_lora",
    "load_dual_lora_state_dict",
    "save_dual_lora",
]

_FORMAT = 1
_SAVED_TENSORS = (*FACTOR_NAMES, "scale")
_SAVED_SETTINGS = ("r1", "r2", "alpha", "init_std", "ste", "rounding", "clip_bound")


def dual_lora_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The adapters' tensors alone: ``<layer>.A``, ``.B``, ``.C``, ``.D`` and ``.scale``, detached, not copied.

    Raises ValueError where the model has no Dual LoRA layers.
    """
    state = {
        f"{name}.{tensor}": getattr(layer, tensor).detach()
        for name, layer in dual_lora_layers(model)
        for tensor in _SAVED_TENSORS
    }
    if not state:
        raise ValueError(f"model: got {type(model).__name__} without Dual LoRA layers, expected some to save")
    return state


@torch.no_grad()
def load_dual_lora_state_dict(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Load what `dual_lora_state_dict` returned into a model with the same Dual LoRA layers.

    Values are cast to the dtype and moved to the device of the model's own tensors; those on the meta device get
    storage on the CPU, where a copy would vanish.

    Raises ValueError for missing or unexpected names, shapes (ranks) that differ, tensors that are not floating-point,
    and values that are not finite in the model's dtype, before anything is changed.
    """
    own = dual_lora_state_dict(model)
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unexpected:
        raise ValueError(
            f"state: missing {missing[:4]}, unexpected {unexpected[:4]}; expected the model's {len(own)} names"
        )
    for name, tensor in own.items():
        _check_tensor(f"state[{name!r}]", state[name], tuple(tensor.shape), tensor.dtype)
    for name, layer in dual_lora_layers(model):
        if layer.merged:
            raise ValueError(f"model: {name} is merged, expected unmerged layers: call unmerge() before loading")
    for name, layer in dual_lora_layers(model):
        for tensor_name in _SAVED_TENSORS:
            _assign(layer, tensor_name, state[f"{name}.{tensor_name}"])


def _assign(layer: DualLoraLinear, name: str, value: torch.Tensor) -> None:
    own = getattr(layer, name)
    if not own.is_meta:
        own.copy_(value)
        return
    real = value.to(device="cpu", dtype=own.dtype, copy=True)
    setattr(layer, name, real if name == "scale" else nn.Parameter(real, requires_grad=own.requires_grad))


def save_dual_lora(model: nn.Module, folder: str | Path) -> Path:
    """Write the adapters of `model` into `folder` (made if need be) and return it.

    ``dual_lora_model.safetensors`` has `dual_lora_state_dict` and, in its metadata, each layer's settings: all that
    loading needs, in one file that is replaced in one atomic step, so that a crash or another process at work leaves
    one whole adapter or the other. ``dual_lora_config.json`` repeats the settings for people. What else trains (a bias,
    a head) is not saved, which is said on the package's logger.

    Raises ValueError where the model has no Dual LoRA layers or a value is not finite, NotADirectoryError where
    `folder` is a file, and OSError where it cannot be written; an adapter that was there before is untouched then.
    """
    folder = Path(folder)
    state = {name: tensor.contiguous() for name, tensor in dual_lora_state_dict(model).items()}
    for name, tensor in state.items():
        if tensor.is_meta:
            raise ValueError(f"model: {name} is on the meta device, expected an adapter with values")
        check_finite(name, tensor)
    adapter = {id(getattr(layer, name)) for _, layer in dual_lora_layers(model) for name in FACTOR_NAMES}
    others = [name for name, p in unwrapped(model).named_parameters() if p.requires_grad and id(p) not in adapter]
    if others:
        logger.warning("%d trainable parameters are no adapter's and are not saved: %s …", len(others), others[0])
    settings = {"format": _FORMAT, "layers": {name: _settings(layer) for name, layer in dual_lora_layers(model)}}
    adapter_files.write(folder, state, settings)
    return folder


def load_dual_lora(model: nn.Module, folder: str | Path) -> nn.Module:
    """Load an adapter that `save_dual_lora` wrote and return `model`.

    A plain model is adapted first, in place, with the saved settings; one that has Dual LoRA layers must have the same
    ones with the same ranks, and keeps its own settings. In a model on the meta device (accelerate's
    ``init_empty_weights``) the adapters get storage on the CPU at once, and the base can be loaded afterwards.

    Raises:
        FileNotFoundError: `folder` holds no saved adapter.
        ValueError: the file is damaged or of a newer format, or does not fit the model. Nothing has been changed then.
    """
    settings, state = adapter_files.read(Path(folder))
    configs = _configs(settings)
    if next(dual_lora_layers(model), None) is None:
        modules = dict(unwrapped(model).named_modules())
        chosen = {}
        for name, config in configs.items():
            module = modules.get(name)
            reason = "the model has no such layer" if module is None else why_not_adaptable(module)
            if module is None or reason is not None:
                raise ValueError(f"folder: the saved adapter has a layer {name!r}, which does not fit: {reason}")
            chosen[name] = (module, config)
        _check_against_model(chosen, state)
        adapt(model, chosen)
    load_dual_lora_state_dict(model, state)
    logger.info("loaded %d layers from %s", len(configs), folder)
    return model


def _settings(layer: DualLoraLinear) -> dict[str, Any]:
    dtype = str(layer.A.dtype).removeprefix("torch.")
    return {name: getattr(layer, name) for name in _SAVED_SETTINGS} | {
        "dropout": layer.dropout.p,
        "adapter_dtype": dtype,
    }


def _configs(settings: Any) -> dict[str, DualLoraConfig]:
    """Each saved layer's configuration by name."""
    try:
        if settings["format"] > _FORMAT:
            raise ValueError(f"format {settings['format']} is newer than this version reads ({_FORMAT})")
        return {
            name: DualLoraConfig(**layer | {"adapter_dtype": getattr(torch, layer["adapter_dtype"])})
            for name, layer in settings["layers"].items()
        }
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"folder: the settings in {WEIGHTS_FILE} cannot be read: {error}") from error


def _check_against_model(
    chosen: Mapping[str, tuple[nn.Module, DualLoraConfig]], state: Mapping[str, torch.Tensor]
) -> None:
    """Raise ValueError unless the saved tensors are those that adapting the chosen layers would make."""
    expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for name, (module, config) in chosen.items():
        dtype = config.adapter_dtype or torch.float32
        shapes = factor_shapes(*linear_features(module), config.r1, config.r2)
        expected |= {f"{name}.{tensor}": (shape, dtype) for tensor, shape in shapes.items()}
        expected[f"{name}.scale"] = (), torch.float32
    if expected.keys() != state.keys():
        raise ValueError(
            f"folder: the tensors and the settings in {WEIGHTS_FILE} name different tensors: "
            f"{sorted(expected.keys() ^ state.keys())[:4]}"
        )
    for name, (shape, dtype) in expected.items():
        _check_tensor(f"folder: {name}", state[name], shape, dtype)


def _check_tensor(where: str, value: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raise ValueError unless a saved tensor has `shape` and stays finite in `dtype`."""
    if tuple(value.shape) != shape:
        raise ValueError(
            f"{where}: got shape {tuple(value.shape)}, expected {shape}: "
            "the adapter was trained with other ranks or for another model"
        )
    if value.dtype not in SUPPORTED_DTYPES:
        raise ValueError(f"{where}: got {value.dtype}, expected one of {', '.join(map(str, SUPPORTED_DTYPES))}")
    check_finite(where, value)
    if value.dtype != dtype:
        check_finite(f"{where} as {dtype}", value.to(dtype))
