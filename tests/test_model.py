"""Whole models: adapting, merging, parameter groups, warm-up and training, on tiny random Llama and GPT-2."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.pytorch_utils import Conv1D

from dual_lora_kernels import (
    DualLoraConfig,
    DualLoraLinear,
    DualLoraWarmup,
    apply_dual_lora,
    dual_lora_parameter_groups,
    merge_dual_lora,
)
from dual_lora_kernels.linear import FACTOR_NAMES, dual_lora_layers
from dual_lora_kernels.trainer import DualLoraWarmupCallback

VOCABULARY = 61
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LLAMA_LINEARS = (*(f"self_attn.{name}" for name in ATTENTION), "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
GPT2_LINEARS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


def llama(*, tied: bool = False, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """2 layers, grouped queries."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def gpt2() -> GPT2LMHeadModel:
    """2 layers of Conv1D; the output head is tied to the embedding."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1
    )
    return GPT2LMHeadModel(config).eval()


def configuration(target_modules: Any = "all-linear", **options: Any) -> DualLoraConfig:
    """Small ranks and an update that is not negligible."""
    return DualLoraConfig(target_modules, **{"r1": 3, "r2": 2, "alpha": 1.0, "init_std": 0.3} | options)


def adapted_names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, DualLoraLinear)}


def tokens(rows: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(tokens()).logits


class Block(nn.Module):
    """Attention by nn.MultiheadAttention, and one linear layer at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.up = nn.Linear(16, 16)
        self.again = self.up
        self.down = nn.Linear(16, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.again(torch.relu(self.up(x + self.attention(x, x, x)[0]))))


# --- which layers ---------------------------------------------------------------------------------------------------


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


# --- merging --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("premerged", [False, True])
@pytest.mark.parametrize("make", [llama, gpt2, lambda: llama(dtype=torch.bfloat16)], ids=["llama", "gpt2", "bf16"])
def test_merge_gives_the_original_architecture(make: Any, premerged: bool) -> None:
    original, model = make(), make()
    apply_dual_lora(model, configuration()).eval()
    adapted = logits(model)
    assert (adapted - logits(original)).abs().max() > 0.05
    if premerged:
        next(module for module in model.modules() if isinstance(module, DualLoraLinear)).merge()
    assert merge_dual_lora(model) is model
    torch.testing.assert_close(logits(model), adapted)
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in original.named_modules()]
    shapes = {name: (value.shape, value.dtype) for name, value in original.state_dict().items()}
    assert {name: (value.shape, value.dtype) for name, value in model.state_dict().items()} == shapes
    original.load_state_dict(model.state_dict())
    assert torch.equal(logits(original), logits(model))


def test_a_merged_model_saves_and_loads_as_any_other(tmp_path: Path) -> None:
    model = merge_dual_lora(apply_dual_lora(llama(), configuration()))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path).eval()), logits(model))


@pytest.mark.parametrize("premerged", [False, True])
def test_merging_unties_the_embedding(premerged: bool) -> None:
    """lm_head asked for by name: the embedding that shares its weight stays as it was."""
    model = llama(tied=True)
    before = model.model.embed_tokens.weight.detach().clone()
    apply_dual_lora(model, configuration(["lm_head"]))
    adapted = logits(model)
    if premerged:
        model.lm_head.merge()
    merge_dual_lora(model)
    assert type(model.lm_head) is nn.Linear
    assert torch.equal(model.model.embed_tokens.weight, before)
    torch.testing.assert_close(logits(model), adapted)


def test_merging_a_shared_module() -> None:
    model, x = Block().eval(), torch.randn(2, 3, 16)
    apply_dual_lora(model, configuration(["up", "again"]))
    adapted = model(x)
    merge_dual_lora(model)
    assert model.up is model.again
    assert not adapted_names(model)
    torch.testing.assert_close(model(x), adapted)


def test_merging_a_bare_layer_does_not_pretend() -> None:
    """As `apply_dual_lora` refuses a bare nn.Linear: the layer cannot be replaced in place. `to_linear` is meant."""
    layer = DualLoraLinear(4, 4)
    before = layer.weight.detach().clone()
    with pytest.raises(ValueError, match=r"^model: got .*to_linear"):
        merge_dual_lora(layer)
    assert torch.equal(layer.weight, before)


def test_merge_refuses_a_diverged_adapter_before_touching_anything() -> None:
    model = apply_dual_lora(llama(), configuration())
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.D[0, 0] = torch.nan
    names, before = adapted_names(model), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"^model\.layers\.1\.mlp\.down_proj\.D: got nan"):
        merge_dual_lora(model)
    assert adapted_names(model) == names
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)


# --- training -------------------------------------------------------------------------------------------------------


