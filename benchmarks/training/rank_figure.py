"""The rank of what Dual LoRA and LoRA learn on the demo's model, at equal parameters (figure 3 of arXiv 2512.03402).

    python -m benchmarks.training.rank_figure

Each adapts the demo's Llama with the demo's settings: LoRA of rank 16, Dual LoRA with r1 = r2 = 8. Of every layer,
before and after training, the singular values of ΔW and, for Dual LoRA, of W_m = ReLU(BA) and W_d = Sign(DC), as
`dual-lora inspect` computes them: all of them, in fp64, of matrices in fp32. LoRA's ΔW is zero before training.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
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
IMAGES = Path(__file__).parents[2] / "docs" / "images"
FAMILY = "Llama"
SEEDS = (0, 1)
RANK = Settings.rank
LORA = "LoRA: ΔW"
WHEN = ("before", "after")
STYLES = {
    "Dual LoRA: ΔW": ("#D55E00", "o"),
    "Dual LoRA: ReLU(BA)": ("#E69F00", "^"),
    "Dual LoRA: Sign(DC)": ("#CC79A7", "D"),
    LORA: ("#0072B2", "s"),
}
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
            for matrix, values in zip(STYLES, matrices, strict=False):
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
    for matrix in STYLES:
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


def draw(measured: Sequence[Measured], path: Path) -> None:
    """Singular values on the left, ranks after training by layer, of the first seed, on the right."""
    figure = Figure(figsize=(11.0, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for matrix, (colour, _) in STYLES.items():
        for when, dash in zip(WHEN, ":-", strict=True):
            _draw_values(left, _spectra(measured, matrix, when), colour, dash, matrix if when == "after" else None)
    left.plot([], [], color="#777777", linestyle=":", label="before training")
    left.axvline(RANK, color="#777777", linewidth=0.8, linestyle="--")
    left.annotate(f"LoRA's rank, {RANK}", (RANK, 2e-6), xytext=(5, 0), textcoords="offset points", fontsize=9)
    left.set(xscale="log", yscale="log", ylim=(1e-6, 1.6))
    left.set_xlabel("singular value, by size")
    left.set_ylabel("share of the largest, median over layers")
    left.set_title("Singular values", fontsize=11)
    left.legend(frameon=False, fontsize=9, loc="lower left")
    _draw_ranks(right, [each for each in measured if (each.when, each.seed) == ("after", SEEDS[0])])
    for axes in (left, right):
        axes.grid(color="#DDDDDD", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def _draw_ranks(axes: Axes, measured: Sequence[Measured]) -> None:
    """Ranks of every matrix, and below them the stable ranks of both methods' ΔW, one mark for each layer."""
    layers = list(dict.fromkeys(each.layer for each in measured))
    for shift, (matrix, (colour, marker)) in enumerate(STYLES.items(), -1):
        found = {each.layer: each.spectrum for each in measured if each.matrix == matrix}
        places = [index + 0.18 * shift for index in range(len(layers))]
        axes.plot(places, [found[layer].rank for layer in layers], marker, color=colour, markersize=4, label=matrix)
        if matrix.endswith("ΔW"):
            stable = [found[layer].stable_rank for layer in layers]
            label = f"{matrix}, stable rank"
            axes.plot(places, stable, marker, color=colour, fillstyle="none", markersize=4, label=label)
    largest = max(each.spectrum.largest_rank for each in measured)
    ticks = [2**power for power in range(largest.bit_length())]
    axes.set_yscale("log", base=2)
    axes.set_yticks(ticks, [str(tick) for tick in ticks])
    axes.set_ylim(0.8, largest * 1.4)
    axes.set_xticks(range(len(layers)), [_short(layer) for layer in layers], rotation=90, fontsize=7)
    axes.set_title("Rank after training, by layer", fontsize=11)
    axes.legend(frameon=False, fontsize=8, loc="upper right", bbox_to_anchor=(1.0, 0.93), ncols=2)


def _draw_values(axes: Axes, found: Sequence[Spectrum], colour: str, dash: str, label: str | None) -> None:
    if found:
        medians = median_values(found)
        axes.plot(list(medians), list(medians.values()), color=colour, linestyle=dash, linewidth=1.8, label=label)


def median_values(found: Sequence[Spectrum]) -> dict[int, float]:
    """Medians over layers of singular values, by place; all layers have as many: the model's width."""
    columns = zip(*(each.values for each in found), strict=True)
    return dict(zip(found[0].positions, map(statistics.median, columns), strict=True))


def _short(layer: str) -> str:
    """ "model.layers.2.mlp.up_proj" → "2 up"."""
    parts = layer.split(".")
    return f"{next(part for part in parts if part.isdecimal())} {parts[-1].removesuffix('_proj')}"


def publish(measured: Sequence[Measured], about: dict[str, Any], steps: int, out: Path, images: Path) -> None:
    """Write the data, the table and the pictures."""
    draw(measured, out / f"{STEM}.png")
    shutil.copyfile(out / f"{STEM}.png", images / "ranks.png")
    layers = len({each.layer for each in measured})
    paragraphs = [
        "# Ranks of updates: Dual LoRA and LoRA at equal parameters on the demo's model",
        report.markdown_table(HEADINGS, cells(measured)),
        f"![Singular values and ranks]({STEM}.png)",
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
            for matrix in STYLES
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
    parser.add_argument("--images", type=Path, default=IMAGES, help="folder for ranks.png (docs/images)")
    options = parser.parse_args(arguments)
    for folder in (options.work, options.out, options.images):
        folder.mkdir(parents=True, exist_ok=True)
    transformers_logging.set_verbosity_error()
    console, about = Console(), environment(torch.device("cpu"))
    make_base(FAMILY, options.work, options.hidden, PRETRAIN_STEPS * options.steps // Settings.steps)
    measured: list[Measured] = []
    for seed in track(SEEDS, description="seeds", console=console):
        measured += dual_lora(options.work, seed, options.steps) + lora(options.work, seed, options.steps)
    report.print_table("Ranks", HEADINGS, cells(measured), console)
    publish(measured, about, options.steps, options.out, options.images)


if __name__ == "__main__":
    main()
