"""The cost model of many GPUs, against sums by hand: a tiny model's numbers, and what the real sizes must give."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.distributed import cost_model
from benchmarks.distributed.cost_model import (
    GPUS,
    LAYOUTS,
    METHODS,
    MODELS,
    NF4,
    Layout,
    Model,
    Settings,
    Traffic,
    all_reduce,
    gather,
)

TINY = Model(hidden=4, layers=2, intermediate=8, heads=2, kv_heads=1, head_dim=2, vocabulary=10)
"""q and o 4 × 4, k and v 2 × 4, gate and up 8 × 4, down 4 × 8: 144 numbers in a block."""
SETTINGS = Settings(tokens=16, sequence=8, rank=2, logits_chunk=8)
DDP, FSDP, _, QUANTISED = LAYOUTS
PAIRS = Layout("pairs", parts=2, sharded=True)


@pytest.mark.parametrize(
    ("size", "numbers"),
    [("1B", 1_235_814_400), ("3B", 3_212_749_824), ("8B", 8_030_261_248), ("70B", 70_553_706_496),
     ("405B", 405_853_388_800)],
)  # fmt: skip
def test_shapes_have_the_checkpoints_numbers(size: str, numbers: int) -> None:
    assert MODELS[size].numbers == numbers


def test_a_tiny_models_numbers() -> None:
    assert (TINY.weights, TINY.outside, TINY.numbers) == (144, 84, 388)
    # r · Σ (N + K) = 2 · 64; in pairs the five column-wise layers halve N, the two row-wise ones K.
    assert [TINY.factors(parts, 2) for parts in (1, 2)] == [128, 92]
    assert TINY.replicated(2) == 2 * (5 * 4 + 2 * 4)
    assert TINY.gathered(1, 2) == 2 * (144 + 8) + 4 * 128


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (DDP, (776, 4096, 256, 3328, 0, 800)),
        (FSDP, (97, 512, 256, 3328, 2 * 816 + 512, 800)),
        (PAIRS, (97, 736, 256, 2048, 2 * 520 + 368, 400)),
        (QUANTISED, (288 * NF4 + 200, 4096, 256, 3328, 0, 800)),
    ],
    ids=lambda value: value.name if isinstance(value, Layout) else "",
)
def test_a_tiny_models_memory(layout: Layout, expected: tuple[float, ...]) -> None:
    found = cost_model.memory(TINY, layout, 8, "Dual LoRA", SETTINGS)
    assert tuple(found.values()) == (*expected, 32 * 2**20)


def test_lora_needs_no_workspace_but_a_dequantised_weight() -> None:
    found = cost_model.memory(TINY, QUANTISED, 8, "LoRA", SETTINGS)
    assert (found["gathered"], found["workspace"]) == (4 * 8 * 2, 0)
    assert pytest.approx(0.516, abs=5e-4) == NF4


def test_collectives_cross_the_network_once_for_a_node() -> None:
    assert gather(64, 8, 8) == Traffic(56, 7)  # 63 of 64 bytes come from others
    assert gather(64, 8, 1) == Traffic(56, 0)
    assert gather(64, 1, 8) == Traffic(0, 56)
    assert all_reduce(64, 8, 8) == Traffic(112, 14)
    assert (Traffic(450e9, 25e9).seconds, Traffic(450e9, 100e9).seconds) == (1.0, 2.0)


def test_a_tiny_models_communication() -> None:
    sharded = cost_model.communication(TINY, FSDP, 64, SETTINGS)
    weights = 2 * 2 * 816 + 2 * 84
    assert sharded["weights"] == Traffic(weights * 7 / 8, weights * 7 / 64)
    assert sharded["gradients"] == gather(2 * 128 * 4, 8, 8)
    assert sharded["activations"] == sharded["partial gradients"] == Traffic()
    assert cost_model.communication(TINY, DDP, 64, SETTINGS)["gradients"] == all_reduce(2 * 128 * 4, 8, 8)
    pairs = cost_model.communication(TINY, PAIRS, 8, SETTINGS)
    # Six all-reduces in each of two blocks, two outside, of 16 × 4 bf16 numbers; a pair's traffic is one such size.
    assert pairs["activations"] == Traffic(14 * 128, 0)
    assert pairs["partial gradients"] == Traffic(2 * 56 * 4, 0)


def test_a_tiny_models_operations() -> None:
    attention, head, product = 2048, 4 * 16 * 10 * 4, 2 * 16 * 288
    factors = 2 * 16 * 256
    assert cost_model.operations(TINY, 1, "LoRA", SETTINGS) == (4.5 * attention + head + 3 * product + 4 * factors, 0)
    assert cost_model.operations(TINY, 1, "Dual LoRA", SETTINGS) == (
        4.5 * attention + head + 4 * product, 4 * (2 * 2 * 288) + 4 * 2 * 288,
    )  # fmt: skip
    once, _ = cost_model.operations(TINY, 1, "Dual LoRA", SETTINGS, forwards=1)
    assert once == 3.5 * attention + head + 3 * product


def test_tensor_parallelism_divides_the_rebuilding() -> None:
    whole, halved = (cost_model.operations(TINY, parts, "Dual LoRA", SETTINGS) for parts in (1, 2))
    assert halved == (whole[0] / 2, whole[1] / 2)


def test_70b_by_hand() -> None:
    """141 GB of bf16 fit no GPU; LoRA's three products of 8192 tokens alone take 6.8 s at half of peak."""
    found = {(at.gpus, at.layout, at.method): at for at in cost_model.rows(MODELS["70B"], Settings())}
    assert len(found) == len(GPUS) * len(LAYOUTS) * len(METHODS)
    assert found[8, "DDP", "LoRA"].memory["base"] == pytest.approx(141.1e9, rel=1e-3)
    assert found[8, "NF4 + DDP", "LoRA"].memory["base"] == pytest.approx(68.45e9 * 0.516 + 4.2e9, rel=1e-3)
    assert not any(at.fits for (_, layout, _), at in found.items() if layout == "DDP")
    products = 6 * 8192 * 68.45e9 / (0.5 * 989e12)
    assert products < found[8, "FSDP2", "LoRA"].compute < 1.1 * products
    assert 4 / 3 < found[64, "FSDP2", "Dual LoRA"].hidden_ratio < 1.4
    # Two gathers of 137 GB and one of embedding and head, over 64 GPUs: the network's 1/8 of 7/8.
    assert found[64, "FSDP2", "LoRA"].traffic["weights"].network == pytest.approx(281e9 * 7 / 64, rel=2e-3)
    assert all(at.open_ratio == at.hidden_ratio == 1 for at in found.values() if at.method == "LoRA")


