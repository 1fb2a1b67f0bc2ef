"""What does not fit, is damaged or is hostile is refused by name, with files and model as they were."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dual_lora_kernels import (
    DualLoraLinear,
    apply_dual_lora,
    dual_lora_state_dict,
    load_dual_lora,
    load_dual_lora_state_dict,
    save_dual_lora,
)
from dual_lora_kernels.adapter_files import SETTINGS_FILE, WEIGHTS_FILE

from .checkpoints import LAYER, adapted, assert_unchanged, settings_of, small, snapshot, write_settings, write_tensors
from .models import configuration, gpt2, llama

Damage = Callable[[Path], nn.Module]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A saved adapter of `llama`."""
    return save_dual_lora(adapted(), tmp_path / "adapter")


def refuse(model: nn.Module, folder: Path, error: type[Exception], message: str) -> None:
    before = snapshot(model)
    with pytest.raises(error, match=message):
        load_dual_lora(model, folder)
    assert_unchanged(model, before)


# --- another model --------------------------------------------------------------------------------------------------


def other_ranks() -> nn.Module:
    return adapted(seed=2, r1=4)


def other_layers() -> nn.Module:
    return adapted(seed=2, target_modules=["q_proj", "v_proj"])


def merged() -> nn.Module:
    model = adapted(seed=2)
    model.get_submodule(LAYER).merge()
    return model


def other_shapes() -> nn.Module:
    model = llama()
    model.model.layers[1].mlp.up_proj = nn.Linear(32, 50, bias=False)
    return model


def hooked() -> nn.Module:
    model = llama()
    model.get_submodule(LAYER).register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (other_ranks, r"^folder: .*\.A has shape \(3, 32\), expected \(4, 32\): .*other ranks"),
        (other_layers, r"^folder: missing \[\], unexpected \['model"),
        (merged, r"^model: model\.layers\.0\.self_attn\.q_proj is merged.*unmerge\(\)"),
        (gpt2, r"^folder: .*layer 'model\.layers\..*: the model has no such layer"),
        (other_shapes, r"^folder: .*up_proj\.B has shape \(48, 3\), expected \(50, 3\)"),
        (hooked, r"^folder: .*q_proj'.*: this Linear has hooks"),
    ],
)
def test_another_model(make: Callable[[], nn.Module], message: str, saved: Path) -> None:
    refuse(make(), saved, ValueError, message)


def test_a_single_layers_adapter_is_not_put_into_a_plain_layer(tmp_path: Path) -> None:
    """It has no name there, and nothing holds the layer that could be replaced."""
    layer = DualLoraLinear(6, 5)
    folder = save_dual_lora(layer, tmp_path)
    other = load_dual_lora(DualLoraLinear(6, 5), folder)
    assert torch.equal(other.A, layer.A)
    refuse(
        nn.Linear(6, 5), folder, ValueError, r"^folder: .* layer '', which does not fit: the model has no such layer"
    )


# --- damaged and hostile files --------------------------------------------------------------------------------------


def at(*path: str, value: Any) -> Callable[[str], str]:
    """A damage that sets one entry of the settings."""

    def change(text: str) -> str:
        settings = json.loads(text)
        inner = settings
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        return json.dumps(settings)

    return change


def of_the_layer(key: str, value: Any) -> Callable[[str], str]:
    return at("layers", LAYER, key, value=value)


def without(*path: str) -> Callable[[str], str]:
    def change(text: str) -> str:
        settings = json.loads(text)
        inner = settings
        for key in path[:-1]:
            inner = inner[key]
        del inner[path[-1]]
        return json.dumps(settings)

    return change


def renamed(name: str) -> Callable[[str], str]:
    return lambda text: text.replace(f'"{LAYER}"', f'"{name}"')


def instead(text: str) -> Callable[[str], str]:
    return lambda _: text


