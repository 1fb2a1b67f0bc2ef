"""The page's table: every layer with every figure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

from .markup import Markup, breakable, element, joined
from .numerals import UNKNOWN, number, percentage, rank
from .report import AdapterReport, LayerReport, Similarity, Spectrum


@dataclass(frozen=True)
class Column:
    """A figure of a layer: the group's and the column's heading, and what stands in the cell."""

    group: str
    heading: str
    cell: Callable[[LayerReport], str]


def columns(report: AdapterReport) -> list[Column]:
    """Every figure that some layer has."""
    layers = report.layers
    found = [
        Column("Adapter", "shape", lambda layer: f"{layer.shape[0]:,} × {layer.shape[1]:,}"),
        Column("Adapter", "r1", lambda layer: f"{layer.r1:,}"),
        Column("Adapter", "r2", lambda layer: f"{layer.r2:,}"),
        Column("Adapter", "α", lambda layer: f"{layer.alpha:g}"),
        Column("Adapter", "scale s", lambda layer: number(layer.scale)),
        Column("Adapter", "parameters", lambda layer: f"{layer.parameters:,}"),
        Column("Signs", "frozen, %", lambda layer: percentage(layer.frozen, 2)),
        Column("Signs", "negative, %", lambda layer: percentage(layer.negative, 2)),
        Column("Update ΔW", "‖ΔW‖", lambda layer: number(layer.norm)),
        Column("Update ΔW", "rms", lambda layer: number(layer.magnitudes.rms)),
        Column("Update ΔW", "largest", lambda layer: number(layer.magnitudes.largest)),
    ]
    if any(layer.base for layer in layers):
        found += [
            Column("Beside W0", "dtype", lambda layer: layer.base.dtype if layer.base else UNKNOWN),
            Column(
                "Beside W0",
                "‖ΔW‖ / ‖W0‖",
                lambda layer: number(layer.base.relative_norm) if layer.base else UNKNOWN,
            ),
            Column(
                "Beside W0",
                "rounded away, %",
                lambda layer: percentage(layer.base.rounded_away, 2) if layer.base else UNKNOWN,
            ),
        ]
    if any(layer.update for layer in layers):
        found += _spectrum("Spectrum of ΔW", lambda layer: layer.update)
    if any(layer.magnitude for layer in layers):
        found += _spectrum("Spectrum of ReLU(BA)", lambda layer: layer.magnitude)
    if any(layer.direction for layer in layers):
        found += _spectrum("Spectrum of Sign(DC)", lambda layer: layer.direction)
    for adapter in report.compared:
        found += _similarity(adapter)
    return found


def layer_table(report: AdapterReport, label: str) -> Markup:
    """The table, in a region that scrolls by itself; `label` is the id of the heading above."""
    found = columns(report)
    groups = [
        element("th", group, scope="colgroup", colspan=len(list(members)))
        for group, members in groupby(found, key=lambda column: column.group)
    ]
    headings = [element("th", column.heading, scope="col") for column in found]
    rows = [
        element(
            "tr",
            element("th", breakable(layer.name), scope="row"),
            *(element("td", column.cell(layer)) for column in found),
        )
        for layer in report.layers
    ]
    head = element(
        "thead",
        element("tr", element("th", "Layer", scope="col", rowspan=2), *groups),
        element("tr", *headings),
    )
    table = element("table", head, element("tbody", *rows), aria_labelledby=label)
    return element("div", table, class_="scroll", role="region", aria_labelledby=label, tabindex=0)


def _spectrum(group: str, spectrum: Callable[[LayerReport], Spectrum | None]) -> Sequence[Column]:
    def cell(text: Callable[[Spectrum], str]) -> Callable[[LayerReport], str]:
        return lambda layer: UNKNOWN if (found := spectrum(layer)) is None else text(found)

    return (
        Column(group, "rank", cell(rank)),
        Column(group, "of", cell(lambda found: f"{found.largest_rank:,}")),
        Column(group, "stable rank", cell(lambda found: number(found.stable_rank))),
        Column(group, "in r1 + r2, %", cell(lambda found: percentage(found.energy, 2))),
    )


def _similarity(adapter: str) -> Sequence[Column]:
    group = joined("Beside ", element("bdi", adapter))

    def cell(text: Callable[[Similarity], str]) -> Callable[[LayerReport], str]:
        def of_layer(layer: LayerReport) -> str:
            found = next((similarity for similarity in layer.similarities if similarity.adapter == adapter), None)
            return UNKNOWN if found is None else text(found)

        return of_layer

    return (
        Column(group, "cosine", cell(lambda found: number(found.cosine))),
        Column(group, "equal signs, %", cell(lambda found: percentage(found.equal_signs, 2))),
        Column(group, "both active, %", cell(lambda found: percentage(found.both_active, 2))),
    )
