"""Which layers of a model are adapted: by names, patterns and all-linear, and those that cannot be."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from dual_lora_kernels import DualLoraLinear, apply_dual_lora
from dual_lora_kernels.adapter import FACTOR_NAMES
from dual_lora_kernels.linear import dual_lora_layers

from .models import Block, adapted_names, configuration, gpt2, llama, logits

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LLAMA_LINEARS = (*(f"self_attn.{name}" for name in ATTENTION), "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
GPT2_LINEARS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q_proj", "v_proj"], [f"{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qv"]),
        (("mlp.up_proj",), ["0.mlp.up_proj", "1.mlp.up_proj"]),
        (["model.layers.1.mlp.up_proj"], ["1.mlp.up_proj"]),
        (["q_proj", "model.layers.0.self_attn.q_proj"], ["0.self_attn.q_proj", "1.self_attn.q_proj"]),
        (r".*\.0\.self_attn\.[qk]_proj", ["0.self_attn.q_proj", "0.self_attn.k_proj"]),
        ("all-linear", [f"{i}.{name}" for i in (0, 1) for name in LLAMA_LINEARS]),
    ],
    ids=["suffixes", "dotted suffix", "full name", "overlapping names", "regular expression", "all-linear"],
)
def test_targets(targets: Any, expected: list[str]) -> None:
    model = llama()
    weights = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    assert apply_dual_lora(model, configuration(targets)) is model
    names = {f"model.layers.{name}" for name in expected}
    assert adapted_names(model) == names
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {f"{name}.{factor}" for name in names for factor in FACTOR_NAMES}
    assert {n: p.data_ptr() for n, p in model.named_parameters() if n in weights} == weights


def test_a_suffix_begins_at_a_dot() -> None:
    """``proj`` does not mean ``q_proj``."""
    with pytest.raises(ValueError, match=r"^target_modules: got \['proj'\].*LlamaForCausalLM.*q_proj"):
        apply_dual_lora(llama(), configuration(["proj"]))


@pytest.mark.parametrize("tied", [False, True])
def test_all_linear_leaves_the_output_head(tied: bool, caplog: pytest.LogCaptureFixture) -> None:
    model = llama(tied=tied)
    with caplog.at_level(logging.INFO):
        apply_dual_lora(model, configuration())
    assert type(model.lm_head) is nn.Linear
    (message,) = (record.getMessage() for record in caplog.records if record.name == "dual_lora_kernels")
    assert "adapted 14 layers" in message
    assert "q_proj x 2" in message
    assert "lm_head (output head)" in message
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"{trainable:,} of " in message


def test_all_linear_leaves_tied_weights_and_multihead_attention() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(4, 16), "block": Block(), "head": nn.Linear(16, 4)})
    model["head"].weight = model["embedding"].weight
    apply_dual_lora(model, configuration())
    assert adapted_names(model) == {"block.up", "block.again", "block.down"}


def test_conv1d_is_adapted() -> None:
    model = gpt2()
    apply_dual_lora(model, configuration())
    for _, layer in dual_lora_layers(model):
        layer.set_scale(0.0)
    assert adapted_names(model) == {f"transformer.h.{i}.{name}" for i in (0, 1) for name in GPT2_LINEARS}
    torch.testing.assert_close(logits(model), logits(gpt2()))  # no update yet
    layer = model.transformer.h[0].attn.c_attn
    assert (layer.in_features, layer.out_features) == (32, 96)
    assert layer.weight.shape == (32, 96)
    assert layer.B.shape == (96, 3)


@pytest.mark.parametrize("targets", ["all-linear", ["up", "again"], ["up"], ["again"]])
def test_a_shared_module_gets_one_adapter(targets: Any) -> None:
    """Whichever of its names is asked for: a copy left behind would be another model than the one trained before."""
    model = apply_dual_lora(Block(), configuration(targets))
    assert isinstance(model.up, DualLoraLinear)
    assert model.up is model.again


def test_excluded_modules_are_left_alone() -> None:
    model = nn.ModuleDict({"block": Block(), "score": nn.Linear(16, 3)})
    apply_dual_lora(model, configuration(exclude_modules=["score", "block.down"]))
    assert adapted_names(model) == {"block.up", "block.again"}


def test_a_compiled_model_is_adapted_by_its_own_names() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    compiled = torch.compile(model, backend="eager")
    apply_dual_lora(compiled, configuration(r"[0]"))
    assert adapted_names(model) == {"0"}
    assert compiled(torch.randn(2, 8)).shape == (2, 8)


def test_layers_that_a_fused_path_reads_are_not_adapted() -> None:
    """In eval mode nn.TransformerEncoderLayer takes its linear layers' weights past their forward."""
    encoder = nn.TransformerEncoderLayer(16, 2, 32)
    model = nn.ModuleDict({"encoder": encoder, "other": nn.Linear(16, 16)})
    apply_dual_lora(model, configuration())
    assert adapted_names(model) == {"other"}
    with pytest.raises(ValueError, match=r"'encoder.linear1' cannot be adapted: .*fused inference"):
        apply_dual_lora(nn.ModuleDict({"encoder": nn.TransformerEncoderLayer(16, 2, 32)}), configuration(["linear1"]))


