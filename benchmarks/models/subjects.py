"""Every subject of the suite as a whole model, on shared frozen weights and at equal trainable parameters."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dual_lora_kernels import DualLoraConfig, apply_dual_lora, merge_dual_lora
from dual_lora_kernels.linear import dual_lora_layers

from ..layers.layer_step import FLOOR
from ..layers.methods import (
    ALPHA,
    FROZEN,
    MERGED,
    PEFT_METHODS,
    PREPARED,
    build,
    compiled,
    trainable_parameters,
    with_peft,
)
from .base import replace_linears, twin
from .case import DENSE, ModelCase
from .floor import floor_model

FULL = "full"
_COLUMNS = {"dual_lora": 1.0, "dual_lora_half": 1 / 2}
_COMPILED = {"lora_compiled": "lora", "naive_compiled": "naive"}
_ADAPTED_AS = {**_COMPILED, PREPARED: "dual_lora", MERGED: "dual_lora"}
"""Subjects that are another one's adapter, with something done to it."""
_REPLACED = ("naive", "dual_lora_eager")
TRAINED = (
    FROZEN, FLOOR, FULL, *PEFT_METHODS, "lora_compiled", "naive", "naive_compiled", "dual_lora_eager", "dual_lora",
    "dual_lora_peft", "dual_lora_half",
)  # fmt: skip
"""The subjects of a training step."""
GENERATING = (FROZEN, "lora", "dora", "dual_lora", PREPARED, MERGED)
"""The subjects of generation; the last three are one adapter: as it trains, with W kept, and without an adapter."""
ON_NF4 = (FLOOR, FROZEN, "lora", "dual_lora")
"""The subjects on a 4-bit base. The floor is that of the dense model: W0 dequantised once and for all."""


def _as_drawn(adapted: nn.Module) -> None:
    """The adapter's values stay what the method's library begins with."""


def subject_model(
    base: nn.Module, subject: str, case: ModelCase, values: Callable[[nn.Module], None] = _as_drawn
) -> nn.Module:
    """The model of `subject`, in training mode; its frozen weights are `base`'s own unless it changes them.

    `base` is `base_model(case)`, and the dense model for the floor. `values` may set the adapter's, before anything is
    merged, prepared or compiled.

    Raises:
        ValueError: there is no such subject, or it trains another number of parameters than the others.
        ImportError: the method's library is not installed.
    """
    torch.manual_seed(1)  # subjects of the same adapter have the same factors
    model = _built(base, subject, case.rank, values)
    if case.checkpointing:  # after get_peft_model, which would make the embeddings' output require a gradient
        llama(model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trained, expected = trainable_count(model), expected_trainable(subject, case)
    if trained != expected:
        raise ValueError(f"subject: {subject!r} trains {trained} parameters, expected {expected} as the others")
    return model.train()


def _built(base: nn.Module, subject: str, rank: int, values: Callable[[nn.Module], None]) -> nn.Module:
    if subject == FULL:
        model = copy.deepcopy(base).requires_grad_(True)
    else:
        model = _adapted(twin(base, own_linears=subject == MERGED), _ADAPTED_AS.get(subject, subject), rank)
    values(model)
    if subject == MERGED:
        return merge_dual_lora(model)
    if subject == PREPARED:
        for _, layer in dual_lora_layers(model):
            layer.prepare()
    if subject in _COMPILED:
        for block in llama(model).model.layers:
            compiled(block)  # each by itself: they are alike, and Inductor compiles one
    return model


def _adapted(model: nn.Module, subject: str, rank: int) -> nn.Module:
    if subject == FROZEN:
        return model
    if subject == FLOOR:
        return floor_model(model)
    if subject in _COLUMNS:
        return apply_dual_lora(model, DualLoraConfig(r1=rank, r2=rank, alpha=ALPHA, gradient_columns=_COLUMNS[subject]))
    if subject in _REPLACED:
        replace_linears(model, lambda linear: build(subject, linear, rank, rank))
        return model
    if subject in PEFT_METHODS or subject == "dual_lora_peft":
        return with_peft(model, subject, rank, rank, "all-linear")
    raise ValueError(f"subject: got {subject!r}, expected one of {', '.join((*TRAINED, PREPARED, MERGED))}")


def dense(case: ModelCase) -> ModelCase:
    """The case on a dense base."""
    return dataclasses.replace(case, base=DENSE)


def llama(model: nn.Module) -> Any:
    """The transformers model, PEFT's wrapper around it or not."""
    return next(module for module in model.modules() if type(module).__name__ == "LlamaForCausalLM")


def trainable_count(model: nn.Module) -> int:
    """Numbers that train."""
    return sum(parameter.numel() for parameter in trainable_parameters(model))


def expected_trainable(subject: str, case: ModelCase) -> int:
    """(r1 + r2)·(N + K) of every adapted layer; DoRA has N magnitudes more, and full fine-tuning trains everything."""
    if subject in (FROZEN, FLOOR, MERGED):
        return 0
    if subject == FULL:
        return case.shape.parameters
    magnitudes = 1 if subject == "dora" else 0
    return sum(2 * case.rank * (n + k) + magnitudes * n for n, k in case.shape.linears)
