"""Adapted models: merging, parameter groups, warm-up and training, on tiny random Llama and GPT-2."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from dual_lora_kernels import (
    DualLoraConfig,
    DualLoraLinear,
    DualLoraWarmup,
    apply_dual_lora,
    disable_adapter,
    dual_lora_parameter_groups,
    merge_dual_lora,
)
from dual_lora_kernels.trainer import DualLoraWarmupCallback

from .models import Block, adapted_names, configuration, gpt2, llama, logits, tokens

# --- merging --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("premerged", [False, True])
@pytest.mark.parametrize("make", [llama, gpt2, lambda: llama(dtype=torch.bfloat16)], ids=["llama", "gpt2", "bf16"])
def test_merge_gives_the_original_architecture(make: Any, premerged: bool) -> None:
    original, model = make(), make()
    apply_dual_lora(model, configuration()).eval()
    adapted = logits(model)
    assert (adapted - logits(original)).abs().max() > 0.05
    if premerged:
        next(module for module in model.modules() if isinstance(module, DualLoraLinear)).merge()
    assert merge_dual_lora(model) is model
    torch.testing.assert_close(logits(model), adapted)
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in original.named_modules()]
    shapes = {name: (value.shape, value.dtype) for name, value in original.state_dict().items()}
    assert {name: (value.shape, value.dtype) for name, value in model.state_dict().items()} == shapes
    original.load_state_dict(model.state_dict())
    assert torch.equal(logits(original), logits(model))


def test_a_merged_model_saves_and_loads_as_any_other(tmp_path: Path) -> None:
    model = merge_dual_lora(apply_dual_lora(llama(), configuration()))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path).eval()), logits(model))


@pytest.mark.parametrize("premerged", [False, True])
def test_merging_unties_the_embedding(premerged: bool) -> None:
    """lm_head asked for by name: the embedding that shares its weight stays as it was."""
    model = llama(tied=True)
    before = model.model.embed_tokens.weight.detach().clone()
    apply_dual_lora(model, configuration(["lm_head"]))
    adapted = logits(model)
    if premerged:
        model.lm_head.merge()
    merge_dual_lora(model)
    assert type(model.lm_head) is nn.Linear
    assert torch.equal(model.model.embed_tokens.weight, before)
    torch.testing.assert_close(logits(model), adapted)


def test_merging_a_shared_module() -> None:
    model, x = Block().eval(), torch.randn(2, 3, 16)
    apply_dual_lora(model, configuration(["up", "again"]))
    adapted = model(x)
    merge_dual_lora(model)
    assert model.up is model.again
    assert not adapted_names(model)
    torch.testing.assert_close(model(x), adapted)


def test_merging_a_bare_layer_does_not_pretend() -> None:
    """As `apply_dual_lora` refuses a bare nn.Linear: the layer cannot be replaced in place. `to_linear` is meant."""
    layer = DualLoraLinear(4, 4)
    before = layer.weight.detach().clone()
    with pytest.raises(ValueError, match=r"^model: got .*to_linear"):
        merge_dual_lora(layer)
    assert torch.equal(layer.weight, before)


def test_merge_refuses_a_diverged_adapter_before_touching_anything() -> None:
    model = apply_dual_lora(llama(), configuration())
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.D[0, 0] = torch.nan
    names, before = adapted_names(model), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"^model\.layers\.1\.mlp\.down_proj\.D: got nan"):
        merge_dual_lora(model)
    assert adapted_names(model) == names
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)


# --- training -------------------------------------------------------------------------------------------------------


def test_parameter_groups() -> None:
    model = apply_dual_lora(llama(), configuration(["q_proj", "down_proj"]))
    assert [g["name"] for g in dual_lora_parameter_groups(model, 1e-3)] == ["magnitude", "direction"]
    norms = [parameter.requires_grad_() for name, parameter in model.named_parameters() if "norm" in name]
    groups = {g["name"]: g for g in dual_lora_parameter_groups(model, 1e-3, direction_lr=1e-4, weight_decay=0.1)}
    assert {name: (g["lr"], g["weight_decay"]) for name, g in groups.items()} == {
        "magnitude": (1e-3, 0.0), "direction": (1e-4, 0.0), "other": (1e-3, 0.1)
    }  # fmt: skip
    layers = [module for module in model.modules() if isinstance(module, DualLoraLinear)]
    for name, pair in (("magnitude", "AB"), ("direction", "CD")):
        assert {id(p) for p in groups[name]["params"]} == {id(getattr(layer, f)) for layer in layers for f in pair}
    assert {id(p) for p in groups["other"]["params"]} == {id(p) for p in norms}
    everything = sorted(id(p) for group in groups.values() for p in group["params"])
    assert everything == sorted(id(p) for p in model.parameters() if p.requires_grad)
    torch.optim.AdamW(list(groups.values()))


def test_parameter_groups_leave_out_frozen_factors() -> None:
    model = apply_dual_lora(Block(), configuration(["down"]))
    model.down.A.requires_grad_(False)
    model.down.B.requires_grad_(False)
    (group,) = dual_lora_parameter_groups(model, 1e-3)
    assert group["name"] == "direction"


def test_warm_up_raises_every_scale_in_step() -> None:
    model = nn.Sequential(DualLoraLinear(4, 4, alpha=8.0), DualLoraLinear(4, 4, r1=4, r2=1))
    buffers = [layer.scale for layer in model]
    warmup = DualLoraWarmup(model, 4)
    factors = []
    for _ in range(6):
        factors.append(warmup.factor)
        for layer in model:
            assert layer.scale.item() == pytest.approx(layer.full_scale * warmup.factor)
        warmup.step()
    assert factors == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert all(layer.scale is buffer for layer, buffer in zip(model, buffers, strict=True))


def test_warm_up_resumes() -> None:
    layer = DualLoraLinear(4, 4)
    warmup = DualLoraWarmup(layer, 10)
    for _ in range(3):
        warmup.step()
    state, scale = warmup.state_dict(), layer.scale.item()
    other = DualLoraWarmup(layer, 10)
    assert layer.scale.item() < scale
    other.load_state_dict(state)
    assert layer.scale.item() == scale
    assert other.factor == pytest.approx(0.4)


class Probe(TrainerCallback):
    """Records a layer's scale, relative to the full one, as each forward pass sees it."""

    def __init__(self, layer: DualLoraLinear) -> None:
        self.layer, self.seen = layer, []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.seen.append(round(self.layer.scale.item() / self.layer.full_scale, 4))