HOSTILE_SETTINGS: dict[str, tuple[Callable[[str], str], str]] = {
    "garbage": (lambda text: text[:30] + "\x00", "cannot be read"),
    "empty": (instead(""), "cannot be read"),
    "nested": (instead("[" * 100_000), "cannot be read: .*recursion"),
    "5000 digits": (instead('{"format": ' + "1" * 5000 + "}"), "cannot be read"),
    "a list": (instead("[]"), "cannot be read"),
    "no format": (without("format"), "cannot be read.*format"),
    "newer format": (at("format", value=999), "format: got 999, expected 1"),
    "NaN format": (at("format", value=float("nan")), "format: got nan, expected 1"),
    "layers a list": (at("layers", value=[1]), "cannot be read"),
    "no layers": (at("layers", value={}), "names no layers"),
    "a layer a number": (at("layers", LAYER, value=5), "cannot be read"),
    "a layer less": (without("layers", LAYER), r"unexpected \['model\.layers\.0\.self_attn\.q_proj\.A'"),
    "path traversal": (renamed("../../etc/passwd"), r"layer '\.\./\.\./etc/passwd', which .* no such layer"),
    "rank 0": (of_the_layer("r1", 0), "cannot be read: r1: got 0"),
    "another rank": (of_the_layer("r1", 5), r"q_proj\.A has shape \(3, 32\), expected \(5, 32\)"),
    "rank 10**400": (of_the_layer("r1", 10**400), "cannot be read: r1: got 1000"),
    "alpha 1e39": (of_the_layer("alpha", 1e39), r"cannot be read: alpha: got 1e\+39"),
    "alpha 1e308": (of_the_layer("alpha", 1e308), r"cannot be read: alpha: got 1e\+308"),
    "alpha 10**400": (of_the_layer("alpha", 10**400), "cannot be read: alpha: got 1000"),
    "alpha true": (of_the_layer("alpha", True), "cannot be read: alpha: got True"),
    "init_std 10**400": (of_the_layer("init_std", 10**400), "cannot be read: init_std: got 1000"),
    "clip_bound 10**400": (of_the_layer("clip_bound", 10**400), "cannot be read: clip_bound: got 1000"),
    "dropout 10**400": (of_the_layer("dropout", 10**400), "cannot be read: dropout: got 1000"),
    "dtype int8": (of_the_layer("adapter_dtype", "int8"), "adapter_dtype: got 'int8'"),
    "dtype a list": (of_the_layer("adapter_dtype", []), "cannot be read"),
    "surprise": (of_the_layer("surprise", 1), "surprise"),
    "no ste": (without("layers", LAYER, "ste"), "has the settings"),
}


@pytest.mark.parametrize("beside", [False, True], ids=["in the metadata", "beside"])
@pytest.mark.parametrize(("change", "message"), HOSTILE_SETTINGS.values(), ids=HOSTILE_SETTINGS.keys())
def test_hostile_settings(change: Callable[[str], str], message: str, beside: bool, saved: Path) -> None:
    write_settings(saved, change((saved / SETTINGS_FILE).read_text()), beside=beside)
    refuse(llama(), saved, ValueError, f"(?s)^folder: .*{message}")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FIELDS = ("r1", "r2", "alpha", "init_std", "ste", "rounding", "clip_bound", "dropout", "adapter_dtype", "other")


