"""What documents say of GPUs, from the session's records to the table."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.gpu import document
from benchmarks.harness.environment import environment
from benchmarks.harness.results import Case, Measurement, Results
from benchmarks.publish import gpu, shown

CELL: dict[str, Any] = {
    "kind": "step", "mode": "graph", "rows": 4096, "columns": 14336, "tokens": 4096, "layers_in_turn": 1,
    "seconds": {"floor": [1.0, 2.0, 4.0], "auto": [1.1, 2.2, 4.4], "dora": [2.0, 2.0, 2.0]},
    "predicted_microseconds": {"auto": 9.0, "floor": 8.0}, "left_out": {"fused": "ValueError: too large"},
    "checked": {"floor": {"output": 1.0}, "auto": {"output": 1.25, "gradient of A": 0.5}},
}  # fmt: skip
MODEL = Case(
    {"kind": "train", "dtype": "bf16", "model": "llama-3.2-1b", "batch": 4, "sequence": 1024, "tokens": 4096,
     "checkpointing": True},
    "floor",
    {
        "floor": Measurement((0.5,), counts={"tokens": 4096}),
        "dual_lora": Measurement((0.55,), counts={"tokens": 4096}, bytes={"held": 3 * 2**30, "peak": 2**30}),
        "naive": Measurement(left_out="needs about 99.0 GiB"),
    },
)  # fmt: skip


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> list[Results]:
    """The documents that there are."""
    found: list[Results] = []
    monkeypatch.setattr(shown, "every", lambda _: iter(found))
    return found


def _results(device: str, *cases: Case) -> Results:
    about = environment(torch.device("cpu")) | {"device": device}
    return Results("gpu", "python -m benchmarks gpu", about, cases, 1.0)


def test_a_cell_becomes_a_case_with_every_round_and_reason() -> None:
    (case,) = document.layer_cases([CELL])
    assert (case.reference, case.ratio("dual_lora").median) == ("floor", pytest.approx(1.1))
    assert {name: measured.seconds for name, measured in case.subjects.items()} == {
        "floor": (1.0, 2.0, 4.0), "dual_lora": (1.1, 2.2, 4.4), "dora": (2.0, 2.0, 2.0), "dual_lora_fused": (),
    }  # fmt: skip
    assert case.subjects["dual_lora"].counts == {"predicted_microseconds": 9.0}
    assert case.subjects["dual_lora"].checked == {"output": 1.25, "gradient of A": 0.5}
    assert case.subjects["dual_lora_fused"].left_out == "ValueError: too large"


def test_without_a_gpus_document_the_table_says_so(results: list[Results]) -> None:
    assert gpu.by_machine() == gpu.NOTHING
    results.append(_results("cpu", *document.layer_cases([CELL])))
    assert gpu.by_machine() == gpu.NOTHING, "an interpreter's times are no GPU's"


def test_a_gpus_layers_and_models_are_shown(results: list[Results]) -> None:
    results.append(_results("NVIDIA H200", *document.layer_cases([CELL]), MODEL))
    lines = gpu.by_machine().splitlines()
    assert lines[0] == "### NVIDIA H200"
    (layer,) = (line for line in lines if line.startswith("| 4096 × 14336"))
    assert layer == "| 4096 × 14336, 4,096 tokens | graph | 2,000 | **1.10** | 1.00 |"
    rows = [line for line in lines if line.startswith("| llama-3.2-1b, 4 × 1024, checkpointed")]
    assert [row.split("|")[2].strip() for row in rows] == ["three products", "**dual_lora_kernels**"]
    assert rows[1].endswith("| **550** | **7,447** | **1.10** | **3,072** | **1,024** |")
    assert "- dual_lora_kernels, fused, step, graph, 4096 × 14336, 4,096 tokens: ValueError: too large" in lines
    assert "- naive Dual LoRA, llama-3.2-1b, 4 × 1024, checkpointed: needs about 99.0 GiB" in lines
