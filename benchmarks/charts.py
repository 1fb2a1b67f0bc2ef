"""The benchmarks' charts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from .timing import Quartiles


def ratio_bars(values: Mapping[str, Quartiles], highlight: str, title: str, axis: str, path: Path) -> None:
    """Horizontal bars of medians, quartiles as error bars, a line at 1; the bar `highlight` in another colour."""
    figure = Figure(figsize=(6.4, 0.42 * len(values) + 1.2), layout="constrained")
    axes = figure.subplots()
    labels = list(values)[::-1]
    medians = [values[label].median for label in labels]
    spread = [
        [values[label].median - values[label].lower for label in labels],
        [values[label].upper - values[label].median for label in labels],
    ]
    colours = ["tab:orange" if label == highlight else "tab:blue" for label in labels]
    axes.barh(labels, medians, xerr=spread, color=colours, error_kw={"elinewidth": 1, "capsize": 2})
    for row, (label, median) in enumerate(zip(labels, medians, strict=True)):
        axes.annotate(
            f"{median:.2f}", (values[label].upper, row), xytext=(4, 0), textcoords="offset points", va="center"
        )
    axes.axvline(1.0, color="black", linewidth=0.8, linestyle=":")
    axes.set_xlim(0, max(quartile.upper for quartile in values.values()) * 1.12)
    axes.set(title=title, xlabel=axis)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
