"""Models that accelerate has dispatched (``device_map="auto"``): its hooks move inputs and offloaded weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module
from peft import PeftModel, get_peft_model
from torch import nn

from dual_lora_kernels import (
    DualLoraLinear,
    apply_dual_lora,
    disable_adapter,
    dual_lora_state_dict,
    load_dual_lora,
    merge_dual_lora,
    save_dual_lora,
)
from dual_lora_kernels.adapter import dual_lora_adapters
from dual_lora_kernels.linear import dual_lora_layers

from .models import configuration, llama, logits, tokens
from .peft_models import config

OFFLOADS = ("cpu", "disk")


def offloaded(where: str, folder: Path) -> nn.Module:
    model = llama()
    if where == "cpu":
        return cpu_offload(model, execution_device="cpu")
    return disk_offload(model, str(folder / "offloaded"), execution_device="cpu")


def adapt(model: nn.Module, door: str) -> nn.Module:
    torch.manual_seed(1)
    if door == "peft":
        return get_peft_model(model, config())
    return apply_dual_lora(model, configuration())


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("door", ["plain", "peft"])
@pytest.mark.parametrize("where", OFFLOADS)
def test_an_offloaded_base_computes_and_trains_as_one_in_memory(where: str, door: str, tmp_path: Path) -> None:
    here, away = adapt(llama(), door), adapt(offloaded(where, tmp_path), door)
    for (_, own), (_, other) in zip(dual_lora_adapters(here), dual_lora_adapters(away), strict=True):
        assert not other.A.is_meta
        other.load_state_dict({name: getattr(own, name) for name in (*"ABCD", "scale")}, strict=False)
    # Not to the bit: how a product is rounded depends on where in memory a weight lies, and some are mapped files here.
    torch.testing.assert_close(logits(away), logits(here), rtol=1e-5, atol=1e-5)
    expected, found = gradients(here), gradients(away)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)
    assert all(p.is_meta for name, p in away.named_parameters() if "embed" in name or "q_proj.weight" in name)


def test_an_offloaded_model_gets_a_saved_adapter(tmp_path: Path) -> None:
    trained = adapt(llama(), "plain")
    save_dual_lora(trained, tmp_path / "adapter")
    away = load_dual_lora(offloaded("cpu", tmp_path), tmp_path / "adapter")
    assert torch.equal(logits(away), logits(trained))
    save_dual_lora(away, tmp_path / "again")
    state = dual_lora_state_dict(load_dual_lora(llama(), tmp_path / "again"))
    assert all(torch.equal(tensor, state[name]) for name, tensor in dual_lora_state_dict(trained).items())
    with disable_adapter(away):
        assert torch.equal(logits(away), logits(llama()))


def test_an_offloaded_layer_cannot_be_merged(tmp_path: Path) -> None:
    away = adapt(offloaded("cpu", tmp_path), "plain")
    with pytest.raises(ValueError, match="weight is offloaded by accelerate, expected one in memory"):
        merge_dual_lora(away)
    layer = next(layer for _, layer in dual_lora_layers(away))
    for verb in (layer.merge, layer.prepare, layer.to_linear):
        with pytest.raises(ValueError, match="weight is offloaded by accelerate, expected one in memory"):
            verb()


@pytest.mark.parametrize("where", OFFLOADS)
def test_peft_loads_and_merges_on_an_offloaded_base(where: str, tmp_path: Path) -> None:
    """PEFT brings each layer into memory to merge it, and keeps what it has merged."""
    trained = adapt(llama(), "peft")
    trained.save_pretrained(tmp_path / "adapter")
    away = PeftModel.from_pretrained(offloaded(where, tmp_path), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(away), logits(trained), rtol=1e-5, atol=1e-5)
    merged, expected = away.merge_and_unload(), trained.merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(expected), rtol=1e-5, atol=1e-5)


def test_a_layer_that_was_offloaded_after_adapting_cannot_be_merged() -> None:
    away = cpu_offload(adapt(llama(), "plain"), execution_device="cpu")
    with pytest.raises(ValueError, match="weight is offloaded by accelerate, expected one in memory"):
        merge_dual_lora(away)


def aligned(linear: nn.Linear) -> nn.Linear:
    """As accelerate hooks the layers of a model that is spread over several devices."""
    return add_hook_to_module(linear, AlignDevicesHook(execution_device="cpu", io_same_device=True))


def test_a_layer_on_a_device_of_its_own_keeps_its_hook() -> None:
    x = torch.randn(3, 8)
    linear = aligned(nn.Linear(8, 6))
    model = apply_dual_lora(nn.Sequential(linear), configuration())
    assert torch.equal(model(x), model[0]._forward(x))
    merged = merge_dual_lora(model)
    assert type(merged[0]) is nn.Linear
    assert isinstance(merged[0]._hf_hook, AlignDevicesHook)
    merged(x)


def test_other_hooks_of_accelerate_are_refused_with_the_way_out() -> None:
    linear = add_hook_to_module(nn.Linear(8, 6), ModelHook())
    with pytest.raises(ValueError, match=r"ModelHook.*accelerate\.hooks\.remove_hook_from_module"):
        DualLoraLinear.from_linear(linear)


def test_a_replaced_forward_below_accelerates_hook_is_refused() -> None:
    linear = nn.Linear(8, 6)
    linear.forward = lambda x: x
    with pytest.raises(ValueError, match="forward was replaced on the instance"):
        DualLoraLinear.from_linear(aligned(linear))
