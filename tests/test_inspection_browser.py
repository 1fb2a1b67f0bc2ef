"""The page of an inspected adapter in Chromium: what a reader sees, on a phone and on a desk, by day and by night."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver

from dual_lora_kernels.inspection.page import render_page
from dual_lora_kernels.inspection.report import AdapterReport

from .browsers import DESK, PHONE, View, chromium, look
from .reports import HOSTILE, llama_report
from .test_inspection_page import cells, parsed

VIEWS = [View(*size, scheme) for size in (PHONE, DESK) for scheme in ("light", "dark")]


def odd() -> AdapterReport:
    """A report with what strains a layout: long and hostile names, extremes, zeros, lacking parts, many kinds."""
    layers = list(llama_report(3, compared=(HOSTILE[0],)).layers)
    for index, name in enumerate(HOSTILE):
        depth = 90 * index
        layers[index] = dataclasses.replace(layers[index], name=f"layers.{depth}.{name}", depth=depth, kind=name)
    huge = dataclasses.replace(layers[-1].magnitudes, rms=1e-300, first_exponent=-149)
    layers[-1] = dataclasses.replace(layers[-1], name="head", depth=None, norm=1e300, magnitudes=huge, base=None)
    layers[-2] = dataclasses.replace(layers[-2], norm=0.0, update=None, scale=-123456.0)
    return AdapterReport(HOSTILE[-1], HOSTILE[1], (HOSTILE[0],), 1, tuple(layers), HOSTILE, "1", "native")


REPORTS = {
    "whole": llama_report(32, compared=("llama-3-8b-code",)),
    "odd": odd(),
    "single": dataclasses.replace(llama_report(1), layers=llama_report(1).layers[:1]),
    "bare": llama_report(4, base=False, spectra=False),
}

LAYOUT = """
const box = e => { const r = e.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; };
const plots = [...document.querySelectorAll("svg.plot")].map(plot => ({
  title: plot.closest("figure").querySelector("h3").textContent,
  box: box(plot),
  axes: [...plot.querySelectorAll("g.ticks")].map(axis => [...axis.children].map(box)),
  texts: [...plot.querySelectorAll("text")].map(box),
  marks: [...plot.querySelectorAll("use, rect, line, polyline")].map(box),
}));
const clipped = [...document.querySelectorAll("h1, h2, h3, p, dt, dd, li, figcaption, th, td")]
  .filter(e => e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).display != "inline")
  .map(e => e.textContent);
const table = document.querySelector(".scroll");
return {plots, clipped, inner: innerWidth, scroll: document.documentElement.scrollWidth,
        client: document.documentElement.clientWidth, region: box(table)};
"""
"""Boxes are left, top, right, bottom."""

COLOURS = """
const found = [];
const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walk.nextNode()) {
  const e = walk.currentNode.parentElement;
  if (!walk.currentNode.textContent.trim() || e.tagName == "title") continue;
  let ground = e;
  while (ground && getComputedStyle(ground).backgroundColor == "rgba(0, 0, 0, 0)") ground = ground.parentElement;
  const style = getComputedStyle(e);
  found.push([style[e instanceof SVGElement ? "fill" : "color"], getComputedStyle(ground).backgroundColor]);
}
return [...new Set(found.map(JSON.stringify))].map(JSON.parse);
"""

TABLE = """
return [...document.querySelectorAll("tbody tr")].map(row => [...row.children].map(cell => cell.textContent));
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    """One browser for all tests: it takes a second to start."""
    with chromium() as driver:
        yield driver


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each report's page as a file."""
    folder = tmp_path_factory.mktemp("pages")
    files = {name: folder / f"{name}.html" for name in REPORTS}
    for name, file in files.items():
        file.write_text(render_page(REPORTS[name]), encoding="utf-8")
    return files


def show(browser: webdriver.Chrome, page: Path, view: View) -> None:
    """Load `page` as `view` shows it; what was logged before is forgotten."""
    look(browser, page.as_uri(), view)


