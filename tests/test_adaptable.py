"""Never silently another function: linear layers that are more than they seem are refused by name."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from transformers.pytorch_utils import Conv1D

from dual_lora_kernels import DualLoraLinear, apply_dual_lora, merge_dual_lora

from .models import adapted_names, configuration, llama, logits


class Doubled(nn.Module):
    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        return 2 * tensor


class WithBuffer(nn.Linear):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.register_buffer("temperature", torch.ones(()))


class WithParameter(nn.Linear):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.gain = nn.Parameter(torch.ones(()))


class WithExtraState(nn.Linear):
    def get_extra_state(self) -> int:
        return 1


class Plain(nn.Linear):
    """Only another name."""


class PlainConv1D(Conv1D):
    """Only another name."""


class Called(nn.Linear):
    def __call__(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().__call__(input)


class CalledWithin(nn.Linear):
    def _call_impl(self, *args: Any, **kwargs: Any) -> Any:
        return 2 * super()._call_impl(*args, **kwargs)


class Rectified(Conv1D):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).relu()


def homonym() -> nn.Module:
    """A class of the user's own with the name and the attributes of transformers' layer, and another forward."""
    module = Rectified(5, 6)
    module.__class__ = type("Conv1D", (nn.Module,), {"forward": Rectified.forward})
    return module


def parametrized(name: str) -> nn.Linear:
    linear = nn.Linear(6, 5)
    parametrize.register_parametrization(linear, name, Doubled())
    return linear


def replaced_forward() -> nn.Linear:
    linear = nn.Linear(6, 5)
    linear.forward = types.MethodType(lambda self, x: 2 * nn.Linear.forward(self, x), linear)  # type: ignore[method-assign]
    return linear


def with_child() -> nn.Linear:
    linear = nn.Linear(6, 5)
    linear.child = nn.Linear(2, 2)
    return linear


def weight_normed() -> nn.Linear:
    return nn.utils.weight_norm(nn.Linear(6, 5))


def with_plain_bias() -> nn.Linear:
    """As code that computes a bias leaves it: a tensor in the parameter's place."""
    linear = nn.Linear(6, 5)
    del linear.bias
    linear.bias = torch.ones(5)  # type: ignore[assignment]
    return linear


def shadowed(name: str) -> nn.Linear:
    """F.linear reads the attribute, `parameters()` the parameter."""
    linear = nn.Linear(6, 5)
    vars(linear)[name] = torch.ones_like(linear.get_parameter(name))
    return linear


def with_state_hook(register: str) -> nn.Linear:
    linear = nn.Linear(6, 5)
    getattr(linear, register)(lambda *_: None)
    return linear


def with_parameter(name: str, value: torch.Tensor) -> nn.Linear:
    linear = nn.Linear(6, 5)
    setattr(linear, name, nn.Parameter(value, requires_grad=False))
    return linear


class Packed(torch.Tensor):
    """As quantised and sharded weights are."""


