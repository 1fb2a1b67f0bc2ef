"""PEFT's verbs on Dual LoRA. tests/test_families.py has whole models, tests/test_trainer.py the trainers."""

from __future__ import annotations

import copy
import json
import math
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftMixedModel,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from peft.helpers import disable_input_dtype_casting, rescale_adapter_scale
from peft.utils.hotswap import hotswap_adapter
from torch import nn

from dual_lora_kernels import DualLoraWarmup, apply_dual_lora, dual_lora_parameter_groups
from dual_lora_kernels.adapter import FACTOR_NAMES, DualLoraAdapter, dual_lora_adapters
from dual_lora_kernels.peft import DualLoraConfig, DualLoraLayer, Linear

from .models import configuration, gpt2, llama, logits, tokens

SMALL: dict[str, Any] = {"r1": 3, "r2": 2, "alpha": 1.0, "init_std": 0.3}


def config(target_modules: Any = "all-linear", **options: Any) -> DualLoraConfig:
    return DualLoraConfig(**{"target_modules": target_modules, "task_type": "CAUSAL_LM"} | SMALL | options)


def adapted(seed: int = 1, dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
    torch.manual_seed(seed)
    return get_peft_model(llama(dtype=dtype), config(**options)).eval()


def layers(model: nn.Module) -> dict[str, Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear)}


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: layer.get_base_layer().weight.detach().clone() for name, layer in layers(model).items()}