@given(
    path=st.sampled_from([("format",), ("layers",), ("layers", "0"), *(("layers", "0", f) for f in FIELDS)]), value=JSON
)
def test_any_settings_load_as_they_are_or_are_refused(
    path: tuple[str, ...], value: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = save_dual_lora(apply_dual_lora(small(), configuration()), tmp_path_factory.mktemp("any"))
    write_settings(folder, at(*path, value=value)((folder / SETTINGS_FILE).read_text()))
    model = small()
    before = snapshot(model)
    refusal = None
    try:
        load_dual_lora(model, folder)
    except ValueError as error:
        refusal = str(error)
    if refusal is None:
        assert path[-1] == "dropout" or getattr(model[0], path[-1]) == value
    else:
        assert refusal.startswith("folder: ")
        assert_unchanged(model, before)


def test_hostile_settings_beside_are_not_followed(saved: Path) -> None:
    """Where the metadata has settings, what is wrong there is not made up for by the JSON file."""
    good = (saved / SETTINGS_FILE).read_text()
    write_settings(saved, of_the_layer("alpha", -1.0)(good))
    (saved / SETTINGS_FILE).write_text(good)
    refuse(llama(), saved, ValueError, rf"^folder: {WEIGHTS_FILE} in .* cannot be read: alpha: got -1.0")


@given(share=st.floats(0.0, 1.0, exclude_max=True))
def test_truncated_weights(share: float, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = save_dual_lora(apply_dual_lora(small(), configuration()), tmp_path_factory.mktemp("cut"))
    data = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(data[: int(share * len(data))])
    refuse(small(), folder, ValueError, rf"^folder: {WEIGHTS_FILE} in .* cannot be read")


@pytest.mark.parametrize("missing", [SETTINGS_FILE, WEIGHTS_FILE])
def test_missing_files(missing: str, saved: Path) -> None:
    write_settings(saved, json.dumps(settings_of(saved)), beside=True)
    (saved / missing).unlink()
    refuse(llama(), saved, FileNotFoundError, rf"^folder: got .* which has no {missing}")


@pytest.mark.parametrize("what", ["nothing", "a file"])
def test_no_folder(what: str, tmp_path: Path) -> None:
    if what == "a file":
        (tmp_path / "nowhere").write_text("")
    refuse(llama(), tmp_path / "nowhere", FileNotFoundError, r"^folder: got .*nowhere', which has no")


# --- tensors --------------------------------------------------------------------------------------------------------

BAD_TENSORS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "NaN": (lambda t: t.index_fill(0, torch.tensor(1), torch.nan), "got nan, expected finite"),
    "infinite": (lambda t: t.index_fill(0, torch.tensor(1), -torch.inf), "got -inf, expected finite"),
    "beyond fp32": (lambda t: t.double() * 1e39, r"in the model's torch\.float32: got -?inf, expected finite"),
    "integer": (lambda t: t.to(torch.int32), "is of torch.int32, expected one of"),
    "bool": (lambda t: t > 0, "is of torch.bool, expected one of"),
    "complex": (lambda t: t.to(torch.complex64), "is of torch.complex64, expected one of"),
    "float8": (lambda t: t.to(torch.float8_e5m2), "is of torch.float8_e5m2, expected one of"),
    "shape": (lambda t: t.t(), r"has shape \(32, 3\), expected \(3, 32\)"),
}


@pytest.mark.parametrize(("change", "message"), BAD_TENSORS.values(), ids=BAD_TENSORS.keys())
@pytest.mark.parametrize("source", ["plain", "adapted", "state"])
def test_bad_tensors(change: Callable[[torch.Tensor], torch.Tensor], message: str, source: str, saved: Path) -> None:
    """A plain model stays plain and trainable."""
    name = f"{LAYER}.A"

    def replace(state: dict[str, torch.Tensor]) -> None:
        state[name] = change(state[name]).contiguous()

    model = llama() if source == "plain" else adapted(seed=2)
    assert source != "plain" or all(parameter.requires_grad for parameter in model.parameters())
    if source == "state":
        state = dual_lora_state_dict(adapted())
        replace(state)
        before = snapshot(model)
        with pytest.raises(ValueError, match=f"^state: {re.escape(name)}.*{message}"):
            load_dual_lora_state_dict(model, state)
        assert_unchanged(model, before)
    else:
        write_tensors(saved, replace)
        refuse(model, saved, ValueError, f"^folder: {re.escape(name)}.*{message}")


def test_a_scale_beyond_fp32(saved: Path) -> None:
    write_tensors(saved, lambda state: state.update({f"{LAYER}.scale": torch.tensor(1e39, dtype=torch.float64)}))
    refuse(llama(), saved, ValueError, r"^folder: .*q_proj\.scale in the model's torch\.float32: got inf")


def test_a_low_precision_model_refuses_what_it_cannot_hold(saved: Path) -> None:
    write_tensors(saved, lambda state: state.update({f"{LAYER}.A": state[f"{LAYER}.A"] * 1e6}))
    load_dual_lora(adapted(seed=2), saved)
    refuse(adapted(seed=2, adapter_dtype=torch.float16), saved, ValueError, r"in the model's torch\.float16: got -?inf")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (f"{LAYER}.A", None, r"^state: missing \['model\.layers\.0\.self_attn\.q_proj\.A'\]"),
        ("elsewhere.A", torch.zeros(3, 32), r"^state: missing \[\], unexpected \['elsewhere\.A'\]"),
        (f"{LAYER}.scale", torch.zeros(1), r"^state: .*\.scale has shape \(1,\), expected \(\)"),
        (f"{LAYER}.C", torch.zeros(2, 32, device="meta"), r"^state: .*\.C is on the meta device, expected .* values"),
        (f"{LAYER}.C", [[0.0]], r"^state\['.*\.C'\]: got \[\[0\.0\]\] of type list, expected a tensor"),
    ],
    ids=["missing", "unexpected", "scale's shape", "no values", "no tensor"],
)
def test_misfitting_states_change_nothing(name: str, value: Any, message: str) -> None:
    model, state = adapted(), dual_lora_state_dict(adapted(seed=2))
    if value is None:
        del state[name]
    else:
        state[name] = value
    before = snapshot(model)
    with pytest.raises((ValueError, TypeError), match=message):
        load_dual_lora_state_dict(model, state)
    assert_unchanged(model, before)
