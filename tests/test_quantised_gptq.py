"""GPTQModel's layers: the numbers of GPTQ and AWQ weights, of any block, and which layers are not read."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn

from dual_lora_kernels import apply_dual_lora, merge_dual_lora
from dual_lora_kernels.quantised import gptq
from dual_lora_kernels.quantised.weight import QuantisedWeight

from .bits import bits as pattern
from .models import configuration
from .peft_models import config

_SHAPES = [(8, 32), (40, 96), (56, 200)]
_DTYPES = [torch.float16, torch.bfloat16]
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight consecutive numbers AWQ's 4-bit words hold, from the lowest bits up."""


def _class(name: str, *bases: type) -> type[Any]:
    """A stand-in for one of the library's classes, told by its name and module."""
    return type(name, bases, {"__module__": "gptqmodel.nn_modules.qlinear.some_kernel"})


_BASE = _class("BaseQuantLinear", nn.Module)
_TORCH = _class("TorchLinear", _BASE)
_AWQ = _class("AwqTorchLinear", _BASE)


def _packed(numbers: torch.Tensor, bits: int, word_bits: int = 32, order: tuple[int, ...] | None = None) -> Any:
    """`numbers` [m, c] as words [m, ⌈c · bits / word_bits⌉] by the format's definition, in Python's integers."""
    per_word, rows = word_bits // bits, []
    for row in numbers.tolist():
        row += [0] * (-len(row) % per_word)
        words = []
        for first in range(0, len(row), per_word):
            several = [row[first + place] for place in order or range(per_word)]
            word = sum(number << bits * place for place, number in enumerate(several))
            words.append(word - (1 << word_bits) if word >> (word_bits - 1) else word)
        rows.append(words)
    return torch.tensor(rows, dtype={8: torch.int8, 16: torch.int16, 32: torch.int32}[word_bits])


