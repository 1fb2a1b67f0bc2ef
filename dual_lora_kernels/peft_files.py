"""An adapter as PEFT keeps it on disk: adapter_config.json and adapter_model.safetensors. Needs no PEFT."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save

from .adapter_files import Adapter
from .config import DualLoraConfig
from .durable_files import replace_files
from .fields import alpha_for, check_patterns
from .safetensors_file import DTYPES, LazyTensors, SafetensorsFile, StoredTensor
from .targets import names_it

PEFT_CONFIG_FILE = "adapter_config.json"
PEFT_WEIGHTS_FILE = "adapter_model.safetensors"
PEFT_NAME = "DUAL_LORA"
"""The method's name, the value of PeftType."""
PEFT_PREFIX = "dual_adapter"
"""What the tuner's parts of a model's state are called. PEFT takes names with ``lora_`` for LoRA's."""
_BASE = "base_model.model."
_COPY = ".base_layer.weight"
"""The end of the name of W0's copy, which PEFT saves with an adapted output head."""
_SHARED = ("dropout", "init_std", "ste", "rounding", "clip_bound")
"""Options that PEFT's format has once for all layers."""


def open_peft_files(folder: Path) -> Adapter:
    """Open the adapter that PEFT or `write_peft_files` saved; its tensors are read when they are asked for.

    Raises FileNotFoundError where a file is missing, ValueError where one is damaged or holds something else.
    """
    config_file, weights_file = folder / PEFT_CONFIG_FILE, folder / PEFT_WEIGHTS_FILE
    for file in (config_file, weights_file):
        if not file.is_file():
            old = "; save it again with safe_serialization=True" if (folder / "adapter_model.bin").is_file() else ""
            raise FileNotFoundError(f"folder: got {str(folder)!r}, which has no {file.name}{old}")
    try:
        settings = json.loads(config_file.read_bytes())
        if settings["peft_type"] != PEFT_NAME:
            raise ValueError(f"peft_type: got {settings['peft_type']!r}, expected {PEFT_NAME!r}")
        return _adapter(settings, SafetensorsFile(weights_file))
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"folder: PEFT's files in {str(folder)!r} cannot be read: {error}") from error


def _adapter(settings: Mapping[str, Any], saved: SafetensorsFile) -> Adapter:
    check_patterns(settings.get("rank_pattern"), settings.get("alpha_pattern"))
    names, layers, whole = {}, [], set()
    for key in saved.tensors:
        name = key.removeprefix(_BASE)
        layer, found, tensor_name = name.partition(f".{PEFT_PREFIX}.")
        if found:
            names[f"{layer}.{tensor_name}"] = key
            layers += [layer] if tensor_name == "scale" else []
        elif not name.endswith(_COPY) or f"{key.removesuffix(_COPY)}.{PEFT_PREFIX}.scale" not in saved.tensors:
            whole.add(_saved_module(name, settings.get("modules_to_save") or ()))
            names[name] = key
    if not layers:
        raise ValueError("it names no layers")
    state = LazyTensors(saved, names)
    configs = {}
    for layer in layers:
        A, C = state.entry(f"{layer}.A"), state.entry(f"{layer}.C")
        configs[layer] = DualLoraConfig(
            r1=_rank(layer, "A", A),  # not by rank_pattern, whose keys PEFT sorts: their order decides
            r2=_rank(layer, "C", C),
            alpha=alpha_for(layer, settings["alpha"], settings.get("alpha_pattern")),
            adapter_dtype=DTYPES[A.dtype],
            **{option: settings[option] for option in _SHARED},
            gradient_columns=settings.get("gradient_columns", 1.0),  # earlier versions have none
        )
    return Adapter(configs, state, tuple(sorted(whole)))


def _rank(layer: str, factor: str, entry: StoredTensor) -> int:
    if len(entry.shape) != 2:
        raise ValueError(f"{layer}.{factor} has shape {entry.shape}, expected [rank, in_features]")
    return entry.shape[0]


def _saved_module(name: str, modules_to_save: Any) -> str:
    """The module that a tensor of no adapter belongs to. ValueError if PEFT saved it for another reason."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        module = ".".join(parts[:end])
        if any(names_it(target, module) for target in modules_to_save):
            return module
    raise ValueError(
        f"{name} is no adapter's and of no module in modules_to_save (a bias that was trained?); load it with PEFT"
    )


def write_peft_files(folder: Path, adapter: Adapter, about: Mapping[str, Any], more: Mapping[str, bytes]) -> None:
    """Write both files, and `more` by their names. `about`: settings on the base model. OSError where it fails."""
    tensors = {}
    for name, tensor in adapter.state.items():
        layer, _, last = name.rpartition(".")
        tensors[_BASE + (f"{layer}.{PEFT_PREFIX}.{last}" if layer in adapter.configs else name)] = tensor
    settings = _settings(adapter.configs) | {
        **about,
        "inference_mode": True,
        "modules_to_save": list(adapter.modules_to_save) or None,
        "peft_type": PEFT_NAME,
    }
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    weights = save(tensors, metadata={"format": "pt"})
    replace_files(folder, {PEFT_WEIGHTS_FILE: weights, **more, PEFT_CONFIG_FILE: text.encode()})


def _settings(configs: Mapping[str, DualLoraConfig]) -> dict[str, Any]:
    """PEFT's settings, which are the same for all layers, with patterns for the ranks and alphas that are not.

    Raises ValueError where layers differ in another option.
    """
    first = next(iter(configs.values()))
    for option in _SHARED:
        for name, config in configs.items():
            if getattr(config, option) != getattr(first, option):
                raise ValueError(
                    f"model: {name} has {option} {getattr(config, option)!r}, others {getattr(first, option)!r}; "
                    "expected the same in all layers, as PEFT's format has it once: use save_dual_lora"
                )
    (r1, r2), _ = Counter((config.r1, config.r2) for config in configs.values()).most_common(1)[0]
    alpha, _ = Counter(config.alpha for config in configs.values()).most_common(1)[0]
    return {
        "r1": r1,
        "r2": r2,
        "alpha": alpha,
        **_gradient_columns(configs),
        **{option: getattr(first, option) for option in _SHARED},
        "target_modules": "|".join(re.escape(name) for name in sorted(configs)),  # names could match the ends of others
        "rank_pattern": {f"^{re.escape(n)}": [c.r1, c.r2] for n, c in configs.items() if (c.r1, c.r2) != (r1, r2)},
        "alpha_pattern": {f"^{re.escape(n)}": c.alpha for n, c in configs.items() if c.alpha != alpha},
    }


def _gradient_columns(configs: Mapping[str, DualLoraConfig]) -> dict[str, float]:
    """The option that earlier versions do not know: only where it is below 1, and the same for all layers."""
    found = {config.gradient_columns for config in configs.values()}
    return {"gradient_columns": found.pop()} if len(found) == 1 and found != {1.0} else {}
