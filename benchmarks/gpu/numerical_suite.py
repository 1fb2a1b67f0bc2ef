"""Runs pytest in a process of its own, within a time limit, and keeps its counts and the end of its output."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_TAIL_LINES = 60
GRACE = 15.0
"""Seconds that pytest has to print its summary after it was told to stop."""
_COUNT = re.compile(r"(\d+) (passed|failed|errors?|skipped|xfailed|xpassed|deselected)\b")
_PATH = re.compile(r"(?:/[\w.+@-]+)+/(?=[\w.+@-])")


def without_paths(text: str) -> str:
    """`text` with folders cut from absolute paths: results can be published."""
    return _PATH.sub("", text)


def counts(output: str) -> dict[str, int]:
    """Outcome → number of tests, from the last line of pytest's output that has any."""
    for line in reversed(output.splitlines()):
        found = _COUNT.findall(line)
        if found:
            return {outcome.removesuffix("s") if outcome == "errors" else outcome: int(n) for n, outcome in found}
    return {}


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
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        process = subprocess.Popen(
            command,
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
                counts=counts(text),
                tail=[without_paths(line) for line in text.splitlines()[-_TAIL_LINES:]],
            )


def _ended(process: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return False
    return True
