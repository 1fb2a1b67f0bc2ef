"""`dual-lora inspect` and its report, against the formula on whole matrices, of adapters in both formats."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from dual_lora_kernels import apply_dual_lora, reference, save_dual_lora
from dual_lora_kernels.adapter import dual_lora_adapters
from dual_lora_kernels.commands import inspect
from dual_lora_kernels.inspection.inspect_adapter import _place, inspect_adapter
from dual_lora_kernels.inspection.report import AdapterReport
from dual_lora_kernels.saved_adapter import weights_file

from .checkpoints import write_tensors
from .exact_adapters import SCALE, lost, make_exact, products
from .models import configuration, gpt2, llama
from .peft_models import config

LAYER = "model.layers.0.self_attn.q_proj"


def saved(make: Callable[[], nn.Module], folder: Path, seed: int = 0, **options: Any) -> nn.Module:
    """An adapter in `folder`, of the package's format, and its model."""
    model = make_exact(apply_dual_lora(make(), configuration(**options)), seed)
    save_dual_lora(model, folder)
    return model


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path, nn.Module]:
    """A bf16 base, an adapter of it, and the adapted model."""
    llama(dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    return tmp_path / "base", tmp_path / "adapter", saved(lambda: llama(dtype=torch.bfloat16), tmp_path / "adapter")


def assert_reported(report: AdapterReport, model: nn.Module, weights: dict[str, torch.Tensor] | None) -> None:
    """Every layer's figures are the formula's; `weights`: W0 [N, K] by the layer's name."""
    assert [layer.name for layer in report.layers] == [name for name, _ in dual_lora_adapters(model)]
    for layer, (name, adapter) in zip(report.layers, dual_lora_adapters(model), strict=True):
        p, q, update = products(adapter)
        assert layer.shape == p.shape
        assert (layer.r1, layer.r2, layer.alpha, layer.scale) == (3, 2, 1.0, SCALE)
        assert layer.parameters == sum(factor.numel() for factor in adapter.factors())
        assert layer.frozen == pytest.approx(float((p <= 0).double().mean()), abs=1e-15)
        assert layer.negative == pytest.approx(float((q <= 0).double().mean()), abs=1e-15)
        assert layer.norm == pytest.approx(float(update.double().norm()), rel=1e-12)
        assert layer.magnitudes.largest == float(update.abs().max())
        assert sum(layer.magnitudes.counts) == int((update != 0).sum())
        if weights is None:
            assert layer.base is None
            continue
        weight = weights[name]
        assert layer.base is not None
        assert layer.base.dtype == str(weight.dtype).removeprefix("torch.")
        norms = update.double().norm() / weight.double().norm()
        assert layer.base.relative_norm == pytest.approx(float(norms), rel=1e-12)
        assert layer.base.rounded_away == pytest.approx(
            float(lost(update, weight).sum() / (update != 0).sum()), abs=1e-6
        )


@pytest.mark.usefixtures("small_workspace")
def test_a_report_beside_its_base(folders: tuple[Path, Path, nn.Module]) -> None:
    base, adapter, model = folders
    report = inspect_adapter(adapter, base)
    weights = {name: layer.weight.detach() for name, layer in dual_lora_adapters(model)}
    assert_reported(report, model, weights)
    assert any(layer.base.rounded_away > 0 for layer in report.layers if layer.base is not None)
    assert (report.adapter, report.base, report.compared) == ("adapter", "base", ())
    assert report.adapter_bytes == weights_file(adapter).stat().st_size


@pytest.mark.usefixtures("small_workspace")
def test_gpt2s_transposed_weights(tmp_path: Path) -> None:
    """Square ones too, of which no shape tells how they lie."""
    gpt2().save_pretrained(tmp_path / "base")
    model = saved(gpt2, tmp_path / "adapter")
    weights = {name: layer.weight.detach().t() for name, layer in dual_lora_adapters(model)}
    assert_reported(inspect_adapter(tmp_path / "adapter", tmp_path / "base", spectra=False), model, weights)


def test_pefts_files(tmp_path: Path) -> None:
    model = make_exact(get_peft_model(llama(), config()), 0)
    model.save_pretrained(tmp_path / "adapter")
    saved(llama, tmp_path / "plain")
    found, plain = (inspect_adapter(tmp_path / folder, spectra=False).layers for folder in ("adapter", "plain"))
    assert [layer.depth for layer in found] == [layer.depth for layer in plain] == sorted([0, 1] * 7)
    for layer in found:
        # The seed's factors go to the same layers in both, whatever order files are in.
        assert layer == next(other for other in plain if other.name == layer.name)


def test_spectra_are_of_the_three_matrices(folders: tuple[Path, Path, nn.Module]) -> None:
    _, folder, model = folders
    for layer, (_, adapter) in zip(inspect_adapter(folder).layers, dual_lora_adapters(model), strict=True):
        p, q, update = products(adapter)
        for found, matrix in (
            (layer.update, update), (layer.magnitude, p.relu()), (layer.direction, reference.sign(q))
        ):  # fmt: skip
            assert found is not None
            values = torch.linalg.svdvals(matrix.double())
            assert found.rank == int((values > max(p.shape) * torch.finfo(torch.float32).eps * values[0]).sum())
            assert found.stable_rank == pytest.approx(float((values / values[0]).square().sum()), rel=1e-6)
            energy = values[: adapter.r1 + adapter.r2].square().sum() / values.square().sum()
            assert found.energy == pytest.approx(float(energy), rel=1e-6)
    assert all(layer.update is None for layer in inspect_adapter(folder, spectra=False).layers)


def test_adapters_are_compared_layer_by_layer(folders: tuple[Path, Path, nn.Module], tmp_path: Path) -> None:
    """By names that tell them apart, though both end alike; layers that the other has not are left out."""
    _, folder, _ = folders
    saved(llama, tmp_path / "one" / "adapter", seed=0)
    saved(llama, tmp_path / "two" / "adapter", seed=1, target_modules=["q_proj"])
    report = inspect_adapter(folder, compare=[tmp_path / "one" / "adapter", tmp_path / "two" / "adapter"])
    assert report.compared == ("one/adapter", "two/adapter")
    for layer in report.layers:
        same, *other = layer.similarities
        assert (same.adapter, same.equal_signs) == ("one/adapter", 1.0)
        assert same.cosine == pytest.approx(1.0, abs=1e-15)
        assert same.both_active == pytest.approx(1 - layer.frozen)
        assert len(other) == (layer.kind == "self_attn.q_proj")
        assert all(abs(each.cosine) < 0.3 and 0.3 < each.equal_signs < 0.7 for each in other)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.7.mlp.up_proj", (7, "mlp.up_proj")),
        ("h.3.experts.11.w1", (3, "experts.11.w1")),
        ("score", (None, "score")),
        ("2", (2, "2")),
    ],
)
def test_a_layers_place(name: str, place: tuple[int | None, str]) -> None:
    assert _place(name) == place


