"""What merging into a bf16 model changes: LoRA, DoRA and Dual LoRA through PEFT, on small models of many families.

    python -m benchmarks.training.merge_drift

Each method adapts every linear layer with random factors, scaled so that the rms of ΔW is 0.1 % of the layer's
weights', and is merged by PEFT's ``merge_and_unload``. With y the logits in bf16 of the base model, of the adapted and
of the merged one,

    drift = rms(y_merged − y_adapted) / rms(y_adapted − y_base)      kept = ⟨W_merged − W0, ΔW⟩ / ⟨ΔW, ΔW⟩

where ΔW is what the same adapter adds to an fp32 copy of the base. A drift of 0: the merged model is the trained one.
Of 1: merging changes the logits as much as training has. Kept 1: the whole update is in the merged weights. The last
column counts the weights that differ from those that Dual LoRA's layers compute with, read out by identity inputs. Of
Mixtral, attention alone is adapted: its experts are no linear layers.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from rich.console import Console
from rich.progress import track
from torch import nn

from dual_lora_kernels.adapter import DualLoraAdapter, dual_lora_adapters
from dual_lora_kernels.peft import DualLoraConfig, Linear

from ..harness import report
from ..harness.environment import environment, sentence
from .families import FAMILIES, Family

STEM = "merge_drift"
METHODS = ("LoRA", "DoRA", "Dual LoRA")
HEADINGS = (
    "model", *(f"drift: {method}" for method in METHODS), *(f"kept: {method}" for method in METHODS),
    "other weights",
)  # fmt: skip
RELATIVE_RMS = 1e-3
"""rms of ΔW over that of the weight; fine-tuned adapters are of this order."""
_RANK = 4


@dataclass(frozen=True)
class Drift:
    """What merging one method's adapter changes. `other_weights` is counted for Dual LoRA alone."""

    drift: float
    kept: float
    other_weights: int | None = None


def measure(family: Family, method: str) -> Drift:
    """Adapt, merge and compare a model of `family`."""
    config = _config(method, family)
    base = family.model(torch.bfloat16)
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    inputs = {
        name: tensor.bfloat16() if tensor.is_floating_point() else tensor for name, tensor in family.inputs().items()
    }
    at_start = _logits(base, inputs)
    torch.manual_seed(1)
    adapted = get_peft_model(base, copy.deepcopy(config)).eval()
    _draw(adapted)
    updates = _updates(family, config, adapted)
    trained = _logits(adapted, inputs)
    used = {name: _weight_in_use(layer) for name, layer in adapted.named_modules() if isinstance(layer, Linear)}
    merged = adapted.merge_and_unload()
    product = norm = 0.0
    for name, update in updates.items():
        change = merged.get_parameter(name).double() - weights[name].double()
        product += (change * update).sum().item()
        norm += update.square().sum().item()
    other = sum(
        (weight != merged.get_submodule(name.removeprefix("base_model.model.")).weight).sum().item()
        for name, weight in used.items()
    )
    drift = _rms(_logits(merged, inputs) - trained) / _rms(trained - at_start)
    return Drift(drift, product / norm, int(other) if used else None)


