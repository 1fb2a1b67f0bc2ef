"""`gradient_columns` of layers, configurations and models: when a sample is drawn, and what keeps the option."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from dual_lora_kernels import (
    DualLoraConfig,
    DualLoraLinear,
    apply_dual_lora,
    load_dual_lora,
    save_dual_lora,
    set_gradient_columns,
)
from dual_lora_kernels import peft as peft_door
from dual_lora_kernels.adapter import dual_lora_adapters
from dual_lora_kernels.adapter_files import SETTINGS_FILE
from dual_lora_kernels.self_check.problems import gaussian

from .layers import make
from .models import configuration, llama

OPS = torch.ops.dual_lora_kernels
X = torch.randn(20, 96, generator=torch.Generator().manual_seed(0))


def _stack(**options: Any) -> nn.Sequential:
    return nn.Sequential(*(make(in_features=96, out_features=96, seed=i, **options) for i in range(2)))


def _gradients(model: nn.Module, call: Callable[[nn.Module], torch.Tensor], seed: int = 0) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    model.zero_grad()
    call(model).square().mean().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def _drawn(layer: DualLoraLinear) -> torch.Tensor:
    """Which columns of A got a gradient."""
    assert layer.A.grad is not None
    return (layer.A.grad != 0).any(0)


def test_all_columns_draw_nothing() -> None:
    """The exact path has the bits that it had, and leaves PyTorch's random state alone."""
    layer = make(in_features=96)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    exact = _gradients(layer, lambda model: model(X))
    assert torch.equal(torch.get_rng_state(), before)
    layer.gradient_columns = 0.5
    sampled = _gradients(layer, lambda model: model(X))
    assert not torch.equal(sampled[0], exact[0])
    layer.gradient_columns = 1.0
    assert all(torch.equal(a, b) for a, b in zip(_gradients(layer, lambda model: model(X)), exact, strict=True))


def test_every_call_draws_anew_and_a_seed_decides() -> None:
    layer = make(in_features=96, gradient_columns=0.25)
    seen = []
    for seed in (0, 1, 0):
        _gradients(layer, lambda model: model(X), seed)
        seen.append(_drawn(layer))
        assert 1 <= seen[-1].sum() <= 24
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0], seen[1])
    layer.zero_grad()
    (layer(X).sum() + layer(X).sum()).backward()
    assert _drawn(layer).sum() > 24  # two calls, two samples


def test_evaluation_mode_is_exact() -> None:
    layer = make(in_features=96, gradient_columns=0.25).eval()
    found = _gradients(layer, lambda model: model(X))
    before = torch.get_rng_state()
    layer(X)
    assert torch.equal(torch.get_rng_state(), before)
    expected = _gradients(make(in_features=96), lambda model: model(X))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_draws_the_same(use_reentrant: bool, dropout: float) -> None:
    model = _stack(gradient_columns=0.25, dropout=dropout)
    x = X.clone().requires_grad_()
    plain = _gradients(model, lambda m: m(x))
    recomputed = _gradients(model, lambda m: checkpoint(m, x, use_reentrant=use_reentrant))
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


def test_frozen_factors_draw_nothing() -> None:
    layer = make(in_features=96, gradient_columns=0.25).requires_grad_(False)
    before = torch.get_rng_state()
    layer(X.clone().requires_grad_()).sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_layers_draw_anew_without_compiling_again(compiler: str) -> None:
    torch._dynamo.reset()
    model = _stack(gradient_columns=0.25)
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    seen = []
    for seed in range(3):
        with torch._dynamo.config.patch(error_on_recompile=True) if seed else torch.enable_grad():
            _gradients(model, lambda _: compiled(X), seed)
        seen.append(_drawn(model[0]))
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])
    torch._dynamo.reset()


def test_compiled_layers_follow_a_change() -> None:
    """Every fraction is a graph of its own, and so is a layer's with another fraction."""
    torch._dynamo.reset()
    model = _stack(gradient_columns=0.5)
    model[1].gradient_columns = 0.125
    for layer in model:
        layer.compile(backend="aot_eager")
    for fraction, most in ((0.5, 48), (0.25, 24), (0.125, 12), (1.0, 96), (0.75, 72)):
        model[0].gradient_columns = fraction
        _gradients(model, lambda m: m(X))
        assert most * 0.5 < _drawn(model[0]).sum() <= most
        assert _drawn(model[1]).sum() <= 12
    torch._dynamo.reset()


def test_opcheck(device: torch.device) -> None:
    problem = gaussian(9, 12, 10, 3, 4, device=device)
    draws = torch.arange(4, device=device)
    options = ("dither", 0, 0, "auto", "auto", 1 << 25)
    wanted = [True, True, False, True, True, False]
    torch.library.opcheck(
        OPS.gradients.default,
        (problem.grad, problem.x, [problem.weight], "", tuple(problem.factors), wanted, "clip", 1.0, draws, *options),
    )