def test_tensor_subclasses_are_not_adapted() -> None:
    class Packed(torch.Tensor):
        """As quantised and sharded weights are: a floating dtype, two dimensions, and not those numbers in memory."""

    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.randn(4, 4).as_subclass(Packed), requires_grad=False)
    with pytest.raises(ValueError, match=r"'0' cannot be adapted: .*Packed, a tensor subclass"):
        apply_dual_lora(model, configuration(["0"]))


def test_the_applications_logging_level_is_respected(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        apply_dual_lora(Block(), configuration())
    assert "adapted" not in caplog.text


def test_other_parameters_are_frozen() -> None:
    model = Block()
    apply_dual_lora(model, configuration(["down"]))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {f"down.{f}" for f in FACTOR_NAMES}


ERRORS = [
    (Block, ["nothing"], r"^target_modules: got \['nothing'\].*Block.*up"),
    (Block, ["up", "gone", "lost"], r"^target_modules: got \['gone', 'lost'\]"),
    (Block, r"u", r"^target_modules: got \['u'\]"),
    (Block, ["attention.out_proj"], r"^target_modules: 'attention.out_proj' cannot be adapted: nn.MultiheadAttention"),
    (Block, ["attention"], r"^target_modules: 'attention' cannot be adapted: MultiheadAttention is not a linear"),
    (llama, ["up_proj", "embed_tokens"], r"'model.embed_tokens' cannot be adapted: Embedding is not a linear"),
    (nn.ReLU, "all-linear", "^target_modules: got 'all-linear', which matches nothing in ReLU: it has no linear"),
    (lambda: nn.MultiheadAttention(8, 2), "all-linear", r"matches nothing in MultiheadAttention: out_proj: "),
    (lambda: nn.Linear(4, 4), "all-linear", r"^model: got a linear layer itself.*from_linear"),
    (lambda: Conv1D(4, 4), "all-linear", r"^model: got a linear layer itself.*from_linear"),
    (lambda: apply_dual_lora(llama(), configuration(["q_proj"])), ["v_proj"], "^model: got .* with Dual LoRA layers"),
]


@pytest.mark.parametrize(("make", "targets", "message"), ERRORS)
def test_errors_change_nothing(make: Any, targets: Any, message: str) -> None:
    model = make()
    before = [(name, id(module)) for name, module in model.named_modules()]
    parameters = [(name, p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()]
    with pytest.raises(ValueError, match=message):
        apply_dual_lora(model, configuration(targets))
    assert [(name, id(module)) for name, module in model.named_modules()] == before
    for (name, trains, value), (other_name, other) in zip(parameters, model.named_parameters(), strict=True):
        assert (name, trains) == (other_name, other.requires_grad)
        assert torch.equal(value, other)
