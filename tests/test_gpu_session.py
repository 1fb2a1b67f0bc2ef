"""The preset ``gpu``: end to end in Triton's interpreter, what it refuses, and the goals that it judges."""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks import command
from benchmarks.gpu import document, session_summary, whole_models
from benchmarks.gpu.session import FOLDER, MEMORY_METHODS, PARTS
from benchmarks.harness.environment import environment
from benchmarks.harness.results import Results, every, read
from benchmarks.harness.timing import Quartiles
from benchmarks.layers import layer_cells
from benchmarks.layers.checks import ALLOWED
from benchmarks.presets import gpu as preset
from dual_lora_kernels.backends.triton.architecture import INTERPRETED_FAMILY
from dual_lora_kernels.tuning.budget import Deadline, part_seconds
from dual_lora_kernels.tuning.kernel_calls import KERNELS

ROOT = Path(__file__).parent.parent
INTERPRETED = os.environ | {"TRITON_INTERPRET": "1", "OMP_WAIT_POLICY": "PASSIVE"}
ROUNDS = 1
"""A model's step takes seconds in the interpreter."""
SESSION = [sys.executable, "-m", "benchmarks", "gpu", "--tiny", "--rounds", str(ROUNDS), "--out"]
PLOTS = {"rooflines.png", "step_ratios.png", "decode_ratios.png"}


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole tiny session."""
    out = tmp_path_factory.mktemp("session") / "out"
    subprocess.run([*SESSION, str(out)], cwd=ROOT, env=INTERPRETED, check=True, timeout=240)
    (folder,) = out.iterdir()
    return folder


def test_a_session_reports_every_part(session: Path) -> None:
    document = _json(session / FOLDER / "summary.json")
    parts = document["parts"]
    assert {key: (part["status"], part["reason"]) for key, part in parts.items()} == {
        part.key: ("complete", None) for part in PARTS
    }
    found = {key: part["results"] for key, part in parts.items()}
    assert found["environment"]["backend"] == f"triton (tile shapes of {INTERPRETED_FAMILY})"
    assert found["environment"]["bytes_per_second"] > 0 < found["environment"]["operations_per_second"]
    assert found["numerics"]["complete"]
    assert set(found["numerics"]["counts"]) == {"passed"}
    assert {row["kernel"] for row in found["rooflines"]["rows"]} == set(KERNELS)
    assert found["rooflines"]["left_out"] == found["memory"]["left_out"] == []
    assert [row["method"] for row in found["memory"]["rows"]] == list(MEMORY_METHODS)
    assert all(row["peak"] > 0 for row in found["memory"]["rows"])
    for cell, kind in zip(found["layers"]["cells"], ("step", "decode"), strict=True):
        assert (cell["kind"], cell["mode"], cell["left_out"]) == (kind, "plain", {})
        assert {len(times) for times in cell["seconds"].values()} == {ROUNDS}
        sampled = layer_cells.SAMPLED if kind == "step" else ()
        assert set(cell["checked"]) == set(cell["seconds"])
        assert all(cell["checked"].values())
        assert set(cell["to_floor"]) == {*layer_cells.STRATEGIES, *layer_cells.PEERS, *sampled}
    assert [reason.partition(" ")[0] for reason in found["layers"]["left_out"]] == ["graph", "compiled"]
    (model,) = found["models"]["cases"]
    assert set(model["subjects"]) == set(whole_models.SUBJECTS)
    assert {name for name, subject in model["subjects"].items() if not subject["seconds"]} == set()
    assert {goal["verdict"] for goal in document["goals"]} == {"not measured"}, "times of an interpreter mean nothing"


def test_the_document_has_the_same_cases_with_every_round(session: Path) -> None:
    results = read(session / "gpu.json")
    parts = _json(session / FOLDER / "summary.json")["parts"]
    cells = parts["layers"]["results"]["cells"]
    assert (results.preset, results.machine) == ("gpu", session.name)
    assert [(case.settings["kind"], case.settings["mode"], case.reference) for case in results.cases[:-1]] == [
        ("step", "plain", "floor"), ("decode", "plain", "frozen"),
    ]  # fmt: skip
    for case, cell in zip(results.cases[:-1], cells, strict=True):
        names = {**document.SUBJECTS, "floor": case.reference}
        assert {names.get(name, name): tuple(times) for name, times in cell["seconds"].items()} == {
            name: measured.seconds for name, measured in case.subjects.items()
        }
        assert all(0 <= error <= ALLOWED for each in case.subjects.values() for error in each.checked.values())
        median = cell["to_floor"]["auto"]["median"]
        assert case.ratio("dual_lora").median == pytest.approx(median, rel=1e-12)  # divided by the layers in turn
    model = results.cases[-1]
    assert (model.settings["kind"], model.settings["dtype"], model.reference) == ("train", "bf16", "floor")
    assert set(model.timed()) == set(whole_models.SUBJECTS)


def test_a_session_writes_few_files_that_can_be_published(session: Path) -> None:
    assert {path.name for path in session.iterdir()} == {"gpu.json", FOLDER}
    assert {path.name for path in (session / FOLDER).iterdir()} == {"summary.json", "summary.md"} | PLOTS
    for name in ("summary.json", "summary.md"):
        text = (session / FOLDER / name).read_text(encoding="utf-8")
        assert str(ROOT) not in text
        assert str(session) not in text
        assert f'"{platform.node()}"' not in text
    text = (session / FOLDER / "summary.md").read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if line.startswith("## ")] == [f"## {p.title}" for p in PARTS]
    assert all(f"]({plot})" in text for plot in PLOTS)


def test_a_sessions_folder_is_read_as_the_suites_documents(session: Path) -> None:
    (results,) = every("gpu", session.parent)
    assert results == read(session / "gpu.json")


@pytest.mark.parametrize(("status", "failed"), [("complete", ""), ("stopped", ""), ("failed", "layers: no memory")])
def test_a_failed_part_is_told_to_the_command_line(status: str, failed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which then ends with 1; a part that was stopped is no failure."""
    records = {"layers": {"status": status, "reason": "no memory", "results": {}}}
    held = SimpleNamespace(records=records, models=[], sizes=SimpleNamespace(interpreted=True))
    monkeypatch.setattr(preset, "_device", lambda _: torch.device("cpu"))
    monkeypatch.setattr(preset, "hold", lambda *_: held)
    options = argparse.Namespace(out=None, quick=True, tiny=False, minutes=None, rounds=1, failed=None)
    assert preset.run(options, Console(quiet=True)) is None
    assert options.failed == failed


