"""Saving and loading through PEFT."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.helpers import disable_input_dtype_casting, rescale_adapter_scale
from peft.utils.hotswap import hotswap_adapter
from torch import nn

from dual_lora_kernels import DualLoraWarmup
from dual_lora_kernels.adapter import dual_lora_adapters
from dual_lora_kernels.peft import DualLoraConfig

from .models import llama, logits
from .peft_models import Net, X, adapted, net


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
