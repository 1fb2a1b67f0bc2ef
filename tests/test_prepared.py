"""A prepared layer: the same bits as a merged one, only where it serves, and never out of date."""

from __future__ import annotations

import copy
import logging

import pytest
import torch

from dual_lora_kernels import DualLoraLinear, apply_dual_lora, prepared

from .bits import bits
from .models import configuration, llama, tokens

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _layer(dtype: torch.dtype = torch.float32, **options: object) -> DualLoraLinear:
    torch.manual_seed(0)
    return DualLoraLinear(40, 30, dtype=dtype, r1=4, r2=4, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_a_prepared_layer_multiplies_the_merged_weight(dtype: torch.dtype) -> None:
    layer, x = _layer(dtype), torch.randn(3, 5, 40).to(dtype)
    merged = layer.to_linear()
    layer.prepare()
    assert torch.equal(bits(layer(x)), bits(merged(x)))
    assert layer.prepared
    layer.release()
    assert not layer.prepared


@pytest.mark.parametrize("name", ["weight", "A", "B", "C", "D", "scale"])
@torch.no_grad()
def test_a_change_ends_it(name: str, caplog: pytest.LogCaptureFixture) -> None:
    layer, x = _layer(), torch.randn(5, 40)
    layer.prepare()
    before = layer(x)
    getattr(layer, name).mul_(-1 if name in "AC" else 2)
    with caplog.at_level(logging.WARNING, "dual_lora_kernels"):
        after = layer(x)
    assert "has changed" in caplog.text
    assert not layer.prepared
    assert not torch.equal(before, after)
    assert torch.equal(after, copy.deepcopy(layer)(x))


@torch.no_grad()
def test_a_replaced_parameter_ends_it() -> None:
    layer, x = _layer(), torch.randn(5, 40)
    layer.prepare()
    layer.B = torch.nn.Parameter(torch.randn_like(layer.B))
    assert torch.allclose(layer(x), layer.to_linear()(x), atol=1e-5)
    assert not layer.prepared


def test_gradients_other_dtypes_and_dropout_are_computed_as_ever() -> None:
    layer, x = _layer(dropout=0.5), torch.randn(5, 40)
    layer.prepare()
    layer._prepared.weight.zero_()  # type: ignore[union-attr]
    plain = layer.eval()(x)
    assert plain.requires_grad
    assert (plain - layer.bias).abs().sum() > 1
    with torch.no_grad():
        assert torch.equal(layer(x), layer.bias.expand(5, 30))  # type: ignore[union-attr]
        assert layer(x.double()).abs().sum() > 1
        with torch.autocast("cpu", torch.bfloat16):
            assert not torch.equal(layer(x), layer.bias.bfloat16().expand(5, 30))  # type: ignore[union-attr]
        assert not torch.equal(layer.train()(x), layer.bias.expand(5, 30))  # type: ignore[union-attr]


def test_merging_moving_and_casting_end_it() -> None:
    layer = _layer()
    layer.prepare()
    layer.merge()
    assert not layer.prepared
    with pytest.raises(RuntimeError, match="merged: there is nothing to prepare"):
        layer.prepare()
    layer.unmerge()
    layer.prepare()
    assert not layer.bfloat16().prepared


def test_the_state_is_as_ever() -> None:
    layer = _layer()
    names = set(layer.state_dict())
    layer.prepare()
    assert set(layer.state_dict()) == names


@torch.no_grad()
def test_a_model_in_a_with_block() -> None:
    model = apply_dual_lora(llama(), configuration()).eval()
    layers = [module for module in model.modules() if isinstance(module, DualLoraLinear)]
    before = model(tokens()).logits
    layers[0].merge()
    layers[1].prepare()
    with prepared(model) as same:
        assert same is model
        assert [layer.prepared for layer in layers] == [False] + [True] * (len(layers) - 1)
        assert torch.allclose(model(tokens()).logits, before, atol=1e-5)
    assert [layer.prepared for layer in layers] == [False, True] + [False] * (len(layers) - 2)
    layers[0].unmerge()
    layers[1].release()
    assert torch.equal(model(tokens()).logits, before)


def test_a_failure_releases_what_was_prepared() -> None:
    model = apply_dual_lora(llama(), configuration())
    layers = [module for module in model.modules() if isinstance(module, DualLoraLinear)]
    with torch.no_grad():
        layers[-1].A.fill_(torch.nan)
    with pytest.raises(ValueError, match="A: got nan"), prepared(model):
        pass
    assert not any(layer.prepared for layer in layers)
