"""Which layers share a series of the charts by depth, and where each stands on the horizontal axis."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .axes import Axis, extra_place, whole_axis
from .report import LayerReport

MOST_SERIES = 16
"""Beyond these, kinds that differ in a number alone (a mixture's experts, say) share a series, and the rarest do."""

DEEPEST = 9999
"""A larger number in a name counts things other than layers, and its layer has no depth here."""

_NO_DEPTH = "layers without a depth"


@dataclass(frozen=True)
class LayerSeries:
    """Layers in the order of their places `xs`; `is_line` where no two share a place."""

    name: str
    xs: tuple[float, ...]
    layers: tuple[LayerReport, ...]

    @property
    def is_line(self) -> bool:
        """Whether a line through them is one value for each place."""
        return len(set(self.xs)) == len(self.xs) and self.name != _NO_DEPTH


def series_by_kind(layers: Sequence[LayerReport]) -> tuple[Axis, tuple[LayerSeries, ...]]:
    """The horizontal axis and the series, in the order in which the layers name them. At least one layer."""
    depths = [layer.depth for layer in layers if _has_depth(layer) and layer.depth is not None]
    if not depths:
        axis = whole_axis("layer, in the adapter's order", len(layers) - 1)
        return axis, (LayerSeries("all layers", tuple(map(float, range(len(layers)))), tuple(layers)),)
    highest = max(depths)
    axis = whole_axis("depth in the model", highest, extra=None if len(depths) == len(layers) else "none")
    grouped: dict[str, list[tuple[float, LayerReport]]] = {}
    name = _naming(layers)
    for layer in layers:
        place = float(layer.depth) if _has_depth(layer) and layer.depth is not None else extra_place(highest)
        grouped.setdefault(name(layer), []).append((place, layer))
    found = []
    for group, placed in grouped.items():
        placed.sort(key=lambda pair: pair[0])
        found.append(LayerSeries(group, tuple(x for x, _ in placed), tuple(layer for _, layer in placed)))
    return axis, tuple(found)


def _naming(layers: Sequence[LayerReport]) -> Callable[[LayerReport], str]:
    """The first way to name series that leaves few enough of them."""
    with_depth = [layer for layer in layers if _has_depth(layer)]
    alike = Counter((layer.depth, layer.kind) for layer in with_depth).most_common(1)[0][1] > 1
    # An encoder and a decoder have layers of the same kind and depth; what stands before the depth tells them apart.
    full = _without_depth if alike else (lambda layer: layer.kind)
    for name in (full, lambda layer: _without_numbers(full(layer))):
        groups = Counter(map(name, with_depth))
        if len(groups) <= MOST_SERIES:
            break
    kept = {group for group, _ in groups.most_common(MOST_SERIES if len(groups) <= MOST_SERIES else MOST_SERIES - 1)}

    def naming(layer: LayerReport) -> str:
        if not _has_depth(layer):
            return _NO_DEPTH
        return name(layer) if name(layer) in kept else "other kinds"

    return naming


def _has_depth(layer: LayerReport) -> bool:
    return layer.depth is not None and layer.depth <= DEEPEST


def _without_depth(layer: LayerReport) -> str:
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", layer.name, count=1)


def _without_numbers(name: str) -> str:
    return re.sub(r"\d+", "*", name)
