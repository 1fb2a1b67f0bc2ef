"""``dual-lora inspect``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from ..durable_files import replace_files
from ..inspection.inspect_adapter import Progress, inspect_adapter
from ..inspection.page import render_page
from ..inspection.report import AdapterReport
from ..inspection.table import print_tables
from .common import Subparsers, ends_in_words

_FORMAT = 1
"""Of the JSON object."""
_DESCRIPTION = """\
What an adapter has learned, layer by layer: how much of ΔW is frozen, and negative, its size beside W0, how much of
it rounding W0 + ΔW to nearest would delete, ranks of ΔW, ReLU(BA) and Sign(DC), and how similar other adapters are.
"""
_EPILOG = """\
example:
  dual-lora inspect runs/adapter --base models/Llama-3-8B --html report.html

docs/inspect.md says what each figure means, and how it is computed. Memory stays some hundred MB, however large the
adapter and the model. Exit status: 0 inspected, 1 a file does not fit, is damaged or cannot be read or written, 2 wrong
usage, 130 Ctrl-C.
"""


def add(subparsers: Subparsers) -> None:
    """Add the parser."""
    parser = subparsers.add_parser(
        "inspect",
        help="what an adapter has learned, layer by layer",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "adapter", type=Path, metavar="ADAPTER", help="folder of a saved adapter, this package's or PEFT's"
    )
    parser.add_argument("--base", type=Path, metavar="MODEL", help="folder of the model that it was trained on")
    parser.add_argument(
        "--compare", type=Path, nargs="+", default=[], metavar="ADAPTER", help="other adapters for the same model"
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with charts, which needs no network")
    parser.add_argument("--json", action="store_true", help="print the report as a JSON object instead of tables")
    parser.add_argument("--no-spectra", action="store_true", help="leave out ranks, which take most of the time")

    @ends_in_words
    def run(arguments: argparse.Namespace) -> int:
        page: Path | None = arguments.html
        if page is not None and (page.is_dir() or not page.parent.is_dir()):  # said before minutes of work
            raise ValueError(f"--html: got {str(page)!r}, expected a file in a folder that exists")
        with _layer_bar() as progress:
            report = inspect_adapter(
                arguments.adapter, arguments.base, arguments.compare,
                spectra=not arguments.no_spectra, progress=progress,
            )  # fmt: skip
        if page is not None:
            replace_files(page.parent, {page.name: render_page(report).encode()})
            print(f"wrote {page}", file=sys.stderr)
        if arguments.json:
            print(json.dumps(document(report), indent=2, allow_nan=False))
        else:
            print_tables(report, sys.stdout)
        return 0

    parser.set_defaults(run=run)


def document(report: AdapterReport) -> dict[str, Any]:
    """The report as JSON has it: the fields of `AdapterReport`, and null for a number that is not finite."""
    found: dict[str, Any] = _without_infinity({"format": _FORMAT, **dataclasses.asdict(report)})
    return found


def _without_infinity(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_infinity(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_infinity(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def _layer_bar() -> Iterator[Progress]:
    """A bar on stderr, where that is a terminal, that goes by the layers' sizes."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading", total=1.0)

        def show(done: int, layers: int, share: float) -> None:
            bar.update(task, description=f"{done} of {layers} layers", completed=share)

        yield show
