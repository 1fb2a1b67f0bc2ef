"""The page's charts: which figures of the layers they show, on which axes, beside which bound."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from .axes import Axis, linear_axis, logarithmic_axis
from .charts import Bar, Point, Reference, Series, bars, scatter
from .layer_series import series_by_kind
from .markup import Markup
from .numerals import is_bound, number, percentage, power_of, rank
from .report import AdapterReport, AgainstBase, LayerReport, Similarity, Spectrum

_UNSEEN = 0.005
"""Share of the smallest updates that the distribution leaves out: near P = 0 every halving has its own tiny bar."""


P = TypeVar("P")
"""The part of a report that a figure comes from."""


@dataclass(frozen=True)
class _Measure(Generic[P]):
    """A figure of a part of a layer's report, None where the layer lacks it; `text` says the figure in words."""

    title: str
    explanation: str
    axis: Callable[[Sequence[float]], Axis]
    part: Callable[[LayerReport], P | None]
    value: Callable[[P], float]
    text: Callable[[P], str]
    is_bound: Callable[[P], bool] = lambda _: False


def sizes(report: AdapterReport) -> list[Markup]:
    """How large updates are, beside W0 where a base is known, and their distribution."""
    bases = [layer.base for layer in report.layers if layer.base]
    dtypes = " and ".join(sorted({base.dtype for base in bases}))
    relative = _Measure(
        "Size beside the base weight",
        "‖ΔW‖ / ‖W0‖ of each layer, in Frobenius norms.",
        lambda values: logarithmic_axis("‖ΔW‖ / ‖W0‖", values),
        _base,
        lambda base: base.relative_norm,
        lambda base: number(base.relative_norm),
    )
    rounded = _share(
        "Lost by rounding to nearest",
        f"Non-zero updates below half a step of W0 in {dtypes}: rounding W0 + ΔW to nearest would give W0 again.",
        "% of non-zero updates",
        _base,
        lambda base: base.rounded_away,
        always=(0.0,),
    )
    norm = _Measure(
        "Size of the update",
        "‖ΔW‖ of each layer, in the Frobenius norm.",
        lambda values: logarithmic_axis("‖ΔW‖", values),
        _whole,
        lambda layer: layer.norm,
        lambda layer: number(layer.norm),
    )
    measures: list[_Measure[Any]] = [relative, rounded] if bases else [norm]
    return [*_by_depth(report.layers, measures), *_distribution(report.layers)]


def signs(report: AdapterReport) -> list[Markup]:
    """The shares of frozen entries and of negative signs."""
    frozen = _share(
        "Frozen entries",
        "Entries with P ≤ 0. Their update is zero, and so are their gradients.",
        "% of all entries",
        _whole,
        lambda layer: layer.frozen,
    )
    negative = _share(
        "Negative signs",
        "Entries whose Sign(DC) is −1: an update there lowers the weight.",
        "% of all entries",
        _whole,
        lambda layer: layer.negative,
        always=(50.0,),
    )
    even = Reference("as many down as up: 50 %", 50.0, is_horizontal=True)
    return [*_by_depth(report.layers, [frozen]), *_by_depth(report.layers, [negative], [even])]


def ranks(report: AdapterReport) -> list[Markup]:
    """Ranks of ΔW, ReLU(BA) and Sign(DC), the stable rank and the energy of ΔW, and singular values of some layers."""
    with_spectra = [layer for layer in report.layers if layer.update or layer.magnitude or layer.direction]
    if not with_spectra:
        return []
    shares = [min(1.0, (layer.r1 + layer.r2) / min(layer.shape)) for layer in with_spectra]
    largest_sum = max(layer.r1 + layer.r2 for layer in with_spectra)
    rank_shares = [
        _rank("Rank of the update ΔW", report.layers, lambda layer: layer.update),
        _rank("Rank of the magnitude ReLU(BA)", report.layers, lambda layer: layer.magnitude),
        _rank("Rank of the direction Sign(DC)", report.layers, lambda layer: layer.direction),
    ]
    stable = _Measure(
        "Stable rank of the update ΔW",
        "‖ΔW‖² / σ₁²: over how many directions the update is spread, weighed by their strength.",
        lambda values: logarithmic_axis("stable rank", [*values, largest_sum]),
        lambda layer: layer.update,
        lambda update: update.stable_rank,
        lambda update: number(update.stable_rank),
    )
    energy = _share(
        "What LoRA could hold of the update ΔW",
        "Share of ‖ΔW‖² in the largest r1 + r2 singular values, the best that LoRA of as many parameters could do.",
        "% of ‖ΔW‖²",
        lambda layer: layer.update,
        lambda update: update.energy,
        always=(0.0, 100.0),
    )
    bound = _lora_bound(100 * max(shares), f"{percentage(max(shares))} %")
    return [
        *_by_depth(report.layers, rank_shares, [bound]),
        *_by_depth(report.layers, [stable], [_lora_bound(largest_sum, f"{largest_sum:,}")]),
        *_by_depth(report.layers, [energy]),
        *_singular_values(report.layers),
    ]


