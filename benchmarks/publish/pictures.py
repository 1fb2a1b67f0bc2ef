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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from ..harness.report import write_text

_STYLE = {"svg.fonttype": "path", "svg.hashsalt": "dual_lora_kernels", "font.family": "DejaVu Sans"}
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
