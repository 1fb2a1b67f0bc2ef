"""The preset that merges: every subject writes the weight that it claims, and a checkpoint's figures become a case."""

from __future__ import annotations

import argparse
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from rich.console import Console
from torch import nn

from benchmarks.checkpoints.merge_checkpoint import Kills, Round, case, merge
from benchmarks.checkpoints.synthetic import make_adapter, make_base
from benchmarks.harness.report import RESULTS
from benchmarks.harness.results import Case, Results, document, every
from benchmarks.layers import subjects
from benchmarks.layers.merging import SUBJECTS, merged_weight
from benchmarks.layers.merging import merging as merges
from benchmarks.layers.methods import build, frozen_linear
from benchmarks.presets import merge as preset
from benchmarks.publish import scale
from benchmarks.publish.shown import Machine, shape

SCHEMA = json.loads((RESULTS / "schema.json").read_text(encoding="utf-8"))
ENVIRONMENT = {
    "date": "2026-11-30", "device": "cpu", "cpu": "a processor", "cores": 2, "threads": 1, "load_average": 0.1,
    "python": "3.12", "torch": "2.13", "dual_lora_kernels": "0.1.0", "commit": "1234567",
}  # fmt: skip


def _as_json(results: Results) -> Any:
    return json.loads(json.dumps(document(results) | {"command": "a test"}))


def _options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    preset.add(parser)
    options = parser.parse_args(["--device", "cpu", *arguments])
    options.quick, options.rounds, options.name = False, 1, None
    return options


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_subject_merges_what_it_claims(dtype: str) -> None:
    results = preset.run(_options("--shape", "24x40", "--dtype", dtype, "--rank", "4"), Console(quiet=True))
    jsonschema.validate(_as_json(results), SCHEMA)
    (found,) = results.cases
    assert found.reference == "copy"
    assert found.timed() == ["copy", *SUBJECTS]
    for name in SUBJECTS:
        assert found.subjects[name].checked["weight"] <= 2
        assert found.subjects[name].bytes["peak"] > 0
    title, headings, cells = preset.table(found)
    assert title == f"Merging into 24x40, {dtype}, r1=r2=4"
    assert {len(row) for row in cells} == {len(headings)}


@pytest.mark.parametrize("name", SUBJECTS)
def test_every_call_merges_once_more(name: str) -> None:
    """Or the rounds after the first would time something else."""
    module = build(name, frozen_linear(32, 24, torch.float32), 4, 4)
    for parameter in module.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.5)
    run = merges(name, module)
    weights = [merged_weight(module).clone()]
    for _ in range(3):
        run()
        weights.append(merged_weight(module).clone())
    changes = [(after - before).norm().item() for before, after in pairwise(weights)]
    assert min(changes) > 1e-3 * weights[0].norm().item()


def test_a_subject_that_merges_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = preset.merging

    def wrong(name: str, module: nn.Module) -> Any:
        run = right(name, module)

        def twice() -> None:
            run()
            run()

        return twice if name == "lora" else run

    monkeypatch.setattr(preset, "merging", wrong)
    results = preset.run(_options("--shape", "24x40", "--dtype", "fp32"), Console(quiet=True))
    lora = results.cases[0].subjects["lora"]
    assert lora.seconds == ()
    assert lora.left_out is not None
    assert "computes something else than it claims" in lora.left_out