def test_a_signal_leaves_a_valid_summary(tmp_path: Path) -> None:
    """In the numerical suite, the second part, whose own process ends with it."""
    machine = tmp_path / Results("gpu", "", environment(torch.device("cpu")), ()).machine
    summary = machine / FOLDER / "summary.json"
    process = subprocess.Popen([*SESSION, str(tmp_path)], cwd=ROOT, env=INTERPRETED)
    try:
        patience = Deadline.after(60)
        while not summary.exists() and process.poll() is None and not patience.passed:
            time.sleep(0.05)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=40) == 0
    finally:
        process.kill()
        process.wait()
    document = _json(summary)
    parts = document["parts"]
    assert document["stopped_by"] == "SIGINT"
    assert parts["environment"]["status"] == "complete"
    assert (parts["numerics"]["status"], parts["numerics"]["reason"]) == ("stopped", "stopped by SIGINT")
    assert parts["numerics"]["results"]["complete"] is False
    assert {parts[key]["status"] for key in ("rooflines", "memory", "layers", "models")} == {"not run"}
    assert "not run, 0 s: stopped by SIGINT" in summary.with_suffix(".md").read_text(encoding="utf-8")
    assert not (machine / "gpu.json").exists(), "nothing was measured that could be in it"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "no GPU: the session needs one"),
        (["--tiny"], "--tiny: "),
        (["--minutes", "0"], "got '0', expected a positive number"),
        (["--minutes", "nan"], "got 'nan', expected a positive number"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    arguments: list[str], reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(command, "self_check", lambda *_: Quartiles(1.1, 1.1, 1.1))
    try:
        status = command.main(["gpu", *arguments])
    except SystemExit as usage:
        status = usage.code
    assert status
    assert reason in capsys.readouterr().err


def test_the_parts_fit_into_the_session() -> None:
    shares, left = [part.seconds for part in PARTS], 60 * 8.0
    assert sum(shares) <= left
    assert part_seconds(left - shares[0], shares[1:]) >= 150, "the numerical suite gets its two and a half minutes"


def _cell(kind: str, mode: str, tokens: int, ratio: float, to_dora: float, rows: int = 4096) -> Any:
    return {
        "kind": kind, "mode": mode, "rows": rows, "columns": rows, "tokens": tokens,
        "to_floor": {"auto": {"lower": ratio, "median": ratio, "upper": ratio}}, "to_dora": {"auto": to_dora},
    }  # fmt: skip


def test_goals_take_the_worst_of_what_they_are_about() -> None:
    cells = [
        _cell("step", "graph", 4096, 1.05, 0.5),
        _cell("step", "graph", 16384, 1.09, 1.2),
        _cell("step", "graph", 256, 9.0, 9.0),  # too few tokens for the goal
        _cell("step", "graph", 4096, 9.0, 9.0, rows=8192),  # not Llama-3-8B's
        _cell("decode", "plain", 16, 1.4, 0.1),
    ]
    peaks = [{"method": "dual_lora", "peak": 50 * 2**20}, {"method": "lora", "peak": 20 * 2**20}]
    records = {
        "layers": {"results": {"cells": cells}},
        "memory": {"results": {"rows": peaks}},
        "numerics": {"results": {"counts": {"passed": 5}, "complete": False}},
    }
    found = {goal["goal"]: (goal["worst"], goal["verdict"]) for goal in session_summary.goals(records)}
    assert found == {
        "step / floor, M ≥ 4096, device time": (1.09, "pass"),
        "step / PEFT DoRA's, M ≥ 4096, device time": (1.2, "short"),
        "decode / F.linear, M ≤ 16, device time": (None, "not measured"),
        "step / floor, M ≥ 4096, plain launches": (None, "not measured"),
        "step / PEFT DoRA's, M ≥ 4096, plain launches": (None, "not measured"),
        "decode / F.linear, M ≤ 16, plain launches": (1.4, "short"),
        "peak memory of a layer's step over PEFT LoRA's, MiB": (30.0, "pass"),
        "failures of the numerical suite (errors against fp64 among others)": (None, "not measured"),
    }
    failed = {"numerics": {"results": {"counts": {"passed": 5, "failed": 1}, "complete": False}}}
    assert session_summary.goals(failed)[-1]["verdict"] == "short", "a failure counts before the end"