class Net(nn.Module):
    """Two linear layers and something else."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 10), nn.Linear(10, 7)
        self.convolution = nn.Conv1d(1, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.convolution(torch.tanh(self.first(x))[:, None])[:, 0])


def net(**options: Any) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(Net(), DualLoraConfig(**{"target_modules": ["first", "second"]} | SMALL | options)).eval()


X = torch.randn(6, 12, generator=torch.Generator().manual_seed(2))


# --- adapting


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 14),
        ({"target_modules": ["q_proj", "v_proj"]}, 4),
        ({"target_modules": r".*layers\.1\..*(gate|up)_proj"}, 2),
        ({"target_modules": None}, 4),
        ({"exclude_modules": ["gate_proj", "layers.0.mlp.up_proj"]}, 11),
        ({"exclude_modules": r".*mlp.*"}, 8),
        ({"target_modules": ["q_proj", "v_proj"], "layers_to_transform": 1}, 2),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"}, 1),
    ],
)
def test_targets(options: dict[str, Any], count: int) -> None:
    model = adapted(**options)
    assert len(layers(model)) == count
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"{name}.dual_adapter.default.{f}" for name in layers(model) for f in FACTOR_NAMES}


def test_all_linear_leaves_alone_what_no_adapter_would_reach(caplog: pytest.LogCaptureFixture) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2)
            self.up = nn.Linear(16, 16)

    with caplog.at_level("INFO"):
        model = get_peft_model(Attention(), DualLoraConfig(target_modules="all-linear"))
    assert list(layers(model)) == ["base_model.model.up"]
    assert "left alone: attention.out_proj (nn.MultiheadAttention reads its weight" in caplog.text


def test_patterns() -> None:
    model = adapted(rank_pattern={"q_proj": 5, r"layers\.1\..*up_proj": (4, 6)}, alpha_pattern={"q_proj": 3.0})
    found = {
        name.removeprefix("base_model.model.model."): layer.dual_adapter["default"]
        for name, layer in layers(model).items()
    }
    for name, adapter in found.items():
        expected = (5, 5) if "q_proj" in name else (4, 6) if name == "layers.1.mlp.up_proj" else (3, 2)
        assert (adapter.r1, adapter.r2) == expected
        alpha = 3.0 if "q_proj" in name else 1.0
        assert adapter.scale.item() == pytest.approx(alpha / math.sqrt(math.prod(expected)))


def test_print_trainable_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    model = adapted(target_modules=["q_proj"])
    model.print_trainable_parameters()
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"trainable params: {count:,}" in capsys.readouterr().out


@pytest.mark.parametrize("automatic", [True, False])
def test_autocast_adapter_dtype(automatic: bool) -> None:
    model = get_peft_model(llama(dtype=torch.bfloat16), config(), autocast_adapter_dtype=automatic)
    for _, adapter in dual_lora_adapters(model):
        assert {getattr(adapter, name).dtype for name in FACTOR_NAMES} == {
            torch.float32 if automatic else torch.bfloat16
        }
        assert adapter.scale.dtype == torch.float32
    model(input_ids=tokens(), labels=tokens()).loss.backward()


def test_the_scale_stays_fp32() -> None:
    model = adapted().to(torch.bfloat16)
    assert {adapter.scale.dtype for _, adapter in dual_lora_adapters(model)} == {torch.float32}


def test_bias_options() -> None:
    torch.manual_seed(0)
    for bias, expected in (("none", 0), ("dual_lora_only", 1), ("all", 3)):
        model = get_peft_model(Net(), DualLoraConfig(target_modules=["first"], bias=bias, **SMALL))
        assert sum(p.requires_grad for name, p in model.named_parameters() if name.endswith("bias")) == expected


def test_injecting_into_a_model() -> None:
    model = inject_adapter_in_model(DualLoraConfig(target_modules=["first"], **SMALL), Net())
    assert isinstance(model.first, DualLoraLayer)


# --- computing


def test_the_layer_computes_the_formula() -> None:
    model = net()
    layer = model.base_model.model.first
    weight = layer.base_layer.weight + layer.get_delta_weight("default")
    torch.testing.assert_close(layer(X), nn.functional.linear(X, weight, layer.base_layer.bias))


def test_dropout_is_used_in_training_alone() -> None:
    model = net(dropout=0.5)
    assert torch.equal(model(X), model(X))
    model.train()
    assert not torch.equal(model(X), model(X))


def test_disable_adapter_gives_the_base_model() -> None:
    model = adapted()
    before = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(llama()))
    assert torch.equal(logits(model), before)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(llama()))


def test_several_adapters() -> None:
    model = adapted(seed=1)
    first = logits(model)
    model.add_adapter("other", config(["q_proj", "up_proj"], r1=4))
    assert torch.equal(logits(model), first)
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".other." in name)
    model.set_adapter("other")
    second = logits(model)
    assert not torch.equal(second, first)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all(".other." in name for name in trainable)
    model.delete_adapter("default")
    assert torch.equal(logits(model), second)
    assert not any(".default." in name for name in model.state_dict())
    assert model.active_adapters == ["other"]


def test_active_adapters_add_up() -> None:
    model = net()
    model.add_adapter("other", DualLoraConfig(target_modules=["first"], **SMALL))
    model.base_model.set_adapter(["default", "other"])
    layer = model.base_model.model.first
    weight = layer.base_layer.weight + layer.get_delta_weight("default") + layer.get_delta_weight("other")
    torch.testing.assert_close(layer(X), nn.functional.linear(X, weight, layer.base_layer.bias))
    expected = model(X)
    torch.testing.assert_close(model.merge_and_unload()(X), expected)


def test_an_adapter_of_the_same_name_is_replaced_by_loading(tmp_path: Path) -> None:
    model, other = adapted(seed=1), adapted(seed=2)
    other.save_pretrained(tmp_path)
    model.load_adapter(str(tmp_path), "default")
    assert torch.equal(logits(model), logits(other))


@torch.no_grad()
def test_mixed_batches() -> None:
    model = net()
    model.add_adapter("other", DualLoraConfig(target_modules=["second"], **SMALL))
    expected = {"default": model(X)}
    model.set_adapter("other")
    expected["other"] = model(X)
    with model.disable_adapter():
        expected["__base__"] = model(X)
    names = ["other", "__base__", "default", "default", "other", "__base__"]
    found = model(X, adapter_names=names)
    for row, name in enumerate(names):
        torch.testing.assert_close(found[row], expected[name][row])


def test_mixed_batches_in_generation_with_beams() -> None:
    model = adapted()
    rows = tokens(2)
    options = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    one, base = model.generate(input_ids=rows, **options), llama().generate(input_ids=rows, **options)
    mixed = model.generate(input_ids=rows, adapter_names=["default", "__base__"], **options)
    assert torch.equal(mixed[0], one[0])
    assert torch.equal(mixed[1], base[1])


def test_mixed_batches_are_refused_where_they_cannot_be() -> None:
    model = net()
    with pytest.raises(ValueError, match="Length of `adapter_names` should be the same"):
        model(X, adapter_names=["default"])
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): nobody"):
        model(X, adapter_names=["nobody"] * 6)
    model.train()
    with pytest.raises(ValueError, match="when the model is in training mode"):
        model(X, adapter_names=["default"] * 6)
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match="when there are merged adapters"):
        model(X, adapter_names=["default"] * 6)


# --- merging


@pytest.mark.parametrize("make", [llama, gpt2])
def test_merge_and_unload(make: Any) -> None:
    torch.manual_seed(1)
    model = get_peft_model(make(), config()).eval()
    expected = logits(model)
    merged = model.merge_and_unload()
    assert type(merged) is type(make())
    assert not any(isinstance(module, DualLoraLayer) for module in merged.modules())
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_merge_adapter_and_unmerge_adapter_are_exact(dtype: torch.dtype) -> None:
    model = adapted(dtype=dtype)
    before = weights(model)
    model.merge_adapter()
    assert all(not torch.equal(weight, before[name]) for name, weight in weights(model).items())
    model.unmerge_adapter()
    assert all(torch.equal(weight, before[name]) for name, weight in weights(model).items())


def test_unload_gives_the_base_model_back() -> None:
    model = adapted()
    assert torch.equal(logits(model.unload()), logits(llama()))


def test_merging_some_of_the_adapters() -> None:
    model = net()
    model.add_adapter("other", DualLoraConfig(target_modules=["first"], **SMALL))
    with_one = model(X)
    merged = copy.deepcopy(model).merge_and_unload(adapter_names=["default"])
    torch.testing.assert_close(merged(X), with_one)
    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="additionally merging other"):
        model.merge_adapter(["other"])
    assert model.base_model.model.first.merged_adapters == ["default", "other"]


@pytest.mark.parametrize("safe", [False, True])
def test_an_adapter_that_is_not_finite_is_not_merged_anywhere(safe: bool) -> None:
    model = adapted()
    last = list(layers(model).values())[-1]
    with torch.no_grad():
        last.dual_adapter["default"].B[0, 0] = math.nan
    before = weights(model)
    for verb in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"NaNs detected in the merged weights\. The adapter default seems"):
            verb(safe_merge=safe)
        assert all(torch.equal(weight, before[name]) for name, weight in weights(model).items())


def test_a_merged_model_cannot_train() -> None:
    model = net()
    model.merge_adapter()
    model(X)
    model.train()
    with pytest.raises(RuntimeError, match=r"merged, so it cannot train: call unmerge_adapter\(\)"):
        model(X)


# --- files


def test_files_are_pefts(tmp_path: Path) -> None:
    model = adapted(rank_pattern={"q_proj": [4, 5]}, clip_bound=0.5, ste="xnor")
    model.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["peft_type"] == "DUAL_LORA"
    assert "lora_" not in "".join(get_peft_model_state_dict(model))
    read = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(read, DualLoraConfig)
    ours = model.peft_config["default"].to_dict() | {"inference_mode": True, "base_model_name_or_path": None}
    assert read.to_dict() == ours
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_cpu_mem_usage(dtype: torch.dtype, tmp_path: Path) -> None:
    """Factors keep their fp32 bits on a bf16 base."""
    model = adapted(dtype=dtype)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(dtype=dtype), tmp_path, low_cpu_mem_usage=True)
    saved = get_peft_model_state_dict(again)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in get_peft_model_state_dict(model).items())
    assert torch.equal(logits(again), logits(model))


def test_the_scale_is_saved_during_warm_up(tmp_path: Path) -> None:
    model = adapted()
    DualLoraWarmup(model, 10).set_step(3)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path)
    for _, adapter in dual_lora_adapters(again):
        assert adapter.scale.item() == pytest.approx(0.4 * adapter.full_scale)


def test_modules_to_save(tmp_path: Path) -> None:
    model = adapted(target_modules=["q_proj"], modules_to_save=["lm_head"])
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(1.5)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), expected)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=1e-5, atol=1e-5)


def test_an_adapter_of_another_base(tmp_path: Path) -> None:
    net(target_modules=["first"]).save_pretrained(tmp_path)
    other = Net()
    other.first = nn.Linear(20, 10)
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(other, tmp_path)


def test_an_adapter_of_other_ranks(tmp_path: Path) -> None:
    net(r1=5).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="size mismatch"):
        net().load_adapter(str(tmp_path), "default")


def test_pefts_helpers() -> None:
    model = net()
    assert {status.module_type for status in model.get_layer_status()} == {"dual_lora.Linear"}
    assert model.get_model_status().num_adapter_layers == 2
    with disable_input_dtype_casting(model):
        model(X)
    with pytest.raises(ValueError, match="models with `LoraLayer`s"), rescale_adapter_scale(model, 0.5):
        pass
    model.merge_adapter()
    with pytest.warns(UserWarning, match="cannot be set when the model is merged"):
        model.set_adapter("default")
    assert not model.base_model.model.first.merged


def test_hotswapping_is_refused(tmp_path: Path) -> None:
    model = net()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="only supports LORA but DUAL_LORA"):
        hotswap_adapter(model, str(tmp_path), adapter_name="default")


# --- training


def test_warm_up_and_parameter_groups_take_what_trains() -> None:
    model = adapted(seed=1)
    model.add_adapter("other", config(["q_proj"]))
    model.set_adapter("other")
    DualLoraWarmup(model, 10)
    for name, adapter in dual_lora_adapters(model):
        assert adapter.scale.item() == pytest.approx(adapter.full_scale * (0.1 if name.endswith("other") else 1.0))
    groups = {group["name"]: len(group["params"]) for group in dual_lora_parameter_groups(model, 1e-3)}
    assert groups == {"magnitude": 4, "direction": 4}


def test_gradient_checkpointing() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = adapted().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    "copier", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copies(copier: Any) -> None:
    model = net()
    model.merge_adapter()
    other = copier(model)
    assert torch.equal(other(X), model(X))
    other.unmerge_adapter()
    assert not torch.equal(
        other.base_model.model.first.base_layer.weight, model.base_model.model.first.base_layer.weight
    )
    with other.disable_adapter():
        assert torch.equal(other(X), net().unload()(X))


def test_torch_compile() -> None:
    model = net()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), model(X))
    compiled(X).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


# --- imports, refusals


@pytest.mark.parametrize(
    "first",
    [
        "import peft, dual_lora_kernels.peft",
        "import dual_lora_kernels.peft, peft",
        "import dual_lora_kernels, peft, dual_lora_kernels.peft",
    ],
)
def test_the_order_of_imports_does_not_matter(first: str) -> None:
    program = f"""{first}
