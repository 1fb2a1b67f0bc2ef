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
from benchmarks.harness.results import Results, document, read
from benchmarks.layers import merging
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
    options.quick, options.rounds = False, 1
    return options


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_subject_merges_what_it_claims(dtype: str) -> None:
    (results,) = preset.run(_options("--shape", "24x40", "--dtype", dtype, "--rank", "4"), Console(quiet=True))
    jsonschema.validate(_as_json(results), SCHEMA)
    (found,) = results.cases
    assert found.reference == "copy"
    assert found.timed() == ["copy", *merging.SUBJECTS]
    for name in merging.SUBJECTS:
        assert found.subjects[name].checked["weight"] <= 2
        assert found.subjects[name].bytes["peak"] > 0
    title, headings, cells = preset.table(found)
    assert title == f"Merging into 24x40, {dtype}, r1=r2=4"
    assert {len(row) for row in cells} == {len(headings)}


@pytest.mark.parametrize("name", merging.SUBJECTS)
def test_every_call_merges_once_more(name: str) -> None:
    """Or the rounds after the first would time something else."""
    module = build(name, frozen_linear(32, 24, torch.float32), 4, 4)
    for parameter in module.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.5)
    run = merging.merging(name, module)
    weights = [merging.merged_weight(module).clone()]
    for _ in range(3):
        run()
        weights.append(merging.merged_weight(module).clone())
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
    (results,) = preset.run(_options("--shape", "24x40", "--dtype", "fp32"), Console(quiet=True))
    lora = results.cases[0].subjects["lora"]
    assert lora.seconds == ()
    assert lora.left_out is not None
    assert "computes something else than it claims" in lora.left_out


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


def test_the_converted_run_is_the_one_that_was_measured() -> None:
    """Five rounds of 4.4 GB on an EPYC with AVX2, and fifty kills."""
    (path,) = (RESULTS / "machines").glob("*/merge-on-disk.json")
    (found,) = read(path).cases
    assert [len(found.subjects[name].seconds) for name in found.timed()] == [5, 5, 5]
    assert round(4362.089805 / found.seconds("dual_lora").median) == 862
    assert found.subjects["dual_lora"].counts["identical_after_kills"] == 1


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
