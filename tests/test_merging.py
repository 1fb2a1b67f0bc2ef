"""Merging refuses to write a non-finite weight over a finite one, before anything is changed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from dual_lora_kernels import DualLoraLinear, apply_dual_lora, dual_lora_merge_, merge_dual_lora, panels
from dual_lora_kernels.merging import check_mergeable

from .bits import bits
from .layers import make
from .models import configuration

SIZE = 6
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
    merged(forced, factors, "dither", 0, 0, "auto", "auto", 1 << 25)
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


@pytest.mark.parametrize("name", ["auto", "eager"])
@given(dtype=st.sampled_from(list(LARGEST)), small=st.floats(-37, 0), large=st.floats(0, 37), scale=st.floats(-3, 38.5))
@example(dtype=torch.float32, small=-37.0, large=0.0, scale=38.4)  # eager doubles the scale
def test_the_bound_holds_for_factors_of_any_size(
    name: str, dtype: torch.dtype, small: float, large: float, scale: float
) -> None:
    """No number that vanishes or overflows on the way hides that the result does."""
    layer = make(dtype, 6, 5, r1=2, r2=2, bias=False)
    weight, ones = layer.weight.detach(), torch.ones(2)
    A, B, C, D = 10.0**large * ones[:, None].expand(2, 6), 10.0**small * ones.expand(5, 2), layer.C, layer.D
    with suppress(ValueError):
        dual_lora_merge_(weight, A, B, C, D, torch.tensor(10.0**scale), backend=name)
    assert weight.isfinite().all()


ALIASED: list[Callable[[torch.Tensor], torch.Tensor]] = [
    lambda values: values[:6].expand(5, 6),
    lambda values: values[:5, None].expand(5, 6),
    lambda values: values.unfold(0, 6, 1)[:5],
]


@pytest.mark.parametrize("alias", ALIASED, ids=["one row", "one column", "windows"])
def test_a_weight_whose_elements_share_memory(alias: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """It cannot hold the merged weight: refused in place, copied in a model."""
    plain = nn.Linear(6, 5)
    plain.weight = nn.Parameter(alias(torch.randn(12)))
    model = nn.Sequential(plain)
    apply_dual_lora(model, configuration(["0"])).eval()
    before, x = plain.weight.detach().clone(), torch.randn(3, 6)
    expected = model(x)
    with pytest.raises(ValueError, match=r"^weight: got the strides \(\d, \d\), expected memory of its own for every"):
        model[0].merge()
    assert not model[0].merged
    assert torch.equal(plain.weight, before)
    torch.testing.assert_close(model[0].to_linear()(x), expected)
    merge_dual_lora(model)
    torch.testing.assert_close(model(x), expected)
    assert torch.equal(plain.weight, before)


@pytest.mark.parametrize("change", [torch.nan, 7.0])
def test_a_tied_layer_that_is_merged_keeps_its_merged_weight(change: float) -> None:
    """Whatever became of its factors since; the embedding gets its own weight back."""
    model = nn.ModuleDict({"first": nn.Linear(6, 6), "embedding": nn.Embedding(5, 6), "head": nn.Linear(6, 5)})
    model["head"].weight = model["embedding"].weight
    before = model["embedding"].weight.detach().clone()
    apply_dual_lora(model, configuration(["first", "head"]))
    model["head"].merge()
    merged = model["head"].weight.detach().clone()
    with torch.no_grad():
        model["head"].A.fill_(change)
    merge_dual_lora(model)
    assert torch.equal(bits(model["head"].weight), bits(merged))
    assert torch.equal(model["embedding"].weight, before)


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_a_lazy_neighbour_does_not_keep_a_model_from_merging() -> None:
    model = apply_dual_lora(nn.Sequential(nn.Linear(6, 5)), configuration())
    model.append(nn.LazyLinear(3))
    model.append(nn.LazyBatchNorm1d())
    merge_dual_lora(model)
    assert type(model[0]) is nn.Linear


def build(choices: st.DataObject) -> nn.ModuleDict:
    """Four linear layers, an embedding and a buffer, any of which may share a parameter or memory."""
    names = [f"layer{index}" for index in range(4)]
    model = nn.ModuleDict({name: nn.Linear(SIZE, SIZE) for name in names} | {"embedding": nn.Embedding(SIZE, SIZE)})
    memory = torch.randn(4 * SIZE**2)
    for name in (*names, "embedding"):
        other = model[choices.draw(st.sampled_from(names))].weight
        at = choices.draw(st.integers(0, 3 * SIZE**2))
        weights = {
            "own": model[name].weight,
            "same": other,
            "storage": nn.Parameter(other.data),
            "transposed": nn.Parameter(other.data.t()),
            "part": nn.Parameter(memory[at : at + SIZE**2].view(SIZE, SIZE)),
        }
        model[name].weight = weights[choices.draw(st.sampled_from(["own", *weights]))]
    buffers = [torch.ones(3), memory[5:17], model["layer0"].weight.data.flatten()[3:]]
    model["embedding"].register_buffer("more", choices.draw(st.sampled_from(buffers)))
    return model


@given(choices=st.data(), seed=st.integers(0, 99))
def test_merging_changes_no_other_tensor_and_no_output(choices: st.DataObject, seed: int) -> None:
    torch.manual_seed(seed)
    model, x = build(choices), torch.randn(3, SIZE)
    targets = choices.draw(st.lists(st.sampled_from([f"layer{i}" for i in range(4)]), min_size=1, unique=True))
    apply_dual_lora(model, configuration(targets)).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    outputs = {name: model[name](x) for name in targets}
    merge_dual_lora(model)
    for name, tensor in model.state_dict().items():
        if name.partition(".")[0] not in targets or name.endswith("bias"):
            assert torch.equal(tensor, before[name]), name
    for name, output in outputs.items():
        torch.testing.assert_close(model[name](x), output)
