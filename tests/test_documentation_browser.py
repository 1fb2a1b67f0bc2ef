"""The documentation site in Chromium: on a phone and on a desk, by day and by night, from a server of this machine."""

from __future__ import annotations

import functools
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from selenium import webdriver
from selenium.webdriver.common.keys import Keys

from . import documentation_site
from .browsers import DESK, PHONE, View, chromium, look
from .documents import ROOT
from .test_inspection_browser import luminance

PAGES = [
    *sorted(file.relative_to(ROOT / "docs").with_suffix(".html").as_posix() for file in (ROOT / "docs").rglob("*.md")),
    "contributing.html",
    "changelog.html",
]

MAIN = ("index.html", "benchmarks.html", "concepts.html", "reference/python.html")

LAYOUT = """
const pictures = [...document.querySelectorAll("article img")];
const outside = [...document.querySelectorAll("article *")].filter(e => {
  for (let frame = e.parentElement; frame.tagName != "ARTICLE"; frame = frame.parentElement)
    if (["auto", "hidden", "scroll"].includes(getComputedStyle(frame).overflowX)) return false;
  const r = e.getBoundingClientRect();
  return r.width > 0 && (r.left < -1 || r.right > innerWidth + 1) && getComputedStyle(e).position != "absolute";
});
return {
  inner: innerWidth, scroll: document.documentElement.scrollWidth, client: document.documentElement.clientWidth,
  outside: outside.map(e => e.outerHTML.slice(0, 80)),
  broken: pictures.filter(p => !p.complete || p.naturalWidth == 0).map(p => p.src),
  unnamed: pictures.filter(p => !p.alt).map(p => p.src),
  headings: document.querySelectorAll("h1").length,
};
"""

MATHEMATICS = """
return [...document.querySelectorAll("math")].map(m => {
  const r = m.getBoundingClientRect();
  return [m.namespaceURI, r.width, r.height];
});
"""


SEEN = """
const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
const ground = numbers(getComputedStyle(document.body).backgroundColor);
const [r, g, b, alpha = 1] = numbers(getComputedStyle(document.querySelector("article p")).color);
const over = [r, g, b].map((part, index) => Math.round(part * alpha + ground[index] * (1 - alpha)));
return [ground, over].map(parts => `rgb(${parts.join(", ")})`);
"""
"""Body text may be translucent: its colour as seen, after its ground's."""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where the site is served."""
    site: Path = documentation_site.build(tmp_path_factory)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    """One browser for all tests: it takes a second to start."""
    with chromium() as driver:
        yield driver


def show(browser: webdriver.Chrome, address: str, page: str, view: View) -> None:
    """Load `page` as a first visitor sees it in `view`; what was logged before is forgotten."""
    browser.execute_cdp_cmd("Storage.clearDataForOrigin", {"origin": address, "storageTypes": "local_storage"})
    look(browser, f"{address}/{page}", view)


def events(browser: webdriver.Chrome) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, parameters) of what the browser did since it was last asked."""
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        yield message["method"], message["params"]


def check(browser: webdriver.Chrome, address: str, page: str, view: View) -> None:
    """Nothing sticks out, is broken, or comes from elsewhere."""
    show(browser, address, page, view)
    layout = browser.execute_script(LAYOUT)
    assert layout["inner"] == view.width
    assert layout["scroll"] == layout["client"], layout["outside"]
    assert layout["outside"] == layout["broken"] == layout["unnamed"] == []
    assert layout["headings"] == 1
    for name, event in events(browser):
        if name == "Network.requestWillBeSent":
            asked = urlsplit(event["request"]["url"])
            assert asked.scheme == "data" or f"{asked.scheme}://{asked.netloc}" == address
        if name == "Network.responseReceived":
            assert event["response"]["status"] < 400, event["response"]["url"]
        assert name != "Network.loadingFailed" or event["canceled"], event
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


@pytest.mark.parametrize("page", PAGES)
def test_pages_fit_a_phone(page: str, browser: webdriver.Chrome, address: str) -> None:
    check(browser, address, page, View(*PHONE, "light"))


@pytest.mark.parametrize("view", [View(*PHONE, "dark"), View(*DESK, "light"), View(*DESK, "dark")], ids=str)
@pytest.mark.parametrize("page", MAIN)
def test_the_main_pages_fit_every_window(page: str, view: View, browser: webdriver.Chrome, address: str) -> None:
    check(browser, address, page, view)


def test_equations_are_drawn(browser: webdriver.Chrome, address: str) -> None:
    show(browser, address, "concepts.html", View(*PHONE, "light"))
    drawn = browser.execute_script(MATHEMATICS)
    assert len(drawn) >= 30
    for namespace, width, height in drawn:
        assert namespace == "http://www.w3.org/1998/Math/MathML"
        assert min(width, height) > 4


def test_the_system_chooses_light_or_dark(browser: webdriver.Chrome, address: str) -> None:
    """Text on its ground has WCAG's contrast for body text, 4.5, in both."""
    brightness = {}
    for scheme in ("light", "dark"):
        show(browser, address, "index.html", View(*DESK, scheme))
        ground, text = browser.execute_script(SEEN)
        brightness[scheme] = luminance(ground)
        darker, lighter = sorted((luminance(ground), luminance(text)))
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5
    assert brightness["light"] > 0.9
    assert brightness["dark"] < 0.05


def test_search_finds_a_function(browser: webdriver.Chrome, address: str) -> None:
    """The index comes from the server, and a worker of the site's own looks things up in it."""
    show(browser, address, "index.html", View(*DESK, "light"))
    box = browser.find_element("css selector", "input.md-search__input")
    browser.execute_script("document.querySelector('#__search').click()")
    box.send_keys("dual_lora_linear", Keys.NULL)
    found = browser.execute_async_script(
        """
        const done = arguments[0];
        const look = () => {
          const links = [...document.querySelectorAll(".md-search-result__link")].map(a => a.href);
          links.length ? done(links) : setTimeout(look, 50);
        };
        look();
        """
    )
    assert any("reference/python.html" in link for link in found)
