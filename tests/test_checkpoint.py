"""Saving and loading the adapter alone: what comes back is exact."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from dual_lora_kernels import (
    DualLoraConfig,
    DualLoraLinear,
    DualLoraWarmup,
    apply_dual_lora,
    dual_lora_state_dict,
    load_dual_lora,
    load_dual_lora_state_dict,
    save_dual_lora,
)
from dual_lora_kernels.adapter import FACTOR_NAMES
from dual_lora_kernels.adapter_files import SETTINGS_FILE, WEIGHTS_FILE

from .checkpoints import LAYER, adapted, settings_of, write_settings
from .models import configuration, gpt2, llama, logits


class Tied(nn.Module):
    """One linear layer at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = self.first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (llama, {}),
        (gpt2, {}),
        (lambda: llama(dtype=torch.bfloat16), {"rounding": "nearest", "ste": "xnor", "clip_bound": 0.5}),
        (lambda: llama(dtype=torch.bfloat16), {"adapter_dtype": torch.bfloat16, "r1": 5, "r2": 1, "dropout": 0.1}),
        (lambda: llama(tied=True), {"target_modules": ["lm_head", "v_proj"]}),
    ],
    ids=["llama", "gpt2", "bf16", "bf16 adapter", "tied head"],
)
@pytest.mark.parametrize("into", ["fresh", "adapted"])
def test_round_trip(make: Callable[[], nn.Module], options: dict[str, Any], into: str, tmp_path: Path) -> None:
    """Bit-identical logits, in a base that is plain or has other adapters of the same ranks; settings come along."""
    model = adapted(make, **options)
    folder = save_dual_lora(model, tmp_path / "deep" / "adapter")
    assert sorted(file.name for file in folder.iterdir()) == sorted([SETTINGS_FILE, WEIGHTS_FILE])
    assert load_file(folder / WEIGHTS_FILE).keys() == dual_lora_state_dict(model).keys()
    other = make() if into == "fresh" else adapted(make, seed=2, **options)
    assert not torch.equal(logits(other), logits(model))
    assert load_dual_lora(other, str(folder)) is other
    assert torch.equal(logits(other.eval()), logits(model))
    layers = [{n: m for n, m in each.named_modules() if isinstance(m, DualLoraLinear)} for each in (model, other)]
    assert layers[0].keys() == layers[1].keys()
    for one, two in zip(layers[0].values(), layers[1].values(), strict=True):
        assert (repr(one), one.clip_bound, one.init_std) == (repr(two), two.clip_bound, two.init_std)
        assert one.A.dtype == two.A.dtype
    trainable = {name for name, parameter in other.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name in dual_lora_state_dict(other) if not name.endswith(".scale")}


def test_layers_may_differ(tmp_path: Path) -> None:
    """Each layer's own ranks and settings are saved, though `apply_dual_lora` gives all the same."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    model = copy.deepcopy(base)
    model[0] = DualLoraLinear.from_linear(model[0], r1=2, r2=3, init_std=0.5)
    model[2] = DualLoraLinear.from_linear(model[2], r1=4, r2=1, init_std=0.5, alpha=5.0)
    load_dual_lora(base, save_dual_lora(model, tmp_path))
    x = torch.randn(3, 6)
    assert torch.equal(base(x), model(x))
    assert base[2].full_scale == model[2].full_scale


def test_a_half_warmed_scale_is_kept(tmp_path: Path) -> None:
    model = adapted()
    warmup = DualLoraWarmup(model, 10)
    warmup.step()
    warmup.step()
    other = load_dual_lora(llama(), save_dual_lora(model, tmp_path))
    layer, original = other.get_submodule(LAYER), model.get_submodule(LAYER)
    assert layer.scale.item() == original.scale.item() == pytest.approx(0.3 * layer.full_scale)
    assert layer.full_scale == original.full_scale
    assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize("into", ["fresh", "adapted"])
def test_a_shared_module(into: str, tmp_path: Path) -> None:
    base, x = Tied(), torch.randn(3, 8)
    model = copy.deepcopy(base)
    apply_dual_lora(model, configuration())
    if into == "adapted":
        apply_dual_lora(base, configuration())
    load_dual_lora(base, save_dual_lora(model, tmp_path))
    assert base.first is base.second
    assert torch.equal(base(x), model(x))


def test_a_merged_model_saves_the_same_adapter(tmp_path: Path) -> None:
    model = adapted()
    before = load_file(save_dual_lora(model, tmp_path / "unmerged") / WEIGHTS_FILE)
    model.get_submodule(LAYER).merge()
    after = load_file(save_dual_lora(model, tmp_path / "merged") / WEIGHTS_FILE)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_compiled_models_save_and_load(tmp_path: Path) -> None:
    """torch.compile's prefix is no part of the names: adapters pass between compiled and plain models."""
    model = adapted()
    folder = save_dual_lora(torch.compile(model, backend="eager"), tmp_path)
    assert not any(name.startswith("_orig_mod") for name in load_file(folder / WEIGHTS_FILE))
    for other in (adapted(seed=2), llama()):
        load_dual_lora(torch.compile(other, backend="eager"), folder)
        assert torch.equal(logits(other), logits(model))


def test_state_dict_round_trip() -> None:
    model, other = adapted(), adapted(seed=2)
    state = dual_lora_state_dict(model)
    assert {name.removeprefix(LAYER + ".") for name in state if name.startswith(LAYER)} == {*FACTOR_NAMES, "scale"}
    assert not any(value.requires_grad for value in state.values())
    assert state[f"{LAYER}.A"].data_ptr() == model.get_submodule(LAYER).A.data_ptr()
    layer = other.get_submodule(LAYER)
    parameters = [getattr(layer, name) for name in FACTOR_NAMES]
    load_dual_lora_state_dict(other, state)
    assert all(getattr(layer, name) is p for name, p in zip(FACTOR_NAMES, parameters, strict=True))
    assert torch.equal(logits(other), logits(model))