assert peft.PeftType("DUAL_LORA") is peft.PeftType.DUAL_LORA and "DUAL_LORA" in list(peft.PeftType)
assert "DUAL_LORA" in vars(peft.PeftType)  # where Python 3.12 looks for members
assert peft.PEFT_TYPE_TO_CONFIG_MAPPING["DUAL_LORA"] is dual_lora_kernels.peft.DualLoraConfig
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_package_alone_does_not_import_peft() -> None:
    subprocess.run(
        [sys.executable, "-c", "import sys, dual_lora_kernels; assert 'peft' not in sys.modules"], check=True
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 8}, r"unexpected keyword argument 'r'; expected r1 .* and r2"),
        ({"lora_alpha": 8}, "'lora_alpha'; expected alpha"),
        ({"lora_dropout": 0.1}, "'lora_dropout'; expected dropout"),
        ({"target_module": ["q"]}, "'target_module'; expected target_modules"),
        ({"nonsense": 1}, "'nonsense'; expected one of task_type"),
    ],
)
def test_unknown_fields(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        DualLoraConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r1": 0}, "^r1: got 0, expected"),
        ({"r2": 2.5}, "^r2: got 2.5 .*expected"),
        ({"alpha": -1.0}, "^alpha: got -1.0, expected"),
        ({"dropout": 1.0}, "^dropout: got 1.0, expected"),
        ({"ste": "sign"}, "^ste: got 'sign', expected"),
        ({"rounding": "up"}, "^rounding: got 'up', expected"),
        ({"bias": "some"}, "^bias: got 'some', expected"),
        ({"rank_pattern": {"q": 0}}, r"^rank_pattern\['q'\]: got 0, expected"),
        ({"rank_pattern": {"q": (1, 2, 3)}}, r"^rank_pattern\['q'\]: got \(1, 2, 3\), expected a rank or a pair"),
        ({"rank_pattern": {"q(": 1}}, r"^rank_pattern: got 'q\(', expected a name or a regular expression"),
        ({"alpha_pattern": {"q": -2.0}}, r"^alpha_pattern\['q'\]: got -2.0, expected a positive number"),
        ({"target_modules": ".*", "layers_to_transform": [1]}, "`layers_to_transform` cannot be used when"),
        ({"target_modules": ["q"], "layers_pattern": "h"}, "`layers_to_transform` must also be specified"),
        ({"task_type": "NOTHING"}, "Invalid task type"),
    ],
)
def test_fields_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        DualLoraConfig(**options)


