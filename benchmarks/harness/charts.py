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
    axes.set_ylim(-0.7, len(labels) - 0.3)
    axes.set_xlim(0, max(quartile.upper for quartile in values.values()) * 1.12)
    axes.set(title=title, xlabel=axis)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def ratio_lines(
    plots: Mapping[str, Mapping[str, Mapping[int, float]]], goal: float, title: str, axis: str, path: Path
) -> None:
    """One plot per entry: each label's ratio over M, both logarithmic, with lines at 1 and at `goal`."""
    columns = min(4, len(plots))
    rows = -(-len(plots) // columns)
    figure = Figure(figsize=(max(3.2 * columns, 6.4), 2.6 * rows + 1.2), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    styles = {
        label: f"C{i}" for i, label in enumerate(dict.fromkeys(label for lines in plots.values() for label in lines))
    }
    for axes, (name, lines) in zip(grid.flat, plots.items(), strict=False):
        for label, points in lines.items():
            axes.plot(list(points), list(points.values()), marker="o", markersize=3, color=styles[label], label=label)
        axes.axhline(1.0, color="black", linewidth=0.8, linestyle=":")
        axes.axhline(goal, color="black", linewidth=0.8, linestyle="--")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_title(name, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid.flat[len(plots) :]:
        axes.set_visible(False)
    handles = {label: line for axes in grid.flat for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=8)
    figure.suptitle(f"{title}. Horizontally: M, tokens", fontsize=10)
    figure.supylabel(axis, fontsize=9)
    figure.savefig(path, dpi=130)


def stacked_bars(bars: Mapping[str, Mapping[str, float]], title: str, axis: str, path: Path) -> None:
    """One horizontal bar per entry, made of its parts, with a line at 1."""
    figure = Figure(figsize=(7.0, 0.38 * len(bars) + 1.6), layout="constrained")
    axes = figure.subplots()
    names = list(bars)
    left = [0.0] * len(names)
    for part in dict.fromkeys(part for parts in bars.values() for part in parts):
        widths = [bars[name].get(part, 0.0) for name in names]
        axes.barh(names, widths, left=left, label=part)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.axvline(1.0, color="black", linewidth=0.8, linestyle=":")
    axes.invert_yaxis()
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(axis)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