def test_progress_goes_by_the_layers_sizes(folders: tuple[Path, Path, nn.Module]) -> None:
    seen: list[tuple[int, int, float]] = []
    report = inspect_adapter(folders[1], spectra=False, progress=lambda *now: seen.append(now))
    sizes = [math.prod(layer.shape) for layer in report.layers]
    assert seen == [(i + 1, len(sizes), sum(sizes[: i + 1]) / sum(sizes)) for i in range(len(sizes))]


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs ``dual-lora inspect`` and returns exit status, stdout and stderr."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        parser = argparse.ArgumentParser(prog="dual-lora")
        inspect.add(parser.add_subparsers(dest="command"))
        parsed = parser.parse_args(["inspect", *map(str, arguments)])
        capsys.readouterr()
        status = parsed.run(parsed)
        return status, *capsys.readouterr()

    return run


def test_the_tables_have_every_layer_and_kind(folders: tuple[Path, Path, nn.Module], command: Command) -> None:
    base, adapter, model = folders
    status, text, _ = command(adapter, "--base", base)
    assert status == 0
    lines = text.splitlines()
    for name, _ in dual_lora_adapters(model):
        assert len([line for line in lines if line.startswith(f" {name} ")]) == 1
    assert len([line for line in lines if line.startswith(" self_attn.q_proj ")]) == 1
    assert "14 layers" in lines[0]
    assert "base base" in lines[0]
    for heading in ("frozen", "‖ΔW‖", "rounded", "Sign(DC)", "stable"):
        assert heading in text
    layer = inspect_adapter(adapter, base).layers[0]
    row = next(line for line in lines if line.startswith(f" {layer.name} "))
    assert f"{100 * layer.frozen:.1f}" in row
    assert f"{layer.norm:.3g}" in row


def test_json_is_the_report(folders: tuple[Path, Path, nn.Module], command: Command) -> None:
    base, adapter, _ = folders
    status, text, _ = command(adapter, "--base", base, "--json", "--no-spectra")
    assert status == 0
    expected = {"format": 1, **dataclasses.asdict(inspect_adapter(adapter, base, spectra=False))}
    assert json.loads(text) == json.loads(json.dumps(expected))


def test_json_has_null_for_infinity(folders: tuple[Path, Path, nn.Module], command: Command) -> None:
    base, adapter, _ = folders
    weights = load_file(base / "model.safetensors")
    weights[f"{LAYER}.weight"].zero_()
    save_file(weights, base / "model.safetensors")
    _, text, _ = command(adapter, "--base", base, "--json", "--no-spectra")
    layer = next(layer for layer in json.loads(text)["layers"] if layer["name"] == LAYER)
    assert layer["base"]["relative_norm"] is None


