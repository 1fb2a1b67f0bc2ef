"""Adapters and models without values: loading gives the adapter its values, or is refused; it never drops them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, init_empty_weights, load_checkpoint_and_dispatch
from torch import nn

from dual_lora_kernels import dual_lora_state_dict, load_dual_lora, load_dual_lora_state_dict, save_dual_lora

from .checkpoints import LAYER, adapted, assert_unchanged, snapshot
from .models import llama, logits


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_dual_lora(adapted(), tmp_path / "adapter")


def empty(*, is_adapted: bool) -> nn.Module:
    with init_empty_weights(include_buffers=False):
        return adapted(seed=2) if is_adapted else llama()


def assert_has_the_adapter(model: nn.Module) -> None:
    state = dual_lora_state_dict(model)
    assert all(torch.equal(state[name], value) for name, value in dual_lora_state_dict(adapted()).items())
    layer = model.get_submodule(LAYER)
    assert layer.weight.is_meta
    assert not layer.weight.requires_grad
    assert layer.A.requires_grad
    assert isinstance(layer.A, nn.Parameter)
    assert not layer.scale.requires_grad


@pytest.mark.parametrize("is_adapted", [False, True], ids=["plain", "adapted"])
@pytest.mark.parametrize("within", [False, True], ids=["outside", "within the context"])
def test_an_empty_model_gets_the_adapters_values(is_adapted: bool, within: bool, saved: Path) -> None:
    model = empty(is_adapted=is_adapted)
    if within:
        with init_empty_weights():
            load_dual_lora(model, saved)
    else:
        load_dual_lora(model, saved)
    assert_has_the_adapter(model)


def test_a_model_on_the_meta_device(saved: Path) -> None:
    with torch.device("meta"):
        model = load_dual_lora(llama(), saved)
    assert_has_the_adapter(model)


def test_a_state_fills_an_empty_model(saved: Path) -> None:
    model, state = empty(is_adapted=True), dual_lora_state_dict(adapted())
    load_dual_lora_state_dict(model, state)
    assert_has_the_adapter(model)
    name = f"{LAYER}.A"
    assert dual_lora_state_dict(model)[name].data_ptr() != state[name].data_ptr()


def test_empty_factors_on_a_base_with_values(saved: Path) -> None:
    """They get their values where the base is."""
    model = adapted(seed=2)
    for module in model.modules():
        for name in ("A", "B", "C", "D"):
            if name in module._parameters:
                module._parameters[name] = nn.Parameter(module._parameters[name].to("meta"))
    load_dual_lora(model, saved)
    assert torch.equal(logits(model), logits(adapted()))


@pytest.mark.parametrize("is_adapted", [False, True], ids=["plain", "adapted"])
def test_the_base_can_follow_by_accelerate(is_adapted: bool, saved: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    llama().save_pretrained(base)
    model = load_dual_lora(empty(is_adapted=is_adapted), saved)
    model = load_checkpoint_and_dispatch(model, str(base), device_map={"": "cpu"})
    assert torch.equal(logits(model.eval()), logits(adapted()))


def test_an_offloaded_adapter_is_refused(saved: Path) -> None:
    """Its hooks hold the values, and would put the old ones back at every call."""
    model = adapted(seed=2)
    cpu_offload(model)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"offloaded by accelerate.*before dispatching"):
        load_dual_lora(model, saved)
    assert_unchanged(model, before)


def test_an_empty_adapter_is_not_saved(saved: Path) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with pytest.raises(ValueError, match=r"^model: .*\.A is on the meta device, expected a tensor with values"):
        save_dual_lora(empty(is_adapted=True), saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
