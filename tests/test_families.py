"""Training, saving, reloading and merging models of the families that people fine-tune, in bf16, through both doors."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from benchmarks.training.families import FAMILIES, Family
from dual_lora_kernels import DualLoraConfig, apply_dual_lora, load_dual_lora, merge_dual_lora, save_dual_lora
from dual_lora_kernels.adapter import FACTOR_NAMES, DualLoraAdapter, dual_lora_adapters
from dual_lora_kernels.linear import DualLoraLinear
from dual_lora_kernels.peft import DualLoraConfig as PeftDualLoraConfig
from dual_lora_kernels.peft import Linear

OPTIONS: dict[str, Any] = {"r1": 4, "r2": 3, "alpha": 4.0, "init_std": 0.1}


class Door:
    """One way of doing it all."""

    def adapt(self, model: nn.Module, family: Family) -> nn.Module:
        return apply_dual_lora(model, DualLoraConfig(**OPTIONS))

    def save(self, model: nn.Module, folder: Path) -> None:
        save_dual_lora(model, folder)

    def load(self, model: nn.Module, folder: Path) -> nn.Module:
        return load_dual_lora(model, folder)

    def merge(self, model: nn.Module) -> nn.Module:
        return merge_dual_lora(model)


class PeftDoor(Door):
    def adapt(self, model: nn.Module, family: Family) -> nn.Module:
        return get_peft_model(
            model, PeftDualLoraConfig(target_modules="all-linear", task_type=family.task_type, **OPTIONS)
        )

    def save(self, model: nn.Module, folder: Path) -> None:
        model.save_pretrained(folder)

    def load(self, model: nn.Module, folder: Path) -> nn.Module:
        return PeftModel.from_pretrained(model, folder)

    def merge(self, model: nn.Module) -> nn.Module:
        return model.merge_and_unload()


DOORS = {"plain": Door(), "peft": PeftDoor()}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


def inputs_of(family: Family) -> dict[str, torch.Tensor]:
    return {name: t.bfloat16() if t.is_floating_point() else t for name, t in family.inputs().items()}


@torch.no_grad()
def logits(model: nn.Module, family: Family) -> torch.Tensor:
    return model(**inputs_of(family)).logits


@torch.no_grad()
def weights_in_use(model: nn.Module) -> dict[str, torch.Tensor]:
    """round(W0 + ΔW) of every adapted layer, read out by the identity, oriented like its weight; by plain names."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, Linear | DualLoraLinear):
            base = module.get_base_layer() if isinstance(module, Linear) else module
            adapter: DualLoraAdapter = module.dual_adapter["default"] if isinstance(module, Linear) else module
            weight = base.weight.t() if module.transposed else base.weight
            used = adapter.adapted_linear(torch.eye(module.in_features, dtype=torch.bfloat16), weight, None)
            found[name.removeprefix("base_model.model.")] = used if module.transposed else used.t()
    return found


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Up to the rounding of bf16 products, which depends on where in memory weights lie, and adds up in such models."""
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02 * expected.abs().max().item())


def train(model: nn.Module, family: Family) -> None:
    model.train()
    model(**inputs_of(family)).loss.backward()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    torch.optim.SGD(trainable, 0.1).step()
    model.zero_grad()
    model.eval()


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
def test_train_save_reload_and_merge(family: Family, door: Door, tmp_path: Path) -> None:
    at_start = logits(family.model(torch.bfloat16), family)
    torch.manual_seed(0)
    model = door.adapt(family.model(torch.bfloat16), family)
    before = {name: adapter.A.detach().clone() for name, adapter in dual_lora_adapters(model)}
    train(model, family)
    assert all(not torch.equal(adapter.A, before[name]) for name, adapter in dual_lora_adapters(model))
    trained = logits(model, family)
    assert not torch.equal(trained, at_start)

    door.save(model, tmp_path)
    again = door.load(family.model(torch.bfloat16), tmp_path).eval()
    used = weights_in_use(again)
    own = weights_in_use(model)
    assert all(torch.equal(weight, used[name]) for name, weight in own.items())
    assert_same(logits(again, family), trained)

    plain = family.model(torch.bfloat16)
    merged = door.merge(again)
    assert used
    for name, weight in used.items():
        assert torch.equal(merged.get_submodule(name).weight, weight)
        assert type(merged.get_submodule(name)) is type(plain.get_submodule(name))
    assert merged.state_dict().keys() == plain.state_dict().keys()
    # The product of the same numbers may be rounded otherwise for another layout; in such a model that adds up.
    torch.testing.assert_close(
        logits(merged, family).float(), trained.float(), rtol=0.02, atol=0.02 * trained.abs().max()
    )


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
def test_experts_in_one_tensor_are_said_to_be_left_out(door: Door, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        door.adapt(FAMILIES["Mixtral"].model(), FAMILIES["Mixtral"])
    assert "the experts are not adapted: in 2 modules they are one 3-D tensor" in caplog.text
    assert "model.layers.0.mlp.experts: gate_up_proj, down_proj" in caplog.text


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
def test_separate_experts_are_adapted(door: Door, caplog: pytest.LogCaptureFixture) -> None:
    family = FAMILIES["separate experts"]
    with caplog.at_level(logging.WARNING):
        model = door.adapt(family.model(), family)
    assert "experts" not in caplog.text
    assert sum("experts" in name for name, _ in dual_lora_adapters(model)) == 2 * 4 * 2


def test_both_doors_compute_the_same(family: Family) -> None:
    """From the same factors, gradients included; W bit for bit."""
    plain = DOORS["plain"].adapt(family.model(torch.bfloat16), family)
    theirs = dict(dual_lora_adapters(plain))
    config = PeftDualLoraConfig(target_modules=list(theirs), task_type=family.task_type, **OPTIONS)
    tuned = get_peft_model(family.model(torch.bfloat16), config)
    pairs = [
        (adapter, theirs[name.removeprefix("base_model.model.").removesuffix(".dual_adapter.default")])
        for name, adapter in dual_lora_adapters(tuned)
    ]
    assert len(pairs) == len(theirs)
    for adapter, other in pairs:
        adapter.load_state_dict({name: getattr(other, name) for name in (*FACTOR_NAMES, "scale")})
    assert_same(logits(plain, family), logits(tuned, family))
    used = weights_in_use(plain)
    assert all(torch.equal(weight, used[name]) for name, weight in weights_in_use(tuned).items())
    for model in (plain, tuned):
        model(**inputs_of(family)).loss.backward()
    for adapter, other in pairs:
        for name in FACTOR_NAMES:
            assert_same(getattr(adapter, name).grad, getattr(other, name).grad)