def test_copies_and_pickles_keep_it() -> None:
    layer = make(gradient_columns=0.25)
    assert copy.deepcopy(layer).gradient_columns == 0.25
    assert pickle.loads(pickle.dumps(layer)).gradient_columns == 0.25
    del layer._gradient_columns, layer._sample_size  # as in a pickle of an earlier version
    assert layer.gradient_columns == 1.0


@pytest.mark.parametrize("value", [0, -0.1, 1.01, float("nan"), "half", None, True])
def test_a_bad_fraction_changes_nothing(value: Any) -> None:
    layer = make(gradient_columns=0.25)
    with pytest.raises((ValueError, TypeError), match="gradient_columns: got"):
        layer.gradient_columns = value
    with pytest.raises((ValueError, TypeError), match="fraction: got"):
        set_gradient_columns(nn.Sequential(layer), value)
    assert layer.gradient_columns == 0.25


def test_a_models_layers_are_set_together() -> None:
    for model in (
        apply_dual_lora(llama(), configuration(gradient_columns=0.5)),
        get_peft_model(llama(), peft_door.DualLoraConfig(target_modules="all-linear", gradient_columns=0.5)),
    ):
        layers = [adapter for _, adapter in dual_lora_adapters(model)]
        assert {layer.gradient_columns for layer in layers} == {0.5}
        set_gradient_columns(model, 1)
        assert {layer.gradient_columns for layer in layers} == {1.0}
    with pytest.raises(ValueError, match="model: got Linear without Dual LoRA layers"):
        set_gradient_columns(nn.Linear(2, 2), 0.5)


def test_it_is_saved_where_it_is_not_1(tmp_path: Path) -> None:
    """Files of exact runs stay what earlier versions read."""
    model = apply_dual_lora(llama(), configuration())
    save_dual_lora(model, tmp_path / "exact")
    assert "gradient_columns" not in (tmp_path / "exact" / SETTINGS_FILE).read_text()
    set_gradient_columns(model, 0.25)
    save_dual_lora(model, tmp_path / "sampled")
    again = load_dual_lora(llama(), tmp_path / "sampled")
    assert {layer.gradient_columns for _, layer in dual_lora_adapters(again)} == {0.25}


def test_the_plain_doors_pefts_files_have_it_where_it_is_the_same_below_1(tmp_path: Path) -> None:
    model = apply_dual_lora(llama(), configuration())
    for fractions, saved in (((1.0, 1.0), None), ((0.5, 0.5), 0.5), ((0.5, 1.0), None)):
        layers = [adapter for _, adapter in dual_lora_adapters(model)]
        for index, layer in enumerate(layers):
            layer.gradient_columns = fractions[index == 0]
        model.save_pretrained(tmp_path / "adapter")
        settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        assert settings.get("gradient_columns") == saved
        again = PeftModel.from_pretrained(llama(), tmp_path / "adapter")
        assert {layer.gradient_columns for _, layer in dual_lora_adapters(again)} == {saved or 1.0}


def test_pefts_files_follow_a_change(tmp_path: Path) -> None:
    model = get_peft_model(llama(), peft_door.DualLoraConfig(target_modules="all-linear", gradient_columns=0.25))
    set_gradient_columns(model, 0.5)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path)
    assert {layer.gradient_columns for _, layer in dual_lora_adapters(again)} == {0.5}


def test_it_is_shown() -> None:
    assert "gradient_columns=0.25" in repr(make(gradient_columns=0.25))
    assert "gradient_columns" not in repr(make())


def test_so_many_columns_that_none_is_left_out() -> None:
    layer = make(in_features=96, gradient_columns=0.999)
    before = torch.get_rng_state()
    layer(X)
    assert torch.equal(torch.get_rng_state(), before)


def test_pefts_files_have_it_and_may_lack_it(tmp_path: Path) -> None:
    model = get_peft_model(llama(), peft_door.DualLoraConfig(target_modules="all-linear", gradient_columns=0.25))
    model.save_pretrained(tmp_path)
    for again in (PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True), load_dual_lora(llama(), tmp_path)):
        assert {layer.gradient_columns for _, layer in dual_lora_adapters(again)} == {0.25}
    file = tmp_path / "adapter_config.json"
    settings = json.loads(file.read_text())
    del settings["gradient_columns"]
    file.write_text(json.dumps(settings))
    for again in (PeftModel.from_pretrained(llama(), tmp_path), load_dual_lora(llama(), tmp_path)):
        assert {layer.gradient_columns for _, layer in dual_lora_adapters(again)} == {1.0}


def test_a_configuration_checks_it() -> None:
    for config in (DualLoraConfig, peft_door.DualLoraConfig):
        with pytest.raises(ValueError, match="gradient_columns: got 2"):
            config(gradient_columns=2)
