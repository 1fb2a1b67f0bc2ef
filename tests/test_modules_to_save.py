"""Modules that are trained whole beside the adapters, in the plain door: new classification heads above all."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import BertConfig, BertForQuestionAnswering, RobertaConfig, RobertaForSequenceClassification

from dual_lora_kernels import (
    DualLoraConfig,
    apply_dual_lora,
    dual_lora_state_dict,
    load_dual_lora,
    load_dual_lora_state_dict,
    merge_dual_lora,
    save_dual_lora,
)

from .models import configuration, gpt2, llama, logits, tokens
from .peft_models import config

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip


def classifier() -> RobertaForSequenceClassification:
    torch.manual_seed(0)
    return RobertaForSequenceClassification(RobertaConfig(**SIZES, pad_token_id=0)).eval()


def step(model: nn.Module) -> None:
    model(input_ids=tokens(), labels=torch.tensor([0, 1])).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5).step()
    model.zero_grad()


def test_a_new_head_trains_and_is_saved(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    model = apply_dual_lora(classifier(), configuration())
    assert "trained whole and saved: classifier" in caplog.text
    assert type(model.classifier.dense) is nn.Linear
    before = {name: p.detach().clone() for name, p in model.classifier.named_parameters()}
    step(model)
    assert all(not torch.equal(p, before[name]) for name, p in model.classifier.named_parameters())
    save_dual_lora(model, tmp_path)
    assert "not saved" not in caplog.text
    assert torch.equal(logits(load_dual_lora(classifier(), tmp_path).eval()), logits(model))
    again = apply_dual_lora(classifier(), configuration())
    load_dual_lora_state_dict(again, dual_lora_state_dict(model))
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(logits(load_dual_lora(apply_dual_lora(classifier(), configuration()), tmp_path)), logits(model))


def test_a_merged_model_has_the_trained_head(tmp_path: Path) -> None:
    model = apply_dual_lora(classifier(), configuration())
    step(model)
    expected = logits(model)
    merge_dual_lora(model).save_pretrained(tmp_path)
    found = logits(RobertaForSequenceClassification.from_pretrained(tmp_path).eval())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (
        dual_lora_state_dict(apply_dual_lora(model, configuration(modules_to_save=())))
        .keys()
        .isdisjoint({"classifier.dense.weight"})
    )


@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_language_models_head_is_none(make: object) -> None:
    model = apply_dual_lora(make(), configuration())
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == set("ABCD")


def test_other_heads_are_found_too() -> None:
    model = apply_dual_lora(BertForQuestionAnswering(BertConfig(**SIZES)), configuration())
    assert model.qa_outputs.weight.requires_grad
    assert "qa_outputs.weight" in dual_lora_state_dict(model)


def test_without_any() -> None:
    model = apply_dual_lora(classifier(), configuration(modules_to_save=()))
    assert type(model.classifier.dense) is not nn.Linear
    assert not any("classifier.dense.weight" in name for name in dual_lora_state_dict(model))


def test_named_ones(tmp_path: Path) -> None:
    """A normalisation and an embedding, by the ends of their names; buffers are saved too."""
    model = llama()
    model.model.layers[0].input_layernorm.register_buffer("count", torch.tensor([3], dtype=torch.int64))
    config = configuration(["q_proj"], modules_to_save=["input_layernorm", "embed_tokens"])
    apply_dual_lora(model, config)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1.5)
        model.model.layers[0].input_layernorm.count.add_(4)
    names = {name for name, p in model.named_parameters() if p.requires_grad and len(name.rpartition(".")[2]) > 1}
    assert names == {"model.embed_tokens.weight", *(f"model.layers.{i}.input_layernorm.weight" for i in range(2))}
    save_dual_lora(model, tmp_path)
    again = llama()
    again.model.layers[0].input_layernorm.register_buffer("count", torch.tensor([0], dtype=torch.int64))
    load_dual_lora(again, tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert again.model.layers[0].input_layernorm.count.item() == 7


def test_what_is_trained_whole_is_no_target() -> None:
    model = apply_dual_lora(llama(), configuration(["q_proj", "up_proj"], modules_to_save=["layers.0.mlp"]))
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    assert type(model.model.layers[1].mlp.up_proj) is not nn.Linear


def test_names_that_match_nothing() -> None:
    with pytest.raises(ValueError, match=r"^modules_to_save: got \['head'\], expected names of modules in Llama"):
        apply_dual_lora(llama(), configuration(modules_to_save=["head"]))
    with pytest.raises(ValueError, match=r"^modules_to_save: got 'lm_head', expected a list of names"):
        DualLoraConfig(modules_to_save="lm_head")


def test_an_adapter_with_a_module_that_the_model_lacks(tmp_path: Path) -> None:
    save_dual_lora(apply_dual_lora(llama(), configuration(["q_proj"], modules_to_save=["lm_head"])), tmp_path)
    other = llama()
    other.head, other.lm_head = other.lm_head, None
    with pytest.raises(ValueError, match="a module 'lm_head', which the model does not have"):
        load_dual_lora(other, tmp_path)


@pytest.mark.parametrize("names", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_tied_modules_are_refused(names: list[str], tmp_path: Path) -> None:
    """The plain door would train both, PEFT trains a copy: their files would mean different things."""
    with pytest.raises(ValueError, match=r"^modules_to_save: '.*' has a weight that is tied to another module's"):
        apply_dual_lora(llama(tied=True), configuration(modules_to_save=names))
    tuned = get_peft_model(llama(tied=True), config(["q_proj"], modules_to_save=names))
    tuned.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^folder: '.*' has a weight that is tied to another module's"):
        load_dual_lora(llama(tied=True), tmp_path)


class SharedHeads(nn.Module):
    """A backbone with two new heads on it; as in detection models, parts of one are shared."""

    base_model_prefix = "backbone"

    def __init__(self, *, outside: bool) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(8, 8))
        self.boxes = nn.ModuleList([nn.Linear(8, 4)])
        self.boxes.append(self.boxes[0])
        self.classes = nn.Linear(8, 3)
        if outside:
            self.backbone.register_module("boxes", self.boxes[0])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.backbone[0](x)
        return torch.cat([self.boxes[0](x), self.boxes[1](x), self.classes(x)], 1)


@pytest.mark.parametrize("outside", [False, True])
def test_heads_with_shared_parts(outside: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Within a head, parts may be shared; a head that shares with the backbone stays frozen, and the log says so."""
    caplog.set_level(logging.WARNING)
    torch.manual_seed(0)
    base = SharedHeads(outside=outside)
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = apply_dual_lora(base, configuration(["backbone.0"]))
    assert ("not trained: boxes, whose weights are tied" in caplog.text) == outside
    assert model.classes.weight.requires_grad
    assert model.boxes[0].weight.requires_grad != outside
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    save_dual_lora(model, tmp_path)
    other = SharedHeads(outside=outside)
    other.load_state_dict(state)
    x = torch.randn(3, 8)
    assert torch.equal(load_dual_lora(other, tmp_path)(x), model(x))
