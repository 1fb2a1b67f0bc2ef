"""The documentation site, built once in a test run, whichever process needs it first."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from .documents import ROOT


def has_mkdocs() -> bool:
    """Whether what the extra ``docs`` installs is there."""
    return all(importlib.util.find_spec(name) for name in ("mkdocs", "material", "mkdocstrings", "latex2mathml"))


def build(factory: pytest.TempPathFactory) -> Path:
    """The folder of the built site. Warnings are errors, as in ``make docs``."""
    base = factory.getbasetemp()
    folder = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    site, done = folder / "site", folder / "site.done"
    with FileLock(folder / "site.lock"):
        if not done.exists():
            command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(site)]
            environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
            process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
            assert process.returncode == 0, process.stdout + process.stderr
            done.touch()
    return site
