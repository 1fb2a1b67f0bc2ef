"""Charts as inline SVG: points by series, and bars.

A plot is as wide as its place on the page and keeps its letters' size: positions are percentages of the plot's content
box, and ticks' texts stand in its padding. Lines need plain numbers, so they are drawn in a square that is stretched
without stretching their strokes. Colours and shapes are the style sheet's and `shapes`'s, by the series' style.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .axes import Axis
from .markup import Markup, element
from .numerals import tied

COLOURS = 8
"""Colours that the style sheet has for series, as classes c0 to c7."""

_SHAPES = (
    "M-3.2 0a3.2 3.2 0 1 0 6.4 0a3.2 3.2 0 1 0-6.4 0z",
    "M-2.9-2.9h5.8v5.8h-5.8z",
    "M0-3.9l3.7 6.5h-7.4z",
    "M0-4.1l4.1 4.1l-4.1 4.1l-4.1-4.1z",
    "M0 3.9l3.7-6.5h-7.4z",
    "M-1.2-3.8h2.4v2.6h2.6v2.4h-2.6v2.6h-2.4v-2.6h-2.6v-2.4h2.6z",
    "M-3.7-3.7h7.4l-2.9 3.7l2.9 3.7h-7.4l2.9-3.7z",
    "M-3.5-1.9l1.6-1.6l1.9 1.9l1.9-1.9l1.6 1.6l-1.9 1.9l1.9 1.9l-1.6 1.6l-1.9-1.9l-1.9 1.9l-1.6-1.6l1.9-1.9z",
)
"""Disc, square, triangle, diamond, triangle down, plus, hourglass, cross: outlines around the point."""

STYLES = COLOURS * len(_SHAPES)
"""Series that look different."""


@dataclass(frozen=True)
class Point:
    """A value on each axis and what a pointer over it shows; hollow where the true value may be above `y`."""

    x: float
    y: float
    text: str
    is_bound: bool = False


@dataclass(frozen=True)
class Series:
    """Points that look alike, joined by a line in their order where `is_line`."""

    name: str
    style: int
    points: tuple[Point, ...]
    is_line: bool = True


@dataclass(frozen=True)
class Reference:
    """A dashed line across the plot where the horizontal or the vertical axis has `value`."""

    name: str
    value: float
    is_horizontal: bool


@dataclass(frozen=True)
class Bar:
    """A bar from `low` to `high` on the horizontal axis."""

    low: float
    high: float
    height: float
    text: str


def shapes() -> Markup:
    """The outlines that every chart of the page refers to; to be put on the page once."""
    outlines = [element("path", id=f"m{index}", d=outline) for index, outline in enumerate(_SHAPES)]
    return element("svg", element("defs", *outlines), class_="shapes", width=0, height=0, aria_hidden="true")


def scatter(
    title: str,
    explanation: str,
    axes: tuple[Axis, Axis],
    series: Sequence[Series],
    references: Sequence[Reference] = (),
) -> Markup:
    """A figure with those points that are numbers, and a legend. `axes` are the horizontal and the vertical."""
    drawn = [element("g", *_drawn(one, axes), class_=f"series {_colour(one.style)}") for one in series]
    count = sum(len(_numbers(one)) for one in series)
    label = f"{title}. Horizontally {axes[0].label}, vertically {axes[1].label}; {count:,} points."
    keys = [_key(one.name, element("use", href=f"#{_shape(one.style)}"), f"key {_colour(one.style)}") for one in series]
    keys += [_key(line.name, element("path", d="M-8 0h16"), "key reference") for line in references]
    lines = [_reference(line, axes) for line in references]
    return _figure(title, explanation, _plot(label, axes, [*drawn, *lines]), keys)


def bars(
    title: str, explanation: str, axes: tuple[Axis, Axis], heights: Sequence[Bar], references: Sequence[Reference] = ()
) -> Markup:
    """A figure with bars from the bottom, and a legend of the references."""
    drawn = [
        element(
            "rect",
            element("title", bar.text),
            x=_percent(axes[0].place(bar.low)),
            y=_percent(1 - axes[1].place(bar.height)),
            width=_percent(axes[0].place(bar.high) - axes[0].place(bar.low)),
            height=_percent(axes[1].place(bar.height)),
            class_="bar",
        )
        for bar in heights
    ]
    label = f"{title}. Horizontally {axes[0].label}, vertically {axes[1].label}; {len(heights):,} bars."
    keys = [_key(line.name, element("path", d="M-8 0h16"), "key reference") for line in references]
    return _figure(
        title, explanation, _plot(label, axes, [*drawn, *(_reference(line, axes) for line in references)]), keys
    )


def _figure(title: str, explanation: str, plot: Markup, keys: Sequence[Markup]) -> Markup:
    legend = [element("ul", *keys, class_="legend", aria_label="Legend")] if keys else []
    return element(
        "figure", element("figcaption", element("h3", title), element("p", tied(explanation))), *legend, plot
    )


def _plot(label: str, axes: tuple[Axis, Axis], marks: Sequence[Markup]) -> Markup:
    horizontal, vertical = axes
    grid = [element("line", x1="0", x2="100%", y1=_percent(1 - at), y2=_percent(1 - at)) for at, _ in vertical.ticks]
    y_texts = [element("text", text, x="-8", y=_percent(1 - at), dy="0.35em") for at, text in vertical.ticks]
    x_texts = [element("text", text, x=_percent(at), y="100%", dy="1.75em") for at, text in horizontal.ticks]
    x_ticks = [element("line", x1=_percent(at), x2=_percent(at), y1="100%", y2="98%") for at, _ in horizontal.ticks]
    return element(
        "svg",
        element("g", *grid, class_="grid"),
        element("g", *x_ticks, class_="grid"),
        element("g", *y_texts, class_="ticks vertical"),
        element("g", *x_texts, class_="ticks horizontal"),
        element("text", vertical.label, class_="axis vertical", x="-46", y="-16"),
        element("text", horizontal.label, class_="axis horizontal", x="100%", y="100%", dy="3.3em"),
        *marks,
        class_="plot",
        role="img",
        aria_label=label,
    )


def _drawn(series: Series, axes: tuple[Axis, Axis]) -> Iterator[Markup]:
    """The line, then the points over it."""
    known = _numbers(series)
    places = [(axes[0].place(point.x), 1 - axes[1].place(point.y)) for point in known]
    if series.is_line and len(places) > 1:
        steps = " ".join(f"{1000 * x:.0f},{1000 * y:.0f}" for x, y in places)
        yield element(
            "svg",
            element("polyline", points=steps),
            viewBox="0 0 1000 1000",
            preserveAspectRatio="none",
            width="100%",
            height="100%",
        )
    for point, (x, y) in zip(known, places, strict=True):
        title, style = element("title", point.text), "bound" if point.is_bound else None
        yield element("use", title, href=f"#{_shape(series.style)}", x=_percent(x), y=_percent(y), class_=style)


def _numbers(series: Series) -> list[Point]:
    return [point for point in series.points if math.isfinite(point.x) and math.isfinite(point.y)]


def _reference(line: Reference, axes: tuple[Axis, Axis]) -> Markup:
    title = element("title", line.name)
    if line.is_horizontal:
        at = _percent(1 - axes[1].place(line.value))
        return element("line", title, class_="reference", x1="0", x2="100%", y1=at, y2=at)
    at = _percent(axes[0].place(line.value))
    return element("line", title, class_="reference", x1=at, x2=at, y1="0", y2="100%")


def _key(name: str, mark: Markup, classes: str) -> Markup:
    return element(
        "li", element("svg", mark, class_=classes, viewBox="-9 -6 18 12", aria_hidden="true"), element("bdi", name)
    )


def _colour(style: int) -> str:
    return f"c{style % COLOURS}"


def _shape(style: int) -> str:
    """The first colours come with a shape each; every further round pairs them anew."""
    return f"m{(style + style // COLOURS) % len(_SHAPES)}"


def _percent(place: float) -> str:
    return f"{100 * place:.2f}".rstrip("0").rstrip(".") + "%"
