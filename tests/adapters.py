"""Saved adapters for the tests of files, and ways to look at what loading may change."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dual_lora_kernels import apply_dual_lora

from .models import configuration, llama

LAYER = "model.layers.0.self_attn.q_proj"


def adapted(make: Callable[[], nn.Module] = llama, *, seed: int = 1, **options: Any) -> nn.Module:
    """A model whose base is always the same and whose adapter the seed decides, in eval mode."""
    model = make()
    torch.manual_seed(seed)
    return apply_dual_lora(model, configuration(**options)).eval()


def snapshot(model: nn.Module) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """What loading may change: the modules, their dtypes, what trains, and every value."""
    structure = [(name, id(module)) for name, module in model.named_modules()]
    structure += [(name, parameter.requires_grad) for name, parameter in model.named_parameters()]
    return structure, copy.deepcopy(model.state_dict())


def assert_unchanged(model: nn.Module, before: tuple[list[Any], dict[str, torch.Tensor]]) -> None:
    structure, state = snapshot(model)
    assert structure == before[0]
    assert all(torch.equal(value, before[1][name]) for name, value in state.items())