def test_the_page_takes_its_place_whole(folders: tuple[Path, Path, nn.Module], command: Command) -> None:
    _, adapter, _ = folders
    page = adapter.parent / "pages" / "report.html"
    status, _, message = command(adapter, "--html", page)
    assert (status, page.exists()) == (1, False)
    assert f"--html: got {str(page)!r}, expected a file in a folder that exists" in message
    page.parent.mkdir()
    page.write_text("an older one", encoding="utf-8")
    status, _, message = command(adapter, "--html", page)
    assert status == 0
    assert f"wrote {page}" in message
    assert [file.name for file in page.parent.iterdir()] == ["report.html"]
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_help_has_an_example(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ending:
        command("--help")
    assert ending.value.code == 0
    assert "example:\n  dual-lora inspect runs/adapter --base" in capsys.readouterr().out


def test_wrong_usage_is_status_2(command: Command) -> None:
    with pytest.raises(SystemExit) as ending:
        command("adapter", "--nonsense")
    assert ending.value.code == 2


def change(name: str, value: torch.Tensor | None) -> Callable[[Path, Path], None]:
    """A change of one of the adapter's tensors; None: it is missing."""

    def apply(base: Path, adapter: Path) -> None:
        def on(state: dict[str, torch.Tensor]) -> None:
            state.pop(name)
            if value is not None:
                state[name] = value

        write_tensors(adapter, on)

    return apply


def truncate(base: Path, adapter: Path) -> None:
    file = weights_file(adapter)
    file.write_bytes(file.read_bytes()[:-100])


def remove(base: Path, adapter: Path) -> None:
    shutil.rmtree(adapter)


def other_base(base: Path, adapter: Path) -> None:
    gpt2().save_pretrained(base.parent / "other")
    shutil.rmtree(base)
    (base.parent / "other").rename(base)


def nan_in_base(base: Path, adapter: Path) -> None:
    weights = load_file(base / "model.safetensors")
    weights[f"{LAYER}.weight"][3, 4] = math.nan
    save_file(weights, base / "model.safetensors")


DAMAGE: dict[str, tuple[Callable[[Path, Path], None], tuple[str, ...]]] = {
    "nan": (
        change(f"{LAYER}.B", torch.full((32, 3), math.nan)),
        ("dual_lora_model.safetensors", f"{LAYER}.B: got nan"),
    ),
    "inf": (
        change(f"{LAYER}.scale", torch.tensor(math.inf)),
        ("dual_lora_model.safetensors", f"{LAYER}.scale: got inf"),
    ),
    "missing": (change(f"{LAYER}.C", None), ("dual_lora_model.safetensors", f"{LAYER}.C")),
    "shape": (change(f"{LAYER}.A", torch.zeros(3, 31)), ("dual_lora_model.safetensors", f"{LAYER}.C", "(2, 31)")),
    "dtype": (change(f"{LAYER}.D", torch.zeros(32, 2).half()), ("dual_lora_model.safetensors", f"{LAYER}.D.dtype")),
    "integers": (change(f"{LAYER}.D", torch.zeros(32, 2).int()), ("dual_lora_model.safetensors", f"{LAYER}.D", "I32")),
    "overflow": (change(f"{LAYER}.B", torch.full((32, 3), 3e38)), (LAYER, "the update holds NaN or infinity")),
    "truncated": (truncate, ("dual_lora_model.safetensors", "truncated")),
    "no adapter": (remove, ("adapter",)),
    "another model": (other_base, ("base", f"{LAYER}.weight")),
    "nan in base": (nan_in_base, ("model.safetensors", f"{LAYER}.weight", "the base weight holds NaN")),
}
"""What is done to a base or adapter, and what the message names."""


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_told_by_file_and_tensor(
    damage: str, folders: tuple[Path, Path, nn.Module], command: Command
) -> None:
    base, adapter, _ = folders
    apply, words = DAMAGE[damage]
    apply(base, adapter)
    status, text, message = command(adapter, "--base", base, "--no-spectra")
    assert (status, text) == (1, "")
    assert message.startswith("dual-lora inspect: ")
    assert len(message.splitlines()) == 1
    for word in words:
        assert word in message
    status, text, _ = command(adapter, "--base", base, "--no-spectra", "--json")
    assert status == 1
    assert json.loads(text) == {"error": message.removeprefix("dual-lora inspect: ").rstrip("\n")}


def test_adapters_of_other_models_are_not_compared(
    folders: tuple[Path, Path, nn.Module], tmp_path: Path, command: Command
) -> None:
    _, adapter, _ = folders
    saved(gpt2, tmp_path / "other")
    _, _, message = command(adapter, "--compare", tmp_path / "other")
    assert "has none of the inspected adapter's layers" in message
    other = apply_dual_lora(nn.ModuleDict({"q": nn.Linear(6, 5)}), configuration())
    larger = apply_dual_lora(nn.ModuleDict({"q": nn.Linear(7, 5)}), configuration())
    save_dual_lora(other, tmp_path / "small")
    save_dual_lora(larger, tmp_path / "large")
    _, _, message = command(tmp_path / "small", "--compare", tmp_path / "large")
    assert "compare: q in" in message
    assert "is (5, 7), expected (5, 6)" in message
    _, _, message = command(adapter, "--compare", adapter)
    assert "twice" in message
