"""Saving and loading the adapter alone: a safetensors file of factors and scales, and a JSON file of settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ._logging import logger
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
from .validation import check_finite

SETTINGS_FILE = "dual_lora_config.json"
WEIGHTS_FILE = "dual_lora_model.safetensors"
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

    Raises ValueError for missing or unexpected names and for shapes (ranks) that differ, before anything is changed.
    Values are cast to the dtype and moved to the device of the model's own tensors.
    """
    own = dual_lora_state_dict(model)
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unexpected:
        raise ValueError(
            f"state: missing {missing[:4]}, unexpected {unexpected[:4]}; expected the model's {len(own)} names"
        )
    for name, tensor in own.items():
        if state[name].shape != tensor.shape:
            raise ValueError(
                f"state[{name!r}]: got shape {tuple(state[name].shape)}, expected {tuple(tensor.shape)}: "
                "the adapter was trained with other ranks or for another model"
            )
        check_finite(f"state[{name!r}]", state[name])
    for name, layer in dual_lora_layers(model):
        if layer.merged:
            raise ValueError(f"model: {name} is merged, expected unmerged layers: call unmerge() before loading")
    for name, tensor in own.items():
        tensor.copy_(state[name])


def save_dual_lora(model: nn.Module, folder: str | Path) -> Path:
    """Write the adapters of `model` into `folder` (made if need be) and return it.

    Two files: ``dual_lora_model.safetensors`` with `dual_lora_state_dict`, and ``dual_lora_config.json`` with each
    layer's settings. What else trains (a bias, a head) is not saved, which is said on the package's logger. Raises
    ValueError where the model has no Dual LoRA layers.
    """
    folder = Path(folder)
    adapter = {id(getattr(layer, name)) for _, layer in dual_lora_layers(model) for name in FACTOR_NAMES}
    others = [name for name, p in unwrapped(model).named_parameters() if p.requires_grad and id(p) not in adapter]
    if others:
        logger.warning("%d trainable parameters are no adapter's and are not saved: %s …", len(others), others[0])
    state = {name: tensor.contiguous() for name, tensor in dual_lora_state_dict(model).items()}
    settings = {"format": _FORMAT, "layers": {name: _settings(layer) for name, layer in dual_lora_layers(model)}}
    settings_text = json.dumps(settings, indent=2) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / SETTINGS_FILE).write_text(settings_text, encoding="utf-8")
    return folder


def load_dual_lora(model: nn.Module, folder: str | Path) -> nn.Module:
    """Load an adapter that `save_dual_lora` wrote and return `model`.

    A plain model is adapted first, in place, with the saved settings; one that has Dual LoRA layers must have the same
    ones with the same ranks, and keeps its own settings.

    Raises:
        FileNotFoundError: `folder` holds no saved adapter.
        ValueError: the files are damaged or of a newer format, or do not fit the model. Nothing has been changed then.
    """
    folder = Path(folder)
    for file in (SETTINGS_FILE, WEIGHTS_FILE):
        if not (folder / file).is_file():
            raise FileNotFoundError(
                f"folder: got {str(folder)!r}, which has no {file}; expected what save_dual_lora wrote"
            )
    configs = _read_settings(folder / SETTINGS_FILE)
    try:
        state = load_file(folder / WEIGHTS_FILE)
    except SafetensorError as error:
        raise ValueError(f"folder: {WEIGHTS_FILE} in {str(folder)!r} cannot be read: {error}") from error
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


def _read_settings(file: Path) -> dict[str, DualLoraConfig]:
    """Each saved layer's configuration by name."""
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        if settings["format"] > _FORMAT:
            raise ValueError(f"format {settings['format']} is newer than this version reads ({_FORMAT})")
        return {
            name: DualLoraConfig(**layer | {"adapter_dtype": getattr(torch, layer["adapter_dtype"])})
            for name, layer in settings["layers"].items()
        }
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"folder: {file.name} in {str(file.parent)!r} cannot be read: {error}") from error


def _check_against_model(
    chosen: Mapping[str, tuple[nn.Module, DualLoraConfig]], state: Mapping[str, torch.Tensor]
) -> None:
    """Raise ValueError unless the saved tensors are those that adapting the chosen layers would make."""
    expected: dict[str, tuple[int, ...]] = {}
    for name, (module, config) in chosen.items():
        shapes = factor_shapes(*linear_features(module), config.r1, config.r2)
        expected |= {f"{name}.{tensor}": shape for tensor, shape in shapes.items()} | {f"{name}.scale": ()}
    if expected.keys() != state.keys():
        raise ValueError(
            f"folder: {WEIGHTS_FILE} and {SETTINGS_FILE} name different tensors: "
            f"{sorted(expected.keys() ^ state.keys())[:4]}"
        )
    for name, shape in expected.items():
        if tuple(state[name].shape) != shape:
            raise ValueError(
                f"folder: {name} is saved with shape {tuple(state[name].shape)}, expected {shape} for this model"
            )
