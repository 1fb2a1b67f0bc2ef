"""The PEFT tuner on models that transformers quantised."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import AutoModelForCausalLM

from dual_lora_kernels import quantised_weight
from dual_lora_kernels.peft.quantised_layer import QuantisedLinear

from .models import logits, tokens
from .peft_models import config
from .quantised_layers import CONFIGS, four_bit, quantised_llama


def _adapted(form: str, prepare: bool = False, **options: Any) -> PeftModel:
    model = quantised_llama(form)
    if prepare:
        model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(1)
    return get_peft_model(model, config(**options)).eval()


def _layers(model: nn.Module) -> dict[str, QuantisedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantisedLinear)}


@pytest.mark.parametrize("form", CONFIGS)
@pytest.mark.parametrize("prepare", [False, True], ids=["as loaded", "kbit training"])
def test_it_trains_saves_reloads_and_merges_exactly(form: str, prepare: bool, tmp_path: Path) -> None:
    model = _adapted(form, prepare).train()
    assert len(_layers(model)) == 14
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(quantised_llama(form), tmp_path / "adapter").eval()
    if not prepare:
        assert torch.equal(logits(again), logits(model))
    used = {name: layer.plain(torch.bfloat16).weight for name, layer in _layers(model).items()}
    trained = logits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # nothing is lost, so nothing is warned of
        merged = model.merge_and_dequantize()
    torch.testing.assert_close(logits(merged).float(), trained.float(), atol=0.05, rtol=0.05)
    merged.save_pretrained(tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not hasattr(plain.config, "quantization_config")
    for name, weight in used.items():
        assert torch.equal(plain.get_submodule(name.removeprefix("base_model.model.")).weight, weight)


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_requantising_warns_with_what_it_loses_and_unmerges_exactly(form: str) -> None:
    model = _adapted(form)
    layers = _layers(model)
    before = {name: quantised_weight(layer.base_layer).dequantised() for name, layer in layers.items()}
    adapted = logits(model)
    with pytest.warns(UserWarning, match=r"has quantised 14 weights anew .* of the update is kept, with an error of"):
        model.merge_adapter()
    kind = bnb.nn.Linear8bitLt if form == "int8" else bnb.nn.Linear4bit
    for name, layer in layers.items():
        assert type(layer.base_layer) is kind
        assert not torch.equal(quantised_weight(layer.base_layer).dequantised(), before[name])
    logits(model)
    model.unmerge_adapter()
    for name, layer in layers.items():
        assert torch.equal(quantised_weight(layer.base_layer).dequantised(), before[name])
    torch.testing.assert_close(logits(model), adapted)
    with pytest.warns(UserWarning, match="merge_and_dequantize"):
        merged = model.merge_and_unload()
    assert sum(isinstance(module, kind) for module in merged.modules()) == 14


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_unmerging_restores_a_model_that_ran_before_it_was_adapted(form: str) -> None:
    """bitsandbytes' int8 layers move their scales from the weight to the layer at their first call."""
    model = quantised_llama(form).eval()
    logits(model)
    torch.manual_seed(1)
    adapted = get_peft_model(model, config()).eval()
    before = logits(adapted)
    with pytest.warns(UserWarning, match="anew"):
        adapted.merge_adapter()
    for layer in _layers(adapted).values():
        layer.base_layer(torch.randn(2, layer.in_features, dtype=torch.bfloat16))
    with adapted.disable_adapter():  # which unmerges
        logits(adapted)
    assert not any(layer.merged for layer in _layers(adapted).values())
    assert torch.equal(logits(adapted), before)


def test_unknown_adapters_and_dtypes_are_refused() -> None:
    model = _adapted("nf4")
    for merge in (model.merge_adapter, model.merge_and_unload, model.merge_and_dequantize):
        with pytest.raises(ValueError, match=r"^adapter_names: got \['defualt'\], expected some of \['default'\]"):
            merge(adapter_names=["defualt"])
    for dtype in (torch.int8, torch.float8_e4m3fn, "bfloat16"):
        with pytest.raises(TypeError, match=r"^dtype: got "):
            model.merge_and_dequantize(dtype)
    assert len(_layers(model)) == 14


def test_a_model_that_transformers_dequantises_goes_on() -> None:
    model = _adapted("nf4")
    before = logits(model)
    model.base_model.model.dequantize()
    torch.testing.assert_close(logits(model), before, atol=0.05, rtol=0.05)
    torch.testing.assert_close(logits(model.merge_and_dequantize()), before, atol=0.05, rtol=0.05)