def _config(method: str, family: Family) -> Any:
    shared: dict[str, Any] = {"target_modules": family.targets, "task_type": family.task_type}
    if method == "Dual LoRA":
        return DualLoraConfig(r1=_RANK // 2, r2=_RANK // 2, alpha=1.0, **shared)
    return LoraConfig(r=_RANK, lora_alpha=_RANK, use_dora=method == "DoRA", **shared)


@torch.no_grad()
def _draw(model: nn.Module) -> None:
    """Scale the update of every layer to `RELATIVE_RMS`."""
    for _, adapter in dual_lora_adapters(model):
        adapter.set_scale(1.0)
    for module in model.modules():
        if not hasattr(module, "base_layer"):
            continue
        if not isinstance(module, Linear):
            module.lora_B["default"].weight.normal_()  # type: ignore[index, union-attr, operator]
        delta = module.get_delta_weight("default")  # type: ignore[operator]
        factor = RELATIVE_RMS * _rms(module.base_layer.weight) / _rms(delta)  # type: ignore[arg-type, union-attr]
        if isinstance(module, Linear):
            module.dual_adapter["default"].set_scale(factor)  # type: ignore[operator]
        else:
            module.lora_B["default"].weight.mul_(factor)  # type: ignore[index, union-attr, operator]


@torch.no_grad()
def _updates(family: Family, config: Any, adapted: nn.Module) -> dict[str, torch.Tensor]:
    """ΔW by the weight's name, from the same adapter merged into an fp32 copy of the base."""
    base = family.model(torch.bfloat16).float()
    before = {name: tensor.double().clone() for name, tensor in base.state_dict().items()}
    twin = get_peft_model(base, copy.deepcopy(config))
    set_peft_model_state_dict(twin, get_peft_model_state_dict(adapted))
    merged = twin.merge_and_unload().state_dict()
    changes = {name: merged[name].double() - tensor for name, tensor in before.items()}
    return {name: change for name, change in changes.items() if change.any()}


@torch.no_grad()
def _weight_in_use(layer: Linear) -> torch.Tensor:
    """round(W0 + ΔW), oriented like the base weight, as a call on the identity reads it."""
    adapter: DualLoraAdapter = layer.dual_adapter["default"]  # type: ignore[assignment]
    base = layer.base_layer.weight
    columns = adapter.adapted_linear(
        torch.eye(layer.in_features, dtype=torch.bfloat16), base.t() if layer.transposed else base, None
    )
    return columns if layer.transposed else columns.t()


@torch.no_grad()
def _logits(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    logits: torch.Tensor = model(**inputs).logits
    return logits.double()


def _rms(values: torch.Tensor) -> float:
    return math.sqrt(values.double().square().mean().item())


def cells(results: dict[str, dict[str, Drift]]) -> list[tuple[str, ...]]:
    """The table's cells, in the order of ``HEADINGS``, and the medians."""
    rows = [
        (
            name,
            *(f"{methods[method].drift:.2f}" for method in METHODS),
            *(f"{methods[method].kept:.2f}" for method in METHODS),
            str(methods["Dual LoRA"].other_weights),
        )
        for name, methods in results.items()
    ]
    medians = [
        f"{statistics.median(getattr(methods[method], field) for methods in results.values()):.2f}"
        for field in ("drift", "kept")
        for method in METHODS
    ]
    return [
        *rows,
        ("median", *medians, str(sum(methods["Dual LoRA"].other_weights or 0 for methods in results.values()))),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training.merge_drift", description="What merging into a bf16 model changes."
    )
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="default: all")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="folder for the results (benchmarks/results)")
    options = parser.parse_args(arguments)
    console, about = Console(), environment(torch.device("cpu"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PEFT calls is deprecated in transformers
        results = {
            name: {method: measure(FAMILIES[name], method) for method in METHODS}
            for name in track(options.families, description="families", transient=True)
        }
    title = f"What merging into a bf16 model changes: rms of ΔW {100 * RELATIVE_RMS:g} % of the weights'"
    report.print_table(title, HEADINGS, cells(results), console)
    document = {
        "environment": about,
        "results": {name: {m: dataclasses.asdict(d) for m, d in methods.items()} for name, methods in results.items()},
    }
    reading = (
        "Drift 0: the merged model is the trained one; 1: merging changes the logits as much as the adapter did. Kept "
        "1: the whole update is in the merged weights, 0: none of it. Other weights: those of Dual LoRA's merged model "
        "that differ from what its layers computed with. Definitions in benchmarks/training/merge_drift.py."
    )
    report.write(
        options.out,
        STEM,
        document,
        [f"# {title}", report.markdown_table(HEADINGS, cells(results)), reading, sentence(about)],
    )


if __name__ == "__main__":
    main()