def train(model: nn.Module, folder: Path, steps: int, callbacks: list[Any], **options: Any) -> Trainer:
    rows = tokens(8)
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=4, use_cpu=True, report_to=[],
        disable_tqdm=True, logging_steps=1, learning_rate=1e-2, seed=0,
        **{"save_strategy": "no"} | options,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in rows]
    return Trainer(model=model, args=arguments, train_dataset=data, callbacks=callbacks)


def test_warm_up_callback(tmp_path: Path) -> None:
    """Over accumulation steps too, it counts the optimiser's steps; a resumed run goes on where it stopped."""
    model = apply_dual_lora(llama(), configuration(["q_proj"]))
    probe = Probe(model.model.layers[0].self_attn.q_proj)
    options = {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 1}
    train(model, tmp_path, 3, [DualLoraWarmupCallback(2), probe], **options).train()
    assert probe.seen == [0.5, 1.0, 1.0]

    model = apply_dual_lora(llama(), configuration(["q_proj"]))
    probe = Probe(model.model.layers[1].self_attn.q_proj)
    resumed = train(model, tmp_path, 3, [DualLoraWarmupCallback(2), probe], **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert probe.seen == [1.0, 1.0]


@pytest.mark.parametrize("make", [llama, gpt2])
def test_training_lowers_the_loss(make: Any) -> None:
    model = apply_dual_lora(make(), configuration(init_std=0.1)).train()
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(dual_lora_parameter_groups(model, 3e-2, direction_lr=1e-2))
    warmup = DualLoraWarmup(model, 5)
    rows, losses = tokens(4), []
    for _ in range(25):
        loss = model(rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        warmup.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.25
    for name, value in frozen.items():
        assert torch.equal(model.get_parameter(name), value), name


@pytest.mark.parametrize("merged", [False, True])
def test_disable_adapter(merged: bool) -> None:
    model = apply_dual_lora(llama(), configuration())
    before = logits(model)
    if merged:
        model.model.layers[0].self_attn.q_proj.merge()
    weights = {name: tensor.clone() for name, tensor in model.named_parameters()}
    with disable_adapter(model) as same, disable_adapter(model):
        assert same is model
        assert torch.equal(logits(model), logits(llama()))
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.named_parameters())
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    with pytest.raises(KeyError), disable_adapter(model):
        raise KeyError
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)


def test_disable_adapter_needs_one() -> None:
    with (
        pytest.raises(ValueError, match=r"^model: got LlamaForCausalLM without Dual LoRA layers"),
        disable_adapter(llama()),
    ):
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 8}, "'r'; expected r1 .* and r2"),
        ({"lora_alpha": 8}, "'lora_alpha'; expected alpha"),
        ({"ste_": 1}, "expected ste"),
    ],
)
def test_fields_of_loras_configuration_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        DualLoraConfig(**options)