def _layer(
    kind: type[Any],
    shape: tuple[int, int],
    *,
    bits: int = 4,
    group_size: int = 32,
    dtype: torch.dtype = torch.float16,
    act_order: bool = False,
    sym: bool = False,
    word_bits: int = 32,
) -> tuple[Any, torch.Tensor]:
    """A layer [n, k] of random numbers, and its W0 [n, k] by the format's definition."""
    n, k = shape
    group_size = k if group_size == -1 else group_size
    groups = -(-k // group_size)
    group = torch.arange(k) // group_size
    group = group[torch.randperm(k)] if act_order else group
    codes = torch.randint(0, 1 << bits, (n, k))
    zeros = torch.full((groups, n), 1 << bits - 1) if sym else torch.randint(0, 1 << bits, (groups, n))
    scales = (torch.randn(groups, n) * 0.02).to(dtype)
    layer = kind()
    layer.bits, layer.group_size, layer.in_features, layer.out_features = bits, group_size, k, n
    layer.bias = None
    layer.optimized, layer.adapter, layer.online_full_had, layer.online_partial_had = True, None, False, False
    if issubclass(kind, _AWQ):
        order = _AWQ_ORDER if bits == 4 else None
        layer.register_buffer("qweight", _packed(codes.t(), bits, order=order))
        layer.register_buffer("qzeros", _packed(zeros, bits, order=order))
    else:
        layer.register_buffer("qweight", _packed(codes, bits, word_bits).t().contiguous())
        layer.register_buffer("qzeros", _packed(zeros, bits, word_bits))
        layer.register_buffer("g_idx", group.int())
    layer.register_buffer("scales", scales)
    # A difference of two codes times a scale is exact in fp32, so that this is rounded once.
    weight = (codes - zeros[group].t()).float() * scales[group].t().float()
    return layer, weight.to(dtype)


def _same(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.dtype == expected.dtype
    assert torch.equal(pattern(got), pattern(expected))


def _check_blocks(weight: QuantisedWeight, expected: torch.Tensor, blocks: int = 8) -> None:
    """All of it and random blocks of it, also through the operators' schemas."""
    _same(weight.dequantised(), expected)
    for _ in range(blocks):
        row, col = (int(torch.randint(0, size, ())) for size in expected.shape)
        end_row = int(torch.randint(row, expected.shape[0], ())) + 1
        end_col = int(torch.randint(col, expected.shape[1], ())) + 1
        part = weight.rows(row, end_row).columns(col, end_col)
        part = QuantisedWeight.restored(part.tensors, part.encoded_layout)
        _same(part.dequantised(), expected[row:end_row, col:end_col])
        single = part.rows(0, 1)  # a block of a block
        _same(single.dequantised(), expected[row : row + 1, col:end_col])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [*_DTYPES, torch.float32])
@pytest.mark.parametrize("group_size", [32, 128, -1])
@pytest.mark.parametrize("shape", [*_SHAPES, (27, 131)])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("sym", [False, True])
def test_gptq(shape: tuple[int, int], group_size: int, dtype: torch.dtype, act_order: bool, sym: bool) -> None:
    layer, expected = _layer(_TORCH, shape, group_size=group_size, dtype=dtype, act_order=act_order, sym=sym)
    assert gptq.is_gptqs(layer)
    assert gptq.why_not_gptqs(layer) is None
    weight = gptq.read_gptqs(layer)
    assert weight.shape == shape
    _check_blocks(weight, expected)


@pytest.mark.parametrize("dtype", _DTYPES)
@pytest.mark.parametrize(("bits", "word_bits"), [(2, 32), (8, 32), (4, 16), (4, 8), (8, 8)])
def test_gptq_of_other_widths(bits: int, word_bits: int, dtype: torch.dtype) -> None:
    layer, expected = _layer(_TORCH, (43, 101), bits=bits, word_bits=word_bits, dtype=dtype, act_order=True)
    _check_blocks(gptq.read_gptqs(layer), expected)


@pytest.mark.parametrize("dtype", _DTYPES)
@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shape", [(8, 32), (40, 96), (56, 192)])
def test_awq(shape: tuple[int, int], bits: int, group_size: int, dtype: torch.dtype) -> None:
    layer, expected = _layer(_AWQ, shape, bits=bits, group_size=group_size, dtype=dtype)
    assert gptq.is_gptqs(layer)
    assert gptq.why_not_gptqs(layer) is None
    _check_blocks(gptq.read_gptqs(layer), expected)


def test_a_negative_group_counts_from_the_end() -> None:
    """As it does in the library, which indexes with it."""
    layer, expected = _layer(_TORCH, (8, 64))
    layer.g_idx -= layer.scales.shape[0]
    _check_blocks(gptq.read_gptqs(layer), expected)


@pytest.mark.parametrize("kind", [_TORCH, _AWQ])
def test_long_rows_are_dequantised_a_few_at_a_time(kind: type[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    layer, expected = _layer(kind, (24, 320))
    monkeypatch.setattr("dual_lora_kernels.quantised.weight._CHUNK", 1000)  # three rows, which no word's end divides
    _same(gptq.read_gptqs(layer).dequantised(), expected)


@pytest.mark.parametrize("kind", [_TORCH, _AWQ])
def test_a_subclass_of_the_users_is_read(kind: type[Any]) -> None:
    layer, expected = _layer(type("Mine", (kind,), {"__module__": __name__}), (16, 64))
    assert gptq.why_not_gptqs(layer) is None
    _same(gptq.read_gptqs(layer).dequantised(), expected)


def test_other_modules_are_not_gptqmodels() -> None:
    embeddings = _class("TorchQuantEmbeddings", _TORCH)
    helper = _class("Int8PackedModule", nn.Module)  # a part of one of the library's layers
    namesake = type("BaseQuantLinear", (nn.Module,), {"__module__": "elsewhere"})
    for module in (nn.Linear(2, 2), embeddings(), helper(), namesake()):
        assert not gptq.is_gptqs(module)


@pytest.mark.parametrize(
    ("name", "base"), [("MarlinLinear", _BASE), ("ExllamaV2Linear", _BASE), ("ParoLinear", _AWQ), ("MlxLinear", _TORCH)]
)
def test_other_kernels_are_refused_by_name(name: str, base: type[Any]) -> None:
    layer, _ = _layer(_class(name, base), (16, 64))
    assert gptq.is_gptqs(layer)
    reason = gptq.why_not_gptqs(layer)
    assert reason is not None
    assert name in reason
    assert "BACKEND.TORCH" in reason


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        (_TORCH, {"bits": 3}, "weight has 3 bits, expected one of 2, 4, 8"),
        (_TORCH, {"optimized": False}, "is not initialised yet"),
        (_AWQ, {"scales": torch.ones(2, 16)}, "is not initialised yet"),
        (_TORCH, {"scales": torch.ones(2, 16).double()}, "has scales of torch.float64"),
        (_TORCH, {"g_idx": torch.zeros(32, dtype=torch.int32)}, "32 numbers in g_idx, expected in_features = 64"),
        (_TORCH, {"g_idx": None}, "weight has no g_idx"),
        (_AWQ, {"qweight": None}, "weight has no qweight"),
        (_AWQ, {"online_full_had": True}, "rotates its input"),
        (_TORCH, {"adapter": SimpleNamespace()}, "adapter SimpleNamespace"),
    ],
)
def test_what_is_not_read_has_a_reason(kind: type[Any], changes: dict[str, Any], reason: str) -> None:
    layer, _ = _layer(kind, (16, 64))
    for name, value in changes.items():
        setattr(layer, name, value)
    assert reason in (gptq.why_not_gptqs(layer) or "")


@pytest.mark.parametrize("kind", [_TORCH, _AWQ])
def test_the_meta_device_has_no_numbers(kind: type[Any]) -> None:
    layer, _ = _layer(kind, (16, 64))
    assert "meta device" in (gptq.why_not_gptqs(layer.to("meta")) or "")


def _random_words(words: torch.Tensor) -> None:
    words.copy_(torch.randint(-(1 << 31), 1 << 31, words.shape))


@pytest.mark.parametrize("kind", [_TORCH, _AWQ])
def test_both_doors_adapt_and_merge(kind: type[Any]) -> None:
    for adapt in (
        lambda model: apply_dual_lora(model, configuration(["0"])),
        lambda model: get_peft_model(model, config(["0"], task_type=None)),
    ):
        torch.manual_seed(0)
        layer, expected = _layer(kind, (16, 64))
        model: Any = adapt(nn.Sequential(layer))
        x = torch.randn(3, 64).to(expected.dtype)
        y = model(x)
        y.float().sum().backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        merged = model.merge_and_dequantize() if hasattr(model, "merge_and_dequantize") else merge_dual_lora(model)
        assert type(merged[0]) is nn.Linear
        torch.testing.assert_close(merged(x), y, atol=1e-2, rtol=1e-2)
        assert not torch.equal(merged[0].weight, expected)


if importlib.util.find_spec("gptqmodel"):  # no dependency of the tests: its own pull in another PyTorch

    @pytest.mark.parametrize("dtype", _DTYPES)
    @pytest.mark.parametrize("bits", [2, 4, 8])
    def test_the_librarys_own_numbers(bits: int, dtype: torch.dtype) -> None:
        """The library's dequantisation of its own layers, where it is installed."""
        gptq_layers: Any = importlib.import_module("gptqmodel.nn_modules.qlinear.torch")
        awq_layers: Any = importlib.import_module("gptqmodel.nn_modules.qlinear.torch_awq")
        n, k = 40, 256
        sizes = {
            "in_features": k,
            "out_features": n,
            "bits": bits,
            "sym": False,
            "bias": False,
            "register_buffers": True,
        }
        for group_size in (32, 128, -1):
            for act_order in (False, True):
                layer = gptq_layers.TorchLinear(group_size=group_size, desc_act=act_order, **sizes)
                layer.g_idx = layer.g_idx[torch.randperm(k)] if act_order else layer.g_idx
                layer.scales = torch.randn(layer.scales.shape).to(dtype)
                _random_words(layer.qweight)
                _random_words(layer.qzeros)
                assert "not initialised" in (gptq.why_not_gptqs(layer) or "")
                layer.post_init()
                assert gptq.why_not_gptqs(layer) is None
                expected = type(layer).dequantize_weight(layer).t()  # the layer's own is compiled, which takes seconds
                _check_blocks(gptq.read_gptqs(layer), expected)
            layer = awq_layers.AwqTorchLinear(group_size=group_size, desc_act=False, dtype=dtype, **sizes)
            layer.scales = torch.randn(layer.scales.shape).to(dtype)
            _random_words(layer.qweight)
            _random_words(layer.qzeros)
            layer.post_init()
            assert gptq.why_not_gptqs(layer) is None
            words, scales = (layer.qweight, layer.qzeros), layer.scales
            _check_blocks(
                gptq.read_gptqs(layer), awq_layers.dequantize_gemm(*words, scales, bits, layer.group_size).t()
            )