def test_factors_that_something_has_cast_down_are_told_of(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL's trainers cast the trainable parameters of 4-bit models to bf16, in which small steps round away."""
    monkeypatch.setattr("dual_lora_kernels.adapter._has_warned", False)
    model = _adapted("nf4").train()
    logits(model)
    model(input_ids=tokens())
    assert "factors train in" not in caplog.text
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    logits(model)
    assert "factors train in" not in caplog.text  # nothing trains there
    model(input_ids=tokens())
    assert caplog.text.count("factors train in torch.bfloat16") == 1


def test_adapters_of_other_layers_do_not_keep_one_from_merging() -> None:
    model = get_peft_model(quantised_llama("torchao-int8"), config(["q_proj"]))
    model.base_model.model.model.layers[0].mlp.up_proj = nn.Linear(64, 192, bias=False).bfloat16()
    model.add_adapter("other", config([r"model.layers.0.mlp.up_proj"]))
    model.merge_adapter(["other"])
    with pytest.raises(ValueError, match="with a weight of Int8Tensor, expected bitsandbytes'"):
        model.merge_adapter(["default"])


def test_merges_that_do_nothing_warn_of_nothing_anew() -> None:
    model = _adapted("nf4")
    with pytest.warns(UserWarning, match="anew"):
        model.merge_adapter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.merge_adapter()
    assert not [each for each in caught if "anew" in str(each.message)]


def test_dense_layers_of_a_quantised_model_are_rounded_once() -> None:
    model = quantised_llama("nf4")
    model.model.layers[0].mlp.up_proj = nn.Linear(64, 192, bias=False)
    adapted = get_peft_model(model, config(["up_proj", "q_proj"])).eval()
    layer = adapted.base_model.model.model.layers[0].mlp.up_proj
    adapter, before = layer.dual_adapter["default"], layer.base_layer.weight.detach().clone()
    expected = adapter.merged_with(before, torch.bfloat16)
    merged = adapted.merge_and_dequantize()
    assert torch.equal(merged.model.layers[0].mlp.up_proj.weight, expected)


def test_gpt2_and_a_trained_head_merge(tmp_path: Path) -> None:
    model = prepare_model_for_kbit_training(quantised_llama("nf4", gpt2=True), use_gradient_checkpointing=False)
    model = get_peft_model(model, config(["c_attn"], modules_to_save=["lm_head"])).train()
    before = logits(model)
    model.merge_and_dequantize().save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(again).float(), before.float(), atol=0.05, rtol=0.05)


def test_the_disabled_adapter_is_the_base_that_it_updates() -> None:
    """bitsandbytes' own products repack the weight on some CPUs, and round its statistics: the policy would change."""
    model = _adapted("nf4")
    before = logits(model)
    with model.disable_adapter():
        base = logits(model)
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), before)
    for layer in _layers(model).values():
        assert not getattr(layer.base_layer.weight.quant_state, "packing_format_for_cpu", False)
        layer.dual_adapter["default"].set_scale(0.0)
    torch.testing.assert_close(logits(model), base, atol=0.0, rtol=0.0)


def test_several_adapters_and_mixed_batches() -> None:
    model = _adapted("nf4")
    model.add_adapter("other", config())
    ids = tokens(3)
    with torch.no_grad():
        mixed = model(input_ids=ids, adapter_names=["default", "other", "__base__"]).logits
        for row, name in enumerate(["default", "other"]):
            model.set_adapter(name)
            torch.testing.assert_close(mixed[row], model(input_ids=ids[row : row + 1]).logits[0], atol=0.05, rtol=0.05)
        with model.disable_adapter():
            torch.testing.assert_close(mixed[2], model(input_ids=ids[2:]).logits[0], atol=0.05, rtol=0.05)


def test_merging_what_is_merged_or_not_finite_is_refused() -> None:
    model = _adapted("nf4")
    with pytest.warns(UserWarning, match="anew"):
        model.merge_adapter()
    with pytest.raises(ValueError, match=r"merged adapters, expected unmerged ones: call unmerge_adapter\(\)"):
        model.merge_and_dequantize()
    model.unmerge_adapter()
    last = list(_layers(model).values())[-1]
    with torch.no_grad():
        last.dual_adapter["default"].D[0, 0] = torch.nan
    with pytest.raises(ValueError, match="D: got nan"):
        model.merge_and_dequantize()
    assert len(_layers(model)) == 14


def test_a_layer_that_is_not_quantised_yet_is_named() -> None:
    model = nn.Sequential(four_bit(48, 128, quantised=False))
    with pytest.raises(ValueError, match="not quantised yet: move the layer to its device first"):
        get_peft_model(model, config(["0"], task_type=None))