def test_targets_that_match_nothing() -> None:
    with pytest.raises(ValueError, match=r"Target modules .* not found in the base model"):
        get_peft_model(Net(), DualLoraConfig(target_modules=["third"]))
    with pytest.raises(ValueError, match="Please specify `target_modules`"):
        get_peft_model(Net(), DualLoraConfig())


@pytest.mark.parametrize("target", ["convolution", "quantised"])
def test_layers_that_cannot_be_adapted(target: str) -> None:
    model = Net()
    model.quantised = nn.Linear(4, 4)
    model.quantised.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=f"is not supported: .*'{target}' matches target_modules"):
        get_peft_model(model, DualLoraConfig(target_modules=[target]))


def test_other_methods_on_the_same_layer_are_refused() -> None:
    model = get_peft_model(Net(), LoraConfig(target_modules=["first"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="is not supported"):
            get_peft_model(model.base_model.model, DualLoraConfig(target_modules=["first"]))
    with pytest.raises(ValueError, match="DUAL_LORA"):
        PeftMixedModel(Net(), DualLoraConfig(target_modules=["first"]))
    with pytest.raises(ValueError, match="is PEFT's"):
        apply_dual_lora(net(), configuration())


def test_a_weighted_sum_of_adapters_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="not linear in its factors"):
        net().add_weighted_adapter(["default"], [1.0], "sum")


def test_the_plain_door_names_the_other_one() -> None:
    with pytest.raises(
        TypeError, match=r"^config: got dual_lora_kernels\.peft\.config\.DualLoraConfig.*get_peft_model"
    ):
        apply_dual_lora(Net(), DualLoraConfig())
    with pytest.raises(
        TypeError, match=r"^config: got peft\..*LoraConfig, expected dual_lora_kernels.DualLoraConfig\(r1="
    ):
        apply_dual_lora(Net(), LoraConfig())


def test_the_layers_repr_names_the_method() -> None:
    assert repr(net().base_model.model.first).startswith("dual_lora.Linear(")
    assert isinstance(net().base_model.model.first.dual_adapter["default"], DualLoraAdapter)
