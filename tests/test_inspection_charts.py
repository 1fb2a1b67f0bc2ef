"""What the page's charts are made of: series, axes, numbers in words, markup, colours."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from importlib.resources import files

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dual_lora_kernels.inspection import charts, layer_series
from dual_lora_kernels.inspection.axes import linear_axis, logarithmic_axis, whole_axis
from dual_lora_kernels.inspection.layer_series import series_by_kind
from dual_lora_kernels.inspection.markup import element, escaped
from dual_lora_kernels.inspection.numerals import UNKNOWN, number, percentage, rank, several, size, tied
from dual_lora_kernels.inspection.report import LayerReport, Spectrum

from .reports import llama_report


def layer(name: str, depth: int | None, kind: str) -> LayerReport:
    """A layer by its name."""
    return dataclasses.replace(llama_report(1).layers[0], name=name, depth=depth, kind=kind)


def test_layers_of_an_encoder_and_a_decoder_have_series_of_their_own() -> None:
    layers = [layer(f"{side}.layers.{index}.fc1", index, "fc1") for side in ("encoder", "decoder") for index in (1, 0)]
    _, series = series_by_kind(layers)
    assert [(one.name, one.xs, one.is_line) for one in series] == [
        ("encoder.layers.*.fc1", (0.0, 1.0), True),
        ("decoder.layers.*.fc1", (0.0, 1.0), True),
    ]


def test_experts_share_a_series_and_the_rarest_kinds_do() -> None:
    experts = [layer(f"layers.0.experts.{index}.up", 0, f"experts.{index}.up") for index in range(40)]
    _, series = series_by_kind(experts)
    assert [(one.name, len(one.layers), one.is_line) for one in series] == [("experts.*.up", 40, False)]
    letters = [layer(f"layers.0.{letter}", 0, letter) for letter in "abcdefghijklmnopqrstuvwxyz"]
    _, series = series_by_kind(letters)
    assert len(series) == layer_series.MOST_SERIES
    assert series[-1].name == "other kinds"
    assert sum(len(one.layers) for one in series) == 26


def test_layers_without_a_depth_stand_apart_or_in_their_order() -> None:
    axis, series = series_by_kind([layer("layers.3.a", 3, "a"), layer("head", None, "head")])
    assert [one.name for one in series] == ["a", "layers without a depth"]
    assert axis.ticks[-1][1] == "none"
    assert axis.place(series[1].xs[0]) == axis.ticks[-1][0]
    axis, series = series_by_kind([layer("head", None, "head"), layer("tail", None, "tail")])
    assert [(one.name, one.xs) for one in series] == [("all layers", (0.0, 1.0))]


@given(st.lists(st.floats(0, 100), min_size=1, max_size=5), st.sampled_from([0.1, 1.0, 100.0]))
@example([50.0, 50.0], 1.0)
@example([99.99, 100.0], 1.0)
def test_linear_axes_hold_their_values_in_few_ticks(values: list[float], least: float) -> None:
    axis = linear_axis("", values, least, limits=(0.0, 100.0))
    assert axis.low <= min(values) + 1e-9
    assert axis.high >= max(values) - 1e-9
    assert axis.low >= 0
    assert axis.high <= 100
    assert axis.high - axis.low >= least * (1 - 1e-9)
    assert_readable(axis.ticks, 6)
    for place, text in axis.ticks:
        assert axis.place(float(text)) == pytest.approx(place, abs=1e-6)


@given(st.lists(st.floats(0, 1e308), min_size=1, max_size=5))
@example([5e-324, 1.7e308, 0.0])
@example([0.0])
@example([0.5])
def test_logarithmic_axes_hold_their_values_in_few_ticks(values: list[float]) -> None:
    axis = logarithmic_axis("", values)
    places = [axis.place(value) for value in sorted(values)]
    assert places == sorted(places)
    assert all(-1e-9 <= place <= 1 + 1e-9 for place in places)
    assert (0 in values) == ((0.0, "0") in axis.ticks)
    assert_readable(axis.ticks, 9)


@given(st.integers(0, layer_series.DEEPEST), st.sampled_from([None, "none"]))
def test_axes_of_depths_have_few_ticks(highest: int, extra: str | None) -> None:
    axis = whole_axis("", highest, extra)
    assert_readable(axis.ticks, 4)
    assert 0 < axis.place(0) <= axis.place(highest) < 1
    assert (axis.ticks[-1][1] == "none") == (extra is not None)


def assert_readable(ticks: tuple[tuple[float, str], ...], letters: int) -> None:
    """At most nine, apart, in order, in different words of at most so many letters."""
    assert 1 <= len(ticks) <= 9
    places = [place for place, _ in ticks]
    assert all(-1e-9 <= place <= 1 + 1e-9 for place in places)
    assert all(later - earlier > 0.05 for earlier, later in itertools.pairwise(places))
    assert len({text for _, text in ticks}) == len(ticks)
    assert all(len(text) <= letters for _, text in ticks)


@given(st.floats(0, 1), st.integers(0, 3))
def test_percentages_say_none_and_all_only_where_it_is_so(share: float, decimals: int) -> None:
    text = percentage(share, decimals)
    assert (float(text.lstrip("<>")) == 0) == (share == 0)
    assert (text == f"{100:.{decimals}f}") == (share == 1)
    assert float(text.lstrip("<>")) == pytest.approx(100 * share, abs=10**-decimals)


@given(st.floats(-1e300, 1e300))
def test_numbers_have_three_digits(value: float) -> None:
    text = number(value).replace("−", "-").replace(",", "")
    mantissa, _, power = text.partition(" × 10")
    exponent = int(power.translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")) or 0)
    assert float(f"{mantissa}e{exponent}") == pytest.approx(value, rel=0.00501)
    assert len(text) <= 14


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("have P ≤ 0: no", "have P~≤~0: no"),
        ("ΔW = s · P ⊙ Q, and", "ΔW~=~s~·~P~⊙~Q, and"),
        ("5 % to 6 %", "5~% to 6~%"),
    ],
)
def test_formulas_are_not_parted(text: str, shown: str) -> None:
    assert tied(text).replace("\N{NO-BREAK SPACE}", "~") == shown


def test_words_of_numbers() -> None:
    assert [number(value) for value in (0.0, 9.999, 0.00012345, 1234567.0, math.nan, math.inf)] == [
        *("0", "10.0", "0.000123", "1.23 × 10⁶", UNKNOWN, "∞")
    ]
    assert [size(count) for count in (0, 999, 1000, 999_900, 160_400_000)] == [
        "0 bytes",
        "999 bytes",
        "1 kB",
        "1 MB",
        "160 MB",
    ]
    assert percentage(math.nan) == UNKNOWN
    assert [several(count, "layer") for count in (1, 2000)] == ["1 layer", "2,000 layers"]


@pytest.mark.parametrize(("found", "is_exact", "text"), [(7, True, "7"), (7, False, "≥ 7"), (9, False, "9")])
def test_a_rank_is_a_bound_unless_it_is_the_largest(found: int, is_exact: bool, text: str) -> None:
    assert rank(Spectrum(found, is_exact, 9, 1.0, 1.0, (), ())) == text


def test_markup_is_escaped_once() -> None:
    assert escaped(escaped("<")) == "&lt;"
    assert element("p", "<", element("wbr"), class_="'\"") == '<p class="&#x27;&quot;">&lt;<wbr></p>'


def linear_rgb(colour: str) -> list[float]:
    """ "#rrggbb" in amounts of light."""
    parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    return [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]


def luminance(colour: str) -> float:
    """WCAG's relative luminance."""
    return float(np.dot([0.2126, 0.7152, 0.0722], linear_rgb(colour)))


