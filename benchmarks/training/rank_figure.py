"""The rank of what Dual LoRA and LoRA learn on the demo's model, at equal parameters (figure 3 of arXiv 2512.03402).

    python -m benchmarks.training.rank_figure

Each adapts the demo's Llama with the demo's settings: LoRA of rank 16, Dual LoRA with r1 = r2 = 8. Of every layer,
before and after training, the singular values of ΔW and, for Dual LoRA, of W_m = ReLU(BA) and W_d = Sign(DC), as
`dual-lora inspect` computes them: all of them, in fp64, of matrices in fp32. LoRA's ΔW is zero before training.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from transformers import set_seed
from transformers.utils import logging as transformers_logging

from dual_lora_kernels import save_dual_lora
from dual_lora_kernels.inspection.inspect_adapter import inspect_adapter
from dual_lora_kernels.inspection.report import Spectrum
from dual_lora_kernels.spectra import spectrum
from examples.demo import models as demo
from examples.demo.options import Settings

from ..harness import report
from ..harness.environment import environment, sentence
from .gradient_columns import BATCH, PRETRAIN_STEPS, WIDTH, Run, adapted, make_base

STEM = "rank_figure"
FAMILY = "Llama"
SEEDS = (0, 1)
RANK = Settings.rank
LORA = "LoRA: ΔW"
WHEN = ("before", "after")
MATRICES = ("Dual LoRA: ΔW", "Dual LoRA: ReLU(BA)", "Dual LoRA: Sign(DC)", LORA)
HEADINGS = ("matrix", "training", "rank", "of", "stable rank", f"beyond the {RANK} largest")


@dataclass(frozen=True)
class Measured:
    """One matrix of one layer; `when` is "before" or "after" training."""

    matrix: str
    when: str
    seed: int
    layer: str
    spectrum: Spectrum


def dual_lora(work: Path, seed: int, steps: int) -> list[Measured]:
    """Train Dual LoRA; the three matrices of every layer, before and after."""
    run = Run(FAMILY, "dual_lora", "", 1.0, demo.METHODS["dual_lora"].learning_rate, seed)
    set_seed(seed)  # as `adapted` does before it makes the same model
    before = demo.METHODS["dual_lora"].prepare(demo.load_base(work / FAMILY, "float32"), RANK)
    after = adapted(work, run, steps, BATCH, evaluations=1)[0]
    found = []
    for when, model in (("before", before), ("after", after)):
        folder = work / f"dual_lora_{seed}_{when}"
        save_dual_lora(model, folder)
        for layer in inspect_adapter(folder).layers:
            matrices = (layer.update, layer.magnitude, layer.direction)
            for matrix, values in zip(MATRICES, matrices, strict=False):
                assert values is not None
                found.append(Measured(matrix, when, seed, layer.name, values))
    return found


def lora(work: Path, seed: int, steps: int) -> list[Measured]:
    """Train LoRA; ΔW of every layer, after."""
    run = Run(FAMILY, "lora", "", 1.0, demo.METHODS["lora"].learning_rate, seed)
    model = adapted(work, run, steps, BATCH, evaluations=1)[0]
    found = []
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "get_delta_weight"):
            update = module.get_delta_weight("default").detach()  # type: ignore[operator]
            values = spectrum(partial(iter, (update,)), (update.shape[0], update.shape[1]), RANK)
            found.append(Measured(LORA, "after", seed, name.removeprefix("base_model.model."), values))
    return found


def cells(measured: Sequence[Measured]) -> list[tuple[str, ...]]:
    """The table's cells, in the order of ``HEADINGS``."""
    rows: list[tuple[str, ...]] = []
    for matrix in MATRICES:
        for when in WHEN:
            found = _spectra(measured, matrix, when)
            if found:
                full = sorted({each.largest_rank for each in found})
                outside = statistics.median(1 - each.energy for each in found)
                ranks = _range([each.rank for each in found], "g")
                stable = _range([each.stable_rank for each in found], ".1f")
                rows.append((matrix, when, ranks, ", ".join(map(str, full)), stable, f"{100 * outside:.1f} %"))
    return rows


