"""Extraction from a fully tuned checkpoint: is the nearest Dual LoRA update nearer than LoRA's of as many parameters?

    python -m benchmarks.training.extraction

The demo's Llama is tuned whole on the standard library's sources, with two seeds and once for longer. Of every linear
layer's W_tuned − W_base, LoRA's nearest update of rank R is a truncated SVD. Dual LoRA's has r1 + r2 = R, so as many
parameters, and is the best that `extraction_fits.WAYS` find with r1 = r2, and one of them with r1 = R/4 and 3 R/4.
Held-out losses are of the base with these updates, and with the tuned model's embeddings, norms and output head, which
extraction would store whole.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from examples.demo import models as demo
from examples.demo.data import BlockDataset, encode_bytes, standard_library_texts, to_blocks
from examples.demo.options import LONG_FACTOR, Settings
from examples.demo.training import evaluate

from ..harness import report
from ..harness.environment import environment, sentence
from .extraction_fits import WAYS, Factors, from_signs, low_rank, relative_error
from .gradient_columns import BATCH, LENGTH, PRETRAIN_STEPS, WIDTH, Run, adapted, make_base

STEM = "extraction"
FAMILY = "Llama"
RANKS = (4, 8, 16, 32)
STEPS = Settings.steps
CONTROL_WIDTH = 256
HEADINGS = (
    "checkpoint", "R", "error: LoRA, R/2", "LoRA, R", "Dual LoRA", "nearer", "loss: LoRA, R/2", "LoRA, R", "Dual LoRA",
)  # fmt: skip


@dataclass(frozen=True, order=True)
class Checkpoint:
    """One full fine-tuning."""

    seed: int
    steps: int

    def __str__(self) -> str:
        return f"{self.steps} steps, seed {self.seed}"


@dataclass(frozen=True)
class Layer:
    """Relative errors ‖M − ΔW‖_F / ‖M‖_F of one layer, M = W_tuned − W_base.

    `ways` has Dual LoRA's by way with r1 = r2, then those of unequal ranks.
    """

    name: str
    shape: tuple[int, ...]
    half_lora: float
    lora: float
    ways: dict[str, float]

    @property
    def dual_lora(self) -> float:
        """The least of all ways."""
        return min(self.ways.values())


@dataclass(frozen=True)
class Outcome:
    """One checkpoint at one R. Losses in nats per byte: with LoRA's updates of rank R/2, of rank R, and Dual LoRA's."""

    layers: list[Layer]
    half_lora_loss: float
    lora_loss: float
    dual_lora_loss: float

    def median(self, field: str) -> float:
        """Over the layers."""
        values: list[float] = [getattr(layer, field) for layer in self.layers]
        return statistics.median(values)

    def median_of(self, way: str) -> float:
        """One way's, over the layers."""
        return statistics.median(layer.ways[way] for layer in self.layers)

    @property
    def won(self) -> int:
        """How many layers' Dual LoRA update is nearer than LoRA's of rank R."""
        return sum(layer.dual_lora < layer.lora for layer in self.layers)


def tune(work: Path, checkpoint: Checkpoint) -> None:
    """Tune a base whole and save it."""
    _quiet_single_thread()
    run = Run(FAMILY, "full", "", 1.0, demo.METHODS["full"].learning_rate, checkpoint.seed)
    model: Any = adapted(work, run, checkpoint.steps, BATCH, evaluations=1)[0]
    model.save_pretrained(work / str(checkpoint))


