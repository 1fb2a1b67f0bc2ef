"""Loading refuses what does not fit, and changes nothing then."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dual_lora_kernels import dual_lora_state_dict, load_dual_lora, load_dual_lora_state_dict, save_dual_lora
from dual_lora_kernels.adapter_files import SETTINGS_FILE, WEIGHTS_FILE, write

from .adapters import LAYER, adapted, assert_unchanged, snapshot
from .models import gpt2, llama


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


def edit(
    folder: Path,
    settings: Callable[[dict[str, Any]], Any] = lambda _: None,
    tensors: Callable[[dict[str, torch.Tensor]], Any] = lambda _: None,
) -> None:
    """Save the adapter again with other settings or tensors."""
    old_settings, state = json.loads((folder / SETTINGS_FILE).read_text()), load_file(folder / WEIGHTS_FILE)
    settings(old_settings)
    tensors(state)
    write(folder, state, old_settings)


def with_settings(folder: Path, text: str) -> nn.Module:
    """A damage of the settings that no JSON writer makes."""
    metadata = {"format": "pt", "dual_lora_settings": text}
    save_file(load_file(folder / WEIGHTS_FILE), folder / WEIGHTS_FILE, metadata=metadata)
    return llama()


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
    return with_settings(folder, '{"format": 1, "layers": {')


def settings_nested_deeply(folder: Path) -> nn.Module:
    return with_settings(folder, "[" * 100_000 + "]" * 100_000)


def settings_not_there(folder: Path) -> nn.Module:
    save_file(load_file(folder / WEIGHTS_FILE), folder / WEIGHTS_FILE)
    return llama()


def tensors_damaged(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], nn.Module]:
    """A damage that replaces one tensor."""

    def damage(folder: Path) -> nn.Module:
        edit(folder, tensors=lambda state: state.update({f"{LAYER}.{name}": change(state[f"{LAYER}.{name}"])}))
        return llama()

    return damage


def filled(value: float, dtype: torch.dtype = torch.float32) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: torch.full_like(tensor, value, dtype=dtype)


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
    edit(folder, tensors=lambda state: state.pop(f"{LAYER}.D"))
    return llama()


def weights_missing(folder: Path) -> nn.Module:
    (folder / WEIGHTS_FILE).unlink()
    return llama()


MISFITS: list[tuple[Callable[[Path], nn.Module], type[Exception], str]] = [
    (other_ranks, ValueError, r"^state\['.*\.A'\]: got shape \(3, 32\), expected \(4, 32\): .*other ranks"),
    (other_layers, ValueError, r"^state: missing \[\], unexpected \['model"),
    (merged, ValueError, r"^model: model\.layers\.0\.self_attn\.q_proj is merged.*unmerge\(\)"),
    (other_architecture, ValueError, r"^folder: .*layer 'model\.layers\..*: the model has no such layer"),
    (other_shapes, ValueError, r"^folder: .*up_proj\.B: got shape \(48, 3\), expected \(50, 3\)"),
    (hooked, ValueError, r"^folder: .*q_proj'.*: this Linear has hooks"),
    (settings_garbage, ValueError, rf"^folder: the settings of {WEIGHTS_FILE} in .* are damaged"),
    (settings_nested_deeply, ValueError, rf"^folder: the settings of {WEIGHTS_FILE} in .* are damaged"),
    (settings_not_there, ValueError, rf"^folder: {WEIGHTS_FILE} in .* has no settings in its metadata"),
    (settings_damaged("layers", LAYER, "alpha", value=1e308), ValueError, r"^folder: .*alpha: got 1e\+308, expected"),
    (settings_damaged("layers", LAYER, "alpha", value=10**400), ValueError, r"^folder: .*alpha: got 0x.*, expected"),
    (settings_damaged("layers", LAYER, "alpha", value=1e39), ValueError, r"^folder: .*alpha: got 1e\+39, expected"),
    (settings_damaged("layers", LAYER, "r1", value=10**400), ValueError, r"^folder: .*r1: got 0x"),
    (settings_damaged("layers", LAYER, "adapter_dtype", value="load"), ValueError, r"^folder: .*adapter_dtype"),
    (settings_lack_the_format, ValueError, rf"^folder: the settings in {WEIGHTS_FILE} cannot be read.*format"),
    (settings_damaged("format", value=999), ValueError, r"^folder: .*format 999 is newer"),
    (settings_damaged("layers", value=[]), ValueError, rf"^folder: the settings in {WEIGHTS_FILE} cannot be read"),
    (settings_damaged("layers", LAYER, "r1", value=0), ValueError, r"^folder: .* cannot be read: r1: got 0"),
    (
        settings_damaged("layers", LAYER, "r1", value=5),
        ValueError,
        r"^folder: .*q_proj\.A: got .*\(3, 32\), expected \(5",
    ),
    (settings_damaged("layers", LAYER, "adapter_dtype", value="int8"), ValueError, r"^folder: .*int8"),
    (settings_damaged("layers", LAYER, "surprise", value=1), ValueError, r"^folder: .*surprise"),
    (settings_lack_a_layer, ValueError, r"^folder: .* name different tensors: \['model\.layers\.0\.self_attn\.q"),
    (weights_truncated, ValueError, rf"^folder: {WEIGHTS_FILE} in .* is damaged"),
    (weights_empty, ValueError, rf"^folder: {WEIGHTS_FILE} in .* is damaged"),
    (weights_lack_a_tensor, ValueError, r"^folder: .* name different tensors: \['.*q_proj\.D'\]"),
    (weights_missing, FileNotFoundError, rf"^folder: got .* which has no {WEIGHTS_FILE}"),
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


BAD_TENSORS: list[tuple[str, Callable[[torch.Tensor], torch.Tensor], str]] = [
    ("B", filled(torch.nan), "got nan, expected finite values"),
    ("scale", filled(torch.inf), "got inf, expected finite values"),
    ("C", filled(1e39, torch.float64), "as torch.float32: got inf, expected finite values"),
    ("A", filled(1, torch.int32), "got torch.int32, expected one of"),
    ("A", filled(1, torch.bool), "got torch.bool, expected one of"),
    ("D", filled(1, torch.complex64), "got torch.complex64, expected one of"),
]


@pytest.mark.parametrize(("name", "change", "message"), BAD_TENSORS)
@pytest.mark.parametrize("into", [llama, adapted], ids=["plain", "adapted"])
def test_tensors_that_are_no_factors_change_nothing(
    name: str, change: Callable[[torch.Tensor], torch.Tensor], message: str, into: Callable[[], nn.Module], saved: Path
) -> None:
    """A plain model stays plain and trainable."""
    tensors_damaged(name, change)(saved)
    model = into()
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"q_proj\.{name}('\])?:? {message}"):
        load_dual_lora(model, saved)
    assert_unchanged(model, before)
