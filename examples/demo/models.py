"""The base model and the four ways of adapting it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel, TrainerCallback

from dual_lora_kernels import DualLoraConfig, apply_dual_lora, dual_lora_parameter_groups
from dual_lora_kernels.trainer import DualLoraWarmupCallback

from .data import BYTE_VOCABULARY

ADAPTER_SCALE = 2.0
"""The factor on every adapter's update: α/r for LoRA and DoRA, α/√(r1·r2) for Dual LoRA. Common practice (α = 2r)."""


def tiny_llama(hidden_size: int, layers: int, block_size: int) -> LlamaForCausalLM:
    """A byte-level Llama with random weights: 3.2 million parameters at width 256 and 4 layers."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=BYTE_VOCABULARY,
            hidden_size=hidden_size,
            intermediate_size=hidden_size * 5 // 2,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=block_size,
            bos_token_id=None,  # all 256 tokens are bytes: none is left for a special meaning
            eos_token_id=None,
            use_cache=False,
        )
    )


def load_base(checkpoint: Path, dtype: str) -> PreTrainedModel:
    """A fresh copy of the base model, on the CPU; the Trainer moves it to the device."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        checkpoint, local_files_only=True, dtype=getattr(torch, dtype)
    )
    model.config.use_cache = False  # training and evaluation never reuse keys and values
    return model


def trainable_parameters(model: nn.Module) -> int:
    """How many numbers the optimiser updates."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@dataclass(frozen=True)
class Method:
    """One way of adapting a model.

    ``prepare(model, rank)`` returns the model to train, with everything frozen that the method does not train.
    ``parameter_groups(model, rate)`` gives the optimiser's groups, ``callbacks(steps)`` what the Trainer needs besides.
    """

    label: str
    learning_rate: float
    prepare: Callable[[PreTrainedModel, int], nn.Module]
    parameter_groups: Callable[[nn.Module, float], list[dict[str, Any]]]
    callbacks: Callable[[int], list[TrainerCallback]]


def _keep(model: nn.Module, rank: int) -> nn.Module:
    return model


def _add_dual_lora(model: PreTrainedModel, rank: int) -> nn.Module:
    """Two groups of half the rank: exactly LoRA's number of trainable parameters."""
    half = rank // 2
    return apply_dual_lora(model, DualLoraConfig(r1=half, r2=half, alpha=ADAPTER_SCALE * half))


def _add_lora(model: PreTrainedModel, rank: int, *, use_dora: bool = False) -> nn.Module:
    alpha = int(ADAPTER_SCALE * rank)  # PEFT declares it as a whole number
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", use_dora=use_dora, task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        # PEFT asks the model for an attribute that transformers has renamed; harmless, and not ours to change.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        adapted: nn.Module = get_peft_model(model, config)
    return adapted


def _add_dora(model: PreTrainedModel, rank: int) -> nn.Module:
    return _add_lora(model, rank, use_dora=True)


def one_group(model: nn.Module, rate: float) -> list[dict[str, Any]]:
    """Every trainable parameter at one rate, without weight decay: the runs are too short for it to matter."""
    return [{"params": [p for p in model.parameters() if p.requires_grad], "lr": rate, "weight_decay": 0.0}]


def no_callbacks(steps: int) -> list[TrainerCallback]:
    """For the methods that need nothing but the Trainer."""
    return []


def _dual_lora_warmup(steps: int) -> list[TrainerCallback]:
    """The scale's warm-up that the method needs (its factors all start random): 20 steps, or a fifth of a short run."""
    return [DualLoraWarmupCallback(max(1, min(20, steps // 5)))]


# The learning rates come from `python -m examples.demo.sweep`; its numbers are in this folder's README.md.
METHODS: dict[str, Method] = {
    "dual_lora": Method("Dual LoRA", 1e-2, _add_dual_lora, dual_lora_parameter_groups, _dual_lora_warmup),
    "lora": Method("LoRA (PEFT)", 5e-3, _add_lora, one_group, no_callbacks),
    "dora": Method("DoRA (PEFT)", 5e-3, _add_dora, one_group, no_callbacks),
    "full": Method("full fine-tuning", 2e-3, _keep, one_group, no_callbacks),
}
