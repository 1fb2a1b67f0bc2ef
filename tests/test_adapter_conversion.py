"""An adapter in the other format is the same one, bit for bit, and loads where that format is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

import dual_lora_kernels.peft  # noqa: F401  # PEFT knows the method then
from dual_lora_kernels import convert_adapter, load_dual_lora, save_dual_lora
from dual_lora_kernels.adapter_files import SETTINGS_FILE, WEIGHTS_FILE
from dual_lora_kernels.peft_files import PEFT_CONFIG_FILE
from dual_lora_kernels.saved_adapter import open_adapter

from .checkpoints import adapted, write_settings, write_tensors
from .merged_checkpoints import content, equal_bits
from .models import gpt2, llama, logits


def assert_same_adapter(one: Path, other: Path) -> None:
    first, second = open_adapter(one), open_adapter(other)
    assert first.configs == second.configs
    assert first.modules_to_save == second.modules_to_save
    assert first.state.keys() == second.state.keys()
    for name, tensor in first.state.items():
        assert equal_bits(tensor.reshape(-1), second.state[name].reshape(-1)), name


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}, {"gradient_columns": 0.5, "ste": "xnor"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [llama, gpt2])
def test_there_and_back(make: Any, dtype: torch.dtype, options: dict[str, Any], tmp_path: Path) -> None:
    if make is gpt2 and "modules_to_save" in options:
        options = {"modules_to_save": ["ln_f"]}  # its head is tied
    model = adapted(make, adapter_dtype=dtype, **options)
    save_dual_lora(model, tmp_path / "own")
    there = convert_adapter(tmp_path / "own", tmp_path / "peft", base_model="models/mine")
    assert (there.source, there.target) == ("dual_lora", "peft")
    assert (there.layers, there.notes) == (14 if make is llama else 8, ())
    back = convert_adapter(tmp_path / "peft", tmp_path / "back")
    assert (back.source, back.target) == ("peft", "dual_lora")
    assert_same_adapter(tmp_path / "own", tmp_path / "peft")
    assert_same_adapter(tmp_path / "own", tmp_path / "back")
    again = convert_adapter(tmp_path / "peft", tmp_path / "again", to="peft")
    assert again.target == "peft"
    assert content(tmp_path / "again") == content(tmp_path / "peft")
    assert json.loads((tmp_path / "peft" / PEFT_CONFIG_FILE).read_text())["base_model_name_or_path"] == "models/mine"


def test_peft_loads_what_is_converted(tmp_path: Path) -> None:
    model = adapted()
    save_dual_lora(model, tmp_path / "own")
    convert_adapter(tmp_path / "own", tmp_path / "peft")
    expected = logits(model)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path / "peft")), expected)
    convert_adapter(tmp_path / "peft", tmp_path / "back")
    assert torch.equal(logits(load_dual_lora(llama(), tmp_path / "back")), expected)


def test_without_a_base_models_name_that_is_said(tmp_path: Path) -> None:
    save_dual_lora(adapted(), tmp_path / "own")
    (note,) = convert_adapter(tmp_path / "own", tmp_path / "peft").notes
    assert "names no base model" in note


def test_what_is_refused_leaves_nothing(tmp_path: Path) -> None:
    save_dual_lora(adapted(), tmp_path / "own")
    before = content(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("years")
    for out in ("taken", "own"):
        with pytest.raises(ValueError, match=rf"out: got '.*/{out}', which exists and is not empty"):
            convert_adapter(tmp_path / "own", tmp_path / out)
    with pytest.raises(ValueError, match="to: got 'lora', expected one of 'dual_lora', 'peft'"):
        convert_adapter(tmp_path / "own", tmp_path / "new", to="lora")
    with pytest.raises(FileNotFoundError, match=f"which has no {WEIGHTS_FILE}"):
        convert_adapter(tmp_path / "none", tmp_path / "new")
    assert content(tmp_path) == before | {"taken/thesis.tex": b"years"}
    assert not (tmp_path / "new").exists()
    write_tensors(tmp_path / "own", lambda state: next(iter(state.values())).view(-1)[:1].fill_(torch.nan))
    with pytest.raises(
        ValueError, match=r"/own/dual_lora_model\.safetensors': model.*: got nan, expected finite values"
    ):
        convert_adapter(tmp_path / "own", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_layers_that_pefts_format_cannot_tell_apart(tmp_path: Path) -> None:
    save_dual_lora(adapted(), tmp_path / "own")
    settings = json.loads((tmp_path / "own" / SETTINGS_FILE).read_text())
    next(iter(settings["layers"].values()))["ste"] = "dorefa"
    write_settings(tmp_path / "own", json.dumps(settings))
    with pytest.raises(
        ValueError, match=r"dual_lora_model\.safetensors': .*has ste 'clip', others 'dorefa'; .* use save_dual_lora"
    ):
        convert_adapter(tmp_path / "own", tmp_path / "peft")
    assert not (tmp_path / "peft").exists()
