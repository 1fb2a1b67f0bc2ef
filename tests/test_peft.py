"""PEFT's verbs on Dual LoRA: computing and training. tests/test_families.py has whole models."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dual_lora_kernels import DualLoraWarmup, dual_lora_parameter_groups
from dual_lora_kernels.adapter import dual_lora_adapters
from dual_lora_kernels.peft import DualLoraConfig

from .models import llama, logits, tokens
from .peft_models import SMALL, X, adapted, config, net


def test_the_layer_computes_the_formula() -> None:
    model = net()
    layer = model.base_model.model.first
    weight = layer.base_layer.weight + layer.get_delta_weight("default")
    torch.testing.assert_close(layer(X), nn.functional.linear(X, weight, layer.base_layer.bias))


def test_dropout_is_used_in_training_alone() -> None:
    model = net(dropout=0.5)
    assert torch.equal(model(X), model(X))
    model.train()
    assert not torch.equal(model(X), model(X))


def test_disable_adapter_gives_the_base_model() -> None:
    model = adapted()
    before = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(llama()))
    assert torch.equal(logits(model), before)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(llama()))


def test_several_adapters() -> None:
    model = adapted(seed=1)
    first = logits(model)
    model.add_adapter("other", config(["q_proj", "up_proj"], r1=4))
    assert torch.equal(logits(model), first)
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".other." in name)
    model.set_adapter("other")
    second = logits(model)
    assert not torch.equal(second, first)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all(".other." in name for name in trainable)
    model.delete_adapter("default")
    assert torch.equal(logits(model), second)
    assert not any(".default." in name for name in model.state_dict())
    assert model.active_adapters == ["other"]


def test_active_adapters_add_up() -> None:
    model = net()
    model.add_adapter("other", DualLoraConfig(target_modules=["first"], **SMALL))
    model.base_model.set_adapter(["default", "other"])
    layer = model.base_model.model.first
    weight = layer.base_layer.weight + layer.get_delta_weight("default") + layer.get_delta_weight("other")
    torch.testing.assert_close(layer(X), nn.functional.linear(X, weight, layer.base_layer.bias))
    expected = model(X)
    torch.testing.assert_close(model.merge_and_unload()(X), expected)


def test_an_adapter_of_the_same_name_is_replaced_by_loading(tmp_path: Path) -> None:
    model, other = adapted(seed=1), adapted(seed=2)
    other.save_pretrained(tmp_path)
    model.load_adapter(str(tmp_path), "default")
    assert torch.equal(logits(model), logits(other))


@torch.no_grad()
def test_mixed_batches() -> None:
    model = net()
    model.add_adapter("other", DualLoraConfig(target_modules=["second"], **SMALL))
    expected = {"default": model(X)}
    model.set_adapter("other")
    expected["other"] = model(X)
    with model.disable_adapter():
        expected["__base__"] = model(X)
    names = ["other", "__base__", "default", "default", "other", "__base__"]
    found = model(X, adapter_names=names)
    for row, name in enumerate(names):
        torch.testing.assert_close(found[row], expected[name][row])


def test_mixed_batches_in_generation_with_beams() -> None:
    model = adapted()
    rows = tokens(2)
    options = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    one, base = model.generate(input_ids=rows, **options), llama().generate(input_ids=rows, **options)
    mixed = model.generate(input_ids=rows, adapter_names=["default", "__base__"], **options)
    assert torch.equal(mixed[0], one[0])
    assert torch.equal(mixed[1], base[1])


def test_mixed_batches_are_refused_where_they_cannot_be() -> None:
    model = net()
    with pytest.raises(ValueError, match="Length of `adapter_names` should be the same"):
        model(X, adapter_names=["default"])
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): nobody"):
        model(X, adapter_names=["nobody"] * 6)
    model.train()
    with pytest.raises(ValueError, match="when the model is in training mode"):
        model(X, adapter_names=["default"] * 6)
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match="when there are merged adapters"):
        model(X, adapter_names=["default"] * 6)


def test_warm_up_and_parameter_groups_take_what_trains() -> None:
    model = adapted(seed=1)
    model.add_adapter("other", config(["q_proj"]))
    model.set_adapter("other")
    DualLoraWarmup(model, 10)
    for name, adapter in dual_lora_adapters(model):
        assert adapter.scale.item() == pytest.approx(adapter.full_scale * (0.1 if name.endswith("other") else 1.0))
    groups = {group["name"]: len(group["params"]) for group in dual_lora_parameter_groups(model, 1e-3)}
    assert groups == {"magnitude": 4, "direction": 4}


def test_gradient_checkpointing() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = adapted().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    "copier", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copies(copier: Any) -> None:
    model = net()
    model.merge_adapter()
    other = copier(model)
    assert torch.equal(other(X), model(X))
    other.unmerge_adapter()
    assert not torch.equal(
        other.base_model.model.first.base_layer.weight, model.base_model.model.first.base_layer.weight
    )
    with other.disable_adapter():
        assert torch.equal(other(X), net().unload()(X))


def test_torch_compile() -> None:
    model = net()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), model(X))
    compiled(X).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
