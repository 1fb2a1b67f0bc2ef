"""accelerate's hooks, which move inputs and offloaded weights around a layer's forward (``device_map="auto"``).

Dual LoRA reads a layer's weight without calling the layer, so it has to run the hooks itself.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from itertools import chain

import torch
from torch import nn


def call_within_hooks(
    modules: Sequence[nn.Module], input: torch.Tensor, compute: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """``compute(input)``, between what accelerate's hooks on `modules` do before and after a forward."""
    hooked = [(module, module._hf_hook) for module in modules if "_hf_hook" in module.__dict__]
    for module, hook in hooked:
        (input,), _ = hook.pre_forward(module, input)  # type: ignore[operator, union-attr]
    result = compute(input)
    for module, hook in reversed(hooked):
        result = hook.post_forward(module, result)  # type: ignore[operator, union-attr]
    return result


def move_hook(hooked: Sequence[nn.Module], module: nn.Module) -> None:
    """Give `module` the hook of the layer in whose place it comes."""
    for layer in hooked:
        accelerate_hooks = sys.modules["accelerate.hooks"]
        accelerate_hooks.add_hook_to_module(module, layer._hf_hook)


def has_aligning_hook(module: nn.Module) -> bool:
    """Whether `module` has the hook by which accelerate puts inputs and weights onto the device that computes."""
    defining = sys.modules.get("accelerate.hooks")  # who has such a hook has imported it
    return defining is not None and type(getattr(module, "_hf_hook", None)) is defining.AlignDevicesHook


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate keeps the weights of `module` elsewhere between calls."""
    return has_aligning_hook(module) and bool(module._hf_hook.offload)  # type: ignore[union-attr]


def computing_device(module: nn.Module) -> torch.device:
    """Where `module` computes: its weight's device, or the one that accelerate brings an offloaded weight to."""
    if is_offloaded(module):
        return torch.device(module._hf_hook.execution_device)  # type: ignore[union-attr, arg-type]
    own = chain(module.parameters(recurse=False), module.buffers(recurse=False))
    return next(own).device