REFUSED: list[tuple[Callable[[], nn.Module], str]] = [
    (lambda: parametrized("bias"), "bias is computed by a parametrization"),
    (lambda: parametrized("weight"), "weight is computed by a parametrization"),
    (lambda: parametrizations.orthogonal(nn.Linear(6, 6)), "weight is computed by a parametrization"),
    (replaced_forward, "forward was replaced on the instance"),
    (with_child, "has child beside weight and bias"),
    (lambda: WithBuffer(6, 5), "has temperature beside weight and bias"),
    (lambda: WithParameter(6, 5), "has gain beside weight and bias"),
    (lambda: WithExtraState(6, 5), "has extra state beside weight and bias"),
    (weight_normed, "weight is computed, not a parameter"),
    (with_plain_bias, "bias is computed, not a parameter"),
    (lambda: shadowed("bias"), "bias is computed, not a parameter"),
    (lambda: shadowed("weight"), "weight is computed, not a parameter"),
    (lambda: Called(6, 5), "__call__ is not nn.Module's"),
    (lambda: CalledWithin(6, 5), "_call_impl is not nn.Module's"),
    (lambda: with_state_hook("register_state_dict_post_hook"), "has hooks"),
    (lambda: with_state_hook("register_state_dict_pre_hook"), "has hooks"),
    (lambda: with_state_hook("register_load_state_dict_pre_hook"), "has hooks"),
    (lambda: with_state_hook("register_load_state_dict_post_hook"), "has hooks"),
    (lambda: with_parameter("weight", torch.ones(5, 6).to_sparse_csr()), "weight has the layout torch.sparse_csr"),
    (lambda: with_parameter("weight", torch.ones(5, 6).to_mkldnn()), "weight has the layout torch._mkldnn"),
    (lambda: with_parameter("bias", torch.ones(5).to_sparse()), "bias has the layout torch.sparse_coo"),
    (lambda: with_parameter("bias", torch.ones(1)), "bias is packed or quantised .*shape .1,."),
    (lambda: with_parameter("bias", torch.ones(5).to(torch.float8_e4m3fn)), "bias is packed or quantised .*float8"),
    (lambda: with_parameter("bias", torch.ones(5).as_subclass(Packed)), "bias is a Packed, a tensor subclass"),
    (homonym, "Conv1D is not a linear layer"),
    (lambda: Rectified(5, 6), "Rectified is not a linear layer"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED)
@pytest.mark.filterwarnings("ignore:.*weight_norm", "ignore:Sparse CSR")
def test_a_layer_that_is_more_than_weight_and_bias_is_refused(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^linear: got .*{message}"):
        DualLoraLinear.from_linear(make())
    model = nn.Sequential(make(), nn.ReLU(), nn.Linear(5, 4))
    with pytest.raises(ValueError, match=rf"^target_modules: '0' cannot be adapted: .*{message}"):
        apply_dual_lora(model, configuration(["0", "2"]))
    assert type(model[2]) is nn.Linear
    first = model[0]
    apply_dual_lora(model, configuration())
    assert model[0] is first
    assert isinstance(model[2], DualLoraLinear)


@pytest.mark.parametrize("make", [lambda: Plain(6, 5), lambda: PlainConv1D(5, 6)], ids=["Linear", "Conv1D"])
def test_a_subclass_that_adds_nothing_is_adapted(make: Callable[[], nn.Module]) -> None:
    assert DualLoraLinear.from_linear(make()).out_features == 5


def test_a_layer_without_accelerates_hooks_again_is_adapted() -> None:
    """accelerate leaves the class's own forward on the instance when it takes its hooks off."""
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    linear = nn.Linear(6, 5)
    add_hook_to_module(linear, ModelHook())
    with pytest.raises(ValueError, match="has accelerate's ModelHook"):
        DualLoraLinear.from_linear(linear)
    remove_hook_from_module(linear)
    assert "forward" in vars(linear)
    assert DualLoraLinear.from_linear(copy.deepcopy(linear)).out_features == 5
    other = nn.Linear(6, 5)
    other.forward = linear.forward  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="forward was replaced on the instance"):
        DualLoraLinear.from_linear(other)


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_a_lazy_linear_is_adapted_once_it_has_run() -> None:
    linear = nn.LazyLinear(5)
    with pytest.raises(ValueError, match=r"^linear: got LazyLinear.*weight has no shape yet; run it once first"):
        DualLoraLinear.from_linear(linear)
    model = nn.Sequential(linear, nn.Linear(5, 4))
    for targets in ("all-linear", ["1"]):
        with pytest.raises(ValueError, match=r"^model: 0\.weight has no shape yet"):
            apply_dual_lora(model, configuration(targets))
    assert model[1].weight.requires_grad
    linear(torch.randn(2, 6))
    assert DualLoraLinear.from_linear(linear).in_features == 6


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"], ["default"], ["base_layer"]])
@pytest.mark.parametrize("inject", [False, True])
def test_a_model_that_peft_has_adapted_is_refused(targets: Any, inject: bool) -> None:
    """Its adapters are linear layers, and would be adapted themselves."""
    from peft import LoraConfig, get_peft_model, inject_adapter_in_model

    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    model = inject_adapter_in_model(lora, llama()) if inject else get_peft_model(llama(), lora)
    with pytest.raises(ValueError, match=r"^model: got .*q_proj' is PEFT's .*merge_and_unload\(\)"):
        apply_dual_lora(model, configuration(targets))
    if not inject:
        apply_dual_lora(model.unload(), configuration(["q_proj"]))


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"], ["mlp_head.0"]])
def test_a_model_with_pefts_prompt_encoder_is_refused(targets: Any) -> None:
    """It has linear layers of its own, and no tuner's layers."""
    from peft import PromptEncoderConfig, get_peft_model

    prompts = PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=8)
    model = get_peft_model(llama(), prompts)
    with pytest.raises(ValueError, match=r"^model: got .*prompt_encoder.* is PEFT's .*get_base_model\(\)"):
        apply_dual_lora(model, configuration(targets))
    assert adapted_names(apply_dual_lora(model.get_base_model(), configuration(["q_proj"])))


def tied_by_assignment() -> nn.Module:
    """As a checkpoint of a tied model leaves it: one storage, two parameters."""
    model = llama(tied=True)
    model.load_state_dict(model.state_dict(), assign=True)
    model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight.data)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    return model


def test_weights_tied_by_storage_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = nn.Parameter(model[0].weight.data)
    apply_dual_lora(model, configuration())
    assert [type(layer) for layer in model] == [nn.Linear, nn.Linear, DualLoraLinear]


@pytest.mark.parametrize("part", [lambda w: w, lambda w: w[2:], lambda w: w[:, 1:], lambda w: w.flatten()[7:9]])
def test_a_buffer_in_a_weights_memory_ties_it(part: Callable[[torch.Tensor], torch.Tensor]) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Module())
    model[2].register_buffer("view", part(model[0].weight.data))
    apply_dual_lora(model, configuration())
    assert [type(layer) for layer in model[:2]] == [nn.Linear, DualLoraLinear]


def test_parts_of_one_storage_that_do_not_overlap_are_no_ties() -> None:
    """Fused projections are split like this."""
    fused = torch.randn(12, 6)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    for layer, weight in zip(model, fused.split(6), strict=True):
        layer.weight = nn.Parameter(weight)
    apply_dual_lora(model, configuration())
    assert all(isinstance(layer, DualLoraLinear) for layer in model)


def test_merging_a_head_tied_by_storage_leaves_the_embedding() -> None:
    model = apply_dual_lora(tied_by_assignment(), configuration(["lm_head", "v_proj"]))
    before, expected = model.model.embed_tokens.weight.detach().clone(), logits(model)
    adapted = {name for name, module in model.named_modules() if isinstance(module, DualLoraLinear)}
    others = {n: v.clone() for n, v in model.state_dict().items() if n.rpartition(".")[0] not in adapted}
    merge_dual_lora(model)
    assert torch.equal(model.model.embed_tokens.weight, before)
    assert not torch.equal(model.lm_head.weight, before)
    for name, value in others.items():
        assert torch.equal(model.state_dict()[name], value), name
    torch.testing.assert_close(logits(model), expected)