def similarities(report: AdapterReport, adapter: str) -> list[Markup]:
    """How alike this adapter and the other are."""

    def beside(layer: LayerReport) -> Similarity | None:
        return next((found for found in layer.similarities if found.adapter == adapter), None)

    cosine = _Measure(
        "Cosine",
        "⟨ΔW, ΔW′⟩ / (‖ΔW‖ ‖ΔW′‖): 1 is the same direction, 0 is none in common.",
        lambda values: linear_axis("cosine", values, least_span=0.1, limits=(-1.0, 1.0)),
        beside,
        lambda found: found.cosine,
        lambda found: number(found.cosine),
    )
    equal = _share(
        "Equal signs",
        "Entries whose Sign(DC) is the same in both; of unrelated signs, half are.",
        "% of all entries",
        beside,
        lambda found: found.equal_signs,
    )
    active = _share(
        "Active in both",
        "Entries with P > 0 in both adapters.",
        "% of all entries",
        beside,
        lambda found: found.both_active,
    )
    return list(_by_depth(report.layers, [cosine, equal, active]))


def _by_depth(
    layers: Sequence[LayerReport], measures: Sequence[_Measure[Any]], references: Sequence[Reference] = ()
) -> Iterator[Markup]:
    """A chart for each measure that some layer has."""
    horizontal, groups = series_by_kind(layers)
    for measure in measures:
        series = []
        for style, group in enumerate(groups):
            points = tuple(
                Point(x, measure.value(part), f"{layer.name}: {measure.text(part)}", measure.is_bound(part))
                for x, layer in zip(group.xs, group.layers, strict=True)
                if (part := measure.part(layer)) is not None
            )
            if points:
                series.append(Series(group.name, style, points, group.is_line))
        if series:
            vertical = measure.axis([point.y for one in series for point in one.points])
            yield scatter(measure.title, measure.explanation, (horizontal, vertical), series, references)


def _share(
    title: str,
    explanation: str,
    label: str,
    part: Callable[[LayerReport], P | None],
    share: Callable[[P], float],
    always: Sequence[float] = (),
) -> _Measure[P]:
    """A measure in percents, whose axis also shows the percents `always`."""
    return _Measure(
        title,
        explanation,
        lambda values: linear_axis(label, [*values, *always], least_span=1.0, limits=(0.0, 100.0)),
        part,
        lambda found: 100 * share(found),
        lambda found: f"{percentage(share(found), 2)} %",
    )


def _rank(
    title: str, layers: Sequence[LayerReport], part: Callable[[LayerReport], Spectrum | None]
) -> _Measure[Spectrum]:
    explanation = "Numerical rank beside the largest that the layer's shape allows."
    if any(is_bound(found) for found in map(part, layers) if found):
        explanation += " A hollow point, ≥ in the table, is a lower bound."
    return _Measure(
        title,
        explanation,
        lambda values: linear_axis("% of the largest possible", [*values, 0.0, 100.0], least_span=100.0),
        part,
        lambda found: 100 * found.rank / found.largest_rank,
        lambda found: f"{rank(found)} of {found.largest_rank:,}",
        is_bound,
    )


def _whole(layer: LayerReport) -> LayerReport:
    return layer


