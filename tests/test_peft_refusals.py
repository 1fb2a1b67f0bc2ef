"""The order of imports, and what PEFT's users get wrong."""

from __future__ import annotations

import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftMixedModel, get_peft_model
from torch import nn

from dual_lora_kernels import DualLoraConfig as PlainDualLoraConfig
from dual_lora_kernels import apply_dual_lora, disable_adapter, merge_dual_lora, prepared, save_dual_lora
from dual_lora_kernels.adapter import DualLoraAdapter
from dual_lora_kernels.peft import DualLoraConfig

from .models import configuration
from .peft_models import Net, net


@pytest.mark.parametrize(
    "first",
    [
        "import peft, dual_lora_kernels.peft",
        "import dual_lora_kernels.peft, peft",
        "import dual_lora_kernels, peft, dual_lora_kernels.peft",
    ],
)
def test_the_order_of_imports_does_not_matter(first: str) -> None:
    program = f"""{first}
assert peft.PeftType("DUAL_LORA") is peft.PeftType.DUAL_LORA and "DUAL_LORA" in list(peft.PeftType)
assert "DUAL_LORA" in vars(peft.PeftType)  # where Python 3.12 looks for members
assert peft.PEFT_TYPE_TO_CONFIG_MAPPING["DUAL_LORA"] is dual_lora_kernels.peft.DualLoraConfig
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_package_alone_does_not_import_peft() -> None:
    subprocess.run(
        [sys.executable, "-c", "import sys, dual_lora_kernels; assert 'peft' not in sys.modules"], check=True
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 8}, r"unexpected keyword argument 'r'; expected r1 .* and r2"),
        ({"lora_alpha": 8}, "'lora_alpha'; expected alpha"),
        ({"lora_dropout": 0.1}, "'lora_dropout'; expected dropout"),
        ({"target_module": ["q"]}, "'target_module'; expected target_modules"),
        ({"nonsense": 1}, "'nonsense'; expected one of task_type"),
    ],
)
def test_unknown_fields(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        DualLoraConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r1": 0}, "^r1: got 0, expected"),
        ({"r2": 2.5}, "^r2: got 2.5 .*expected"),
        ({"alpha": -1.0}, "^alpha: got -1.0, expected"),
        ({"dropout": 1.0}, "^dropout: got 1.0, expected"),
        ({"ste": "sign"}, "^ste: got 'sign', expected"),
        ({"rounding": "up"}, "^rounding: got 'up', expected"),
        ({"bias": "some"}, "^bias: got 'some', expected"),
        ({"rank_pattern": {"q": 0}}, r"^rank_pattern\['q'\]: got 0, expected"),
        ({"rank_pattern": {"q": (1, 2, 3)}}, r"^rank_pattern\['q'\]: got \(1, 2, 3\), expected a rank or a pair"),
        ({"rank_pattern": {"q(": 1}}, r"^rank_pattern: got 'q\(', expected a name or a regular expression"),
        ({"alpha_pattern": {"q": -2.0}}, r"^alpha_pattern\['q'\]: got -2.0, expected a positive number"),
        ({"target_modules": ".*", "layers_to_transform": [1]}, "`layers_to_transform` cannot be used when"),
        ({"target_modules": ["q"], "layers_pattern": "h"}, "`layers_to_transform` must also be specified"),
        ({"task_type": "NOTHING"}, "Invalid task type"),
    ],
)
def test_fields_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        DualLoraConfig(**options)


def test_targets_that_match_nothing() -> None:
    with pytest.raises(ValueError, match=r"Target modules .* not found in the base model"):
        get_peft_model(Net(), DualLoraConfig(target_modules=["third"]))
    with pytest.raises(ValueError, match="Please specify `target_modules`"):
        get_peft_model(Net(), DualLoraConfig())


@pytest.mark.parametrize("target", ["convolution", "quantised"])
def test_layers_that_cannot_be_adapted(target: str) -> None:
    model = Net()
    model.quantised = nn.Linear(4, 4)
    model.quantised.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=f"is not supported: .*'{target}' matches target_modules"):
        get_peft_model(model, DualLoraConfig(target_modules=[target]))


def test_other_methods_on_the_same_layer_are_refused() -> None:
    model = get_peft_model(Net(), LoraConfig(target_modules=["first"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="is not supported"):
            get_peft_model(model.base_model.model, DualLoraConfig(target_modules=["first"]))
    with pytest.raises(ValueError, match="DUAL_LORA"):
        PeftMixedModel(Net(), DualLoraConfig(target_modules=["first"]))
    with pytest.raises(ValueError, match="is PEFT's"):
        apply_dual_lora(net(), configuration())


def test_a_weighted_sum_of_adapters_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="not linear in its factors"):
        net().add_weighted_adapter(["default"], [1.0], "sum")


def test_the_plain_door_names_the_other_one() -> None:
    with pytest.raises(
        TypeError, match=r"^config: got dual_lora_kernels\.peft\.config\.DualLoraConfig.*get_peft_model"
    ):
        apply_dual_lora(Net(), DualLoraConfig())
    with pytest.raises(
        TypeError, match=r"^config: got peft\..*LoraConfig, expected dual_lora_kernels.DualLoraConfig\(r1="
    ):
        apply_dual_lora(Net(), LoraConfig())


def test_the_layers_repr_names_the_method() -> None:
    assert repr(net().base_model.model.first).startswith("dual_lora.Linear(")
    assert isinstance(net().base_model.model.first.dual_adapter["default"], DualLoraAdapter)


def test_the_two_configurations_are_not_taken_for_each_other() -> None:
    with pytest.raises(TypeError, match=r"^peft_config: got dual_lora_kernels\.DualLoraConfig, which is for"):
        get_peft_model(Net(), PlainDualLoraConfig())


def test_each_door_says_what_the_other_one_is_called() -> None:
    model = net()
    verbs: list[tuple[Any, str]] = [
        (merge_dual_lora, r"PEFT has merge_and_unload\(\)"),
        (lambda model: save_dual_lora(model, "nowhere"), r"PEFT has save_pretrained\(\)"),
        (lambda model: disable_adapter(model).__enter__(), r"PEFT has disable_adapter\(\)"),
        (lambda model: prepared(model).__enter__(), r"PEFT has merge_adapter\(\)"),
    ]
    for verb, message in verbs:
        with pytest.raises(ValueError, match=message):
            verb(model)
    plain = apply_dual_lora(Net(), configuration(["first"]))
    with pytest.raises(ValueError, match="with layers of apply_dual_lora, expected one without"):
        get_peft_model(plain, DualLoraConfig(target_modules=["second"]))
