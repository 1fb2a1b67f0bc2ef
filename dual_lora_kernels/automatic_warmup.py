"""Warm-up of adapters' scales that needs no call from the training loop: optimisers' steps are seen by PyTorch's hook.

`DualLoraWarmup` is for loops, `DualLoraWarmupCallback` for transformers' Trainer; this is for adapters of PEFT's, whose
users change a configuration and nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

if TYPE_CHECKING:
    from .adapter import DualLoraAdapter

_warming: WeakSet[DualLoraAdapter] = WeakSet()
"""Adapters whose scale has not had all its steps. Copies and unpickled ones register themselves."""
_is_hooked = False


def start(adapter: DualLoraAdapter, steps: int) -> None:
    """Let the scale of `adapter` rise linearly to the full one, in as many optimiser steps.

    During step t, counted from 0, it is min(1, (t + 1)/steps) of the full scale, as with `DualLoraWarmup`. An optimiser
    counts if it holds the adapter's first trainable factor. The scale itself keeps the progress: a run that resumes
    from a saved adapter goes on where it stopped.
    """
    adapter.warmup_steps, adapter.warmup_left = steps, steps
    adapter.set_scale(adapter.full_scale / steps)
    register(adapter)


def register(adapter: DualLoraAdapter) -> None:
    """See `start`: of an adapter with steps left, that no optimiser is watched for yet."""
    global _is_hooked
    if adapter.warmup_left > 0:
        _warming.add(adapter)
        if not _is_hooked:
            register_optimizer_step_post_hook(_advance)
            _is_hooked = True


@torch.no_grad()
def _advance(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """After a step of any optimiser."""
    if not _warming:
        return
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for adapter in list(_warming):
        trainable = next((factor for factor in adapter.factors() if factor.requires_grad), None)
        if id(trainable) not in held:
            continue
        adapter.warmup_left -= 1
        if adapter.warmup_left > 0:  # without reading the scale, which would wait for the device
            adapter.scale.add_(adapter.full_scale / adapter.warmup_steps).clamp_(max=adapter.full_scale)
        else:
            adapter.scale.fill_(adapter.full_scale)
            _warming.discard(adapter)
