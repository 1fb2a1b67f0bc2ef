"""`QuantisedDualLoraLinear`, and models that transformers quantised, through `apply_dual_lora`."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import prepare_model_for_kbit_training
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from dual_lora_kernels import (
    DualLoraLinear,
    QuantisedDualLoraLinear,
    apply_dual_lora,
    disable_adapter,
    dual_lora_state_dict,
    load_dual_lora,
    merge_dual_lora,
    prepared,
    quantised_weight,
    reference,
    save_dual_lora,
)
from dual_lora_kernels.linear import dual_lora_layers
from dual_lora_kernels.quantised.models import _cast_rest

from .models import configuration, logits, tokens
from .quantised_layers import CONFIGS, FORMATS, eight_bit, four_bit, numbers_of, quantised_llama

OPTIONS: dict[str, Any] = {"r1": 3, "r2": 2, "alpha": 1.0, "init_std": 0.3}


def _adapted(base: nn.Module) -> QuantisedDualLoraLinear:
    layer = DualLoraLinear.from_linear(base, **OPTIONS)
    assert isinstance(layer, QuantisedDualLoraLinear)
    return layer


def _twin(layer: QuantisedDualLoraLinear, dtype: torch.dtype | None = None) -> DualLoraLinear:
    """The same adapter on the dequantised weight."""
    numbers = numbers_of(layer.base_layer)
    dense = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, dtype=dtype or numbers.dtype)
    dense.weight = nn.Parameter(numbers.to(dense.weight.dtype))
    if layer.bias is not None:
        dense.bias = nn.Parameter(layer.bias.detach().to(dense.weight.dtype))
    twin = DualLoraLinear.from_linear(dense, **OPTIONS)
    twin.load_state_dict({name: getattr(layer, name) for name in ("A", "B", "C", "D", "scale")}, strict=False)
    return twin


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("count", [3, 100])
def test_a_layer_computes_what_the_dequantised_one_does(form: str, dtype: torch.dtype, count: int) -> None:
    layer = _adapted(four_bit(48, 128, form, dtype=dtype, compute_dtype=dtype))
    twin = _twin(layer)
    x, grad = torch.randn(2, count, 128).to(dtype), torch.randn(2, count, 48).to(dtype)
    results = []
    for each in (layer, twin):
        own = x.clone().requires_grad_()
        y = each(own)
        results.append([y, *torch.autograd.grad(y, [own, *each.factors()], grad)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-2 if dtype == torch.bfloat16 else 1e-5, rtol=1e-2)


def test_compute_dtype_is_the_layers() -> None:
    """Inputs of any dtype are computed with in it, whatever autocast says, and get their own back."""
    layer = _adapted(four_bit(48, 128, compute_dtype=torch.bfloat16))
    x = torch.randn(5, 128)
    expected = layer(x.bfloat16())
    assert expected.dtype == torch.bfloat16
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", dtype=torch.float16):
            y = layer(x.bfloat16().to(dtype))
        assert torch.equal(y, expected.to(dtype))
    unset = _adapted(four_bit(48, 128))
    unset(x)  # bitsandbytes takes the first input's then
    assert unset.base_layer.compute_dtype == torch.float32


@pytest.mark.parametrize("make", [lambda: four_bit(48, 128, compute_dtype=torch.bfloat16), lambda: eight_bit(48, 128)])
def test_merged_weights_are_those_of_training_to_the_bit(make: Any) -> None:
    layer = _adapted(make())
    linear = layer.to_linear(torch.bfloat16)
    assert type(linear) is nn.Linear
    expected = reference.effective_weight(
        numbers_of(layer.base_layer), *layer.factors(), layer.scale, torch.bfloat16, "dither"
    )
    assert linear.weight.dtype == torch.bfloat16
    torch.testing.assert_close(linear.weight, expected)  # P and Q are summed in another order there
    layer.base_layer.bias = None
    used = layer(torch.eye(128, dtype=torch.bfloat16))
    assert torch.equal(linear.weight, used.t())


def test_what_a_quantised_layer_cannot_do_says_what_can() -> None:
    layer = _adapted(four_bit(48, 128))
    with pytest.raises(
        RuntimeError, match=r"^QuantisedDualLoraLinear cannot merge .* merge_dual_lora\(model\) or to_l"
    ):
        layer.merge()
    assert not layer.merged


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_preparing_keeps_w_for_calls_without_gradients(dtype: torch.dtype) -> None:
    layer = _adapted(four_bit(48, 128, compute_dtype=dtype)).eval()
    x = torch.randn(5, 128)
    with torch.no_grad():
        before = layer(x)
        layer.prepare()
        assert layer._prepared_weight(x.to(dtype)) is not None
        torch.testing.assert_close(layer(x), before, atol=1e-2, rtol=1e-2)
        layer.A.add_(1)
        assert layer.prepared
        layer(x)
    assert not layer.prepared


def test_copies_and_states_keep_the_quantised_weight() -> None:
    layer = _adapted(four_bit(48, 128, compute_dtype=torch.float32)).eval()
    x = torch.randn(5, 128)
    other = copy.deepcopy(layer)
    assert torch.equal(other(x), layer(x))
    state = layer.state_dict()
    assert {"A", "scale", "base_layer.weight", "base_layer.weight.absmax", "base_layer.bias"} <= state.keys()
    layer.to("cpu").double()  # the packed weight is no floating-point tensor
    assert layer.weight.dtype == torch.uint8
    assert torch.equal(quantised_weight(layer.base_layer).dequantised(), numbers_of(other.base_layer))


def test_frozen_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    model = quantised_llama("nf4")
    features = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, bnb.nn.Linear4bit))
    packed = sum(m.weight.numel() for m in model.modules() if isinstance(m, bnb.nn.Linear4bit))
    with caplog.at_level("INFO"):
        apply_dual_lora(model, configuration())
    assert {p.requires_grad for n, p in model.named_parameters() if n.rpartition(".")[2] in "ABCD"} == {True}
    assert not any(p.requires_grad for n, p in model.named_parameters() if n.rpartition(".")[2] not in "ABCD")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters()) + features - packed
    partial = apply_dual_lora(quantised_llama("nf4"), configuration(["q_proj"]))
    with caplog.at_level("INFO"):
        apply_dual_lora(quantised_llama("nf4"), configuration(["q_proj"]))
    own = sum(p.numel() for p in partial.parameters() if p.requires_grad)
    assert f"{own:,} of {total - trained + own:,} parameters train" in caplog.text
    assert f"of {total:,} parameters train" in caplog.text


@pytest.mark.parametrize("form", CONFIGS)
@pytest.mark.parametrize("prepare", [False, True], ids=["as loaded", "kbit training"])
def test_a_quantised_model_trains_saves_reloads_and_merges(form: str, prepare: bool, tmp_path: Path) -> None:
    model = quantised_llama(form)
    if prepare:
        model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    apply_dual_lora(model, configuration())
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()
    save_dual_lora(model, tmp_path / "adapter")
    assert sum(f.stat().st_size for f in (tmp_path / "adapter").iterdir()) < 200_000  # the adapter alone
    again = quantised_llama(form)
    load_dual_lora(again, tmp_path / "adapter")
    assert dual_lora_state_dict(again).keys() == dual_lora_state_dict(model).keys()
    if not prepare:
        assert torch.equal(logits(again.eval()), logits(model))
    trained = logits(model)
    used = {name: layer.to_linear(torch.bfloat16).weight for name, layer in dual_lora_layers(model)}
    merge_dual_lora(model)
    torch.testing.assert_close(logits(model).float(), trained.float(), atol=0.05, rtol=0.05)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model.save_pretrained(tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not hasattr(plain.config, "quantization_config")
    for name, weight in used.items():
        assert torch.equal(plain.get_submodule(name).weight, weight)


def test_layers_without_an_adapter_are_dequantised_too(caplog: pytest.LogCaptureFixture) -> None:
    model = apply_dual_lora(quantised_llama("nf4"), configuration(["q_proj"]))
    expected = numbers_of(model.model.layers[0].mlp.up_proj)
    with caplog.at_level("INFO"):
        merge_dual_lora(model)
    assert "dequantised 12 layers without adapters" in caplog.text
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, expected)


def test_layers_that_bitsandbytes_has_repacked_are_merged_rightly() -> None:
    """In eval mode, on CPUs with bf16 units, it repacks layers without an adapter; transformers then misreads them."""
    model = apply_dual_lora(quantised_llama("nf4"), configuration(["q_proj"])).eval()
    expected = numbers_of(model.model.layers[0].mlp.up_proj)
    before = logits(model)
    merge_dual_lora(model)
    weight = model.model.layers[0].mlp.up_proj.weight
    assert (weight - expected).abs().max() <= expected.abs().max() / 64  # the absmax has been rounded to bf16
    torch.testing.assert_close(logits(model), before, atol=0.03, rtol=0.03)


@pytest.mark.parametrize("targets", ["all-linear", ["c_fc"]], ids=str)
def test_gpt2_gets_its_own_kind_of_layers_back(targets: Any, tmp_path: Path) -> None:
    model = apply_dual_lora(quantised_llama("nf4", gpt2=True), configuration(targets)).train()
    before = logits(model)
    merge_dual_lora(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(again), before, atol=0.05, rtol=0.05)


def test_torchaos_layers_merge_and_save(tmp_path: Path) -> None:
    model = quantised_llama("torchao-int8")
    apply_dual_lora(model, configuration(["q_proj"])).eval()
    before = logits(model)
    merge_dual_lora(model).save_pretrained(tmp_path)
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), before, atol=0.05, rtol=0.05
    )


def test_a_head_trained_in_fp32_is_rounded_with_the_rest(caplog: pytest.LogCaptureFixture) -> None:
    model = prepare_model_for_kbit_training(quantised_llama("nf4"), use_gradient_checkpointing=False)
    apply_dual_lora(model, configuration(["q_proj"], modules_to_save=["lm_head"]))
    with torch.no_grad():
        model.lm_head.weight.add_(1e-4)
    with caplog.at_level("WARNING"):
        merge_dual_lora(model)
    assert "rounded to torch.bfloat16, as the merged layers are: lm_head.weight" in caplog.text
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_model_merged_in_another_dtype_runs(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    model = apply_dual_lora(quantised_llama("nf4"), configuration()).eval()
    before = logits(model)
    with caplog.at_level("INFO"):
        merge_dual_lora(model, dtype)
    assert f"merged to {dtype}, while layers computed in torch.bfloat16" in caplog.text
    assert model.config.dtype == dtype
    torch.testing.assert_close(logits(model).float(), before.float(), atol=0.05, rtol=0.05)


def test_a_model_that_transformers_dequantises_goes_on() -> None:
    model = apply_dual_lora(quantised_llama("nf4"), configuration()).train()
    before = logits(model)
    model.dequantize()
    torch.testing.assert_close(logits(model), before, atol=0.05, rtol=0.05)
    merge_dual_lora(model)
    torch.testing.assert_close(logits(model), before, atol=0.05, rtol=0.05)


class _Around(nn.Module):
    """A model of the user's around one of transformers'."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, ids: torch.Tensor) -> Any:
        return self.inner(ids)


