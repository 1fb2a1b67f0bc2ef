"""Pictures of the documents: SVG files that say what they were drawn from.

matplotlib's versions and installed fonts draw the same figure in other bytes. So a picture's file names the digest of
its data and of the source that drew it, and it is up to date as long as that is the same. Letters are drawn as paths
on a white card: that looks the same in every browser, on a dark page too.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from ..harness.report import write_text

_STYLE = {"svg.fonttype": "path", "svg.hashsalt": "dual_lora_kernels", "font.family": "DejaVu Sans"}
PADDED = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
"""A layout with room at the card's edges."""
_MARKERS = "osD^vP"
_DIGEST = re.compile(r"<dc:identifier>sha256:([0-9a-f]{64})</dc:identifier>")


@dataclass(frozen=True)
class Picture:
    """A figure and where its numbers come from.

    title: what it shows, for readers who cannot see it. data: the numbers, as what JSON can hold. draw: the figure,
    from nothing but these.
    """

    title: str
    data: Callable[[], Any]
    draw: Callable[[Any], Figure]

    def digest(self) -> str:
        """Of the numbers, to six significant digits, of the module that draws them, and of this one."""
        module = sys.modules[self.draw.__module__]
        parts = (self.title, json.dumps(_rounded(self.data()), sort_keys=True), inspect.getsource(module), _source())
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def is_current(self, path: Path) -> bool:
        """Whether the file at `path` was drawn from the same numbers by the same source."""
        if not path.exists():
            return False
        found = _DIGEST.search(path.read_text(encoding="utf-8"))
        return found is not None and found[1] == self.digest()

    def write(self, path: Path) -> None:
        """Draw into the file at `path`, whole or not at all."""
        metadata = {"Title": self.title, "Identifier": f"sha256:{self.digest()}", "Date": None, "Creator": None}
        buffer = io.StringIO()
        with matplotlib.rc_context(_STYLE):
            self.draw(self.data()).savefig(buffer, format="svg", metadata=metadata, facecolor="white")
        lines = [line.rstrip() for line in buffer.getvalue().splitlines()]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, "\n".join(lines) + "\n")


def drawn_by_program(folder: Path) -> list[Path]:
    """The pictures in `folder` that name a digest."""
    return [path for path in sorted(folder.glob("*.svg")) if _DIGEST.search(path.read_text(encoding="utf-8"))]


def dots(
    panels: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]],
    rows: Sequence[str],
    highlighted: str,
    title: str,
    lines: Mapping[str, float],
) -> Figure:
    """Panels, two in a row, with a dot and its quartiles for each of `rows` and each machine, the axis logarithmic.

    panels: title → machine → row → (lower, median, upper). highlighted: the row with a band behind it. lines: panel →
    where it has a vertical line, such as a floor at 1.
    """
    labels = list(dict.fromkeys(machine for machines in panels.values() for machine in machines))
    down = -(-len(panels) // 2)
    figure = Figure(figsize=(9.6, down * (0.3 * len(rows) + 0.9) + 0.9), layout=PADDED)
    axes_of = figure.subplots(down, 2, squeeze=False, sharey=True)
    for axes, (name, machines) in zip(axes_of.flat, panels.items(), strict=False):
        axes.axhspan(rows.index(highlighted) - 0.5, rows.index(highlighted) + 0.5, color="#ffe9a8", zorder=0)
        if name in lines:
            axes.axvline(lines[name], color="black", linewidth=1.2, linestyle="--", zorder=1)
        for machine, points in machines.items():
            index = labels.index(machine)
            place = [rows.index(row) + 0.22 * (index - (len(labels) - 1) / 2) for row in points]
            lower, median, upper = zip(*points.values(), strict=True)
            error = [
                [m - q for m, q in zip(median, lower, strict=True)],
                [q - m for m, q in zip(median, upper, strict=True)],
            ]
            style = {"fmt": _MARKERS[index % len(_MARKERS)], "color": f"C{index}", "markersize": 5, "elinewidth": 1}
            axes.errorbar(median, place, xerr=error, zorder=2, **style)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_title(name, fontsize=10)
        axes.grid(axis="x", color="#dddddd", linewidth=0.6)
        axes.set_yticks(range(len(rows)), rows, fontsize=9)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        for text in axes.get_yticklabels():
            text.set_fontweight("bold" if text.get_text() == highlighted else "normal")
        axes.spines[["top", "right"]].set_visible(False)
    for axes in list(axes_of.flat)[len(panels) :]:
        axes.set_visible(False)
    handles = [
        Line2D([], [], color=f"C{i}", marker=_MARKERS[i % len(_MARKERS)], linestyle="", label=label)
        for i, label in enumerate(labels)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(3, len(handles)), fontsize=9, frameon=False)
    figure.suptitle(title, fontsize=11)
    return figure


def _source() -> str:
    return inspect.getsource(sys.modules[__name__])


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(entry) for entry in value]
    return value