def test_parameter_groups() -> None:
    model = apply_dual_lora(llama(), configuration(["q_proj", "down_proj"]))
    assert [g["name"] for g in dual_lora_parameter_groups(model, 1e-3)] == ["magnitude", "direction"]
    norms = [parameter.requires_grad_() for name, parameter in model.named_parameters() if "norm" in name]
    groups = {g["name"]: g for g in dual_lora_parameter_groups(model, 1e-3, direction_lr=1e-4, weight_decay=0.1)}
    assert {name: (g["lr"], g["weight_decay"]) for name, g in groups.items()} == {
        "magnitude": (1e-3, 0.0), "direction": (1e-4, 0.0), "other": (1e-3, 0.1)
    }  # fmt: skip
    layers = [module for module in model.modules() if isinstance(module, DualLoraLinear)]
    for name, pair in (("magnitude", "AB"), ("direction", "CD")):
        assert {id(p) for p in groups[name]["params"]} == {id(getattr(layer, f)) for layer in layers for f in pair}
    assert {id(p) for p in groups["other"]["params"]} == {id(p) for p in norms}
    everything = sorted(id(p) for group in groups.values() for p in group["params"])
    assert everything == sorted(id(p) for p in model.parameters() if p.requires_grad)
    torch.optim.AdamW(list(groups.values()))


def test_parameter_groups_leave_out_frozen_factors() -> None:
    model = apply_dual_lora(Block(), configuration(["down"]))
    model.down.A.requires_grad_(False)
    model.down.B.requires_grad_(False)
    (group,) = dual_lora_parameter_groups(model, 1e-3)
    assert group["name"] == "direction"


def test_warm_up_raises_every_scale_in_step() -> None:
    model = nn.Sequential(DualLoraLinear(4, 4, alpha=8.0), DualLoraLinear(4, 4, r1=4, r2=1))
    buffers = [layer.scale for layer in model]
    warmup = DualLoraWarmup(model, 4)
    factors = []
    for _ in range(6):
        factors.append(warmup.factor)
        for layer in model:
            assert layer.scale.item() == pytest.approx(layer.full_scale * warmup.factor)
        warmup.step()
    assert factors == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert all(layer.scale is buffer for layer, buffer in zip(model, buffers, strict=True))


def test_warm_up_resumes() -> None:
    layer = DualLoraLinear(4, 4)
    warmup = DualLoraWarmup(layer, 10)
    for _ in range(3):
        warmup.step()
    state, scale = warmup.state_dict(), layer.scale.item()
    other = DualLoraWarmup(layer, 10)
    assert layer.scale.item() < scale
    other.load_state_dict(state)
    assert layer.scale.item() == scale
    assert other.factor == pytest.approx(0.4)


class Probe(TrainerCallback):
    """Records a layer's scale, relative to the full one, as each forward pass sees it."""

    def __init__(self, layer: DualLoraLinear) -> None:
        self.layer, self.seen = layer, []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.seen.append(round(self.layer.scale.item() / self.layer.full_scale, 4))


def train(model: nn.Module, folder: Path, steps: int, callbacks: list[Any], **options: Any) -> Trainer:
    rows = tokens(8)
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=4, use_cpu=True, report_to=[],
        disable_tqdm=True, logging_steps=1, learning_rate=1e-2, seed=0,
        **{"save_strategy": "no"} | options,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in rows]
    return Trainer(model=model, args=arguments, train_dataset=data, callbacks=callbacks)


def test_warm_up_callback(tmp_path: Path) -> None:
    """Over accumulation steps too, it counts the optimiser's steps; a resumed run goes on where it stopped."""
    model = apply_dual_lora(llama(), configuration(["q_proj"]))
    probe = Probe(model.model.layers[0].self_attn.q_proj)
    options = {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 1}
    train(model, tmp_path, 3, [DualLoraWarmupCallback(2), probe], **options).train()
    assert probe.seen == [0.5, 1.0, 1.0]

    model = apply_dual_lora(llama(), configuration(["q_proj"]))
    probe = Probe(model.model.layers[1].self_attn.q_proj)
    resumed = train(model, tmp_path, 3, [DualLoraWarmupCallback(2), probe], **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert probe.seen == [1.0, 1.0]


@pytest.mark.parametrize("make", [llama, gpt2])
def test_training_lowers_the_loss(make: Any) -> None:
    model = apply_dual_lora(make(), configuration(init_std=0.1)).train()
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(dual_lora_parameter_groups(model, 3e-2, direction_lr=1e-2))
    warmup = DualLoraWarmup(model, 5)
    rows, losses = tokens(4), []
    for _ in range(25):
        loss = model(rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        warmup.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.25
    for name, value in frozen.items():
        assert torch.equal(model.get_parameter(name), value), name
