"""The page of an inspected adapter: what stands on it, whatever a report holds, and that it loads and runs nothing."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import itertools
import os
import re
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given

from dual_lora_kernels.inspection.numerals import UNKNOWN, number, percentage, rank
from dual_lora_kernels.inspection.page import render_page
from dual_lora_kernels.inspection.report import AdapterReport, LayerReport, Magnitudes, Spectrum

from .reports import HOSTILE, LLAMA, adapter_reports, llama_report

ROOT = Path(__file__).parents[1]
ELEMENTS = {
    *("html", "head", "meta", "title", "style", "body", "header", "main", "section", "footer", "div"),
    *("h1", "h2", "h3", "p", "ul", "li", "dl", "dt", "dd", "bdi", "wbr", "figure", "figcaption"),
    *("table", "thead", "tbody", "tr", "th", "td"),
    *("svg", "defs", "g", "path", "line", "polyline", "rect", "text", "use"),
}
FULL = llama_report(2, compared=("other",))
SPECTRA = ("update", "magnitude", "direction")


def parsed(page: str) -> ElementTree.Element:
    """The page read as XML, which forgives nothing; elements without an end are closed for that."""
    start = "<!DOCTYPE html>\n"
    assert page.startswith(start)
    return ElementTree.fromstring(re.sub(r"<((?:meta|wbr)\b[^>]*)>", r"<\1/>", page.removeprefix(start)))


def words(found: ElementTree.Element | None) -> str:
    """An element's text, whatever its spaces do to lines."""
    assert found is not None
    return "".join(found.itertext()).replace("\N{NO-BREAK SPACE}", " ")


def plots(page: ElementTree.Element) -> dict[str, ElementTree.Element]:
    """Each chart by its title."""
    return {words(figure.find("figcaption/h3")): figure for figure in page.iter("figure")}


def points(figure: ElementTree.Element) -> list[str]:
    """What a pointer over each of a chart's points shows."""
    return [words(point) for point in figure.findall("svg/g/use")]


def visible(name: str) -> str:
    """A name as a page shows it: what is neither printable nor a kind of space is replaced."""
    kept = (letter.isprintable() or unicodedata.category(letter).startswith("Z") for letter in name)
    shown = "".join(letter if keep else "\ufffd" for letter, keep in zip(name, kept, strict=True))
    return shown.replace("\N{NO-BREAK SPACE}", " ")


@given(adapter_reports())
def test_any_report_gives_a_page_that_loads_and_runs_nothing(report: AdapterReport) -> None:
    page = parsed(render_page(report))
    assert {found.tag for found in page.iter()} <= ELEMENTS
    identifiers = [found.get("id") for found in page.iter() if found.get("id") is not None]
    assert len(identifiers) == len(set(identifiers))
    for found in page.iter():
        for name, value in found.items():
            assert not name.startswith("on")
            assert name not in ("src", "style", "srcset")
            assert name != "href" or value.removeprefix("#") in identifiers
            assert name != "aria-labelledby" or value in identifiers
    style = words(page.find("head/style"))
    assert "url(" not in style
    assert "@import" not in style


