"""Frozen models with random weights, which are in memory once for however many models adapt them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import LlamaForCausalLM

from .case import NF4, ModelCase
from .shapes import Shape

_DRAWN = 2**20 + 7
"""Random numbers that are drawn; weights are filled with them again and again. It is odd, so no two rows are equal."""
STD = 0.02


def random_model(shape: Shape, dtype: torch.dtype, device: torch.device | str = "cpu") -> Any:
    """A frozen Llama: linear weights and embeddings ~ N(0, 0.02²), the same ones for the same shape; norms are 1.

    Built in seconds at a billion parameters: PyTorch's own initialisation is skipped.
    """
    with torch.device("meta"):
        model = LlamaForCausalLM(shape.config()).to(dtype)
    model.to_empty(device=device)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config).to(device)  # buffers were empty, too
    drawn = (torch.randn(_DRAWN, generator=torch.Generator().manual_seed(0)) * STD).to(device, dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter.fill_(1)
                continue
            for part in parameter.view(-1).split(_DRAWN):
                part.copy_(drawn[: part.numel()])
    return model.requires_grad_(False)


def base_model(case: ModelCase) -> Any:
    """The case's frozen model; with an NF4 base the linear layers of its blocks are bitsandbytes' ``Linear4bit``."""
    model = random_model(case.shape, case.torch_dtype, case.device)
    if case.base == NF4:
        from ..quantised.bases import nf4_linear

        def quantised(linear: nn.Linear) -> nn.Module:
            layer: nn.Module = nf4_linear(linear.out_features, linear.in_features, case.torch_dtype).to(case.device)
            return layer

        replace_linears(model, quantised)
        model.is_loaded_in_4bit = True  # as transformers tells PEFT
    return model


def adapted_linears(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    """Names and linear layers of a Llama that methods adapt: all but the output head."""
    inner = model.get_submodule("model")
    return [(f"model.{name}", module) for name, module in inner.named_modules() if isinstance(module, nn.Linear)]


def replace_linears(model: nn.Module, build: Callable[[Any], nn.Module]) -> None:
    """Put ``build(linear)`` in the place of each of `adapted_linears`."""
    for name, linear in adapted_linears(model):
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, build(linear))


def twin(model: nn.Module, own_linears: bool = False) -> Any:
    """Another model on the same frozen weights; with `own_linears` those of the blocks' linear layers are copied."""
    copied = {id(linear.weight) for _, linear in adapted_linears(model)} if own_linears else set()
    shared: dict[int, Any] = {id(p): p for p in model.parameters() if id(p) not in copied}
    for module in model.modules():  # what bitsandbytes keeps beside its parameters
        state = getattr(module, "quant_state", None)
        if state is not None:
            shared[id(state)] = state
    return copy.deepcopy(model, shared)
