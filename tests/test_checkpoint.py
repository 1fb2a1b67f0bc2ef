"""Saving and loading the adapter alone: what comes back is exact, and what does not fit is refused untouched."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

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
from dual_lora_kernels.checkpoint import SETTINGS_FILE, WEIGHTS_FILE
from dual_lora_kernels.linear import FACTOR_NAMES

from .models import configuration, gpt2, llama, logits

LAYER = "model.layers.0.self_attn.q_proj"


class Tied(nn.Module):
    """One linear layer at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = self.first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


def adapted(make: Callable[[], nn.Module] = llama, *, seed: int = 1, **options: Any) -> nn.Module:
    """A model whose base is always the same and whose adapter the seed decides, in eval mode."""
    model = make()
    torch.manual_seed(seed)
    return apply_dual_lora(model, configuration(**options)).eval()


def snapshot(model: nn.Module) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """What loading may change: the modules, their dtypes, what trains, and every value."""
    structure = [(name, id(module)) for name, module in model.named_modules()]
    structure += [(name, parameter.requires_grad) for name, parameter in model.named_parameters()]
    return structure, copy.deepcopy(model.state_dict())


def assert_unchanged(model: nn.Module, before: tuple[list[Any], dict[str, torch.Tensor]]) -> None:
    structure, state = snapshot(model)
    assert structure == before[0]
    assert all(torch.equal(value, before[1][name]) for name, value in state.items())


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A saved adapter of `llama`."""
    return save_dual_lora(adapted(), tmp_path / "adapter")


# --- round trips ----------------------------------------------------------------------------------------------------


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


# --- what does not fit ----------------------------------------------------------------------------------------------


def other_ranks(folder: Path) -> nn.Module:
    return adapted(seed=2, r1=4)


def other_layers(folder: Path) -> nn.Module:
    return adapted(seed=2, target_modules=["q_proj", "v_proj"])


def merged(folder: Path) -> nn.Module:
    model = adapted(seed=2)
    model.get_submodule(LAYER).merge()
    return model


def other_architecture(folder: Path) -> nn.Module:
    return gpt2()


def other_shapes(folder: Path) -> nn.Module:
    model = llama()
    model.model.layers[1].mlp.up_proj = nn.Linear(32, 50, bias=False)
    return model


def hooked(folder: Path) -> nn.Module:
    model = llama()
    model.get_submodule(LAYER).register_forward_hook(lambda *_: None)
    return model


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    settings = json.loads((folder / SETTINGS_FILE).read_text())
    change(settings)
    (folder / SETTINGS_FILE).write_text(json.dumps(settings))


def settings_damaged(*path: str, value: Any) -> Callable[[Path], nn.Module]:
    """A damage that sets one entry of the settings."""

    def damage(folder: Path) -> nn.Module:
        def change(settings: dict[str, Any]) -> None:
            for key in path[:-1]:
                settings = settings[key]
            settings[path[-1]] = value

        edit(folder, change)
        return llama()

    damage.__name__ = f"settings_{path[-1]}_{value}"
    return damage


def settings_garbage(folder: Path) -> nn.Module:
    (folder / SETTINGS_FILE).write_bytes(b'{"format": 1, "layers": {\xff')
    return llama()


def settings_lack_a_layer(folder: Path) -> nn.Module:
    edit(folder, lambda settings: settings["layers"].pop(LAYER))
    return llama()


def settings_lack_the_format(folder: Path) -> nn.Module:
    edit(folder, lambda settings: settings.pop("format"))
    return llama()


def weights_truncated(folder: Path) -> nn.Module:
    data = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(data[: len(data) // 2])
    return llama()


def weights_empty(folder: Path) -> nn.Module:
    (folder / WEIGHTS_FILE).write_bytes(b"")
    return llama()


def weights_lack_a_tensor(folder: Path) -> nn.Module:
    state = load_file(folder / WEIGHTS_FILE)
    del state[f"{LAYER}.D"]
    save_file(state, folder / WEIGHTS_FILE)
    return llama()


def weights_missing(folder: Path) -> nn.Module:
    (folder / WEIGHTS_FILE).unlink()
    return llama()


def settings_missing(folder: Path) -> nn.Module:
    (folder / SETTINGS_FILE).unlink()
    return adapted(seed=2)


MISFITS: list[tuple[Callable[[Path], nn.Module], type[Exception], str]] = [
    (other_ranks, ValueError, r"^state\['.*\.A'\]: got shape \(3, 32\), expected \(4, 32\): .*other ranks"),
    (other_layers, ValueError, r"^state: missing \[\], unexpected \['model"),
    (merged, ValueError, r"^model: model\.layers\.0\.self_attn\.q_proj is merged.*unmerge\(\)"),
    (other_architecture, ValueError, r"^folder: .*layer 'model\.layers\..*: the model has no such layer"),
    (other_shapes, ValueError, r"^folder: .*up_proj\.B is saved with shape \(48, 3\), expected \(50, 3\)"),
    (hooked, ValueError, r"^folder: .*q_proj'.*: this Linear has hooks"),
    (settings_garbage, ValueError, rf"^folder: {SETTINGS_FILE} in .* cannot be read"),
    (settings_lack_the_format, ValueError, rf"^folder: {SETTINGS_FILE} in .* cannot be read.*format"),
    (settings_damaged("format", value=999), ValueError, r"^folder: .*format 999 is newer"),
    (settings_damaged("layers", value=[]), ValueError, rf"^folder: {SETTINGS_FILE} in .* cannot be read"),
    (settings_damaged("layers", LAYER, "r1", value=0), ValueError, r"^folder: .* cannot be read: r1: got 0"),
    (settings_damaged("layers", LAYER, "r1", value=5), ValueError, r"^folder: .*q_proj\.A .*\(3, 32\), expected \(5"),
    (settings_damaged("layers", LAYER, "adapter_dtype", value="int8"), ValueError, r"^folder: .*int8"),
    (settings_damaged("layers", LAYER, "surprise", value=1), ValueError, r"^folder: .*surprise"),
    (settings_lack_a_layer, ValueError, r"^folder: .* name different tensors: \['model\.layers\.0\.self_attn\.q"),
    (weights_truncated, ValueError, rf"^folder: {WEIGHTS_FILE} in .* cannot be read"),
    (weights_empty, ValueError, rf"^folder: {WEIGHTS_FILE} in .* cannot be read"),
    (weights_lack_a_tensor, ValueError, r"^folder: .* name different tensors: \['.*q_proj\.D'\]"),
    (weights_missing, FileNotFoundError, rf"^folder: got .* which has no {WEIGHTS_FILE}"),
    (settings_missing, FileNotFoundError, rf"^folder: got .* which has no {SETTINGS_FILE}"),
]


@pytest.mark.parametrize(("damage", "error", "message"), MISFITS, ids=[case[0].__name__ for case in MISFITS])
def test_misfits_change_nothing(
    damage: Callable[[Path], nn.Module], error: type[Exception], message: str, saved: Path
) -> None:
    model = damage(saved)
    before = snapshot(model)
    with pytest.raises(error, match=message):
        load_dual_lora(model, saved)
    assert_unchanged(model, before)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"^folder: got .*nowhere"):
        load_dual_lora(llama(), tmp_path / "nowhere")


def test_saving_a_plain_model_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^model: got LlamaForCausalLM without Dual LoRA layers"):
        save_dual_lora(llama(), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (f"{LAYER}.A", None, r"^state: missing \['model\.layers\.0\.self_attn\.q_proj\.A'\]"),
        ("elsewhere.A", torch.zeros(3, 32), r"^state: missing \[\], unexpected \['elsewhere\.A'\]"),
        (f"{LAYER}.C", torch.zeros(2, 31), r"^state\['.*\.C'\]: got shape \(2, 31\), expected \(2, 32\)"),
        (f"{LAYER}.scale", torch.zeros(1), r"^state\['.*\.scale'\]: got shape \(1,\), expected \(\)"),
    ],
    ids=["missing", "unexpected", "shape", "scale's shape"],
)
def test_misfitting_states_change_nothing(name: str, value: torch.Tensor | None, message: str) -> None:
    model, state = adapted(), dual_lora_state_dict(adapted(seed=2))
    if value is None:
        del state[name]
    else:
        state[name] = value
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        load_dual_lora_state_dict(model, state)
    assert_unchanged(model, before)


def test_config_and_weights_are_the_documented_files(saved: Path) -> None:
    """Other tools read these: names, format number, one entry a layer with what `DualLoraConfig` takes."""
    settings = json.loads((saved / "dual_lora_config.json").read_text())
    assert settings["format"] == 1
    assert len(settings["layers"]) == 14
    layer = settings["layers"][LAYER]
    assert layer.pop("adapter_dtype") == "float32"
    assert DualLoraConfig(**layer) == DualLoraConfig(r1=3, r2=2, alpha=1.0, init_std=0.3)


def test_values_that_are_not_finite_are_refused(saved: Path) -> None:
    state = load_file(saved / WEIGHTS_FILE)
    state[f"{LAYER}.B"][3, 1] = torch.nan
    save_file(state, saved / WEIGHTS_FILE)
    model = adapted(seed=2)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"q_proj\.B'\]: got nan"):
        load_dual_lora(model, saved)
    assert_unchanged(model, before)


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
