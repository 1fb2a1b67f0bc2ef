"""Optimiser parameter groups: magnitude and direction factors apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .adapter import dual_lora_adapters
from .validation import check_number


def dual_lora_parameter_groups(
    model: nn.Module, lr: float, *, direction_lr: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """The trainable parameters of `model` as groups for an optimiser.

    Args:
        lr: learning rate of the magnitude group (A, B) and of whatever else trains.
        direction_lr: learning rate of the direction group (C, D); default `lr`.
        weight_decay: weight decay of the other trainable parameters. The factors get none: decay would pull P towards
            zero, where the gradients of both groups stop, and cannot change sgn(Q).

    Returns:
        Up to three groups named ``"magnitude"``, ``"direction"`` and ``"other"``, each with its ``lr`` and
        ``weight_decay``; empty ones are left out and every trainable parameter is in exactly one.

    Raises:
        ValueError: a rate is negative or not finite, or the model has no Dual LoRA layers.
    """
    lr = check_number("lr", lr, 0.0)
    weight_decay = check_number("weight_decay", weight_decay, 0.0)
    direction_lr = lr if direction_lr is None else check_number("direction_lr", direction_lr, 0.0)
    layers = [layer for _, layer in dual_lora_adapters(model)]
    if not layers:
        raise ValueError(f"model: got {type(model).__name__} without Dual LoRA layers, expected an adapted model")
    magnitude = [p for layer in layers for p in (layer.A, layer.B)]
    direction = [p for layer in layers for p in (layer.C, layer.D)]
    grouped = {id(p) for p in (*magnitude, *direction)}
    other = [p for p in model.parameters() if id(p) not in grouped]
    groups = (
        ("magnitude", magnitude, lr, 0.0),
        ("direction", direction, direction_lr, 0.0),
        ("other", other, lr, weight_decay),
    )
    return [
        {"name": name, "params": trainable, "lr": rate, "weight_decay": decay}
        for name, parameters, rate, decay in groups
        if (trainable := [p for p in parameters if p.requires_grad])
    ]


def create_dual_lora_optimizer(
    model: nn.Module,
    optimizer_cls: type[torch.optim.Optimizer] = torch.optim.AdamW,
    *,
    lr: float,
    direction_lr: float | None = None,
    weight_decay: float = 0.0,
    **options: Any,
) -> torch.optim.Optimizer:
    """An optimiser with a rate of its own for the direction group, as PEFT's ``create_loraplus_optimizer`` is for B.

    Pass it to a Trainer as ``optimizers=(optimizer, None)``. `lr`, `direction_lr` and `weight_decay` are those of
    `dual_lora_parameter_groups`, which says what it raises; further options go to `optimizer_cls`.
    """
    groups = dual_lora_parameter_groups(model, lr, direction_lr=direction_lr, weight_decay=weight_decay)
    return optimizer_cls(groups, **options)
