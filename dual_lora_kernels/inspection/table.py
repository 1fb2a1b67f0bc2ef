"""An inspected adapter as tables for a terminal: a line for each kind of layer, and one for each layer."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from .numerals import UNKNOWN, is_bound, median, number, percentage, several, size
from .report import AdapterReport, LayerReport, Spectrum

_NO_LIMIT = 10_000
_Group = Sequence[LayerReport]
_Text = Callable[[_Group], str]
_Column = tuple[str, _Text]
"""A heading, and what stands under it for one layer or several: a figure, or the median of theirs."""


def print_tables(report: AdapterReport, file: TextIO) -> None:
    """Print the tables: medians by kind, and all layers.

    They are as wide as they need to be: a narrow terminal wraps their lines, which loses no figure.
    """
    console = Console(file=file, width=_NO_LIMIT)
    columns = list(_columns(report))
    parameters = sum(layer.parameters for layer in report.layers)
    about = [
        f"{report.adapter}: {several(len(report.layers), 'layer')}, {parameters:,} parameters",
        size(report.adapter_bytes),
        f"computed by '{report.backend}'",
        *([f"base {report.base}"] if report.base is not None else []),
        *([f"with {', '.join(report.modules_to_save)} saved whole"] if report.modules_to_save else []),
    ]
    console.print(", ".join(about), highlight=False, markup=False)
    by_kind: dict[str, list[LayerReport]] = {}
    for layer in report.layers:
        by_kind.setdefault(layer.kind, []).append(layer)
    counted: list[_Column] = [("layers", lambda group: f"{len(group)}"), *columns]
    _print(console, "Medians by kind", "kind", counted, list(by_kind.items()))
    _print(console, "Layers", "layer", columns, [(layer.name, [layer]) for layer in report.layers])


def _print(
    console: Console, title: str, first: str, columns: Sequence[_Column], groups: Sequence[tuple[str, _Group]]
) -> None:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0)
    table.add_column(first, no_wrap=True)
    for heading, _ in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for name, group in groups:
        table.add_row(_plain(name), *(text(group) for _, text in columns))
    console.print(table)


def _plain(name: str) -> str:
    """A name that rich takes for no markup."""
    return name.replace("[", r"\[")


def _columns(report: AdapterReport) -> Iterator[_Column]:
    """The figures that the report has."""
    yield "N × K", _same(lambda layer: f"{layer.shape[0]} × {layer.shape[1]}")
    yield "r1, r2", _same(lambda layer: f"{layer.r1}, {layer.r2}")
    yield "frozen\n%", _middle(percentage, lambda layer: layer.frozen)
    yield "negative\n%", _middle(percentage, lambda layer: layer.negative)
    yield "‖ΔW‖", _middle(number, lambda layer: layer.norm)
    if report.base is not None:
        yield "‖ΔW‖\n/ ‖W0‖", _middle(number, lambda layer: None if layer.base is None else layer.base.relative_norm)
        yield (
            "rounded\naway, %",
            _middle(percentage, lambda layer: None if layer.base is None else layer.base.rounded_away),
        )
    if any(layer.update is not None for layer in report.layers):
        yield "rank\nΔW", _rank(lambda layer: layer.update)
        yield "rank\nReLU(BA)", _rank(lambda layer: layer.magnitude)
        yield "rank\nSign(DC)", _rank(lambda layer: layer.direction)
        yield (
            "stable\nrank ΔW",
            _middle(number, lambda layer: None if layer.update is None else layer.update.stable_rank),
        )
    for name in report.compared:
        yield f"cosine\n{_plain(name)}", _middle(number, partial(_cosine, name))


def _same(of: Callable[[LayerReport], str]) -> _Text:
    """What all layers have, or nothing."""

    def text(group: _Group) -> str:
        found = {of(layer) for layer in group}
        return found.pop() if len(found) == 1 else UNKNOWN

    return text


def _middle(written: Callable[[float], str], of: Callable[[LayerReport], float | None]) -> _Text:
    """The median of what layers have."""
    return lambda group: written(median(figure for figure in map(of, group) if figure is not None))


def _rank(of: Callable[[LayerReport], Spectrum | None]) -> _Text:
    """The median of ranks; a lower bound where one of them is."""

    def text(group: _Group) -> str:
        found = [spectrum for spectrum in map(of, group) if spectrum is not None]
        if not found:
            return UNKNOWN
        middle = statistics.median_low([spectrum.rank for spectrum in found])
        return f"≥ {middle:,}" if any(map(is_bound, found)) else f"{middle:,}"

    return text


def _cosine(name: str, layer: LayerReport) -> float | None:
    return next((similarity.cosine for similarity in layer.similarities if similarity.adapter == name), None)
