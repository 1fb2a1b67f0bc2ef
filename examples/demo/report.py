"""Writes the results: a table on the terminal, JSON, Markdown, and the loss curves as a PNG."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.harness.report import markdown_table, print_table
from dual_lora_kernels.backends import resolve_backend
from dual_lora_kernels.runtime_settings import default_backend

from .models import METHODS
from .options import Settings
from .training import TrainingRun
from .verification import NOISE_MULTIPLE, Verification

MEBIBYTE = 2**20
HEADINGS = ("method", "loss before", "after", "trainable", "rate", "tokens/s", "peak MiB")


@dataclass(frozen=True)
class Results:
    """All that a run of the demo found. Losses are in nats per ``unit`` (a byte or a token)."""

    settings: Settings
    unit: str
    corpus: str
    base_parameters: int
    base_loss: float
    runs: Mapping[str, TrainingRun]
    pretraining: TrainingRun | None
    verification: Verification | None
    seconds: float


def device_name() -> str:
    """What the demo runs on."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"


def backend_in_use(dtype: str) -> str:
    """The backend that Dual LoRA's layers run on, with their fp32 factors on a base of `dtype`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backend = resolve_backend(default_backend(), device, getattr(torch, dtype), torch.float32)
    return f"'{backend.name}' ({backend.description()})"


def environment(dtype: str) -> dict[str, Any]:
    """What the numbers depend on besides the settings."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device_name(),
        "dual_lora_backend": backend_in_use(dtype),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
    }


def rows(results: Results) -> list[tuple[str, ...]]:
    """The comparison's cells, in the order of ``HEADINGS``."""
    return [
        (
            METHODS[name].label,
            f"{results.base_loss:.4f}",
            f"{run.final_held_out_loss:.4f}",
            f"{run.trainable_parameters:,}",
            f"{run.learning_rate:.0e}",
            f"{run.tokens_per_second:,.0f}",
            f"{run.peak_memory_bytes / MEBIBYTE:,.0f}",
        )
        for name, run in results.runs.items()
    ]


def notes(results: Results) -> list[str]:
    """How to read the table, in sentences."""
    settings, half = results.settings, results.settings.rank // 2
    sentences = [
        f"Target: {results.corpus}. Loss: nats per {results.unit} on held-out text (at most {settings.eval_blocks} "
        f"blocks of {settings.block_size} {results.unit}s), before and after {settings.steps} steps of "
        f"{settings.tokens_per_step:,} {results.unit}s; base of {results.base_parameters:,} parameters in "
        f"{settings.dtype}.",
        "Trainable: parameters that the optimiser updates. Rate: peak learning rate.",
        f"Dual LoRA with r1 = r2 = {half} trains as many parameters as LoRA with r = {settings.rank}"
        + _dora_surplus(results.runs)
        + ".",
        "Tokens/s: from the median step. Peak: memory that training adds to the model: activations, gradients, "
        "optimiser state, temporaries.",
        f"One run with seed {settings.seed}: try other seeds before reading much into small differences.",
    ]
    if results.pretraining is not None:
        sentences.insert(
            0,
            f"Pre-training on English documentation: {len(results.pretraining.train_losses)} steps, training "
            f"loss {results.pretraining.final_train_loss:.3f}, held-out loss "
            f"{results.pretraining.final_held_out_loss:.3f} nats per byte, {results.pretraining.seconds:.0f} s.",
        )
    return sentences


def _dora_surplus(runs: Mapping[str, TrainingRun]) -> str:
    if "dora" not in runs or "lora" not in runs:
        return ""
    surplus = runs["dora"].trainable_parameters - runs["lora"].trainable_parameters
    return f"; DoRA has {surplus:,} more, its magnitude vectors"


def verification_lines(verification: Verification) -> list[str]:
    """The save, reload and merge check in words."""
    lines = [
        f"reloaded adapter against trained model: max |Δ logit| = {verification.reloaded_difference:.3g} (must be 0)",
        f"merged nn.Linear against trained model: max |Δ logit| = {verification.merged_difference:.3g} "
        f"(must be ≤ {NOISE_MULTIPLE:g} × rounding noise = {NOISE_MULTIPLE * verification.rounding_noise:.3g}; "
        f"largest logit {verification.largest_logit:.1f})",
        f"DualLoraLinear layers: {verification.layers_adapted} trained, {verification.layers_left} left after merging",
    ]
    return lines + [f"FAILED: {failure}" for failure in verification.failures]


def print_report(results: Results, console: Console) -> None:
    """The table and the checks on the terminal."""
    print_table("Adaptation compared", HEADINGS, rows(results), console)
    for sentence in notes(results):
        console.print(f"- {sentence}")
    if results.verification is not None:
        for line in verification_lines(results.verification):
            console.print(f"- {line}")


def write_markdown(results: Results, path: Path, curves: Path) -> None:
    """The report for people."""
    about = environment(results.settings.dtype)
    parts = [
        "# Dual LoRA demo",
        markdown_table(HEADINGS, rows(results)),
        f"![Loss curves]({curves.name})",
        "\n".join(f"- {sentence}" for sentence in notes(results)),
    ]
    if results.verification is not None:
        checks = "\n".join(f"- {line}" for line in verification_lines(results.verification))
        parts.append(f"## Save, reload, merge\n\n{checks}")
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    parts.append(
        f"{about['device']}; Python {about['python']}, {versions}; Dual LoRA on backend "
        f"{about['dual_lora_backend']}; {results.seconds:.0f} s in all."
    )
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def write_json(results: Results, path: Path) -> None:
    """The report for programs, with every training loss."""
    document = {**dataclasses.asdict(results), "environment": environment(results.settings.dtype)}
    document["final_held_out_loss"] = {name: run.final_held_out_loss for name, run in results.runs.items()}
    document["failures"] = results.verification.failures if results.verification is not None else []
    path.write_text(json.dumps(document, indent=1, default=str) + "\n", encoding="utf-8")
