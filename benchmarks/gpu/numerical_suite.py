"""Runs pytest in a process of its own, within a time limit, and keeps its counts and the end of its output."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]
_TAIL_LINES = 60
_OUTCOMES = {"failure": "failed", "error": "error", "skipped": "skipped"}
"""A test's element in JUnit XML → its outcome in pytest's words."""
GRACE = 15.0
"""Seconds that pytest has to print its summary after it was told to stop."""
_PATH = re.compile(r"(?:/[\w.+@-]+)+/(?=[\w.+@-])")


def without_paths(text: str) -> str:
    """`text` with folders cut from absolute paths: results can be published."""
    return _PATH.sub("", text)


def counts(report: Path) -> dict[str, int]:
    """Outcome → number of tests, from the JUnit XML that pytest writes; empty where it was killed before it could."""
    if not report.exists():
        return {}
    outcomes = Counter(
        next((_OUTCOMES[element.tag] for element in case if element.tag in _OUTCOMES), "passed")
        for case in ElementTree.parse(report).iter("testcase")
        if "name" in case.attrib  # a test that was interrupted has none
    )
    return dict(outcomes)


def run(
    results: dict[str, Any],
    arguments: Sequence[str],
    seconds: float,
    environment: Mapping[str, str],
    workers: int = 1,
) -> None:
    """``pytest -q`` with `arguments`; ``complete`` says whether it came to its end within `seconds`.

    In `workers` processes where pytest-xdist is installed, else in one; ``command`` in `results` shows which.
    At the limit, or when an exception ends the wait, it is interrupted, so that it still reports what it has run, and
    killed if that does not end it. `results` is filled in any case.
    """
    parallel = ["-n", str(workers), "--dist", "worksteal"] if workers > 1 and find_spec("xdist") else []
    command = [sys.executable, "-m", "pytest", "-q", "--tb=line", "-p", "no:cacheprovider", *parallel, *arguments]
    with (
        tempfile.TemporaryDirectory() as folder,
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output,
    ):
        report = Path(folder) / "junit.xml"
        process = subprocess.Popen(
            [*command, f"--junitxml={report}"],
            cwd=ROOT,
            env=dict(environment),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C at the terminal is ours to handle
        )
        complete = False
        try:
            complete = _ended(process, seconds)
        finally:
            if not complete:
                process.send_signal(signal.SIGINT)
                if not _ended(process, GRACE):
                    process.kill()
                    process.wait()
            output.seek(0)
            text = output.read()
            results.update(
                command=" ".join(["pytest", *command[3:]]),
                complete=complete,
                exit_code=process.returncode,
                counts=counts(report),
                tail=[without_paths(line) for line in text.splitlines()[-_TAIL_LINES:]],
            )


def _ended(process: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return False
    return True
