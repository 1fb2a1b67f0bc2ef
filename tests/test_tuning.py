"""`dual-lora tune`: end to end in Triton's interpreter, its arithmetic, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from dual_lora_kernels import cli
from dual_lora_kernels.backends.triton import shapes
from dual_lora_kernels.backends.triton.architecture import INTERPRETED_FAMILY, Architecture
from dual_lora_kernels.tuning import candidates
from dual_lora_kernels.tuning import tuner as tune
from dual_lora_kernels.tuning.budget import Deadline
from dual_lora_kernels.tuning.kernel_calls import KERNELS, Operands

ROOT = Path(__file__).parent.parent
INTERPRETED = os.environ | {"TRITON_INTERPRET": "1", "OMP_WAIT_POLICY": "PASSIVE"}


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


@pytest.mark.parametrize("out", [[], ["--out", str(shapes.PATH)]])
def test_tiny_tuning_refuses_the_shipped_table(out: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    before = shapes.PATH.read_bytes()
    assert cli.main(["tune", "--tiny", *out]) == 1
    assert "--tiny: its times mean nothing, so it does not write to tile_shapes.json" in capsys.readouterr().err
    assert shapes.PATH.read_bytes() == before


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        sys.exit(cli.main(["tune"]))
    assert "no GPU: " in capsys.readouterr().err


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

    tuner = tune.Tuner(torch.device("cpu"), Architecture(family, 1), tune.TINY, Console(quiet=True))
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
