"""`DualLoraLinear`: merging, and its state through copies, files, devices and dtypes."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dual_lora_kernels import DualLoraLinear
from dual_lora_kernels.adapter import FACTOR_NAMES

from .bits import bits
from .layers import DTYPES, K, N, effective, make, make_exact

# --- merging --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", ["dither", "nearest"])
@pytest.mark.parametrize("dtype", DTYPES)
@given(n=st.integers(1, 40), k=st.integers(1, 40), seed=st.integers(0, 99), is_exact=st.booleans())
def test_merge_writes_the_forward_weights_and_unmerge_restores(
    dtype: torch.dtype, rounding: str, n: int, k: int, seed: int, is_exact: bool
) -> None:
    """A product with the identity is exact, so forward and ∂X show the weights that they used.

    Where the factors' products are exact too, they are the reference's; else its sums may have another order.
    """
    layer = (make_exact if is_exact else make)(dtype, k, n, seed, rounding=rounding, bias=False)
    before = layer.weight.detach().clone()
    forward = layer(torch.eye(k, dtype=dtype)).detach().t()
    x = torch.zeros(n, k, dtype=dtype, requires_grad=True)
    (backward,) = torch.autograd.grad(layer(x), x, torch.eye(n, dtype=dtype))
    truth = effective(layer, dtype)

    layer.eval().merge()
    assert layer.merged
    if is_exact:
        assert torch.equal(bits(layer.weight), bits(truth))
    assert torch.equal(layer.weight, forward)
    assert torch.equal(layer.weight, backward)
    layer.unmerge()
    assert not layer.merged
    assert torch.equal(bits(layer.weight), bits(before))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_merged_output_is_the_unmerged_to_the_products_rounding(dtype: torch.dtype) -> None:
    layer, x = make(dtype, 200, 150).eval(), torch.randn(16, 200).to(dtype)
    unmerged = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), unmerged)


def test_merge_and_unmerge_refuse_to_repeat() -> None:
    layer = make()
    with pytest.raises(RuntimeError, match="not merged"):
        layer.unmerge()
    layer.merge()
    merged = layer.weight.detach().clone()
    with pytest.raises(RuntimeError, match="merged already"):
        layer.merge()
    assert torch.equal(layer.weight, merged)


@pytest.mark.parametrize("trains", ["ABCD", "AB", "CD", "B"])
def test_training_while_merged_raises(trains: str) -> None:
    """Whichever factor is left trainable."""
    layer, x = make(), torch.randn(3, K)
    for name in FACTOR_NAMES:
        getattr(layer, name).requires_grad_(name in trains)
    layer.merge()
    with pytest.raises(RuntimeError, match=r"merged.*unmerge\(\)"):
        layer(x)
    with torch.no_grad():
        layer(x)
    layer.eval()(x)
    layer.unmerge()
    layer.train()(x).sum().backward()


@pytest.mark.parametrize("name", FACTOR_NAMES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_merge_refuses_a_diverged_adapter(name: str, value: float) -> None:
    layer = make()
    with torch.no_grad():
        getattr(layer, name)[0, 0] = value
    before = layer.weight.detach().clone()
    with pytest.raises(ValueError, match=f"{name}: got (nan|inf)"):
        layer.merge()
    assert not layer.merged
    assert torch.equal(layer.weight, before)


def test_a_merge_shows_to_autograd() -> None:
    """Merging between forward and backward must not give gradients of other weights silently."""
    layer, x = make(), torch.randn(3, K, requires_grad=True)
    out = layer(x).sum()
    layer.merge()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("merged", [True, False])
def test_to_linear(dtype: torch.dtype, bias: bool, merged: bool) -> None:
    layer = make_exact(dtype, bias=bias).eval()
    before, truth = layer.weight.detach().clone(), effective(layer, dtype)
    if merged:
        layer.merge()
    plain = layer.to_linear()
    assert type(plain) is nn.Linear
    assert torch.equal(bits(plain.weight), bits(truth))
    assert (plain.in_features, plain.out_features, plain.training) == (K, N, False)
    assert (plain.bias is None) == (not bias)
    assert plain.weight.data_ptr() != layer.weight.data_ptr()
    if merged:
        layer.unmerge()
    assert torch.equal(bits(layer.weight), bits(before))


def test_delta_weight_is_the_update() -> None:
    layer = make(torch.float64)
    with torch.no_grad():
        difference = effective(layer, torch.float64) - layer.weight
    torch.testing.assert_close(layer.delta_weight(), difference)


# --- state ----------------------------------------------------------------------------------------------------------


def by_deepcopy(layer: DualLoraLinear) -> DualLoraLinear:
    return copy.deepcopy(layer)


def by_pickle(layer: DualLoraLinear) -> DualLoraLinear:
    return pickle.loads(pickle.dumps(layer))


def by_torch_save(layer: DualLoraLinear) -> DualLoraLinear:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def by_state_dict(layer: DualLoraLinear) -> DualLoraLinear:
    """Through a file, into a fresh layer; the state of a merged layer is the unmerged one's."""
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    fresh = make(layer.weight.dtype, seed=99)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    return fresh


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("clone", [by_deepcopy, by_pickle, by_torch_save, by_state_dict])
def test_copies(clone: Callable[[DualLoraLinear], DualLoraLinear], merged: bool) -> None:
    """A copy has every tensor and the half-warmed scale, shares nothing, and can still be unmerged."""
    layer, x = make(torch.bfloat16).eval(), torch.randn(4, K).bfloat16()
    layer.set_scale(0.123)
    before = layer.weight.detach().clone()
    if merged:
        layer.merge()
    other = clone(layer).eval()
    assert other.merged == (merged and clone is not by_state_dict)
    torch.testing.assert_close(other(x), layer(x))
    if other.merged:
        assert torch.equal(other(x), layer(x))
        other.unmerge()
        assert layer.merged
    assert torch.equal(bits(other.weight), bits(before))
    for name, value in layer.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
        assert other.state_dict()[name].data_ptr() != value.data_ptr(), name


