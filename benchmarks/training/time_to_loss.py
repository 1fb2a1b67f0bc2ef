"""Which method reaches a loss first: a Llama wide enough for products to matter, adapted by each, against the clock.

    python -m benchmarks.training.time_to_loss

The base is the demo's Llama, wider, pre-trained as there and adapted to the standard library's sources with the demo's
rates. Times are a method's steps times the median of its steps' seconds: data loading and
evaluation do not count, and a disturbed step does not move the rest. Methods run one after the other.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.console import Console
from transformers.utils import logging as transformers_logging

from ..harness import report
from ..harness.environment import environment, load_average, sentence
from .gradient_columns import LENGTH, PACKAGE, Run, adapted, make_base

STEM = "time_to_loss"
WIDTH, BATCH, STEPS, PRETRAIN_STEPS, EVALUATIONS = 512, 16, 80, 300, 8
METHODS = {
    "Dual LoRA": Run("Llama", "dual_lora", "", 1.0, 1e-2, 0),
    "Dual LoRA, 1/2": Run("Llama", "dual_lora", PACKAGE, 1 / 2, 1e-2, 0),
    "Dual LoRA, 1/4": Run("Llama", "dual_lora", PACKAGE, 1 / 4, 1e-2, 0),
    "LoRA (PEFT)": Run("Llama", "lora", "", 1.0, 5e-3, 0),
    "DoRA (PEFT)": Run("Llama", "dora", "", 1.0, 5e-3, 0),
}
HEADINGS = ("method", "seconds a step", "final loss", "seconds to LoRA's final loss", "to DoRA's")


@dataclass(frozen=True)
class Curve:
    """Median seconds of a step, and (step, held-out loss in nats per byte)."""

    step_seconds: float
    held_out: list[tuple[int, float]]

    def seconds_to(self, loss: float) -> float | None:
        """When the curve first reaches `loss`, interpolated between evaluations; None where it does not."""
        for (before, high), (after, low) in zip(self.held_out, self.held_out[1:], strict=False):
            if low <= loss < high:
                return (before + (after - before) * (high - loss) / (high - low)) * self.step_seconds
        return self.held_out[0][0] * self.step_seconds if self.held_out[0][1] <= loss else None


def measure(folder: Path, run: Run) -> Curve:
    """One method."""
    _, training, _ = adapted(folder, run, STEPS, BATCH, EVALUATIONS)
    return Curve(BATCH * LENGTH / training.tokens_per_second, training.held_out)


def cells(curves: dict[str, Curve]) -> list[tuple[str, ...]]:
    """The table's cells, in the order of ``HEADINGS``."""

    def reached(curve: Curve, other: str) -> str:
        seconds = curve.seconds_to(curves[other].held_out[-1][1])
        return "not reached" if seconds is None else f"{seconds:.1f}"

    return [
        (
            name, f"{curve.step_seconds:.3f}", f"{curve.held_out[-1][1]:.4f}", reached(curve, "LoRA (PEFT)"),
            reached(curve, "DoRA (PEFT)"),
        )
        for name, curve in curves.items()
    ]  # fmt: skip


def draw(curves: dict[str, Curve], title: str, path: Path) -> None:
    """Held-out loss over seconds."""
    figure = Figure(figsize=(6.8, 4.2), layout="constrained")
    axes = figure.subplots()
    styles = ("#D55E00", "#E69F00", "#CC79A7", "#0072B2", "#009E73")
    for (name, curve), colour, marker in zip(curves.items(), styles, "oD^sv", strict=True):
        seconds = [step * curve.step_seconds for step, _ in curve.held_out]
        axes.plot(seconds, [loss for _, loss in curve.held_out], color=colour, marker=marker, markersize=4, label=name)
    axes.set(title=title, xlabel="seconds of training steps", ylabel="held-out loss, nats per byte")
    axes.grid(color="#DDDDDD", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training.time_to_loss", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (all cores)")
    parser.add_argument("--work", type=Path, default=Path("results/time_to_loss"), help="folder for the base")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="folder for the results (benchmarks/results)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    transformers_logging.set_verbosity_error()
    for folder in (options.work, options.out):
        folder.mkdir(parents=True, exist_ok=True)
    console = Console()
    make_base("Llama", options.work, WIDTH, PRETRAIN_STEPS)
    about = environment(torch.device("cpu"))
    curves = {name: measure(options.work, run) for name, run in METHODS.items()}
    after = load_average()
    title = f"Llama of width {WIDTH}, {BATCH} × {LENGTH} bytes a step, {STEPS} steps"
    report.print_table(title, HEADINGS, cells(curves), console)
    draw(curves, title, options.out / f"{STEM}.png")
    paragraphs = [
        f"# Loss against time: {title}",
        report.markdown_table(HEADINGS, cells(curves)),
        f"![Held-out loss over seconds]({STEM}.png)",
        "Held-out loss in nats per byte; seconds are steps times the median of a method's steps, without evaluation. "
        "Equal trainable parameters; the demo's learning rates, which were found for a model of half the width. One "
        "seed.",
        f"Load average {after} at the end; {sentence(about)}",
    ]
    document = {"environment": about, "curves": {name: asdict(curve) for name, curve in curves.items()}}
    report.write(options.out, STEM, document, paragraphs)


if __name__ == "__main__":
    main()