@pytest.mark.parametrize("form", ["nf4", "int8"])
@pytest.mark.parametrize("prepare", [False, True])
def test_a_model_inside_another_merges_to_its_own_dtype(form: str, prepare: bool) -> None:
    inner = quantised_llama(form)
    if prepare:
        inner = prepare_model_for_kbit_training(inner, use_gradient_checkpointing=False)
    model = apply_dual_lora(_Around(inner), configuration()).eval()
    before = logits(model)
    merge_dual_lora(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(logits(model).float(), before.float(), atol=0.05, rtol=0.05)


def test_a_dense_layer_of_a_quantised_model_is_rounded_once() -> None:
    """kbit training casts it up to fp32; the merged bf16 weight is round(W0 + ΔW), dithered."""
    model = quantised_llama("nf4")
    model.model.layers[0].mlp.up_proj = dense = nn.Linear(64, 192, bias=False)
    apply_dual_lora(model, configuration(["up_proj"]))
    expected = reference.effective_weight(
        dense.weight, *model.model.layers[0].mlp.up_proj.factors(), torch.tensor(0.4), torch.bfloat16, "dither"
    )
    model.model.layers[0].mlp.up_proj.set_scale(0.4)
    merge_dual_lora(model)
    merged = model.model.layers[0].mlp.up_proj.weight
    assert merged.dtype == torch.bfloat16
    assert (merged != expected).float().mean() < 0.01  # P and Q are summed in another order there


def test_dense_layers_outside_quantised_models_keep_their_dtype() -> None:
    """The dtype is that of dequantised weights: a model of both kinds of layers, and one without quantised ones."""
    model = nn.Sequential(four_bit(64, 128, compute_dtype=torch.bfloat16), nn.Linear(64, 48))
    apply_dual_lora(model, configuration())
    merge_dual_lora(model, torch.float16)
    assert [layer.weight.dtype for layer in model] == [torch.float16, torch.float32]
    dense = apply_dual_lora(nn.Sequential(nn.Linear(8, 8)), configuration())
    assert merge_dual_lora(dense, torch.bfloat16)[0].weight.dtype == torch.float32


def test_an_overflow_in_another_dtype_is_found_before_anything_changes() -> None:
    model = quantised_llama("nf4")
    model.model.layers[0].mlp.up_proj = nn.Linear(64, 192, bias=False)
    apply_dual_lora(model, configuration(["up_proj"]))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.B.fill_(1e4)
        model.model.layers[0].mlp.up_proj.A.fill_(1e4)
    with pytest.raises(ValueError, match=r"^model\.layers\.0\.mlp\.up_proj\.weight: .* overflow torch\.float16"):
        merge_dual_lora(model, torch.float16)
    assert len(list(dual_lora_layers(model))) == 2


def test_an_int8_model_is_prepared_in_its_own_dtype() -> None:
    model = apply_dual_lora(quantised_llama("int8"), configuration()).eval()
    before = logits(model)
    with prepared(model):
        layers = [layer for _, layer in dual_lora_layers(model)]
        assert all(layer._prepared is not None and layer._prepared.weight.dtype == torch.bfloat16 for layer in layers)
        torch.testing.assert_close(logits(model), before, atol=0.05, rtol=0.05)


def test_parameters_that_transformers_keeps_in_fp32() -> None:
    """For fp16 alone, or, the strict ones, for bf16 as well; as from_pretrained does."""
    for dtype, kept in ((torch.bfloat16, {"strict.weight"}), (torch.float16, {"strict.weight", "plain.weight"})):
        model: Any = nn.ModuleDict({"strict": nn.Linear(2, 2, False), "plain": nn.Linear(2, 2, False)})
        model._keep_in_fp32_modules, model._keep_in_fp32_modules_strict = ["plain"], ["strict"]
        model.config = SimpleNamespace(dtype=torch.float32)
        _cast_rest(model, dtype)
        assert {name for name, p in model.named_parameters() if p.dtype == torch.float32} == kept


def test_merging_checks_everything_first() -> None:
    model = apply_dual_lora(quantised_llama("nf4"), configuration())
    layers = dict(dual_lora_layers(model))
    last = list(layers)[-1]
    with torch.no_grad():
        layers[last].B[0, 0] = torch.inf
    with pytest.raises(ValueError, match=rf"^{last}\.B: got inf"):
        merge_dual_lora(model)
    assert all(isinstance(layer, QuantisedDualLoraLinear) for _, layer in dual_lora_layers(model))
    with pytest.raises(TypeError, match=r"^dtype: got torch\.int8"):
        merge_dual_lora(model, torch.int8)


def test_disabling_and_preparing_a_model() -> None:
    model = apply_dual_lora(quantised_llama("nf4"), configuration()).eval()
    base = quantised_llama("nf4").train()  # in eval mode bitsandbytes rounds the absmax on some CPUs
    adapted = logits(model)
    own = logits(base)
    update = (adapted - own).norm()
    with disable_adapter(model):
        assert (logits(model) - own).norm() < 0.1 * update
    with prepared(model):
        assert (logits(model) - adapted).norm() < 0.1 * update


def test_transformers_trainer_accepts_it(tmp_path: Path) -> None:
    model = apply_dual_lora(quantised_llama("nf4"), configuration())
    data = [{"input_ids": row, "labels": row} for row in tokens(4)]
    arguments = TrainingArguments(tmp_path, max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True)
    Trainer(model, arguments, train_dataset=data).train()
    model.save_pretrained(tmp_path / "adapter")
    again = quantised_llama("nf4")
    load_dual_lora(again, tmp_path / "adapter")
    assert torch.equal(logits(again.eval()), logits(model.eval()))


def test_a_quantised_model_that_is_not_quantised_yet_is_refused() -> None:
    model = nn.Sequential(four_bit(48, 128, quantised=False))
    with pytest.raises(ValueError, match="not quantised yet: move the layer to its device first"):
        apply_dual_lora(model, configuration(["0"]))
    with pytest.raises(ValueError, match="0: Linear4bit's weight is not quantised yet"):
        apply_dual_lora(model, configuration())
    assert isinstance(model[0], bnb.nn.Linear4bit)
    apply_dual_lora(model.to("cpu"), configuration())
    assert model(torch.randn(2, 128)).shape == (2, 48)