def test_state_dict_ignores_merging() -> None:
    layer = make(torch.bfloat16)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    assert set(before) == {"weight", "bias", *FACTOR_NAMES, "scale"}
    layer.merge()
    after = layer.state_dict()
    assert list(after) == list(before)
    for name, value in before.items():
        assert torch.equal(after[name], value), name


def test_loading_into_a_merged_layer_unmerges() -> None:
    source, layer = make(seed=1), make(seed=2)
    layer.merge()
    layer.load_state_dict(source.state_dict())
    assert not layer.merged
    assert torch.equal(layer.weight, source.weight)
    x = torch.randn(3, K)
    assert torch.equal(layer(x), source(x))


def test_loading_another_layer_keeps_this_one_merged() -> None:
    """A key of "10." does not begin with the prefix "1." of a merged neighbour."""
    model = nn.ModuleDict({"1": make(), "10": make(seed=5)})
    model["1"].merge()
    state = {name: value for name, value in model.state_dict().items() if name.startswith("10.")}
    model.load_state_dict(state, strict=False)
    assert model["1"].merged


def test_meta_device_to_empty_and_reset() -> None:
    """The deferred way gives the same layer as the direct one, from one seed."""
    layer = make(device="meta")
    assert all(tensor.is_meta for tensor in layer.state_dict().values())
    layer.to_empty(device="cpu")
    torch.manual_seed(0)
    layer.reset_parameters()
    for name, value in make().state_dict().items():
        assert torch.equal(layer.state_dict()[name], value), name


def test_reset_parameters_of_a_merged_layer_leaves_nothing_to_unmerge() -> None:
    layer = make()
    layer.merge()
    layer.reset_parameters()
    assert not layer.merged


def test_meta_device_forward() -> None:
    """Shape inference and FLOP counts on the meta device, as ``nn.Linear`` allows."""
    layer = make(device="meta")
    out = layer(torch.empty(2, 5, K, device="meta"))
    assert out.is_meta
    assert out.shape == (2, 5, N)


@pytest.mark.parametrize("convert", [nn.Module.bfloat16, nn.Module.half, nn.Module.double, nn.Module.float])
@pytest.mark.parametrize("merged", [False, True])
def test_conversions_keep_the_scale_exactly(convert: Callable[[nn.Module], nn.Module], merged: bool) -> None:
    """0.3 is on no 16-bit grid. The other tensors convert as any module's do, W0 of a merged layer included."""
    layer = make()
    layer.set_scale(0.3)
    exact, before = layer.scale.item(), layer.weight.detach().clone()
    if merged:
        layer.merge()
    convert(layer)
    assert layer.scale.dtype == torch.float32
    assert layer.scale.item() == exact
    assert layer.A.dtype == layer.weight.dtype
    assert layer.state_dict()["weight"].dtype == layer.weight.dtype
    if merged:
        layer.unmerge()
    assert torch.equal(layer.weight, before.to(layer.weight.dtype))
    assert layer(torch.randn(2, K, dtype=layer.weight.dtype)).isfinite().all()
