"""Warm-up of adapters' scales that needs no call from the training loop: optimisers' steps are seen by PyTorch's hooks.

`DualLoraWarmup` is for loops, `DualLoraWarmupCallback` for transformers' Trainer; this is for adapters of PEFT's, whose
users change a configuration and nothing else.
"""

from __future__ import annotations

import sys
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any
from weakref import ReferenceType, WeakSet, ref

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from .sharding import is_sharded

if TYPE_CHECKING:
    from .adapter import DualLoraAdapter

_warming: WeakSet[DualLoraAdapter] = WeakSet()
"""Adapters whose scale is to rise. Copies and unpickled ones register themselves."""
_stepping: list[tuple[ReferenceType[torch.optim.Optimizer], set[int]]] = []
"""Optimisers within a step, outermost first, and which others have made one within it, by identity.

One that wraps another holds the same factors, and both steps are one.
"""
_is_hooked = False
_is_reached: MutableMapping[torch.Tensor, bool] = WeakIdKeyDictionary()
"""Whether a gradient has reached a factor since the last step, where DeepSpeed is in use."""


@torch.no_grad()
def start(adapter: DualLoraAdapter, steps: int, now: bool) -> None:
    """Let the scale of `adapter` rise linearly to the full one, in as many optimiser steps.

    During step t, counted from 0, it is min(1, (t + 1)/steps) of the full scale, as with `DualLoraWarmup`. A step
    counts where its optimiser holds the adapter's first trainable factor. Unless `now`, the scale is left as it is
    until the first such step: an adapter that never trains (TRL's copy of another as a reference, say) stays.
    """
    adapter.warmup_steps, adapter.warmup_left, adapter.warmup_waits = steps, steps - 1, not now
    if now:
        adapter.scale.fill_(adapter.full_scale / steps)
    register(adapter)


def resume(adapter: DualLoraAdapter) -> None:
    """Find out how much is left from the scale, which was loaded. One that is full, or beyond, stays."""
    if adapter.warmup_steps > 0 and not adapter.scale.is_meta:
        part = adapter.scale.item() / adapter.full_scale
        adapter.warmup_left = round(adapter.warmup_steps * (1 - part)) if 0 < part < 1 else 0
        adapter.warmup_waits = False
        register(adapter)


def register(adapter: DualLoraAdapter) -> None:
    """Watch optimisers for an adapter with steps left; no more for one without."""
    global _is_hooked
    if adapter.warmup_left == 0:
        _warming.discard(adapter)
        return
    _warming.add(adapter)
    if not _is_hooked:
        register_optimizer_step_pre_hook(_enter)
        register_optimizer_step_post_hook(_leave)
        _is_hooked = True


def _enter(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Before a step of any optimiser.

    A step that raised, when memory ran out say, has not been left. It is over if its optimiser steps again, if the
    optimiser is gone, or if another one steps a second time meanwhile.
    """
    _forget(optimizer)
    ended = (depth for depth, (other, done) in enumerate(_stepping) if other() is None or id(optimizer) in done)
    del _stepping[next(ended, len(_stepping)) :]
    _stepping.append((ref(optimizer), set()))


def _leave(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """After a step of any optimiser."""
    _forget(optimizer)
    for _outer, done in _stepping:
        done.add(id(optimizer))
    if _warming and not _is_without_effect(optimizer):
        around = {identity for outer, _ in _stepping for identity in _parameters(outer())}
        _advance((_parameters(optimizer) | _stepped_by_deepspeed(optimizer)) - around)


def _is_without_effect(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step has rates and gradients of zero alone.

    PyTorch makes an optimiser's state by such a step, where it is to be saved or loaded before the first real one. A
    schedule's first rate may be zero as well, but gradients are not then. They are read where the rates are zero only.
    """
    groups = optimizer.param_groups
    rates = [group.get("lr", 1.0) for group in groups]
    if any((isinstance(rate, torch.Tensor) and rate.device.type != "cpu") or rate != 0 for rate in rates):
        return False
    held = [tensor.grad for group in groups for tensor in group["params"] if tensor.grad is not None]
    return not any(bool((grad.to_local() if is_sharded(grad) else grad).any()) for grad in held)


def _stepped_by_deepspeed(optimizer: torch.optim.Optimizer) -> set[int]:
    """Factors, by identity, that a gradient has reached since the last step of DeepSpeed's.

    Its optimisers hold copies of the parameters, which are no parameters themselves, and make one step for each group.
    """
    held = (tensor for group in optimizer.param_groups for tensor in group["params"])
    if "deepspeed" not in sys.modules or any(isinstance(tensor, nn.Parameter) for tensor in held):
        return set()
    reached = set()
    for adapter in _warming:
        factor = _first_trainable(adapter)
        if factor is not None and _is_reached.get(factor, True):
            reached.add(id(factor))
            if factor not in _is_reached:  # in the first step after deepspeed was imported
                factor.register_post_accumulate_grad_hook(_reach)
            _is_reached[factor] = False
    return reached


def _reach(factor: torch.Tensor) -> None:
    _is_reached[factor] = True


def _first_trainable(adapter: DualLoraAdapter) -> torch.Tensor | None:
    return next((factor for factor in adapter.factors() if factor.requires_grad), None)


def _forget(optimizer: torch.optim.Optimizer) -> None:
    """Leave `optimizer`'s step, and those that began within it."""
    depths = (depth for depth, (other, _) in enumerate(_stepping) if other() is optimizer)
    del _stepping[next(depths, len(_stepping)) :]


def _parameters(optimizer: torch.optim.Optimizer | None) -> set[int]:
    """What an optimiser holds, by identity."""
    groups = [] if optimizer is None else optimizer.param_groups
    return {id(parameter) for group in groups for parameter in group["params"]}


@torch.no_grad()
def _advance(stepped: set[int]) -> None:
    """One step more for the adapters whose first trainable factor has `stepped`, by identity."""
    for adapter in list(_warming):
        if id(_first_trainable(adapter)) in stepped:
            adapter.warmup_left -= 1
            scale = adapter.full_scale * (1 - adapter.warmup_left / adapter.warmup_steps)
            if adapter.warmup_waits:
                adapter.scale.fill_(scale)
                adapter.warmup_waits = False
            else:  # never lower: a copy's scale can be ahead of its count. And without reading it from the device
                adapter.scale.clamp_(min=scale)
            register(adapter)
