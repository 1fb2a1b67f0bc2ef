"""What the tests of saving and loading share: adapted models, their state before and after, and doctored files."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from dual_lora_kernels import apply_dual_lora
from dual_lora_kernels.adapter_files import SETTINGS_FILE, SETTINGS_KEY, WEIGHTS_FILE

from .models import configuration, llama

LAYER = "model.layers.0.self_attn.q_proj"


def adapted(make: Callable[[], nn.Module] = llama, *, seed: int = 1, **options: Any) -> nn.Module:
    """A model whose base is always the same and whose adapter the seed decides, in eval mode."""
    model = make()
    torch.manual_seed(seed)
    return apply_dual_lora(model, configuration(**options)).eval()


def small() -> nn.Module:
    """A model whose names are "0" and "2"."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))


def snapshot(model: nn.Module) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """What loading may change: the modules, their dtypes, what trains, and every value."""
    structure = [(name, id(module)) for name, module in model.named_modules()]
    structure += [(name, id(parameter), parameter.requires_grad) for name, parameter in model.named_parameters()]
    return structure, copy.deepcopy(model.state_dict())


def assert_unchanged(model: nn.Module, before: tuple[list[Any], dict[str, torch.Tensor]]) -> None:
    structure, state = snapshot(model)
    assert structure == before[0]
    assert all(torch.equal(value, before[1][name]) for name, value in state.items() if not value.is_meta)


def settings_of(folder: Path) -> dict[str, Any]:
    """The settings that loading reads."""
    with safe_open(folder / WEIGHTS_FILE, "pt") as file:
        return json.loads(file.metadata()[SETTINGS_KEY])


def write_settings(folder: Path, text: str, *, beside: bool = False) -> None:
    """Give a saved adapter other settings; `beside` the tensors alone, as the first versions had them."""
    metadata = {"format": "pt"} if beside else {"format": "pt", SETTINGS_KEY: text}
    save_file(load_file(folder / WEIGHTS_FILE), folder / WEIGHTS_FILE, metadata)
    (folder / SETTINGS_FILE).write_text(text, encoding="utf-8")


def write_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a saved adapter, and keep its settings."""
    state, text = load_file(folder / WEIGHTS_FILE), json.dumps(settings_of(folder))
    change(state)
    save_file(state, folder / WEIGHTS_FILE, {"format": "pt", SETTINGS_KEY: text})