def test_the_simplest_layouts() -> None:
    sizes = {gpus: [cost_model.simplest(model, gpus, Settings()) for model in MODELS.values()] for gpus in GPUS}
    assert sizes == {8: ["DDP"] * 3 + ["FSDP2", "none"], 64: ["DDP"] * 3 + ["FSDP2"] * 2}
    # A block of the 70B's takes 1.93 GB (weights, state, hidden), what is outside of blocks 10.2: 36 blocks.
    assert cost_model.largest(DDP, 8, Settings()) == pytest.approx(36 * 855.6e6 + 2.1e9, rel=1e-3)


def test_communication_and_compute_balance() -> None:
    at = (MODELS["70B"], FSDP, 64, "LoRA")
    tokens = cost_model.balance(*at, Settings())
    below, above = (Settings(tokens=count) for count in (tokens - 64, tokens))
    longer = [cost_model.communication_seconds(*at[:3], s) > cost_model.compute_seconds(at[0], 1, "LoRA", s)
              for s in (below, above)]  # fmt: skip
    assert longer == [True, False]


def test_the_command_writes_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cost_model.main(["--model", "8B", "--tokens", "4096", "--out", str(tmp_path)])
    text = (tmp_path / "cost_model.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out == text
    assert "predicted, nothing of this was run on GPUs" in text
    document = json.loads((tmp_path / "cost_model.json").read_text(encoding="utf-8"))
    assert document["settings"]["tokens"] == 4096
    assert len(document["rows"]) == 16