def _base(layer: LayerReport) -> AgainstBase | None:
    return layer.base


def _lora_bound(value: float, text: str, is_horizontal: bool = True) -> Reference:
    return Reference(f"LoRA of as many parameters: at most {text}", value, is_horizontal)


def _distribution(layers: Sequence[LayerReport]) -> Iterator[Markup]:
    """|ΔW| over all layers, by powers of two; nothing where every update is zero."""
    counts: Counter[int] = Counter()
    for layer in layers:
        for index, count in enumerate(layer.magnitudes.counts):
            counts[layer.magnitudes.first_exponent + index] += count
    total = counts.total()
    if not total:
        return
    unseen, left_out = 0, set()
    for exponent in sorted(counts):
        if unseen + counts[exponent] > _UNSEEN * total:
            break
        unseen += counts[exponent]
        left_out.add(exponent)
    heights = [
        Bar(
            exponent,
            exponent + 1,
            100 * count / total,
            f"{power_of(2, exponent)} to {power_of(2, exponent + 1)}: {percentage(count / total, 2)} %",
        )
        for exponent, count in sorted(counts.items())
        if count and exponent not in left_out
    ]
    entries = sum(math.prod(layer.shape) for layer in layers)
    rms = math.sqrt(
        sum(math.prod(layer.shape) * layer.magnitudes.rms * layer.magnitudes.rms for layer in layers) / entries
    )
    explanation = f"Non-zero updates of all layers, {percentage(total / entries)} % of the entries."
    if left_out:
        explanation += f" The smallest {percentage(unseen / total, 2)} % of them are not drawn."
    references = []
    horizontal = _binary_axis(min(bar.low for bar in heights), max(bar.high for bar in heights), rms)
    if 0 < rms < math.inf:
        references = [Reference(f"rms over all entries: {number(rms)}", math.log2(rms), is_horizontal=False)]
    vertical = linear_axis("% of non-zero updates", [0.0, *(bar.height for bar in heights)], least_span=1.0)
    yield bars("Distribution of |ΔW|", explanation, (horizontal, vertical), heights, references)


def _binary_axis(low: float, high: float, rms: float) -> Axis:
    """An axis of exponents of two, with a whole number of them from tick to tick."""
    if 0 < rms < math.inf:
        low, high = min(low, math.floor(math.log2(rms))), max(high, math.ceil(math.log2(rms)))
    stride = math.ceil((high - low) / 6)
    ticks = [
        ((at - low) / (high - low), f"{at:.0f}".replace("-", "−")) for at in range(int(low), int(high) + 1, stride)
    ]
    return Axis("log₂ |ΔW|", low, high, tuple(ticks))


def _singular_values(layers: Sequence[LayerReport]) -> Iterator[Markup]:
    """Curves of the layers whose ΔW has the smallest, the middle and the largest share of its possible rank."""
    found = [(layer, layer.update) for layer in layers if layer.update and layer.update.positions]
    if not found:
        return
    found.sort(key=lambda pair: pair[1].rank / pair[1].largest_rank)
    places = {"largest": len(found) - 1, "median": len(found) // 2, "smallest": 0}
    shown = {index: name for name, index in places.items()} if len(found) > 1 else {0: "the only layer"}
    series = [
        Series(
            f"{found[index][0].name} ({name})",
            style,
            tuple(
                Point(position, value, f"{found[index][0].name}: σ{position:,} / σ1 = {number(value)}")
                for position, value in zip(found[index][1].positions, found[index][1].values, strict=True)
            ),
        )
        for style, (index, name) in enumerate(shown.items())
    ]
    points = [point for one in series for point in one.points]
    largest_sum = max(found[index][0].r1 + found[index][0].r2 for index in shown)
    yield scatter(
        "Singular values of the update ΔW",
        "In falling order, of the layers whose rank is the largest, the median and the smallest share of the possible.",
        (
            logarithmic_axis("place among the singular values", [*(point.x for point in points), largest_sum]),
            logarithmic_axis("share of σ₁", [point.y for point in points]),
        ),
        series,
        [_lora_bound(largest_sum, f"{largest_sum:,}", is_horizontal=False)],
    )
