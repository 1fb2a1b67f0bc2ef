"""Draws the loss curves of all methods into one PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .models import METHODS
from .report import Results

# Okabe and Ito's palette, told apart by people with any common colour-vision deficiency; the marker repeats the
# distinction for print.
STYLES: dict[str, tuple[str, str]] = {
    "dual_lora": ("#D55E00", "o"),
    "lora": ("#0072B2", "s"),
    "dora": ("#009E73", "^"),
    "full": ("#555555", "D"),
}
SMOOTHING_STEPS = 10


def smooth(losses: Sequence[float]) -> np.ndarray:
    """Exponential moving average over about ten steps, corrected for its start."""
    decay = 1.0 - 1.0 / SMOOTHING_STEPS
    total, weight, smoothed = 0.0, 0.0, []
    for loss in losses:
        total, weight = decay * total + loss, decay * weight + 1.0
        smoothed.append(total / weight)
    return np.array(smoothed)


def draw_curves(results: Results, path: Path) -> None:
    """Training loss on the left, held-out loss on the right."""
    figure = Figure(figsize=(11, 4.6), dpi=160, layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, run in results.runs.items():
        colour, marker = STYLES[name]
        steps = np.arange(1, len(run.train_losses) + 1)
        left.plot(steps, smooth(run.train_losses), color=colour, linewidth=2.0, label=METHODS[name].label)
        points = [(0, results.base_loss), *run.held_out]
        right.plot(
            [step for step, _ in points],
            [loss for _, loss in points],
            color=colour,
            marker=marker,
            markersize=6,
            linewidth=1.8,
            label=f"{METHODS[name].label}: {run.final_held_out_loss:.3f}",
        )
    right.axhline(results.base_loss, color="#999999", linewidth=1.0, linestyle="--", label="base, not adapted")
    _finish(left, f"Training loss, mean over about {SMOOTHING_STEPS} steps", results.unit)
    _finish(right, "Held-out loss", results.unit)
    figure.suptitle(f"Adapting to {results.corpus}: base of {results.base_parameters:,} parameters", fontsize=13)
    figure.savefig(path)


def _finish(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title, fontsize=12)
    axes.set_xlabel("step", fontsize=11)
    axes.set_ylabel(f"nats per {unit}", fontsize=11)
    axes.grid(color="#DDDDDD", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=10)
