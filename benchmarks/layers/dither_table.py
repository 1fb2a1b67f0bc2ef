"""How much of an update arrives at a bf16 layer's output, by the way it is added (the README's rounding table).

    python -m benchmarks.layers.dither_table

Ways: ``nearest`` and ``dithered`` are one product with round(W0 + ΔW), as `dual_lora_merge_` writes it and the forward
pass uses it; ``two_products`` is PEFT's, base and update products each rounded to bf16, then added. With y the bf16
output, and y_base = x W0ᵀ and y_update = x ΔWᵀ in fp64,

    gain = ⟨y − y_base, y_update⟩ / ⟨y_update, y_update⟩       SNR = 10 log₁₀(|y_update|² / |y − y_base − y_update|²)

A gain of 1 means that the whole update arrives. ΔW = s · relu(B A) ⊙ sgn(D C) with r1 = r2 = 16 and Gaussian factors;
s sets its rms. Inputs are partly aligned with the update, as a trained update's are: x = (g + 0.7 v) / √(1 + 0.7²), g
standard Gaussian, v a random Gaussian combination of the rows of sgn(ΔW), at rms 1. Signs rather than values let each
entry of ΔW weigh in by its magnitude alone. Unaligned inputs would drown small updates in y's own rounding.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from dual_lora_kernels import dual_lora_delta, dual_lora_merge_

from ..harness import report
from ..harness.environment import environment, sentence

WAYS = {"nearest": "nearest", "two_products": "two products", "dithered": "dithered"}
RMS = (1e-3, 1e-4, 3e-5, 1e-5, 3e-6)
WEIGHT_STD = 0.02
ALIGNMENT = 0.7
STEM = "dither_table"
HEADINGS = ("rms of ΔW", *(f"gain: {way}" for way in WAYS.values()), *(f"SNR dB: {way}" for way in WAYS.values()))


@dataclass(frozen=True)
class Fidelity:
    """How an update arrives. `snr` in dB."""

    gain: float
    snr: float


@dataclass(frozen=True)
class Row:
    """One rms of ΔW, and what each of ``WAYS`` makes of it."""

    rms: float
    ways: dict[str, Fidelity]


def rows(
    out_features: int = 1024, in_features: int = 4096, tokens: int = 1024, rank: int = 16, seed: int = 0
) -> list[Row]:
    """The table's rows. 1024 tokens bring the gain's sampling error at the smallest rms below 0.5 %."""
    generator = torch.Generator().manual_seed(seed)

    def gaussian(*shape: int, std: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * std

    weight = gaussian(out_features, in_features, std=WEIGHT_STD).bfloat16()
    A, C = gaussian(rank, in_features, std=WEIGHT_STD), gaussian(rank, in_features, std=WEIGHT_STD)
    B, D = gaussian(out_features, rank, std=WEIGHT_STD), gaussian(out_features, rank, std=WEIGHT_STD)
    unscaled = dual_lora_delta(A, B, C, D, 1.0)
    x = _aligned_inputs(gaussian(tokens, in_features), gaussian(tokens, out_features) @ unscaled.sign())

    exact_base = x.double() @ weight.double().t()
    base = _product(x, weight)
    table = []
    for rms in track(RMS, description="rounding", transient=True):
        scale = rms / _rms(unscaled)
        update = dual_lora_delta(A, B, C, D, scale)
        outputs = {
            "nearest": _product(x, dual_lora_merge_(weight.clone(), A, B, C, D, scale, rounding="nearest")),
            "two_products": base + _product(x, update),
            "dithered": _product(x, dual_lora_merge_(weight.clone(), A, B, C, D, scale, rounding="dither")),
        }
        exact_update = x.double() @ update.double().t()
        table.append(Row(rms, {way: _fidelity(y, exact_base, exact_update) for way, y in outputs.items()}))
    return table


def _rms(values: torch.Tensor) -> float:
    return math.sqrt(values.square().mean().item())


def _aligned_inputs(noise: torch.Tensor, aligned: torch.Tensor) -> torch.Tensor:
    mixed = noise + ALIGNMENT * aligned / _rms(aligned)
    return (mixed / math.sqrt(1 + ALIGNMENT**2)).bfloat16()


def _product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x Wᵀ accumulated in fp32 and rounded once to bf16.

    bf16 operands multiply exactly in fp32, so widening them changes nothing and is faster on a CPU. An fp32 weight (the
    update of two products) stays as it is: the rounding of ΔW itself is not what is compared.
    """
    return (x.float() @ weight.float().t()).bfloat16()


def _fidelity(y: torch.Tensor, exact_base: torch.Tensor, exact_update: torch.Tensor) -> Fidelity:
    arrived = y.double() - exact_base
    power = exact_update.square().sum()
    gain = (arrived * exact_update).sum() / power
    snr = 10 * torch.log10(power / (arrived - exact_update).square().sum())
    return Fidelity(gain.item(), snr.item())


def cells(table: Sequence[Row]) -> list[tuple[str, ...]]:
    """The table's cells, in the order of ``HEADINGS``."""
    return [
        (
            f"{row.rms:.0e}",
            *(f"{row.ways[way].gain:.3f}" for way in WAYS),
            *(f"{row.ways[way].snr:.1f}" for way in WAYS),
        )
        for row in table
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.layers.dither_table", description="How much of an update survives rounding to bf16."
    )
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="folder for the results (benchmarks/results)")
    options = parser.parse_args(arguments)
    console, about = Console(), environment(torch.device("cpu"))
    table = rows()
    title = "What arrives of an update: N=1024, K=4096, W0 ~ N(0, 0.02²) in bf16, bf16 output"
    report.print_table(title, HEADINGS, cells(table), console)
    document = {"environment": about, "rows": [dataclasses.asdict(row) for row in table]}
    reading = (
        "Gain 1: the whole update arrives, 0: none of it. Inputs partly aligned with the update; definitions in "
        "benchmarks/layers/dither_table.py."
    )
    report.write(
        options.out,
        STEM,
        document,
        [f"# {title}", report.markdown_table(HEADINGS, cells(table)), reading, sentence(about)],
    )
    console.print(f"written to {options.out}: {STEM}.json, .md")


if __name__ == "__main__":
    main()
