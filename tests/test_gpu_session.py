"""Tuning and the GPU session: end to end in Triton's interpreter, and their arithmetic."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import gpu_session, numerical_suite, rooflines, session_summary
from benchmarks.gpu.rooflines import Ceilings, Point, Reached, Work
from benchmarks.harness import timing
from benchmarks.layers import layer_cells
from dual_lora_kernels import cli, set_default_backend
from dual_lora_kernels.backends.triton import shapes
from dual_lora_kernels.backends.triton.architecture import INTERPRETED_FAMILY, Architecture
from dual_lora_kernels.tuning import candidates
from dual_lora_kernels.tuning import tuner as tune
from dual_lora_kernels.tuning.budget import Deadline, Guard, Stopped, part_seconds
from dual_lora_kernels.tuning.kernel_calls import KERNELS, Operands

ROOT = Path(__file__).parent.parent
INTERPRETED = os.environ | {"TRITON_INTERPRET": "1", "OMP_WAIT_POLICY": "PASSIVE"}
SESSION = [sys.executable, "-m", "benchmarks.gpu.gpu_session", "--tiny", "--out"]
PLOTS = {"rooflines.png", "step_ratios.png", "decode_ratios.png"}


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


# End to end


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole tiny session."""
    folder = tmp_path_factory.mktemp("session") / "out"
    subprocess.run([*SESSION, str(folder)], cwd=ROOT, env=INTERPRETED, check=True, timeout=150)
    return folder


def test_a_session_reports_every_part(session: Path) -> None:
    document = _json(session / "summary.json")
    parts = document["parts"]
    assert {key: (part["status"], part["reason"]) for key, part in parts.items()} == {
        part.key: ("complete", None) for part in gpu_session.PARTS
    }
    found = {key: part["results"] for key, part in parts.items()}
    assert found["environment"]["backend"] == f"triton (tile shapes of {INTERPRETED_FAMILY})"
    assert found["environment"]["bytes_per_second"] > 0 < found["environment"]["operations_per_second"]
    assert found["numerics"]["complete"]
    assert set(found["numerics"]["counts"]) == {"passed"}
    assert {row["kernel"] for row in found["rooflines"]["rows"]} == set(KERNELS)
    assert found["rooflines"]["left_out"] == found["memory"]["left_out"] == []
    assert [row["method"] for row in found["memory"]["rows"]] == list(gpu_session.MEMORY_METHODS)
    assert all(row["peak"] > 0 for row in found["memory"]["rows"])
    for cell, kind in zip(found["layers"]["cells"], ("step", "decode"), strict=True):
        assert (cell["kind"], cell["mode"], cell["left_out"]) == (kind, "plain", {})
        sampled = layer_cells.SAMPLED if kind == "step" else ()
        assert set(cell["to_floor"]) == {*layer_cells.STRATEGIES, *layer_cells.PEERS, *sampled}
    assert [reason.partition(" ")[0] for reason in found["layers"]["left_out"]] == ["graph", "compiled"]
    assert {goal["verdict"] for goal in document["goals"]} == {"not measured"}, "times of an interpreter mean nothing"


def test_a_session_writes_few_files_that_can_be_published(session: Path) -> None:
    assert {path.name for path in session.iterdir()} == {"summary.json", "summary.md"} | PLOTS
    for name in ("summary.json", "summary.md"):
        text = (session / name).read_text(encoding="utf-8")
        assert str(ROOT) not in text
        assert str(session) not in text
        assert f'"{platform.node()}"' not in text
    text = (session / "summary.md").read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        f"## {p.title}" for p in gpu_session.PARTS
    ]
    assert all(f"]({plot})" in text for plot in PLOTS)


def test_a_signal_leaves_a_valid_summary(tmp_path: Path) -> None:
    """In the numerical suite, the second part, whose own process ends with it."""
    summary = tmp_path / "summary.json"
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
    assert {parts[key]["status"] for key in ("rooflines", "memory", "layers")} == {"not run"}
    assert "not run, 0 s: stopped by SIGINT" in (tmp_path / "summary.md").read_text(encoding="utf-8")


def test_tuning_rewrites_one_family_of_the_table(tmp_path: Path) -> None:
    out = tmp_path / "table.json"
    command = [sys.executable, "-m", "dual_lora_kernels.cli", "tune", "--tiny", "--out", str(out), "--json"]
    done = subprocess.run(command, cwd=ROOT, env=INTERPRETED, check=True, timeout=100, capture_output=True, text=True)
    assert "left out" not in done.stderr
    assert json.loads(done.stdout) == {"family": INTERPRETED_FAMILY, "table": str(out)}
    before, after = shapes.load(), shapes.load(out)
    assert {family for family in before if before[family] != after[family]} == {INTERPRETED_FAMILY}
    tuned = after[INTERPRETED_FAMILY]
    for operation in ("forward", "input_gradient"):
        entries = getattr(tuned, operation)
        fallback = [None] if entries[3].whole_tiles else []  # for weights that end within a tile
        assert [shape.up_to for shape in entries] == [16, 64, 128, None, *fallback]
    measured = [
        *tuned.forward[:4],
        *tuned.input_gradient[:4],
        tuned.effective_weight,
        tuned.factor_gradients,
        tuned.token_product,
    ]
    assert all(
        shape.source.startswith("measured: interpreter, ") and " µs at 32x64" in shape.source for shape in measured
    )
    assert set(tuned.fused_up_to.values()) <= {0, 1, 3}


