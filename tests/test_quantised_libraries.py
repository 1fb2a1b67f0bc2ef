"""Reading W0 from bitsandbytes' and torchao's layers: bit for bit the library's own dequantisation, or a reason."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from torchao import quantization
from torchao.quantization.granularity import PerGroup

from dual_lora_kernels import DualLoraLinear, QuantisedDualLoraLinear, quantised_weight

from .quantised_layers import FORMATS, eight_bit, four_bit, numbers_of


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("blocksize", [32, 64, 256])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
def test_four_bit_numbers_are_the_librarys(form: str, dtype: torch.dtype, blocksize: int, storage: torch.dtype) -> None:
    layer = four_bit(24, 512, form, dtype=dtype, blocksize=blocksize, storage=storage)
    weight = quantised_weight(layer)
    assert weight.dtype == dtype
    assert torch.equal(weight.dequantised(), numbers_of(layer))
    block = torch.empty(7, 50)
    weight.rows(3, 10).columns(31, 81).load(block)
    assert torch.equal(block, numbers_of(layer)[3:10, 31:81].float())


@pytest.mark.parametrize(("n", "k", "blocksize"), [(64, 4160, 128), (31, 33, 64), (96, 128, 2048)])
def test_blocks_that_cross_rows_are_those_of_the_flattened_weight(n: int, k: int, blocksize: int) -> None:
    """bitsandbytes' CPU kernel (0.50.2) does not read these back; its quantisation and its CUDA kernels are flat."""
    layer = four_bit(n, k, "nf4", blocksize=blocksize, dtype=torch.float32)
    state = layer.weight.quant_state
    codes = layer.weight.data.view(-1)
    codes = torch.stack((codes >> 4, codes & 15), dim=1).view(-1)[: n * k].long()
    expected = state.code[codes] * state.absmax.repeat_interleave(blocksize)[: n * k]
    assert torch.equal(quantised_weight(layer).dequantised(), expected.view(n, k))


@pytest.mark.parametrize("called", [False, True])
def test_eight_bit_numbers_are_the_librarys(called: bool) -> None:
    layer = eight_bit(24, 96)
    if called:  # which moves the statistics from the weight to the layer's state
        layer(torch.randn(2, 96))
    weight = quantised_weight(layer)
    assert weight.dtype == torch.float32
    assert torch.equal(weight.dequantised(), numbers_of(layer))


@pytest.mark.parametrize("form", ["nf4", "nf4-double"])
def test_a_layer_that_was_called_in_eval_mode_is_read_as_well(form: str) -> None:
    """On CPUs with bf16 units bitsandbytes repacks the weight then, and rounds its absmax to bf16."""
    layer = four_bit(64, 128, form, dtype=torch.bfloat16, compute_dtype=torch.bfloat16).eval()
    before = quantised_weight(layer).dequantised()
    with torch.no_grad():
        layer(torch.randn(4, 128, dtype=torch.bfloat16))
    after = quantised_weight(layer).dequantised()
    assert after.shape == before.shape
    assert (after - before).abs().max() <= before.abs().max() / 128


def _torchao(kind: str, dtype: torch.dtype) -> nn.Linear:
    configs = {
        "int8": lambda: quantization.Int8WeightOnlyConfig(),
        "int8-groups": lambda: quantization.Int8WeightOnlyConfig(granularity=PerGroup(32)),
        "int4-groups": lambda: quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
    }
    torch.manual_seed(0)
    layer = nn.Linear(128, 48).to(dtype)
    quantization.quantize_(layer, configs[kind]())
    return layer


@pytest.mark.parametrize("kind", ["int8", "int8-groups", "int4-groups"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
def test_torchaos_numbers_are_the_librarys(kind: str, dtype: torch.dtype) -> None:
    layer = _torchao(kind, dtype)
    expected = layer.weight.dequantize()
    weight = quantised_weight(layer)
    assert weight.dtype == expected.dtype == dtype
    assert torch.equal(weight.dequantised(), expected)
    block = torch.empty(7, 50, dtype=dtype)
    weight.rows(3, 10).columns(31, 81).load(block)
    assert torch.equal(block, expected[3:10, 31:81])
    adapted = DualLoraLinear.from_linear(layer, r1=3, r2=2)
    assert isinstance(adapted, QuantisedDualLoraLinear)
    adapted(torch.randn(2, 128, dtype=dtype)).sum().backward()
    assert adapted.A.grad is not None


def test_torchao_with_quantised_activations_is_refused() -> None:
    layer = nn.Linear(128, 48)
    quantization.quantize_(layer, quantization.Int8DynamicActivationInt8WeightConfig())
    with pytest.raises(ValueError, match="act_quant_kwargs: expected a weight-only quantisation"):
        quantised_weight(layer)


def _with(layer: Any, **changes: Any) -> Any:
    for name, value in changes.items():
        owner: Any = layer
        *path, last = name.split("__")
        for part in path:
            owner = getattr(owner, part)
        setattr(owner, last, value)
    return layer


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.Linear(4, 4), "its weight is not quantised by a known library"),
        (lambda: four_bit(8, 64, quantised=False), "weight is not quantised yet: move the layer to its device first"),
        (lambda: eight_bit(8, 64, quantised=False), "weight is not quantised yet: move the layer to its device first"),
        (lambda: bnb.nn.Linear4bit(64, 8, device="meta"), "weight is on the meta device"),
        (lambda: bnb.nn.Linear8bitLt(64, 8, has_fp16_weights=False, device="meta"), "weight is on the meta device"),
        (lambda: bnb.nn.Linear8bitLt(64, 8), "has_fp16_weights=True"),
        (lambda: _with(four_bit(8, 64), weight__quant_state__quant_type="int4"), "quant_type 'int4', expected 'nf4'"),
        (lambda: _with(four_bit(8, 64), compute_dtype=torch.float8_e4m3fn), "compute_dtype is torch.float8_e4m3fn"),
        (lambda: _with(four_bit(8, 64), weight__quant_state__dtype=torch.float64), "dequantises to torch.float64"),
    ],
)
def test_what_cannot_be_read_is_named(make: Any, reason: str) -> None:
    layer = make()
    with pytest.raises(ValueError, match=f"^layer: got {type(layer).__name__}, .*{reason}"):
        quantised_weight(layer)
    if type(layer) is not nn.Linear:
        with pytest.raises(ValueError, match=f"^linear: got {type(layer).__name__}, .*{reason}"):
            DualLoraLinear.from_linear(layer)