@pytest.mark.parametrize("fails", ["merge", "trace"])
def test_a_subject_that_fails_leaves_the_others(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """When it merges, or only when its memory is traced, after it was timed."""
    right, trace = preset.merging, subjects.peak_temporary_bytes
    failing: list[object] = []

    def fail() -> None:
        raise MemoryError("no room\nfor it")

    def merging(name: str, module: nn.Module) -> Any:
        run = right(name, module)
        if name == "naive":
            run = fail if fails == "merge" else run
            failing.append(run)
        return run

    def traced(run: Any, device: torch.device) -> Any:
        return fail() if run in failing else trace(run, device)

    monkeypatch.setattr(preset, "merging", merging)
    monkeypatch.setattr(subjects, "peak_temporary_bytes", traced)
    results = preset.run(_options("--shape", "24x40", "--dtype", "fp32"), Console(quiet=True))
    jsonschema.validate(_as_json(results), SCHEMA)
    (found,) = results.cases
    assert found.subjects["naive"].left_out == "MemoryError: no room"
    assert found.timed() == ["copy", *(name for name in SUBJECTS if name != "naive")]
    assert ["naive Dual LoRA", "MemoryError: no room", "–", "–", "–"] in preset.table(found)[2]


@pytest.mark.parametrize(
    ("arguments", "quick", "measured"),
    [
        ([], False, (preset.DEPTH, preset.KILLS)),
        ([], True, (preset.QUICK_DEPTH, preset.QUICK_KILLS)),
        (["--depth", "3"], True, (3, preset.QUICK_KILLS)),
        (["--depth", "3", "--kills", "7"], True, (3, 7)),
        (["--kills", "7"], False, (preset.DEPTH, 7)),
    ],
)
@pytest.mark.parametrize("name", [None, "mine"])
def test_on_disk_takes_what_is_asked_for_and_a_name_of_its_own(
    arguments: list[str], quick: bool, measured: tuple[int, int], name: str | None, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    seen: list[tuple[int, int]] = []

    def measure(folder: Path, depth: int, rank: int, rounds: int, kills: int, console: Console) -> Case:
        seen.append((depth, kills))
        return case(depth, rank, 1, ROUNDS, Kills(kills, 0, 0, True))

    monkeypatch.setattr(preset.merge_checkpoint, "measure", measure)
    options = _options("--on-disk", str(tmp_path), *arguments)
    options.quick, options.name = quick, name
    preset.run(options, Console(quiet=True))
    assert seen == [measured]
    assert (options.name, options.document) == (name, "merge-on-disk")


ROUNDS = (Round(2.0, 1.0, 6.0, 20.0, 1000), Round(2.0, 2.0, 8.0, None, 3000))


def test_a_checkpoints_rounds_are_a_case() -> None:
    found = case(10, 16, 4_000_000_000, ROUNDS, Kills(kills=50, left_parts=47, too_late=3, equal=True))
    assert {name: found.seconds(name).median for name in found.timed()} == {
        "cp": 2.0, "cp_and_sync": 3.5, "dual_lora": 7.0,
    }  # fmt: skip
    assert found.ratio("dual_lora").median == 3.5
    assert found.subjects["dual_lora"].bytes == {"resident": 3000}
    assert found.subjects["dual_lora"].counts["kills_in_the_middle"] == 47
    results = Results("merge", "a test", ENVIRONMENT, (found,), 0.2, {"median": 1.1, "lower": 1.1, "upper": 1.1})
    jsonschema.validate(_as_json(results), SCHEMA)
    assert "4,000 MB in 10 files" in preset.table(found)[0]
    machine = Machine("a machine", {shape(found.settings): found}, [results], {shape(found.settings): results})
    text = "\n".join(scale.merging_of(machine))
    assert "| **`dual-lora merge`** | 571 | 3.50 (3.25 to 3.75) |" in text
    assert "With `--verify` 200 MB/s. After 50 kills, 47 of them in the middle" in text


def test_committed_runs_on_disk_are_whole() -> None:
    """Every machine's: each round of all three, and kills that left the same bytes."""
    runs = [case for run in every("merge") for case in run.cases if case.settings["kind"] == "merge_on_disk"]
    assert runs
    for found in runs:
        assert found.timed() == ["cp", "cp_and_sync", "dual_lora"]
        assert len({len(found.subjects[name].seconds) for name in found.timed()}) == 1
        own = found.subjects["dual_lora"].counts
        assert own["identical_after_kills"] == 1
        assert own["kills_in_the_middle"] + own["kills_after_the_end"] <= own["kills"]
        assert own["checkpoint_bytes"] > 436e6 * float(found.settings["layers"])


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--on-disk: got '.*missing', expected a folder"):
        preset.run(_options("--on-disk", str(tmp_path / "missing")), Console(quiet=True))


def test_what_is_made_to_be_merged_merges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.checkpoints.synthetic._KINDS", {"self_attn.q_proj": (16, 24)})
    make_adapter(tmp_path / "adapter", 2, 4)
    make_base(tmp_path / "base", 2)
    seconds, _ = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert seconds > 0
    files = {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    assert files == {path.name for path in (tmp_path / "base").glob("*.safetensors")}
    assert len(files) == 2
