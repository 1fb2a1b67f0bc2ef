"""Tables of the studies that are not the suite's: rounding, merging, quantised bases, samples of columns.

Each study writes one JSON file into ``benchmarks/results``, with all that it found; the tables here are what the
documents show of it.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from typing import Any

from ..harness.report import MEBIBYTE, RESULTS
from .shown import plain, table

_SEEDS = (0, 1, 2)
_STORED = {
    ("NF4", "nearest"): "NF4, to nearest (as PEFT merges)",
    ("NF4", "unbiased"): "NF4, unbiased",
    ("int8", "nearest"): "int8, to nearest",
    ("int8", "unbiased"): "int8, unbiased",
    ("NF4", "bf16, nearest"): "bf16, to nearest",
    ("NF4", "bf16, dither"): "bf16, dithered (what training computes with)",
}
"""(base, how the merged weight is stored) → its row's name; what is stored in bf16 hardly depends on the base."""
_NF4_METHODS = {
    "dual_lora": "**dual_lora_kernels**",
    "qlora": "PEFT QLoRA",
    "naive": "naive Dual LoRA, dequantised in every call",
    "dense": "`dual_lora_linear` on a weight that the user dequantises",
}
_NF4_SHAPES = {
    "4096 × 11008": "cpu_nf4_layer_step_bf16_4096x11008_m512",
    "4096 × 4096": "cpu_nf4_layer_step_bf16_4096x4096_m512",
    "1024 × 1024": "cpu_nf4_layer_step_bf16_1024x1024_m512",
    "4096 × 4096, fp32": "cpu_nf4_layer_step_fp32_4096x4096_m512",
}


def load(stem: str) -> Any:
    """What a study has found: ``benchmarks/results/<stem>.json``."""
    return json.loads((RESULTS / f"{stem}.json").read_text(encoding="utf-8"))


def origin(about: Mapping[str, Any], command: str) -> str:
    """When, where and by what a study was measured, as a paragraph."""
    return (
        f"Measured {about['date']} on {plain(about['cpu'])} ({about['threads']} of {about['cores']} cores), torch "
        f"{about['torch']}, dual_lora_kernels {about['dual_lora_kernels']}: `{command}`."
    )


def dither() -> str:
    """How much of a small update reaches a bf16 layer's output, by three ways of rounding."""
    found = load("dither_table")
    ways = ("nearest", "two_products", "dithered")
    rows = (
        [f"{row['rms']:.0e}".replace("e-0", "e-"), *(f"{row['ways'][way]['gain']:.3f}" for way in ways)]
        for row in found["rows"]
    )
    headings = ("rms of ΔW", "W0 + ΔW rounded to nearest", "two products (as PEFT adds them)", "this package")
    return f"{table(headings, rows)}\n\n{origin(found['environment'], 'python -m benchmarks.layers.dither_table')}"


def merge_drift() -> str:
    """What merging into a bf16 model changes, medians over families of models."""
    found = load("merge_drift")
    families = found["results"].values()

    def median(method: str, figure: str) -> str:
        return f"{statistics.median(family[method][figure] for family in families):.2f}"

    rows = (
        [name, median("LoRA", figure), median("DoRA", figure), f"**{median('Dual LoRA', figure)}**"]
        for name, figure in (
            ("change of the logits by merging / by training", "drift"),
            ("share of the update in the merged weights", "kept"),
        )
    )
    shown = table(("", "PEFT LoRA", "PEFT DoRA", "this package"), rows)
    return f"{shown}\n\n{origin(found['environment'], 'python -m benchmarks.training.merge_drift')}"


def requantising() -> str:
    """What is left of an update where the merged weight is quantised anew."""
    found = load("requantising")
    by_row = {(row["base"], row["stored"], row["relative_rms"]): row for row in found["rows"]}
    rows = (
        [
            name,
            *(f"{by_row[base, stored, rms][figure]:.2f}" for rms in (0.001, 0.01) for figure in ("kept", "error")),
        ]
        for (base, stored), name in _STORED.items()
    )
    headings = ("stored as", "ΔW of 0.1 % of W0: kept", "error / ‖ΔW‖", "ΔW of 1 %: kept", "error / ‖ΔW‖")
    command = "python -m benchmarks.quantised.requantising"
    return f"{table(headings, rows)}\n\n{origin(found['environment'], command)}"


def nf4_layer() -> str:
    """Time and memory of a step of an NF4 layer, all methods for the first shape, this package for the others."""
    rows: list[list[str]] = []
    for index, (shape, stem) in enumerate(_NF4_SHAPES.items()):
        by_method = {row["method"]: row for row in load(stem)["rows"]}
        for method in _NF4_METHODS if index == 0 else ("dual_lora",):
            row = by_method[method]
            figures = (
                f"{row['to_floor']['median']:.2f}",
                *(f"{row[kind] / MEBIBYTE:.0f}" for kind in ("peak", "largest")),
            )
            emphasis = "**" if method == "dual_lora" else ""
            shown = [f"{emphasis}{figure}{emphasis}" for figure in figures]
            rows.append([shape if method == "dual_lora" else "", _NF4_METHODS[method], *shown])
    headings = ("N × K", "", "× products + dequantisation", "peak MiB", "largest MiB")
    about = load(next(iter(_NF4_SHAPES.values())))["environment"]
    shown_table = table(headings, rows, words=(0, 1))
    return f"{shown_table}\n\n{origin(about, 'python -m benchmarks.quantised.layer_step --shape NxK')}"


def gradient_columns_loss() -> str:
    """Held-out loss with gradients from samples of columns, beside other methods."""
    found = load("gradient_columns")
    exact = {family: _final_losses(found["runs"], family, "dual_lora", "", 1.0) for family in ("Llama", "GPT-2")}
    rows = []
    for name, method, sample, fraction in (
        ("all columns", "dual_lora", "", 1.0),
        *((f"1/{n}", "dual_lora", "package", 1 / n) for n in (2, 4, 8)),
        ("LoRA (PEFT)", "lora", "", 1.0),
        ("DoRA (PEFT)", "dora", "", 1.0),
    ):
        row = [name]
        for family, all_columns in exact.items():
            losses = _final_losses(found["runs"], family, method, sample, fraction)
            differences = [own - other for own, other in zip(losses, all_columns, strict=True)]
            error = statistics.stdev(differences) / len(differences) ** 0.5
            change = f"{statistics.mean(differences):+.3f} ± {error:.3f}".replace("-", "−")
            row += [f"{statistics.mean(losses):.3f}", "" if losses == all_columns else change]
        rows.append(row)
    headings = ("held-out loss, mean of 3 seeds", "Llama", "difference to all", "GPT-2", "difference to all")
    command = "python -m benchmarks.training.gradient_columns"
    return f"{table(headings, rows)}\n\n{origin(found['environment'], command)}"


def _final_losses(runs: list[dict[str, Any]], family: str, method: str, sample: str, fraction: float) -> list[float]:
    """Of every seed, at the learning rate whose validation loss is the least with the first one."""
    wanted = {"family": family, "method": method, "sample": sample, "fraction": fraction}
    own = {(run["rate"], run["seed"]): run for run in runs if wanted.items() <= run.items()}
    best = min((rate for rate, seed in own if seed == 0), key=lambda rate: float(own[rate, 0]["validation"]))
    return [own[best, seed]["held_out"][-1][1] for seed in _SEEDS]


TABLES = {
    "dither": dither,
    "merge-drift": merge_drift,
    "requantising": requantising,
    "nf4-layer": nf4_layer,
    "gradient-columns-loss": gradient_columns_loss,
}