@given(adapter_reports())
def test_headings_are_in_order_and_paragraphs_hold_phrases(report: AdapterReport) -> None:
    page = parsed(render_page(report))
    levels = [int(found.tag[1]) for found in page.iter() if found.tag in ("h1", "h2", "h3")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(later - earlier <= 1 for earlier, later in itertools.pairwise(levels))
    assert {child.tag for found in page.iter("p") for child in found.iter()} <= {"p", "bdi", "wbr"}


@given(adapter_reports())
def test_every_chart_is_described_and_nothing_lies_outside_it(report: AdapterReport) -> None:
    for title, figure in plots(parsed(render_page(report))).items():
        plot = figure.find("svg")
        assert plot is not None
        assert plot.get("role") == "img"
        assert (plot.get("aria-label") or "").startswith(title)
        for mark in plot.iter():
            for name in ("x", "y", "x1", "x2", "y1", "y2", "width", "height"):
                value = mark.get(name, "0%")
                assert not value.endswith("%") or 0 <= float(value[:-1]) <= 100, (title, mark.attrib)


@given(adapter_reports())
def test_the_table_has_every_layer(report: AdapterReport) -> None:
    page = parsed(render_page(report))
    names = [words(row.find("th")) for row in page.iterfind(".//tbody/tr")]
    assert names == [visible(layer.name) for layer in report.layers]
    assert words(page.find(".//h1")) == visible(report.adapter)
    widths = {len(row.findall("td")) for row in page.iterfind(".//tbody/tr")}
    spans = sum(int(group.get("colspan", 0)) for group in page.iterfind(".//thead/tr/th"))
    assert widths in (set(), {spans})


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_stay_text_wherever_names_stand(name: str) -> None:
    layer = dataclasses.replace(FULL.layers[0], name=f"layers.0.{name}", kind=name)
    beside = dataclasses.replace(layer.similarities[0], adapter=name)
    assert layer.base is not None
    layer = dataclasses.replace(layer, similarities=(beside,), base=dataclasses.replace(layer.base, dtype=name))
    report = AdapterReport(name, name, (name,), 1, (layer,), (name,), name, name)
    page = parsed(render_page(report))
    assert {found.tag for found in page.iter()} <= ELEMENTS
    shown = visible(name)
    assert words(page.find("head/title")).startswith(shown)
    terms = dict(zip(map(words, page.iter("dt")), map(words, page.iter("dd")), strict=True))
    assert [terms[term] for term in ("Base model", "Saved whole", "Compared with")] == [shown] * 3
    assert f"Beside {shown}" in map(words, page.iter("h2"))
    assert f"layers.0.{shown}: " in points(plots(page)["Frozen entries"])[0]


def test_the_policy_allows_the_style_sheet_alone() -> None:
    page = parsed(render_page(FULL))
    policy = page.find("head/meta[@http-equiv='Content-Security-Policy']")
    digest = base64.b64encode(hashlib.sha256(words(page.find("head/style")).encode()).digest()).decode()
    assert policy is not None
    assert policy.get("content") == (
        f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    assert list(page.iter("style")) == page.findall("head/style")


def test_the_same_report_gives_the_same_page_in_another_process() -> None:
    """Which orders sets otherwise."""
    program = (
        "import hashlib; from tests.reports import llama_report;"
        "from dual_lora_kernels.inspection.page import render_page;"
        "print(hashlib.sha256(render_page(llama_report(2, compared=('other',))).encode()).hexdigest())"
    )
    other = os.environ | {"PYTHONHASHSEED": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=other, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == hashlib.sha256(render_page(FULL).encode()).hexdigest()


def cells(page: ElementTree.Element) -> list[dict[tuple[str, str], str]]:
    """The table's rows by the headings of group and column."""
    groups, headings = page.findall(".//thead/tr")
    names = [words(group) for group in groups[1:] for _ in range(int(group.get("colspan", 0)))]
    keys = list(zip(names, map(words, headings), strict=True))
    return [dict(zip(keys, map(words, row.findall("td")), strict=True)) for row in page.iterfind(".//tbody/tr")]


def expected(layer: LayerReport) -> Iterator[tuple[tuple[str, str], str]]:
    """Every figure of `layer`, where it stands and in its words."""
    yield ("Adapter", "shape"), f"{layer.shape[0]:,} × {layer.shape[1]:,}"
    for name in ("r1", "r2", "parameters"):
        yield ("Adapter", name), f"{getattr(layer, name):,}"
    yield ("Adapter", "α"), f"{layer.alpha:g}"
    yield ("Adapter", "scale s"), number(layer.scale)
    for name in ("frozen", "negative"):
        yield ("Signs", f"{name}, %"), percentage(getattr(layer, name), 2)
    yield ("Update ΔW", "‖ΔW‖"), number(layer.norm)
    yield ("Update ΔW", "rms"), number(layer.magnitudes.rms)
    yield ("Update ΔW", "largest"), number(layer.magnitudes.largest)
    assert layer.base is not None
    yield ("Beside W0", "dtype"), layer.base.dtype
    yield ("Beside W0", "‖ΔW‖ / ‖W0‖"), number(layer.base.relative_norm)
    yield ("Beside W0", "rounded away, %"), percentage(layer.base.rounded_away, 2)
    for name, group in zip(SPECTRA, ("ΔW", "ReLU(BA)", "Sign(DC)"), strict=True):
        spectrum = getattr(layer, name)
        yield (f"Spectrum of {group}", "rank"), rank(spectrum)
        yield (f"Spectrum of {group}", "of"), f"{spectrum.largest_rank:,}"
        yield (f"Spectrum of {group}", "stable rank"), number(spectrum.stable_rank)
        yield (f"Spectrum of {group}", "in r1 + r2, %"), percentage(spectrum.energy, 2)
    for beside in layer.similarities:
        yield (f"Beside {beside.adapter}", "cosine"), number(beside.cosine)
        yield (f"Beside {beside.adapter}", "equal signs, %"), percentage(beside.equal_signs, 2)
        yield (f"Beside {beside.adapter}", "both active, %"), percentage(beside.both_active, 2)


def test_the_table_has_every_figure() -> None:
    assert cells(parsed(render_page(FULL))) == [dict(expected(layer)) for layer in FULL.layers]


def test_every_chart_by_depth_has_every_layer() -> None:
    charts_of = plots(parsed(render_page(FULL)))
    assert list(charts_of) == [
        "Size beside the base weight",
        "Lost by rounding to nearest",
        "Distribution of |ΔW|",
        "Frozen entries",
        "Negative signs",
        "Rank of the update ΔW",
        "Rank of the magnitude ReLU(BA)",
        "Rank of the direction Sign(DC)",
        "Stable rank of the update ΔW",
        "What LoRA could hold of the update ΔW",
        "Singular values of the update ΔW",
        "Cosine",
        "Equal signs",
        "Active in both",
    ]
    by_kind = [layer for kind in LLAMA for layer in FULL.layers if layer.kind == kind]
    assert points(charts_of["Frozen entries"]) == [
        f"{layer.name}: {percentage(layer.frozen, 2)} %" for layer in by_kind
    ]
    for title in charts_of:
        if title not in ("Distribution of |ΔW|", "Singular values of the update ΔW"):
            names = [text.partition(":")[0] for text in points(charts_of[title])]
            assert names == [layer.name for layer in by_kind], title
            keys = [words(key) for key in charts_of[title].iter("li")]
            assert keys[: len(LLAMA)] == list(LLAMA)


def test_lower_bounds_are_hollow_and_have_a_sign() -> None:
    page = parsed(render_page(FULL))
    figure = plots(page)["Rank of the update ΔW"]
    hollow = [words(point) for point in figure.findall("svg/g/use[@class='bound']")]
    bounds = [layer for layer in FULL.layers if layer.update and not layer.update.is_exact]
    assert sorted(hollow) == sorted(f"{layer.name}: ≥ 1,024 of 4,096" for layer in bounds)
    assert [text for text in points(figure) if "≥" in text] == hollow
    assert "is a lower bound" in words(figure.find("figcaption/p"))


def test_lower_bounds_are_not_spoken_of_where_there_are_none() -> None:
    exact = tuple(
        dataclasses.replace(
            layer, **{name: dataclasses.replace(getattr(layer, name), is_exact=True) for name in SPECTRA}
        )
        for layer in FULL.layers
    )
    page = words(parsed(render_page(dataclasses.replace(FULL, layers=exact))))
    assert "lower bound" not in page
    assert "≥" not in page


def test_lora_has_its_line_where_ranks_are_shown() -> None:
    charts_of = plots(parsed(render_page(FULL)))
    sentence = "LoRA of as many parameters: at most"
    lined = {
        title: [words(key) for key in figure.iter("li") if sentence in words(key)]
        for title, figure in charts_of.items()
    }
    share = [f"{sentence} 3.1 %"]  # 32 of 1,024, the largest of the layers' bounds
    assert {title: keys for title, keys in lined.items() if keys} == {
        "Rank of the update ΔW": share,
        "Rank of the magnitude ReLU(BA)": share,
        "Rank of the direction Sign(DC)": share,
        "Stable rank of the update ΔW": [f"{sentence} 32"],
        "Singular values of the update ΔW": [f"{sentence} 32"],
    }
    line = charts_of["Rank of the update ΔW"].find("svg/line[@class='reference']")
    assert line is not None
    assert line.get("y1") == line.get("y2") == "96.88%"


def test_the_distribution_adds_up_all_layers_but_their_smallest_updates() -> None:
    first, second = (
        dataclasses.replace(layer, shape=(100, 100), magnitudes=Magnitudes(rms, 1.0, exponent, counts))
        for layer, rms, exponent, counts in zip(
            FULL.layers, (0.5, 0.0), (-5, -4), ((4, 1000, 3000), (4000,)), strict=False
        )
    )
    figure = plots(parsed(render_page(dataclasses.replace(FULL, layers=(first, second)))))["Distribution of |ΔW|"]
    assert [words(bar) for bar in figure.iter("rect")] == ["2⁻⁴ to 2⁻³: 62.47 %", "2⁻³ to 2⁻²: 37.48 %"]
    assert words(figure.find("figcaption/p")) == (
        "Non-zero updates of all layers, 40.0 % of the entries. The smallest 0.05 % of them are not drawn."
    )
    assert [words(key) for key in figure.iter("li")] == ["rms over all entries: 0.354"]


def test_singular_values_are_of_the_layers_with_the_most_the_median_and_the_least_rank() -> None:
    layers = tuple(
        dataclasses.replace(layer, update=Spectrum(found, True, 8, 1.0, 1.0, (1, 2), (1.0, 0.5)))
        for layer, found in zip(FULL.layers, (5, 8, 2, 3, 7), strict=False)
    )
    figure = plots(parsed(render_page(dataclasses.replace(FULL, layers=layers))))["Singular values of the update ΔW"]
    keys = [words(key) for key in figure.iter("li")]
    assert keys[:3] == [
        f"{layers[index].name} ({which})" for index, which in ((1, "largest"), (0, "median"), (2, "smallest"))
    ]
    assert points(figure)[:2] == [f"{layers[1].name}: σ1 / σ1 = 1.00", f"{layers[1].name}: σ2 / σ1 = 0.500"]


def headlines(page: ElementTree.Element) -> dict[str, str]:
    """The figures at a glance by their labels."""
    return {words(card[0]): words(card[1]) for card in page.iterfind(".//ul[@class='headlines']/li")}


def test_headlines_are_medians() -> None:
    layers = tuple(
        dataclasses.replace(layer, frozen=share, negative=1 - share)
        for layer, share in zip(FULL.layers, (0.1, 0.9, 0.2, 0.8, 0.3), strict=False)
    )
    shown = headlines(parsed(render_page(dataclasses.replace(FULL, layers=layers))))
    assert shown["Frozen"] == "30.0 %"
    assert shown["Negative signs"] == "70.0 %"
    assert shown["Rank of the update"] == "≥ 1,024"
    assert list(shown)[2:4] == ["Size beside W0", "Lost by rounding"]


def test_what_is_not_known_is_left_out() -> None:
    page = parsed(render_page(llama_report(2, base=False, spectra=False)))
    assert list(headlines(page)) == ["Frozen", "Negative signs"]
    assert list(plots(page)) == ["Size of the update", "Distribution of |ΔW|", "Frozen entries", "Negative signs"]
    assert {group for row in cells(page) for group, _ in row} == {"Adapter", "Signs", "Update ΔW"}
    assert "No base model was given" in words(page)


def test_one_layer_alone_lacking_a_part_has_a_dash() -> None:
    lacking = dataclasses.replace(FULL.layers[0], base=None, update=None, similarities=())
    rows = cells(parsed(render_page(dataclasses.replace(FULL, layers=(lacking, *FULL.layers[1:])))))
    assert {key for key, text in rows[0].items() if text == UNKNOWN} == {
        key for key in rows[0] if key[0] in ("Beside W0", "Spectrum of ΔW", "Beside other")
    }
    assert UNKNOWN not in rows[1].values()


def test_an_adapter_without_layers_says_so() -> None:
    page = parsed(render_page(dataclasses.replace(FULL, layers=())))
    assert "This adapter has no Dual LoRA layers." in words(page)
    assert not list(page.iter("table"))


def test_updates_that_are_zero_stand_at_zero() -> None:
    layers = tuple(
        dataclasses.replace(
            layer,
            norm=0.0,
            magnitudes=dataclasses.replace(layer.magnitudes, rms=0.0, largest=0.0, counts=()),
            base=layer.base and dataclasses.replace(layer.base, relative_norm=0.0),
        )
        for layer in FULL.layers
    )
    charts_of = plots(parsed(render_page(dataclasses.replace(FULL, layers=layers))))
    assert "Distribution of |ΔW|" not in charts_of
    marks = charts_of["Size beside the base weight"].findall("svg/g/use")
    assert {mark.get("y") for mark in marks} == {"100%"}


def test_500_layers_are_drawn_once_each() -> None:
    report = llama_report(72)
    page = render_page(report)
    assert len(points(plots(parsed(page))["Frozen entries"])) == len(report.layers) == 504
    assert len(page) < 2_000_000
