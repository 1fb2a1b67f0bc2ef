"""What a saved adapter is on disk: one safetensors file that holds all, and a JSON file of its settings for people."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save

from .config import DualLoraConfig
from .durable_files import replace_files
from .linear import DualLoraLinear
from .safetensors_file import LazyTensors, SafetensorsFile
from .validation import SUPPORTED_DTYPES

_logger = logging.getLogger("dual_lora_kernels")
SETTINGS_FILE = "dual_lora_config.json"
WEIGHTS_FILE = "dual_lora_model.safetensors"
SETTINGS_KEY = "dual_lora_config"
"""Where the safetensors file's metadata has the settings, as the same text that the JSON file has."""
_FORMAT = 1
_OPTIONS = ("r1", "r2", "alpha", "init_std", "ste", "rounding", "clip_bound", "dropout", "adapter_dtype")
_LATER = {"gradient_columns": 1.0}
"""Options that earlier versions do not know, and their values there: files have only those with other values."""
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in SUPPORTED_DTYPES}


class Adapter(NamedTuple):
    """A saved adapter: each layer's settings by the layer's name, and the tensors by ``<layer>.<tensor>``."""

    configs: Mapping[str, DualLoraConfig]
    state: Mapping[str, torch.Tensor]
    modules_to_save: tuple[str, ...] = ()
    """Modules that are saved whole; their tensors are in `state` too."""


def layer_config(layer: DualLoraLinear) -> DualLoraConfig:
    """A layer's settings. Raises ValueError or TypeError where an attribute was set to what cannot be."""
    names = (*_OPTIONS, *_LATER)
    options = {name: getattr(layer, name) for name in names if name not in ("dropout", "adapter_dtype")}
    return DualLoraConfig(**options, dropout=float(layer.dropout.p), adapter_dtype=layer.A.dtype)


def write_adapter(folder: Path, adapter: Adapter) -> None:
    """Write both files into `folder`. The tensors are contiguous and share no memory.

    The safetensors file has the settings too, so its taking its place is the whole save; the JSON file follows. Raises
    OSError, with what was in `folder` unchanged, where they cannot be written.
    """
    text = _settings_text(adapter.configs, adapter.modules_to_save)
    weights = _in_order(save(dict(adapter.state), metadata={"format": "pt", SETTINGS_KEY: text}))
    try:
        if folder.is_symlink():
            _logger.warning("%s is a link to %s; a folder of its own takes its place", folder, folder.readlink())
        # In this order: a reader that has read the JSON file first cannot have new settings for old tensors then.
        replace_files(folder, {WEIGHTS_FILE: weights, SETTINGS_FILE: text.encode()})
    except OSError as error:
        at = f" ({error.filename})" if error.filename else ""
        message = f"folder: got {str(folder)!r}, expected one that an adapter can be written to: {error.strerror}{at}"
        raise OSError(error.errno, message) from error


def open_adapter_file(folder: Path) -> Adapter:
    """Open what `write_adapter` wrote, or an adapter without metadata that an earlier version wrote.

    Its tensors are read when they are asked for, from the file as it is now, whatever takes its place. Raises
    FileNotFoundError where there is none, ValueError where a file is damaged or of another format. Settings in the
    metadata count; a JSON file that says otherwise is warned of and not used.
    """
    weights_file, settings_file = folder / WEIGHTS_FILE, folder / SETTINGS_FILE
    beside = settings_file.read_bytes() if settings_file.is_file() else None
    if not weights_file.is_file():
        raise _missing(weights_file)
    try:
        file = SafetensorsFile(weights_file)
        state = LazyTensors(file, {name: name for name in file.tensors})
    except ValueError as error:
        raise _unreadable(weights_file, error) from error
    text = file.metadata.get(SETTINGS_KEY)
    if text is None:
        if beside is None:
            raise _missing(settings_file)
        configs, modules_to_save = _settings(settings_file, beside)
        return Adapter(configs, state, modules_to_save)
    configs, modules_to_save = _settings(weights_file, text)
    if beside is not None and not _says(settings_file, beside, (configs, modules_to_save)):
        _logger.warning(
            "%s does not say what %s has as its settings, which are used: it was edited, or a save is under way or was "
            "interrupted; saving again rewrites it",
            settings_file, WEIGHTS_FILE,
        )  # fmt: skip
    return Adapter(configs, state, modules_to_save)


def _in_order(data: bytes) -> bytes:
    """A safetensors file with its metadata sorted: the library writes them in another order each time."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors stay aligned
    return len(text).to_bytes(8, "little") + text + data[start:]


def _settings_text(configs: Mapping[str, DualLoraConfig], modules_to_save: tuple[str, ...]) -> str:
    layers = {name: _settings_of(config) for name, config in configs.items()}
    modules = {"modules_to_save": list(modules_to_save)} if modules_to_save else {}
    return json.dumps({"format": _FORMAT, **modules, "layers": layers}, indent=2) + "\n"


def _settings_of(config: DualLoraConfig) -> dict[str, Any]:
    options = config.layer_options() | {"adapter_dtype": str(config.adapter_dtype).removeprefix("torch.")}
    return {name: value for name, value in options.items() if name not in _LATER or value != _LATER[name]}


def _settings(file: Path, text: str | bytes) -> tuple[dict[str, DualLoraConfig], tuple[str, ...]]:
    """Each saved layer's settings by name, and the modules saved whole. `file`: where the text comes from."""
    try:
        settings = json.loads(text)
        if settings["format"] != _FORMAT:
            raise ValueError(f"format: got {settings['format']!r}, expected {_FORMAT}; is it of a newer version?")
        if not settings["layers"]:
            raise ValueError("it names no layers")
        modules = settings.get("modules_to_save", [])
        if not isinstance(modules, list) or not all(isinstance(name, str) for name in modules):
            raise ValueError(f"modules_to_save: got {modules!r}, expected a list of names")
        return {name: _config(name, layer) for name, layer in settings["layers"].items()}, tuple(modules)
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise _unreadable(file, error) from error


def _config(name: str, layer: dict[str, Any]) -> DualLoraConfig:
    if layer.keys() - _LATER != set(_OPTIONS):
        raise ValueError(
            f"{name} has the settings {sorted(layer)}, expected {sorted(_OPTIONS)}, and maybe {sorted(_LATER)}"
        )
    if layer["adapter_dtype"] not in _DTYPES:
        raise ValueError(f"adapter_dtype: got {layer['adapter_dtype']!r}, expected one of {', '.join(_DTYPES)}")
    return DualLoraConfig(**layer | {"adapter_dtype": _DTYPES[layer["adapter_dtype"]]})


def _says(file: Path, text: bytes, settings: tuple[dict[str, DualLoraConfig], tuple[str, ...]]) -> bool:
    try:
        return _settings(file, text) == settings
    except ValueError:
        return False


def _missing(file: Path) -> FileNotFoundError:
    hub = not file.parent.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(file.parent))
    download = ", or for one on the Hub what huggingface_hub.snapshot_download returns" if hub else ""
    expected = f"what save_dual_lora or PEFT wrote{download}"
    return FileNotFoundError(f"folder: got {str(file.parent)!r}, which has no {file.name}; expected {expected}")


def _unreadable(file: Path, error: Exception) -> ValueError:
    return ValueError(f"folder: {file.name} in {str(file.parent)!r} cannot be read: {error}")
