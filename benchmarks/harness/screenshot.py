"""A picture of a page for the documentation, by Chromium: ``python -m benchmarks.harness.screenshot PAGE PICTURE``."""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from shutil import which

_FLAGS = (
    "headless=new",
    "no-sandbox",
    "disable-gpu",
    "no-first-run",
    "disable-background-networking",
    "disable-component-update",
    "disable-sync",
    "hide-scrollbars",
    "blink-settings=preferredColorScheme=1",  # light, whatever the desktop prefers
)


def take(page: Path, picture: Path, size: tuple[int, int]) -> None:
    """Write the top of `page`, an HTML file, as a PNG of `size` pixels.

    Raises:
        FileNotFoundError: there is no Chromium, or no page.
        subprocess.CalledProcessError: Chromium failed.
    """
    browser = which("chromium")
    if browser is None:
        raise FileNotFoundError("chromium: not found on PATH, expected Chromium's command")
    if not page.is_file():
        raise FileNotFoundError(f"page: got {str(page)!r}, expected an HTML file")
    with tempfile.TemporaryDirectory() as profile:
        window = f"window-size={size[0]},{size[1]}"
        flags = (*_FLAGS, window, f"user-data-dir={profile}", f"screenshot={picture.resolve()}")
        command = [browser, *(f"--{flag}" for flag in flags), page.resolve().as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)


def main(argv: Sequence[str] | None = None) -> None:
    """Take the picture that the arguments ask for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.harness.screenshot", description=__doc__)
    parser.add_argument("page", type=Path, metavar="PAGE", help="an HTML file")
    parser.add_argument("picture", type=Path, metavar="PICTURE", help="the PNG file to write")
    parser.add_argument("--width", type=int, default=1280, help="of the window, in pixels (default: %(default)s)")
    parser.add_argument("--height", type=int, default=1600, help="of the window, in pixels (default: %(default)s)")
    arguments = parser.parse_args(argv)
    take(arguments.page, arguments.picture, (arguments.width, arguments.height))


if __name__ == "__main__":
    main()