def test_the_documented_files(tmp_path: Path) -> None:
    """Other tools read these: names, format number, one entry a layer with what `DualLoraConfig` takes."""
    folder = save_dual_lora(adapted(), tmp_path)
    settings = json.loads((folder / "dual_lora_config.json").read_text())
    assert settings == settings_of(folder)
    assert settings["format"] == 1
    assert len(settings["layers"]) == 14
    layer = settings["layers"][LAYER]
    assert layer.pop("adapter_dtype") == "float32"
    assert DualLoraConfig(**layer) == DualLoraConfig(r1=3, r2=2, alpha=1.0, init_std=0.3)


@pytest.mark.parametrize("into", ["fresh", "adapted"])
def test_files_of_the_first_versions_load(into: str, tmp_path: Path) -> None:
    """They have the settings in the JSON file alone."""
    model = adapted(ste="xnor", rounding="nearest")
    folder = save_dual_lora(model, tmp_path)
    write_settings(folder, (folder / SETTINGS_FILE).read_text(), beside=True)
    other = load_dual_lora(llama() if into == "fresh" else adapted(seed=2), folder)
    assert torch.equal(logits(other), logits(model))
    assert other.get_submodule(LAYER).ste == ("xnor" if into == "fresh" else "clip")


def test_the_settings_for_people_are_not_needed(tmp_path: Path) -> None:
    model = adapted(ste="xnor")
    folder = save_dual_lora(model, tmp_path)
    (folder / SETTINGS_FILE).unlink()
    other = load_dual_lora(llama(), folder)
    assert torch.equal(logits(other), logits(model))
    assert other.get_submodule(LAYER).ste == "xnor"


def edited(text: str) -> str:
    return text.replace('"alpha": 1.0', '"alpha": 2.0')


def damaged(text: str) -> str:
    return text[: len(text) // 2]


def nested(text: str) -> str:
    return "[" * 100_000


@pytest.mark.parametrize("change", [edited, damaged, nested])
def test_settings_for_people_that_say_otherwise_are_warned_of(
    change: Callable[[str], str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = adapted()
    folder = save_dual_lora(model, tmp_path)
    load_dual_lora(llama(), folder)
    assert "does not say" not in caplog.text
    (folder / SETTINGS_FILE).write_text(change((folder / SETTINGS_FILE).read_text()))
    other = load_dual_lora(llama(), folder)
    assert f"{folder / SETTINGS_FILE} does not say what {WEIGHTS_FILE} has" in caplog.text
    assert torch.equal(logits(other), logits(model))
    assert other.get_submodule(LAYER).alpha == 1.0


def test_an_adapted_model_that_keeps_other_settings_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_dual_lora(adapted(), tmp_path)
    load_dual_lora(adapted(seed=2, dropout=0.1), folder)
    assert "differ" not in caplog.text
    load_dual_lora(adapted(seed=2, rounding="nearest"), folder)
    assert f"differ from the adapter's: {LAYER} has rounding 'nearest', saved was 'dither'" in caplog.text


def test_saving_says_what_it_leaves_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = adapted()
    save_dual_lora(model, tmp_path)
    assert "not saved" not in caplog.text
    model.lm_head.weight.requires_grad_(True)
    save_dual_lora(model, tmp_path)
    assert "1 trainable parameters are no adapter's and are not saved: lm_head.weight" in caplog.text


def test_a_low_precision_state_assigned_keeps_the_scale_fp32() -> None:
    layer = DualLoraLinear(8, 8)
    state = {name: tensor.bfloat16() for name, tensor in layer.state_dict().items()}
    layer.load_state_dict(state, assign=True)
    assert layer.A.dtype == torch.bfloat16
    assert layer.scale.dtype == torch.float32
    assert layer(torch.randn(2, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_wrapped_models_adapter_loads_into_the_plain_model(tmp_path: Path) -> None:
    model = adapted()
    save_dual_lora(nn.DataParallel(model), tmp_path)
    assert torch.equal(logits(load_dual_lora(llama(), tmp_path)), logits(model))


def test_an_averaged_models_adapter_loads_into_the_plain_model(tmp_path: Path) -> None:
    """Stochastic weight averaging: the count of averaged steps is not saved and not changed by loading."""
    model = adapted()
    averaged = AveragedModel(model)
    averaged.update_parameters(model)
    model.get_submodule(LAYER).A.data.add_(1.0)
    averaged.update_parameters(model)
    folder = save_dual_lora(averaged, tmp_path)
    assert load_file(folder / WEIGHTS_FILE).keys() == dual_lora_state_dict(model).keys()
    assert torch.equal(logits(load_dual_lora(llama(), folder)), logits(averaged.module))
    assert not torch.equal(logits(model), logits(averaged.module))
    other = AveragedModel(adapted(seed=2))
    load_dual_lora(other, folder)
    assert torch.equal(logits(other.module), logits(averaged.module))
    assert other.n_averaged == 0


def test_numbers_from_numpy_are_saved(tmp_path: Path) -> None:
    model = adapted(r1=np.int64(2), alpha=np.float64(3.0))
    assert torch.equal(logits(load_dual_lora(llama(), save_dual_lora(model, tmp_path))), logits(model))


def test_a_low_precision_scale_buffer_is_widened() -> None:
    """FSDP's buffer_dtype writes buffers without going through the module."""
    layer = DualLoraLinear(8, 8)
    x = torch.randn(2, 8)
    expected = layer(x)
    layer._buffers["scale"] = layer.scale.bfloat16()
    assert torch.equal(layer(x), expected)  # 2.0 is a bf16 number
