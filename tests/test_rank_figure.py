"""The rank figure: ranks that are known are found, and a small study has every layer, matrix and time."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.training import rank_figure
from benchmarks.training.gradient_columns import LENGTH
from dual_lora_kernels.spectra import spectrum
from examples.demo.models import tiny_llama

WIDTH = 40


def _measured(rank: int, layer: str, when: str = "after", seed: int = 0) -> rank_figure.Measured:
    generator = torch.Generator().manual_seed(rank)
    matrix = torch.randn(48, rank, generator=generator) @ torch.randn(rank, WIDTH, generator=generator)
    found = spectrum(partial(iter, (matrix,)), (48, WIDTH), rank_figure.RANK)
    return rank_figure.Measured(rank_figure.LORA, when, seed, layer, found)


def test_the_table_has_medians_and_ranges() -> None:
    rows = rank_figure.cells([_measured(rank, f"layers.{rank}.up_proj") for rank in (2, 3, 20)])
    assert [row[:4] for row in rows] == [(rank_figure.LORA, "after", "3 (2 to 20)", str(WIDTH))]
    assert rows[0][-1] == "0.0 %"


def test_rank_figure_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LoRA's rank is its own; Dual LoRA's, with half of it in each group, is the model's width."""
    monkeypatch.setattr(rank_figure, "SEEDS", (0,))
    torch.manual_seed(0)
    tiny_llama(WIDTH, 1, LENGTH).save_pretrained(tmp_path / "work" / "Llama")
    sizes = f"--hidden {WIDTH} --steps 2"
    folders = ("--work", str(tmp_path / "work"), "--out", str(tmp_path))
    rank_figure.main([*sizes.split(), *folders])
    document = json.loads((tmp_path / "rank_figure.json").read_text(encoding="utf-8"))
    found = {(each["matrix"], each["training"], each["layer"]): each for each in document["layers"]}
    layers = {layer for _, _, layer in found}
    assert len(layers) == 7
    assert len(found) == 7 * 7  # three matrices before and after, and LoRA's ΔW after training
    for (matrix, _, _), values in found.items():
        assert values["largest_rank"] == WIDTH
        if matrix == rank_figure.LORA:
            assert values["rank"] == rank_figure.RANK
        elif matrix == "Dual LoRA: ΔW":
            assert values["rank"] == WIDTH
    for layer in layers:  # two steps move the factors, and the files before and after are two
        before, after = (found["Dual LoRA: ΔW", when, layer] for when in ("before", "after"))
        assert before["stable_rank"] != after["stable_rank"]
    assert document["median_values"][rank_figure.LORA]["after"]["1"] == 1.0
    assert "What this does not show" in (tmp_path / "rank_figure.md").read_text(encoding="utf-8")
