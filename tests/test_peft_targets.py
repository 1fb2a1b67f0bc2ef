"""Which layers PEFT adapts by Dual LoRA, and how."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from peft import get_peft_model, inject_adapter_in_model
from torch import nn

from dual_lora_kernels.adapter import FACTOR_NAMES, dual_lora_adapters
from dual_lora_kernels.peft import DualLoraConfig, DualLoraLayer

from .models import llama, tokens
from .peft_models import SMALL, Net, adapted, config, layers


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 14),
        ({"target_modules": ["q_proj", "v_proj"]}, 4),
        ({"target_modules": r".*layers\.1\..*(gate|up)_proj"}, 2),
        ({"target_modules": None}, 4),
        ({"exclude_modules": ["gate_proj", "layers.0.mlp.up_proj"]}, 11),
        ({"exclude_modules": r".*mlp.*"}, 8),
        ({"target_modules": ["q_proj", "v_proj"], "layers_to_transform": 1}, 2),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"}, 1),
    ],
)
def test_targets(options: dict[str, Any], count: int) -> None:
    model = adapted(**options)
    assert len(layers(model)) == count
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"{name}.dual_adapter.default.{f}" for name in layers(model) for f in FACTOR_NAMES}


def test_all_linear_leaves_alone_what_no_adapter_would_reach(caplog: pytest.LogCaptureFixture) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2)
            self.up = nn.Linear(16, 16)

    with caplog.at_level("INFO"):
        model = get_peft_model(Attention(), DualLoraConfig(target_modules="all-linear"))
    assert list(layers(model)) == ["base_model.model.up"]
    assert "left alone: attention.out_proj (nn.MultiheadAttention reads its weight" in caplog.text


def test_patterns() -> None:
    model = adapted(rank_pattern={"q_proj": 5, r"layers\.1\..*up_proj": (4, 6)}, alpha_pattern={"q_proj": 3.0})
    found = {
        name.removeprefix("base_model.model.model."): layer.dual_adapter["default"]
        for name, layer in layers(model).items()
    }
    for name, adapter in found.items():
        expected = (5, 5) if "q_proj" in name else (4, 6) if name == "layers.1.mlp.up_proj" else (3, 2)
        assert (adapter.r1, adapter.r2) == expected
        alpha = 3.0 if "q_proj" in name else 1.0
        assert adapter.scale.item() == pytest.approx(alpha / math.sqrt(math.prod(expected)))


def test_print_trainable_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    model = adapted(target_modules=["q_proj"])
    model.print_trainable_parameters()
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"trainable params: {count:,}" in capsys.readouterr().out


@pytest.mark.parametrize("automatic", [True, False])
def test_autocast_adapter_dtype(automatic: bool) -> None:
    model = get_peft_model(llama(dtype=torch.bfloat16), config(), autocast_adapter_dtype=automatic)
    for _, adapter in dual_lora_adapters(model):
        assert {getattr(adapter, name).dtype for name in FACTOR_NAMES} == {
            torch.float32 if automatic else torch.bfloat16
        }
        assert adapter.scale.dtype == torch.float32
    model(input_ids=tokens(), labels=tokens()).loss.backward()


def test_the_scale_stays_fp32() -> None:
    model = adapted().to(torch.bfloat16)
    assert {adapter.scale.dtype for _, adapter in dual_lora_adapters(model)} == {torch.float32}


def test_bias_options() -> None:
    torch.manual_seed(0)
    for bias, expected in (("none", 0), ("dual_lora_only", 1), ("all", 3)):
        model = get_peft_model(Net(), DualLoraConfig(target_modules=["first"], bias=bias, **SMALL))
        assert sum(p.requires_grad for name, p in model.named_parameters() if name.endswith("bias")) == expected


def test_injecting_into_a_model() -> None:
    model = inject_adapter_in_model(DualLoraConfig(target_modules=["first"], **SMALL), Net())
    assert isinstance(model.first, DualLoraLayer)


def test_the_first_layer_counts() -> None:
    assert len(layers(adapted(target_modules=["q_proj"], layers_to_transform=0, layers_pattern="layers"))) == 1