def requested(browser: webdriver.Chrome) -> list[str]:
    """The addresses that the page has asked for."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]


def overlap(one: list[float], other: list[float]) -> bool:
    """Whether two boxes have a point in common."""
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def within(one: list[float], other: list[float], slack: float) -> bool:
    """Whether the first box lies in the second, but for `slack` pixels."""
    return all(a >= b - slack for a, b in zip(one[:2], other[:2], strict=True)) and all(
        a <= b + slack for a, b in zip(one[2:], other[2:], strict=True)
    )


@pytest.mark.parametrize("name", REPORTS)
@pytest.mark.parametrize("view", VIEWS, ids=lambda view: f"{view.width}-{view.scheme}")
def test_every_page_fits_its_window_and_asks_for_nothing(
    name: str, view: View, browser: webdriver.Chrome, pages: dict[str, Path]
) -> None:
    show(browser, pages[name], view)
    layout: dict[str, Any] = browser.execute_script(LAYOUT)
    assert layout["inner"] == view.width
    assert layout["scroll"] == layout["client"]
    assert layout["clipped"] == []
    assert within(layout["region"], [0, -1e9, view.width, 1e9], 0)
    assert len(layout["plots"]) == len(list(parsed(pages[name].read_text(encoding="utf-8")).iter("figure")))
    for plot in layout["plots"]:
        left, top, right, bottom = plot["box"]
        assert right - left >= 300, plot["title"]
        assert bottom - top >= 200
        assert left >= 0
        assert right <= view.width
        for text in plot["texts"]:
            assert text[2] - text[0] > 0
            assert within(text, plot["box"], 0.5), plot["title"]
        assert len(plot["axes"]) == 2
        for axis in plot["axes"]:
            assert not any(overlap(*pair) for pair in itertools.combinations(axis, 2)), plot["title"]
        assert not any(overlap(*pair) for pair in itertools.product(*plot["axes"])), plot["title"]
        # A mark at a plot's edge reaches over it by its half.
        assert all(within(mark, plot["box"], 1) for mark in plot["marks"]), plot["title"]
    assert requested(browser) == [pages[name].as_uri()]
    assert browser.get_log("browser") == []


def luminance(colour: str) -> float:
    """WCAG's relative luminance of "rgb(r, g, b)"."""
    assert colour.startswith("rgb("), colour  # opaque
    parts = [int(part) / 255 for part in colour.removeprefix("rgb(").rstrip(")").split(",")]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_all_text_stands_out_in_both_schemes(browser: webdriver.Chrome, pages: dict[str, Path]) -> None:
    """WCAG's AA for text of any size."""
    found = {}
    for scheme in ("light", "dark"):
        show(browser, pages["whole"], View(*PHONE, scheme))
        found[scheme] = {tuple(pair) for pair in browser.execute_script(COLOURS)}
        for text, ground in found[scheme]:
            darker, lighter = sorted((luminance(text), luminance(ground)))
            assert (lighter + 0.05) / (darker + 0.05) >= 4.5, (scheme, text, ground)
            assert (luminance(ground) > 0.5) == (scheme == "light")
    assert len(found["light"]) >= 4
    assert not found["light"] & found["dark"]


def test_series_keep_their_colours_apart_from_the_paper(browser: webdriver.Chrome, pages: dict[str, Path]) -> None:
    """WCAG asks for 3 : 1 of what a chart is made of; the seven kinds have seven colours in each scheme."""
    script = """
      const keys = document.querySelectorAll("figure:first-of-type .legend .key:not(.reference)");
      return [...new Set([...keys].map(key => getComputedStyle(key).color))];
    """
    for scheme in ("light", "dark"):
        show(browser, pages["whole"], View(*DESK, scheme))
        paper = luminance(browser.execute_script("return getComputedStyle(document.body).backgroundColor"))
        colours = browser.execute_script(script)
        assert len(colours) == 7
        for colour in colours:
            darker, lighter = sorted((luminance(colour), paper))
            assert (lighter + 0.05) / (darker + 0.05) >= 3, (scheme, colour)


def test_the_table_that_is_seen_has_the_figures(browser: webdriver.Chrome, pages: dict[str, Path]) -> None:
    """And scrolls in its frame, with the layers' names staying in sight."""
    show(browser, pages["whole"], View(*PHONE, "light"))
    rows = browser.execute_script(TABLE)
    wanted = cells(parsed(pages["whole"].read_text(encoding="utf-8")))
    names = [layer.name for layer in REPORTS["whole"].layers]
    assert rows == [[name, *row.values()] for name, row in zip(names, wanted, strict=True)]
    before, after, scrolled = browser.execute_script(
        """
        const frame = document.querySelector(".scroll"), name = frame.querySelector("tbody th");
        const before = name.getBoundingClientRect().left;
        frame.scrollLeft = 200;
        return [before, name.getBoundingClientRect().left, frame.scrollLeft];
        """
    )
    assert scrolled == 200
    assert before == after


def test_hostile_names_are_text_and_the_policy_would_stop_what_they_call(
    browser: webdriver.Chrome, pages: dict[str, Path]
) -> None:
    show(browser, pages["odd"], View(*DESK, "light"))
    counts = browser.execute_script("return [document.scripts.length, document.images.length, document.title]")
    assert counts[:2] == [0, 0]
    assert counts[2].startswith("x")
    browser.execute_async_script(
        """
        const done = arguments[0], script = document.createElement("script"), image = new Image();
        script.textContent = "document.title = 'hostile'";
        image.onerror = done;
        document.body.append(script, image);
        image.src = "http://127.0.0.1:9/x.png";
        """
    )
    assert browser.title.startswith("x")
    messages = " ".join(entry["message"] for entry in browser.get_log("browser"))
    assert "Executing inline script violates" in messages
    assert "Loading the image 'http://127.0.0.1:9/x.png' violates" in messages


def test_a_series_under_the_pointer_stands_out(browser: webdriver.Chrome, pages: dict[str, Path]) -> None:
    show(browser, pages["whole"], View(*DESK, "light"))
    x, y = browser.execute_script(
        """
        const mark = document.querySelector(".series:last-of-type use:last-of-type");
        mark.scrollIntoView({block: "center"});
        const r = mark.getBoundingClientRect();
        return [r.left + r.width / 2, r.top + r.height / 2];
        """
    )
    browser.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": "mouseMoved", "x": x, "y": y})
    opacities = browser.execute_async_script(
        """
        const done = arguments[0];
        const read = () => [...document.querySelector("svg.plot").querySelectorAll(".series")]
          .map(series => Number(getComputedStyle(series).opacity));
        const wait = () => { const now = read(); now[0] < 0.2 ? done(now) : requestAnimationFrame(wait); };
        wait();
        """
    )
    assert opacities[-1] == 1
    assert max(opacities[:-1]) < 0.2
