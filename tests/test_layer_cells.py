"""Layer cells: which there are, what one measures, and when it has rounds enough."""

from __future__ import annotations

import sys
import time
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.gpu import document
from benchmarks.harness import timing
from benchmarks.layers import layer_cells
from benchmarks.layers.checks import ALLOWED
from benchmarks.layers.methods import NaiveDualLora
from dual_lora_kernels import set_default_backend
from dual_lora_kernels.runtime_settings import current_settings


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


def test_a_cell_without_peft_measures_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)  # importing it fails
    set_default_backend("eager")
    found = layer_cells.measure(layer_cells.Cell("decode", "plain", 32, 48, 3), torch.device("cpu"), 3)
    assert set(found["to_floor"]) == {"auto", "panels", "naive"}
    assert {name: reason.partition(":")[0] for name, reason in found["left_out"].items()} == {
        "fused": "ValueError",  # the eager backend has no fused kernels
        "lora": "ModuleNotFoundError",
        "dora": "ModuleNotFoundError",
    }


@pytest.mark.parametrize("kind", ["step", "decode"])
def test_a_candidate_that_computes_something_else_is_not_timed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a strategy alone, whose module is the others' too."""
    right = layer_cells._own

    def wrong(cell: Any, module: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> Any:
        run = right(cell, module, x, grad)

        def scaled() -> Any:
            returned = run()
            is_wrong = isinstance(module, NaiveDualLora) or current_settings().strategy == "panels"
            return [1.5 * each for each in returned] if is_wrong else returned

        return scaled

    monkeypatch.setattr(layer_cells, "_own", wrong)
    set_default_backend("eager")
    found = layer_cells.measure(layer_cells.Cell(kind, "plain", 32, 48, 3), torch.device("cpu"), 1)
    for name in ("naive", "panels"):
        assert found["left_out"][name].startswith("computes something else than it claims")
        assert found["checked"][name]["output"] > ALLOWED
    assert {"floor", "auto", "lora", "dora"} <= found["seconds"].keys()
    assert not {"naive", "panels"} & found["seconds"].keys()
    (case,) = document.layer_cases([found])
    assert case.subjects["dual_lora"].checked == found["checked"]["auto"]
    assert case.subjects["dual_lora_panels"].checked == found["checked"]["panels"]
    assert case.subjects["dual_lora_panels"].left_out == found["left_out"]["panels"]


def test_a_time_limit_ends_the_rounds_but_leaves_three() -> None:
    def rounds(limit: float) -> int:
        candidate = {"a": lambda: time.sleep(0.01)}
        device = torch.device("cpu")
        return len(timing.interleaved(candidate, rounds=5, warmup=0, device=device, limit=limit, show=False)["a"])

    assert (rounds(limit=0.0), rounds(limit=60.0)) == (timing.FEWEST_ROUNDS, 5)