def contrast(first: str, second: str) -> float:
    """WCAG's contrast of two colours."""
    darker, lighter = sorted((luminance(first), luminance(second)))
    return (lighter + 0.05) / (darker + 0.05)


@pytest.fixture(params=[0, 1], ids=["light", "dark"])
def colours(request: pytest.FixtureRequest) -> dict[str, str]:
    """The style sheet's colours by name, of each scheme."""
    style = files("dual_lora_kernels.inspection").joinpath("page.css").read_text(encoding="utf-8")
    schemes = re.findall(r":root \{([^}]*--paper[^}]*)\}", style)
    assert len(schemes) == 2
    return dict(re.findall(r"--(\w+): (#\w{6})", schemes[request.param]))


SERIES = [f"c{index}" for index in range(charts.COLOURS)]


def test_colours_have_contrast(colours: dict[str, str]) -> None:
    """WCAG's AA: 4.5 for text, 3 for what a chart is made of."""
    for text in ("ink", "muted", "accent"):
        assert min(contrast(colours[text], colours[ground]) for ground in ("paper", "raised")) >= 4.5
    for mark in (*SERIES, "bar"):
        assert contrast(colours[mark], colours["paper"]) >= 3, mark
    assert contrast(colours["ink"], colours["bar"]) >= 3  # the rms line over bars


VISION = {
    "all cones": np.eye(3),
    "protanopia": np.array([[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]]),
    "deuteranopia": np.array([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]]),
    "tritanopia": np.array([[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]]),
}
"""What linear RGB looks like without one kind of cone (Machado, Oliveira and Fernandes 2009, severity 1)."""

OKLAB = (
    np.array([[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.6300]]),
    np.array([[0.2105, 0.7936, -0.0041], [1.9780, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]]),
)


@pytest.mark.parametrize("vision", VISION)
def test_series_differ_in_colour_whoever_looks(vision: str, colours: dict[str, str]) -> None:
    """0.02 in OKLab is a difference that is just seen; Okabe and Ito's palette has 0.08 between its closest two."""
    linear = [np.clip(VISION[vision] @ np.array(linear_rgb(colours[name])), 0, 1) for name in SERIES]
    seen = [OKLAB[1] @ np.cbrt(OKLAB[0] @ colour) for colour in linear]
    assert min(float(np.linalg.norm(a - b)) for a, b in itertools.combinations(seen, 2)) >= 0.09


def test_series_differ_in_shape_and_colour() -> None:
    looks = [(charts._colour(style), charts._shape(style)) for style in range(charts.STYLES)]
    assert len(set(looks)) == charts.STYLES
    assert len({shape for _, shape in looks[: charts.COLOURS]}) == charts.COLOURS