# Command lines


@pytest.mark.parametrize("out", [[], ["--out", str(shapes.PATH)]])
def test_tiny_tuning_refuses_the_shipped_table(out: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    before = shapes.PATH.read_bytes()
    assert cli.main(["tune", "--tiny", *out]) == 1
    assert "--tiny: its times mean nothing, so it does not write to tile_shapes.json" in capsys.readouterr().err
    assert shapes.PATH.read_bytes() == before


@pytest.mark.parametrize(
    "command",
    [
        lambda arguments: sys.exit(cli.main(["tune", *arguments])),
        lambda arguments: gpu_session.main([*arguments, "--out", "unused"]),
    ],
)
def test_without_a_gpu_both_say_so(
    command: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        command([])
    assert "no GPU: " in capsys.readouterr().err


# Budgets


def test_a_part_takes_what_the_later_ones_leave_or_its_fair_share() -> None:
    assert part_seconds(100.0, [20.0, 30.0]) == 70.0
    assert part_seconds(10.0, [20.0, 30.0]) == 4.0  # two fifths of what is left
    assert part_seconds(50.0, [20.0, 30.0]) == 20.0
    assert part_seconds(0.0, [20.0]) == part_seconds(-3.0, [20.0]) == 0.0
    shares, left = [part.seconds for part in gpu_session.PARTS], 60 * 8.0
    assert sum(shares) <= left
    assert part_seconds(left - shares[0], shares[1:]) >= 150, "the numerical suite gets its two and a half minutes"


def test_a_deadline_counts_down() -> None:
    now = [5.0]
    deadline = Deadline.after(2.0, clock=lambda: now[0])
    assert (deadline.left(), deadline.passed) == (2.0, False)
    now[0] = 7.0
    assert (deadline.left(), deadline.passed) == (0.0, True)


def test_a_guard_ends_a_part_by_its_time_and_by_a_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dual_lora_kernels.tuning.budget.GRACE", 0.0)
    handler = signal.getsignal(signal.SIGTERM)
    with Guard() as guard:
        with pytest.raises(Stopped, match="its time was up"), guard.part(0.05):
            time.sleep(5)
        assert guard.told is None
        with guard.part(60):
            pass
        assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
        os.kill(os.getpid(), signal.SIGTERM)  # between parts: remembered, not raised
        assert guard.told == "SIGTERM"
    with Guard() as guard, pytest.raises(Stopped, match="stopped by SIGTERM"), guard.part(60):
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is handler


# Rooflines


def test_work_of_each_kernel() -> None:
    """4096², r1 = r2 = 16, counted by hand: 2²⁴ weights, 2·16·8192 numbers in the factors."""
    weights, factor_bytes, rank_operations = 2**24, 4 * 32 * 8192, 2 * 32 * 2**24
    expected = {
        ("effective_weight", 0): Work(4 * weights + factor_bytes, rank_operations),
        ("factor_gradients", 0): Work(4 * weights + 2 * factor_bytes, 3 * rank_operations),
        ("forward", 16): Work(2 * weights + 2 * 16 * 8192 + factor_bytes, 2 * 16 * weights + rank_operations),
        ("token_product", 256): Work(2 * 256 * 8192 + 2 * factor_bytes, 2 * 256 * weights + 3 * rank_operations),
    }
    assert {key: rooflines.work(Point(key[0], 4096, 4096, key[1])) for key in expected} == expected
    assert rooflines.work(Point("input_gradient", 8, 32, 3)) == rooflines.work(Point("forward", 8, 32, 3))


def test_the_larger_floor_is_the_roofline() -> None:
    assert Work(bytes=300, operations=4000).floor(Ceilings(100.0, 1000.0)) == (3.0, 4.0)
    assert Reached(8.0, 300, 4000, bytes_floor=3.0, operations_floor=4.0).fraction == 0.5
    assert Reached(8.0, 300, 4000, bytes_floor=6.0, operations_floor=4.0).fraction == 0.75


# Tuning


def test_fused_is_kept_up_to_where_panels_first_win() -> None:
    assert tune.fused_up_to({16: 0.5, 64: 0.9, 128: 1.1, 256: 0.9}) == 64
    assert tune.fused_up_to({16: 1.0}) == tune.fused_up_to({}) == 0
    assert tune.fused_up_to({64: 0.9, 16: 0.5}) == 64


def test_a_score_is_the_geometric_mean_over_the_layers() -> None:
    shape = shapes.PanelShape(1, 1, 1, 1)
    assert tune.Measured(shape, (1.0, 8.0)).score(tune.Measured(shape, (2.0, 1.0))) == pytest.approx(2.0)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("family", shapes.TABLE)
def test_candidates_start_with_the_shape_in_use_and_differ(family: str, kernel: str) -> None:
    for slot in candidates.slots(kernel, candidates.CLASS_TOKENS, 1024):
        grid = candidates.candidates(slot, shapes.TABLE[family])
        assert grid[0] == candidates.current(slot, shapes.TABLE[family])
        tiles = [dataclasses.replace(shape, source="") for shape in grid]
        assert len(set(tiles)) == len(tiles) > 4
        assert all(getattr(shape, "up_to", None) == slot.up_to for shape in grid)
        names = {"rows", "columns", "tokens", "first", "second"}
        sizes = [size for shape in grid for name, size in dataclasses.asdict(shape).items() if name in names]
        assert all(size >= 16 and size & (size - 1) == 0 for size in sizes), "what Triton's products take"


def test_a_written_table_reads_back_and_keeps_the_other_families(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    other = dataclasses.replace(shapes.TABLE["sm_80"], fused_up_to={"forward": 7})
    tune.write_table(path, "gfx942", other)
    expected = shapes.load() | {"gfx942": other}
    assert shapes.load(path) == expected
    tune.write_table(path, "sm_90", other)
    assert shapes.load(path) == expected | {"sm_90": other}
    assert [each.name for each in tmp_path.iterdir()] == ["table.json"]


@pytest.mark.parametrize("kernel", ["effective_weight", "forward", "input_gradient"])
def test_a_shape_with_another_weight_is_refused(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake kernel that changes one element of W, in the last bit, under one shape."""
    family = INTERPRETED_FAMILY
    torch.manual_seed(0)

    def results(name: str, given: Operands) -> tuple[torch.Tensor, ...]:
        weight = given.weight.clone()
        if name == kernel and current_entry() == bad:
            weight.view(torch.int16)[0, 0] ^= 1
        if name == "effective_weight":
            return (weight,)
        return (given.x @ weight.t() if name == "forward" else given.grad @ weight,)

    def current_entry() -> candidates.Shape:
        return candidates.current(slot, shapes.TABLE[family])

    tuner = tune.Tuner(torch.device("cpu"), Architecture(family, 1), tune.TINY, gpu_session.Console(quiet=True))
    slot = tuner.slots(kernel)[0]
    trusted, good, bad = candidates.candidates(slot, shapes.TABLE[family])[:3]
    monkeypatch.setattr(tune, "results", results)
    before = shapes.TABLE[family]
    measured = [tune.Measured(shape, (seconds,)) for shape, seconds in ((trusted, 3.0), (good, 2.0), (bad, 1.0))]
    monkeypatch.setattr(tuner, "_measure", lambda *_: measured)
    monkeypatch.setattr(tuner, "_failure_at_the_largest_rank", lambda *_: None)
    winner = tuner.winner(slot, Deadline.after(60))
    assert winner is not None
    assert dataclasses.replace(winner, source="") == good, "the fastest one's W differs"
    assert "2000000.0 µs at 32x64" in winner.source
    reason = tuner._disagreement(slot, bad, trusted)
    assert reason == "W differs in 1 elements from the one that panels write"
    assert shapes.TABLE[family] is before


# Layers, the suite and the goals


def test_cells_are_all_there_once_and_start_with_the_goals() -> None:
    found = layer_cells.cells()
    layers = len(layer_cells.LLAMA_8B) + len(layer_cells.LLAMA_70B)
    per_layer = 2 * (len(layer_cells.TOKENS) + len(layer_cells.DECODE_TOKENS))
    compiled = len(layer_cells.LLAMA_8B) * (len(layer_cells.TOKENS) + len(layer_cells.DECODE_TOKENS))
    assert len(set(found)) == len(found) == layers * per_layer + compiled
    first = found[: 3 * len(layer_cells.LLAMA_8B)]
    assert {(cell.kind, cell.mode, cell.tokens) for cell in first} == {
        ("step", "graph", 4096), ("decode", "graph", 1), ("decode", "graph", 16),
    }  # fmt: skip


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


def test_a_cell_without_peft_measures_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)  # importing it fails
    set_default_backend("eager")
    found = layer_cells.measure(layer_cells.Cell("decode", "plain", 32, 48, 3), torch.device("cpu"))
    assert set(found["to_floor"]) == {"auto", "panels", "naive"}
    assert {name: reason.partition(":")[0] for name, reason in found["left_out"].items()} == {
        "fused": "ValueError",  # the eager backend has no fused kernels
        "lora": "ModuleNotFoundError",
        "dora": "ModuleNotFoundError",
    }


def test_a_time_limit_ends_the_rounds_but_leaves_three() -> None:
    def rounds(limit: float) -> int:
        candidate = {"a": lambda: time.sleep(0.01)}
        device = torch.device("cpu")
        return len(timing.interleaved(candidate, rounds=5, warmup=0, device=device, limit=limit, show=False)["a"])

    assert (rounds(limit=0.0), rounds(limit=60.0)) == (timing.FEWEST_ROUNDS, 5)


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
