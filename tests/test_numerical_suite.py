"""pytest in a process of its own, within a time limit."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import numerical_suite

OUTCOMES = """
import pytest
def test_passes(): print("3 failed by design")
def test_fails(): assert False
@pytest.fixture
def broken(): raise RuntimeError
def test_errs(broken): pass
def test_skips(): pytest.skip("2 passed")
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_pytests_counts_are_its_reports(workers: int, tmp_path: Path) -> None:
    test = tmp_path / "test_outcomes.py"
    test.write_text(OUTCOMES, encoding="utf-8")
    results: dict[str, Any] = {}
    arguments = ["--noconftest", f"--rootdir={tmp_path}", str(test)]
    numerical_suite.run(results, arguments, 60.0, os.environ, workers)
    assert results["complete"]
    assert results["counts"] == {"passed": 1, "failed": 1, "error": 1, "skipped": 1}
    assert numerical_suite.counts(tmp_path / "junit.xml") == {}, "pytest was killed before it could write it"


def test_folders_are_cut_from_messages() -> None:
    text = "/home/someone/x-1.2/torch/mm.py:3: RuntimeError in a/b, 1 / 2"
    assert numerical_suite.without_paths(text) == "mm.py:3: RuntimeError in a/b, 1 / 2"


def test_a_suite_that_runs_out_of_time_is_interrupted_and_reports(tmp_path: Path) -> None:
    test = tmp_path / "test_slow.py"
    test.write_text("import time\ndef test_fast(): pass\ndef test_slow(): time.sleep(60)\n", encoding="utf-8")
    results: dict[str, Any] = {}
    quick = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    numerical_suite.run(results, ["--noconftest", f"--rootdir={tmp_path}", str(test)], 15.0, quick)
    assert not results["complete"]
    assert results["counts"] == {"passed": 1}