def extract(name: str, matrix: torch.Tensor, rank: int) -> tuple[Layer, tuple[torch.Tensor, ...]]:
    """The errors at R = `rank`, and the updates [N, K]: LoRA's of rank R/2 and R, and Dual LoRA's best."""
    half, whole = (up @ down for up, down in (low_rank(matrix, rank // 2), low_rank(matrix, rank)))
    fits = {name: way(matrix, rank // 2, rank // 2) for name, way in WAYS.items()}
    for share, r1 in (("R/4", rank // 4), ("3R/4", rank - rank // 4)):
        fits[f"from signs, r1 = {share}"] = from_signs(matrix, r1, rank - r1)
    best = min(fits.values(), key=lambda fit: fit.error)
    errors = {way: fit.error for way, fit in fits.items()}
    layer = Layer(name, tuple(matrix.shape), relative_error(matrix, half), relative_error(matrix, whole), errors)
    return layer, (half, whole, best.factors.update())


def measure(work: Path, checkpoint: Checkpoint, rank: int) -> Outcome:
    """Every layer's updates at R = `rank`, and the losses with them."""
    _quiet_single_thread()
    base, tuned = _differing_weights(work, checkpoint)
    found = {name: extract(name, weight - base[name], rank) for name, weight in tuned.items()}
    losses = [
        held_out_loss(work, checkpoint, {name: base[name] + updates[which] for name, (_, updates) in found.items()})
        for which in range(3)
    ]
    return Outcome([layer for layer, _ in found.values()], *losses)


def control(rank: int) -> list[Layer]:
    """The same for matrices of which it is known what is in them: nothing but noise, and a Dual LoRA update."""
    _quiet_single_thread()
    generator = torch.Generator().manual_seed(0)
    shapes = ((rank // 2, CONTROL_WIDTH), (CONTROL_WIDTH, rank // 2)) * 2
    planted = Factors(*(torch.randn(shape, generator=generator) for shape in shapes))
    noise = torch.randn(CONTROL_WIDTH, CONTROL_WIDTH, generator=generator)
    return [extract(*named, rank)[0] for named in (("noise", noise), ("a Dual LoRA update", planted.update()))]


def bounds(work: Path, checkpoint: Checkpoint) -> tuple[float, float]:
    """Held-out losses without any update of the linear layers, and with all of it."""
    _quiet_single_thread()
    base, tuned = _differing_weights(work, checkpoint)
    return held_out_loss(work, checkpoint, base), held_out_loss(work, checkpoint, tuned)


def held_out_loss(work: Path, checkpoint: Checkpoint, weights: dict[str, torch.Tensor]) -> float:
    """Of the tuned model with other `weights` in its linear layers."""
    model = demo.load_base(work / str(checkpoint), "float32")
    with torch.no_grad():
        for name, weight in weights.items():
            model.get_submodule(name).weight.copy_(weight)  # type: ignore[union-attr, operator]
    return evaluate(model, held_out_blocks(), out=work / "runs", batch_size=BATCH, seed=0)


@cache
def held_out_blocks() -> BlockDataset:
    """The demo's. Reading the standard library takes seconds, so processes get it from their parent."""
    return to_blocks(standard_library_texts()[2], encode_bytes, LENGTH, Settings.eval_blocks)


def _differing_weights(work: Path, checkpoint: Checkpoint) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    return _linear_weights(work / FAMILY), _linear_weights(work / str(checkpoint))


def _linear_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Those of the layers that adapters would adapt: all linear ones but the output head."""
    model: PreTrainedModel = demo.load_base(folder, "float32")
    head = model.get_output_embeddings()
    return {
        name: module.weight.detach()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }


def _quiet_single_thread() -> None:
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


@dataclass(frozen=True)
class Study:
    """Everything measured: outcomes by R for every checkpoint, the losses that bound theirs, and controls by R."""

    outcomes: dict[Checkpoint, dict[int, Outcome]]
    bounds: dict[Checkpoint, tuple[float, float]]
    controls: dict[int, list[Layer]]


def run_all(
    work: Path, checkpoints: Sequence[Checkpoint], ranks: Sequence[int], processes: int, console: Console
) -> Study:
    """Tune, extract and evaluate, a process for each; what was tuned earlier is taken from `work`."""
    study = Study({checkpoint: {} for checkpoint in checkpoints}, {}, {})
    held_out_blocks()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with (
        ProcessPoolExecutor(processes) as pool,
        Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress,
    ):
        todo = [c for c in sorted(checkpoints, key=lambda c: -c.steps) if not (work / str(c) / "config.json").exists()]
        task = progress.add_task("full fine-tunings", total=len(todo))
        for future in as_completed([pool.submit(tune, work, checkpoint) for checkpoint in todo]):
            future.result()
            progress.advance(task)
        jobs = [(checkpoint, rank) for checkpoint in checkpoints for rank in sorted(ranks, reverse=True)]
        task = progress.add_task("extractions", total=len(jobs))
        pending = {pool.submit(measure, work, *job): job for job in jobs}
        for extraction in as_completed(pending):
            checkpoint, rank = pending[extraction]
            study.outcomes[checkpoint][rank] = extraction.result()
            progress.advance(task)
        study.bounds.update(zip(checkpoints, pool.map(partial(bounds, work), checkpoints), strict=True))
        study.controls.update(zip(sorted(ranks), pool.map(control, sorted(ranks)), strict=True))
    return study


def cells(study: Study) -> list[tuple[str, ...]]:
    """The table's cells, in the order of ``HEADINGS``: medians of the relative errors over the layers, and losses."""
    return [
        (
            str(checkpoint), str(rank),
            *(f"{found.median(field):.3f}" for field in ("half_lora", "lora", "dual_lora")),
            f"{found.won} of {len(found.layers)}",
            *(f"{loss:.3f}" for loss in (found.half_lora_loss, found.lora_loss, found.dual_lora_loss)),
        )
        for checkpoint, by_rank in study.outcomes.items()
        for rank, found in sorted(by_rank.items())
    ]  # fmt: skip


def way_cells(study: Study) -> list[tuple[str, ...]]:
    """A table of the ways: medians over the layers."""
    ways = way_names(study)
    return [
        (str(checkpoint), str(rank), *(f"{found.median_of(way):.3f}" for way in ways))
        for checkpoint, by_rank in study.outcomes.items()
        for rank, found in sorted(by_rank.items())
    ]


def control_cells(study: Study) -> list[tuple[str, ...]]:
    """A table of the controls."""
    return [
        (layer.name, str(rank), f"{layer.half_lora:.3f}", f"{layer.lora:.3f}", f"{layer.dual_lora:.3f}")
        for rank, layers in study.controls.items()
        for layer in layers
    ]


def way_names(study: Study) -> list[str]:
    """Of all ways that were tried, unequal ranks included."""
    by_rank = next(iter(study.outcomes.values()))
    return sorted(next(iter(by_rank.values())).layers[0].ways, key=lambda name: (", r1" in name, name))


def draw(study: Study, path: Path) -> None:
    """Median error, and the share of the linear layers' gain in held-out loss, over R."""
    figure = Figure(figsize=(9.4, 4.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    ranks = sorted(next(iter(study.outcomes.values())))
    for (checkpoint, by_rank), dash in zip(study.outcomes.items(), ("-", "--", ":"), strict=True):
        nothing, everything = study.bounds[checkpoint]
        for label, field, colour, marker in (
            ("LoRA", "lora", "#0072B2", "s"),
            ("Dual LoRA", "dual_lora", "#D55E00", "o"),
        ):
            style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 4, "linestyle": dash}
            style["label"] = f"{label}, {checkpoint}"
            left.plot(ranks, [by_rank[rank].median(field) for rank in ranks], **style)
            losses = [getattr(by_rank[rank], f"{field}_loss") for rank in ranks]
            right.plot(ranks, [(nothing - loss) / (nothing - everything) for loss in losses], **style)
    _finish(left, "Relative error, median over layers", 0.0, ranks)
    _finish(right, "Share of the gain in held-out loss", 1.0, ranks)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)


def _finish(axes: Axes, title: str, ideal: float, ranks: Sequence[int]) -> None:
    axes.axhline(ideal, color="black", linewidth=0.8, linestyle=":")
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [str(rank) for rank in ranks])
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("R: LoRA's rank, Dual LoRA's r1 + r2")
    axes.grid(color="#DDDDDD", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def _rank(text: str) -> int:
    value = int(text)
    if value < 4 or value % 2:
        raise argparse.ArgumentTypeError(f"{value} is not an even number from 4: r1 = R/2 and R/4 are tried")
    return value


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training.extraction", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--hidden", type=int, default=WIDTH, help=f"width of the model ({WIDTH})")
    parser.add_argument(
        "--steps", type=int, default=STEPS, help=f"of tuning, and {LONG_FACTOR} times as many ({STEPS})"
    )
    parser.add_argument("--ranks", type=_rank, nargs="+", default=RANKS, help="even numbers from 4 (4 8 16 32)")
    parser.add_argument("--processes", type=int, default=2, help="at a time, of one thread each (2)")
    parser.add_argument("--work", type=Path, default=Path("results/extraction"), help="folder for the checkpoints")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="folder for the results (benchmarks/results)")
    options = parser.parse_args(arguments)
    for folder in (options.work, options.out):
        folder.mkdir(parents=True, exist_ok=True)
    console, about, started = Console(), environment(torch.device("cpu")), time.perf_counter()
    make_base(FAMILY, options.work, options.hidden, PRETRAIN_STEPS * options.steps // STEPS)
    checkpoints = [
        Checkpoint(0, options.steps),
        Checkpoint(1, options.steps),
        Checkpoint(0, LONG_FACTOR * options.steps),
    ]
    study = run_all(options.work, checkpoints, options.ranks, options.processes, console)
    minutes = (time.perf_counter() - started) / 60
    report.print_table("Extraction at equal parameters", HEADINGS, cells(study), console)
    draw(study, options.out / f"{STEM}.png")
    limits = "; ".join(
        f"{checkpoint}: {nothing:.3f} without any update of these layers, {everything:.3f} with all of it"
        for checkpoint, (nothing, everything) in study.bounds.items()
    )
    ways = way_names(study)
    paragraphs = [
        "# Extraction from fully tuned checkpoints: Dual LoRA and LoRA at equal parameters",
        report.markdown_table(HEADINGS, cells(study)),
        f"![Error and held-out loss over R]({STEM}.png)",
        "‖M − ΔW‖ / ‖M‖ with M = W_tuned − W_base, medians over the linear layers. LoRA's update is the truncated SVD. "
        "Dual LoRA's, with r1 + r2 = R, is the best that was found by any way, an upper bound of the least error; "
        "nearer: the layers where it is nearer than LoRA's of rank R. "
        f"Losses on held-out text in nats per byte: {limits}.",
        "Dual LoRA by way, r1 = r2 = R/2 unless named:",
        report.markdown_table(("checkpoint", "R", *ways), way_cells(study)),
        f"The same ways on {CONTROL_WIDTH} × {CONTROL_WIDTH} matrices of which it is known what is in them, Gaussian "
        "noise and ReLU(BA) ⊙ Sign(DC) with Gaussian factors and r1 = r2 = R/2:",
        report.markdown_table(("control", "R", "error: LoRA, R/2", "LoRA, R", "Dual LoRA"), control_cells(study)),
        f"A Llama of width {options.hidden} pre-trained and tuned in fp32 as in the demo. The ways are described in "
        "benchmarks/training/extraction_fits.py. `python -m benchmarks.training.extraction` took "
        f"{minutes:.0f} minutes, with what else the machine did.",
        sentence(about),
    ]
    document = {
        "environment": about,
        "checkpoints": [
            {
                **asdict(checkpoint),
                "loss_without_update": study.bounds[checkpoint][0],
                "loss_tuned": study.bounds[checkpoint][1],
                "ranks": {str(rank): asdict(outcome) for rank, outcome in sorted(by_rank.items())},
            }
            for checkpoint, by_rank in study.outcomes.items()
        ],
        "controls": {str(rank): [asdict(layer) for layer in layers] for rank, layers in study.controls.items()},
    }
    report.write(options.out, STEM, document, paragraphs)


if __name__ == "__main__":
    main()
