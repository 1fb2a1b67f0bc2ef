"""The model of a step's device time: its parts on made-up kernels, and what it says of the shipped ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.compiler.recorded_step import Product, SmallOperation, decoding, training_step
from benchmarks.gpu import session_summary
from benchmarks.model import chips, kernel_time, predict, search
from benchmarks.model.chips import CHIPS
from benchmarks.model.kernel_time import Counts, Part
from dual_lora_kernels.backends.triton.architecture import Architecture
from dual_lora_kernels.backends.triton.arguments import SumConstants
from dual_lora_kernels.backends.triton.launch import Launch, Plan
from dual_lora_kernels.backends.triton.shapes import TABLE
from dual_lora_kernels.tuning.candidates import Slot

H200 = CHIPS["H200"]
PLAN = Plan((1, 1, 1), SumConstants(16, 32, True, True, True, True), 4, 1)
STRAIGHT = Part(instructions=1000, barriers=0, matrix_waits=0, loads=0, macs=0.0)


def test_every_family_of_the_table_has_a_chip() -> None:
    families = {family for family in TABLE if not family.startswith("any")}
    assert families == {chip.family for chip in CHIPS.values()}


@pytest.mark.parametrize(
    ("registers", "shared", "programs"), [(128, 0, 4), (129, 0, 3), (64, 100 * 1024, 2), (16, 0, 16)]
)
def test_a_unit_holds_what_fits(registers: int, shared: int, programs: int) -> None:
    assert kernel_time.residents(Counts(registers, shared, STRAIGHT, None), PLAN, H200) == programs


def test_programs_share_issue_slots_and_hide_waits() -> None:
    """One program alone waits; four of them take the time of their instructions, which a unit issues four a cycle."""
    waiting = replace(STRAIGHT, barriers=20)
    assert kernel_time.part_cycles(waiting, 4, 1, H200) > kernel_time.part_cycles(STRAIGHT, 4, 1, H200) > 1000
    assert kernel_time.part_cycles(waiting, 4, 4, H200) == kernel_time.part_cycles(STRAIGHT, 4, 4, H200) == 4000


def test_products_take_whole_waves_or_their_bytes() -> None:
    one_wave = predict.product_seconds(Product(1024, 4096, 8192, 0), H200)
    ideal = 2 * 1024 * 4096 * 8192 / H200.product_operations
    assert one_wave == pytest.approx(ideal * 132 / 128 + H200.launch_seconds)
    few_tokens = Product(1, 4096, 4096, 2 * 4096 * 4096)
    assert predict.product_seconds(few_tokens, H200) >= few_tokens.bytes / H200.bytes_per_second


def test_steps_are_recorded_without_questions_and_views() -> None:
    step = training_step(Architecture("sm_90", 132), 4096, 4096, 8192, 16)
    operations = [event.name for event in step.events if isinstance(event, SmallOperation)]
    assert operations == ["_foreach_zero_"]
    products = [event for event in step.parameter_gradients if isinstance(event, Product)]
    assert {(product.m, product.n, product.k) for product in products} == {(1024, 4096, 8192)}


def test_decoding_is_one_launch() -> None:
    """The last program of each split sum adds the parts, the bias and rounds."""
    for tokens in (1, 16):
        (launch,) = decoding(Architecture("sm_90", 132), 4096, 4096, tokens, 16)
        assert isinstance(launch, Launch)
        assert launch.plan().grid[1] > 1


@pytest.mark.parametrize(
    ("sizes", "bound"),
    [((4096, 4096, 8192), 1.12), ((14336, 4096, 8192), 1.15), ((4096, 14336, 8192), 1.15), ((4096, 4096, 2048), 1.8)],
    ids=str,
)
def test_predicted_steps_are_near_their_floor(sizes: tuple[int, int, int], bound: float) -> None:
    """The goals of the work on launches and panels, with whichever Triton is installed; nothing here is timed."""
    assert predict.predict(*sizes, H200).ratio <= bound


def test_a_session_replaces_the_ceilings() -> None:
    chip = chips.measured("sm_90", 114, 600e12, 2e12)
    assert chip is not None
    assert (chip.units, chip.product_operations, chip.bytes_per_second) == (114, 600e12, 2e12)
    assert predict.cell_seconds("step", 1024, 1024, 4096, chip) > predict.cell_seconds("step", 1024, 1024, 4096, H200)
    assert chips.measured("sm_75", 40, 1.0, 1.0) is None


def test_predictions_stand_beside_measurements() -> None:
    cell = {
        "kind": "step", "mode": "graph", "rows": 8, "columns": 16, "tokens": 4,
        "microseconds": {"auto": 30.0, "floor": 10.0}, "predicted_microseconds": {"auto": 20.0, "floor": 10.0},
    }  # fmt: skip
    _, table = session_summary._predictions([cell, cell | {"predicted_microseconds": None}])
    assert table.count("step 8x16") == 1
    assert "| 20.0 | 30.0 | 1.50 | 10.0 | 10.0 | 1.00 |" in table


def test_the_search_prefers_the_faster_shape_and_keeps_the_others() -> None:
    slot = Slot("forward", 16, 16)
    shape = TABLE["sm_90"].weight_product("forward", 16, 4096, 4096)
    slower = replace(shape, block_m=64, source="")
    assert search.predicted(H200, slot, shape)[0] < search.predicted(H200, slot, slower)[0]
    entries = search.with_shape(TABLE["sm_90"], slot, slower).forward
    assert entries[0] == slower
    assert entries[1:] == TABLE["sm_90"].forward[1:]
    narrow = replace(shape, block_n=32)
    refusals = [search.refusal(row) for row in search.variants("sm_90", slot, narrow)]
    assert any(reason and "mma.sync" in reason for reason in refusals)


def test_the_command_writes_what_it_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict, "STEPS", predict.STEPS[:1])
    monkeypatch.setattr(predict, "DECODES", predict.DECODES[:1])
    predict.main(["--out", str(tmp_path)])
    document = json.loads((tmp_path / "step_model_h200.json").read_text(encoding="utf-8"))
    assert document["steps"][0]["ratio"] > 1
    assert "4096 × 4096, 512" in (tmp_path / "step_model_h200.md").read_text(encoding="utf-8")
    assert (tmp_path / "step_model_h200.png").stat().st_size > 0
