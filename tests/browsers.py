"""Chromium, driven without a display, for tests of pages; they are left out where it is not installed."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from shutil import which
from typing import TYPE_CHECKING, NamedTuple

import pytest

if TYPE_CHECKING:
    from selenium import webdriver

_FLAGS = (
    "headless=new",
    "no-sandbox",
    "disable-gpu",
    "disable-quic",
    "no-first-run",
    "disable-background-networking",
    "disable-component-update",
    "disable-sync",
)


class View(NamedTuple):
    """A window and what its reader prefers."""

    width: int
    height: int
    scheme: str


PHONE, DESK = (375, 812), (1440, 900)


def has_browser() -> bool:
    """Whether Chromium, its driver and selenium are installed."""
    return bool(which("chromium") and which("chromedriver") and importlib.util.find_spec("selenium"))


@contextmanager
def chromium() -> Iterator[webdriver.Chrome]:
    """A browser with a profile of its own. It logs what goes wrong and what it asks of a network."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = which("chromium") or ""
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SE_OFFLINE", "true")  # selenium would look for a driver to download
        for flag in (*_FLAGS, f"user-data-dir={profile}"):
            options.add_argument(f"--{flag}")
        driver = webdriver.Chrome(options=options, service=Service(which("chromedriver")))
        try:
            yield driver
        finally:
            driver.quit()


def look(browser: webdriver.Chrome, address: str, view: View) -> None:
    """Load the page at `address` as `view` shows it; what was logged before is forgotten."""
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": view.width, "height": view.height, "deviceScaleFactor": 1, "mobile": view[:2] == PHONE},
    )
    scheme = {"name": "prefers-color-scheme", "value": view.scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    browser.get_log("browser")
    browser.get_log("performance")
    browser.get(address)
