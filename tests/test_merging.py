"""Merging refuses to write a non-finite weight over a finite one, before anything is changed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dual_lora_kernels import DualLoraLinear, dual_lora_merge_, merge_dual_lora, panels
from dual_lora_kernels.merging import check_mergeable

from .layers import make

LARGEST = {torch.float16: 6e4, torch.bfloat16: 3e38, torch.float32: 3e38}


def huge(dtype: torch.dtype) -> DualLoraLinear:
    """Finite factors whose update is beyond the weight's dtype at some entries."""
    layer = make(dtype, 40, 30, bias=False)
    with torch.no_grad():
        layer.B.zero_()[7] = 1.0
        layer.A[:, 9] = 1e10 if dtype == torch.float16 else 3e38
    return layer


@pytest.mark.parametrize("dtype", LARGEST, ids=str)
@pytest.mark.parametrize("merge", [DualLoraLinear.merge, DualLoraLinear.to_linear], ids=["merge", "to_linear"])
def test_an_update_that_overflows_is_refused(
    dtype: torch.dtype, merge: Callable[[DualLoraLinear], object], small_workspace: int
) -> None:
    layer = huge(dtype)
    before = layer.weight.detach().clone()
    with pytest.raises(ValueError, match=rf"^weight: got .* at \[7, 9\], which the update makes overflow {dtype}"):
        merge(layer)
    assert not layer.merged
    assert torch.equal(layer.weight, before)


def test_no_layer_is_merged_where_one_overflows() -> None:
    model = nn.Sequential(make(torch.float16, 40, 40), huge(torch.float16))
    before = [layer.weight.detach().clone() for layer in model]
    with pytest.raises(ValueError, match=r"^1\.weight: got "):
        merge_dual_lora(model)
    assert all(isinstance(layer, DualLoraLinear) for layer in model)
    assert all(torch.equal(layer.weight, old) for layer, old in zip(model, before, strict=True))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_was_not_finite_before_is_no_reason(value: float) -> None:
    layer = make(torch.float16, 40, 30)
    with torch.no_grad():
        layer.weight[3, 4] = value
    layer.merge()
    finite = layer.weight.isfinite()
    assert not finite[3, 4]
    assert finite.sum() == finite.numel() - 1


@given(dtype=st.sampled_from(list(LARGEST)), exponent=st.floats(-6, 2), base=st.floats(0, 1), seed=st.integers(0, 20))
def test_a_merge_is_refused_exactly_where_it_would_overflow(
    dtype: torch.dtype, exponent: float, base: float, seed: int
) -> None:
    """The bound from norms never accepts what overflows; what it cannot decide is computed."""
    layer = make(dtype, 20, 15, seed)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(15, 20).sign() * base * LARGEST[dtype])
        layer.set_scale(min(LARGEST[dtype] * 10.0**exponent, 1.7e38))
    factors = (layer.A, layer.B, layer.C, layer.D, layer.scale)
    merged = torch.ops.dual_lora_kernels.merge_
    forced = layer.weight.detach().clone()
    merged(forced, *factors, "dither", "auto")
    before = layer.weight.detach().clone()
    if forced.isfinite().all():
        assert torch.equal(dual_lora_merge_(layer.weight.detach(), *factors), forced)
    else:
        with pytest.raises(ValueError, match="overflow"):
            dual_lora_merge_(layer.weight.detach(), *factors)
        assert torch.equal(layer.weight, before)


def test_usual_merges_are_not_computed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound decides."""
    monkeypatch.setattr(panels, "first_overflow", lambda *_: pytest.fail("computed to be looked at"))
    for dtype in LARGEST:
        layer = make(dtype, 40, 30)
        check_mergeable(layer.weight, layer.A, layer.B, layer.C, layer.D, layer.scale)
