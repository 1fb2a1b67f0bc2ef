"""The picture of what Dual LoRA and LoRA learn: singular values, and ranks by layer (figure 3 of arXiv 2512.03402)."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .pictures import PADDED, Picture
from .studies import load

_STYLES = {
    "Dual LoRA: ΔW": ("#D55E00", "o"),
    "Dual LoRA: ReLU(BA)": ("#E69F00", "^"),
    "Dual LoRA: Sign(DC)": ("#CC79A7", "D"),
    "LoRA: ΔW": ("#0072B2", "s"),
}
"""Matrix → colour and marker."""
_DASHES = {"before": ":", "after": "-"}
_GREY = "#777777"


def _numbers() -> Any:
    found = load("rank_figure")
    kept = ("matrix", "layer", "rank", "stable_rank", "largest_rank")
    return {
        "rank": found["rank"],
        "values": found["median_values"],
        "layers": [
            {name: each[name] for name in kept}
            for each in found["layers"]
            if (each["training"], each["seed"]) == ("after", 0)
        ],
    }


def _draw(numbers: Any) -> Figure:
    """On the left singular values, medians over layers and seeds; on the right ranks of the first seed, trained."""
    figure = Figure(figsize=(11.0, 4.6), layout=PADDED)
    left, right = figure.subplots(1, 2)
    _draw_values(left, numbers["values"], numbers["rank"])
    _draw_ranks(right, numbers["layers"])
    for axes in (left, right):
        axes.grid(color="#DDDDDD", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_values(axes: Axes, values: dict[str, dict[str, dict[str, float]]], rank: int) -> None:
    for matrix, (colour, _) in _STYLES.items():
        for when, medians in values[matrix].items():
            places = [int(place) for place in medians]
            label = matrix if when == "after" else None
            axes.plot(places, list(medians.values()), color=colour, linestyle=_DASHES[when], linewidth=1.8, label=label)
    axes.plot([], [], color=_GREY, linestyle=":", label="before training")
    axes.axvline(rank, color=_GREY, linewidth=0.8, linestyle="--")
    axes.annotate(f"LoRA's rank, {rank}", (rank, 2e-6), xytext=(5, 0), textcoords="offset points", fontsize=9)
    axes.set(xscale="log", yscale="log", ylim=(1e-6, 1.6))
    axes.set_xlabel("singular value, by size")
    axes.set_ylabel("share of the largest, median over layers")
    axes.set_title("Singular values", fontsize=11)
    axes.legend(frameon=False, fontsize=9, loc="lower left")


def _draw_ranks(axes: Axes, measured: list[dict[str, Any]]) -> None:
    """Ranks of every matrix, and below them the stable ranks of both methods' ΔW, one mark for each layer."""
    layers = list(dict.fromkeys(each["layer"] for each in measured))
    for shift, (matrix, (colour, marker)) in enumerate(_STYLES.items(), -1):
        found = {each["layer"]: each for each in measured if each["matrix"] == matrix}
        places = [index + 0.18 * shift for index in range(len(layers))]
        axes.plot(places, [found[layer]["rank"] for layer in layers], marker, color=colour, markersize=4, label=matrix)
        if matrix.endswith("ΔW"):
            stable = [found[layer]["stable_rank"] for layer in layers]
            label = f"{matrix}, stable rank"
            axes.plot(places, stable, marker, color=colour, fillstyle="none", markersize=4, label=label)
    largest = max(each["largest_rank"] for each in measured)
    ticks = [2**power for power in range(largest.bit_length())]
    axes.set_yscale("log", base=2)
    axes.set_yticks(ticks, [str(tick) for tick in ticks])
    axes.set_ylim(0.8, largest * 1.4)
    axes.set_xticks(range(len(layers)), [short_name(layer) for layer in layers], rotation=90, fontsize=7)
    axes.set_title("Rank after training, by layer", fontsize=11)
    axes.legend(frameon=False, fontsize=8, loc="upper right", bbox_to_anchor=(1.0, 0.93), ncols=2)


def short_name(layer: str) -> str:
    """``"model.layers.2.mlp.up_proj"`` → ``"2 up"``."""
    parts = layer.split(".")
    return f"{next(part for part in parts if part.isdecimal())} {parts[-1].removesuffix('_proj')}"


PICTURES = {"ranks": Picture("Singular values and ranks of what Dual LoRA and LoRA learn", _numbers, _draw)}