def _range(values: Sequence[float], form: str) -> str:
    """Median (least to largest)."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def _spectra(measured: Iterable[Measured], matrix: str, when: str) -> list[Spectrum]:
    return [each.spectrum for each in measured if (each.matrix, each.when) == (matrix, when)]


def median_values(found: Sequence[Spectrum]) -> dict[int, float]:
    """Medians over layers of singular values, by place; all layers have as many: the model's width."""
    columns = zip(*(each.values for each in found), strict=True)
    return dict(zip(found[0].positions, map(statistics.median, columns), strict=True))


def publish(measured: Sequence[Measured], about: dict[str, Any], steps: int, out: Path) -> None:
    """Write the data and the table; ``python -m benchmarks.publish`` draws the picture from them."""
    layers = len({each.layer for each in measured})
    paragraphs = [
        "# Ranks of updates: Dual LoRA and LoRA at equal parameters on the demo's model",
        report.markdown_table(HEADINGS, cells(measured)),
        "![Singular values and ranks](../../docs/images/ranks.svg)",
        f"Medians (least to largest) over the {layers} layers and seeds {', '.join(map(str, SEEDS))}, {steps} "
        f"steps each; LoRA of rank {RANK}, Dual LoRA with r1 = r2 = {RANK // 2}. Rank: singular values above max(N, K) "
        f"· ε(fp32) · σ₁. Stable rank: ‖·‖²_F / σ₁². Beyond the {RANK} largest: the median share of ‖·‖²_F that no "
        f"update of rank {RANK} could hold. LoRA's ΔW is zero before training. The right plot is of seed {SEEDS[0]}.",
        "What this does not show: that the rank is of use. A rank counts singular values however small, the stable "
        "rank says how few dominate; Gaussian factors have full rank before any training, and one small model of one "
        "family says nothing about others. Losses at equal parameters are in time_to_loss.md and gradient_columns.md.",
        "Command: `python -m benchmarks.training.rank_figure`.",
        sentence(about),
    ]
    document: dict[str, Any] = {
        "environment": about,
        "steps": steps,
        "rank": RANK,
        "layers": [
            {"matrix": each.matrix, "training": each.when, "seed": each.seed, "layer": each.layer, **_scalars(each)}
            for each in measured
        ],
        "median_values": {
            matrix: {when: median_values(found) for when in WHEN if (found := _spectra(measured, matrix, when))}
            for matrix in MATRICES
        },
    }
    report.write(out, STEM, document, paragraphs)


def _scalars(measured: Measured) -> dict[str, Any]:
    values = asdict(measured.spectrum)
    return {name: value for name, value in values.items() if name not in ("positions", "values")}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training.rank_figure", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--hidden", type=int, default=WIDTH, help=f"width of the model ({WIDTH})")
    parser.add_argument("--steps", type=int, default=Settings.steps, help=f"of training ({Settings.steps})")
    parser.add_argument("--work", type=Path, default=Path("results/rank_figure"), help="folder for models")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="folder for the results (benchmarks/results)")
    options = parser.parse_args(arguments)
    for folder in (options.work, options.out):
        folder.mkdir(parents=True, exist_ok=True)
    transformers_logging.set_verbosity_error()
    console, about = Console(), environment(torch.device("cpu"))
    make_base(FAMILY, options.work, options.hidden, PRETRAIN_STEPS * options.steps // Settings.steps)
    measured: list[Measured] = []
    for seed in track(SEEDS, description="seeds", console=console):
        measured += dual_lora(options.work, seed, options.steps) + lora(options.work, seed, options.steps)
    report.print_table("Ranks", HEADINGS, cells(measured), console)
    publish(measured, about, options.steps, options.out)


if __name__ == "__main__":
    main()
