"""What is left of an update when a merged weight is quantised anew, to nearest or at random, and in bf16.

    python -m benchmarks.quantised.requantising

W0 is a quantised Gaussian weight, W = W0 + ΔW in fp32, and Ŵ what is stored. The table has

    kept = ⟨Ŵ − W0, ΔW⟩ / ⟨ΔW, ΔW⟩        error = ‖Ŵ − W‖ / ‖ΔW‖        output = ‖X (Ŵ − W)ᵀ‖ / ‖X ΔWᵀ‖

Kept 1 and error 0: the merged layer is the trained one. An error of 1: merging changes as much as training has.
``nearest`` is bitsandbytes' own quantisation, as PEFT merges. ``unbiased`` moves each number to one of its two
neighbours among W0's codes, with W0's absmax, at random with the probabilities that keep its mean; the random numbers
are the dither's fixed field.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant, int8_vectorwise_quant, quantize_4bit
from rich.console import Console
from rich.progress import track

from dual_lora_kernels import dual_lora_delta
from dual_lora_kernels.quantised.requantising import loss
from dual_lora_kernels.rounding import dither_field, round_to

from ..harness import report
from ..harness.environment import environment, sentence

STEM = "requantising"
HEADINGS = ("base", "rms of ΔW / rms of W0", "stored as", "kept", "error", "output error")
_FEATURES, _TOKENS, _RANK = 1024, 256, 16
_BLOCKSIZE = 64
RELATIVE_RMS = (1e-3, 1e-2, 1e-1)
"""Fine-tuned adapters are of the order of the first two."""


@dataclass(frozen=True)
class Row:
    """One way to store W."""

    base: str
    relative_rms: float
    stored: str
    kept: float
    error: float
    output: float


def unbiased(values: torch.Tensor, grid: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Each of `values` [n, k] as scale · one of the two neighbouring numbers of the sorted `grid`, unbiased.

    `scale` [n, k]. Numbers beyond the grid's ends go to these.
    """
    x = (values / scale).clamp(grid[0], grid[-1])
    above = torch.searchsorted(grid, x.contiguous()).clamp(1, len(grid) - 1)
    low, high = grid[above - 1], grid[above]
    n, k = values.shape
    field = dither_field(n, k, 0, 0, values.device).long() & 0xFFFFFFFF
    uniform = ((field >> 8).float() + 0.5) * 2.0**-24
    return torch.where(uniform < (x - low) / (high - low), high, low) * scale


def four_bits(kind: str, w0: torch.Tensor) -> tuple[torch.Tensor, dict[str, Callable[[torch.Tensor], torch.Tensor]]]:
    """(W0 in fp32 as NF4 or FP4, the ways to store W in that format)."""
    packed, state = quantize_4bit(w0, blocksize=_BLOCKSIZE, quant_type=kind)
    base: torch.Tensor = dequantize_4bit(packed, state)
    grid = state.code.unique()
    scale = state.absmax.repeat_interleave(_BLOCKSIZE).view_as(w0)

    def nearest(w: torch.Tensor) -> torch.Tensor:
        stored: torch.Tensor = dequantize_4bit(*quantize_4bit(w, blocksize=_BLOCKSIZE, quant_type=kind))
        return stored

    return base, {"nearest": nearest, "unbiased": lambda w: unbiased(w, grid, scale)}


def eight_bits(w0: torch.Tensor) -> tuple[torch.Tensor, dict[str, Callable[[torch.Tensor], torch.Tensor]]]:
    """The same for LLM.int8."""
    integers, statistics, _ = int8_vectorwise_quant(w0.half())
    base: torch.Tensor = int8_vectorwise_dequant(integers, statistics)
    grid = torch.arange(-127, 128) / 127
    scale = statistics.view(-1, 1).expand_as(w0)

    def nearest(w: torch.Tensor) -> torch.Tensor:
        stored: torch.Tensor = int8_vectorwise_dequant(*int8_vectorwise_quant(w.half())[:2])
        return stored

    return base, {"nearest": nearest, "unbiased": lambda w: unbiased(w, grid, scale)}


def update(like: torch.Tensor, relative_rms: float) -> torch.Tensor:
    """A Dual LoRA update [n, k] of random factors, its rms `relative_rms` of that of `like`."""
    n, k = like.shape
    A, B, C, D = (torch.randn(*shape) for shape in ((_RANK, k), (n, _RANK), (_RANK, k), (n, _RANK)))
    delta = dual_lora_delta(A, B, C, D, 1.0)
    return delta * (relative_rms * like.square().mean().sqrt() / delta.square().mean().sqrt())


def measure(console: Console | None = None) -> list[Row]:
    """All bases, sizes of the update and ways to store W."""
    torch.manual_seed(0)
    w0, x = torch.randn(_FEATURES, _FEATURES) * 0.02, torch.randn(_TOKENS, _FEATURES)
    bases = {"NF4": four_bits("nf4", w0), "FP4": four_bits("fp4", w0), "int8": eight_bits(w0)}
    rows = []
    for name, (own, ways) in track(bases.items(), "quantising", console=console):
        in_bf16 = own.bfloat16().float()  # what a model in bf16 dequantises to
        for relative in RELATIVE_RMS:
            delta = update(own, relative)
            others = {f"bf16, {rounding}": rounding for rounding in ("nearest", "dither")}
            for stored in (*ways, *others):
                base = in_bf16 if stored in others else own
                trained = base + delta
                if stored in others:
                    merged = round_to(trained, torch.bfloat16, others[stored]).float()
                else:
                    merged = ways[stored](trained)
                left = loss(base, trained, merged)
                output = (x @ (merged - trained).t()).norm() / (x @ delta.t()).norm()
                rows.append(Row(name, relative, stored, left.kept, left.error, output.item()))
    return rows


def cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """The table's cells, in the order of ``HEADINGS``."""
    return [
        (row.base, f"{row.relative_rms:g}", row.stored, f"{row.kept:.2f}", f"{row.error:.2f}", f"{row.output:.2f}")
        for row in rows
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantised.requantising", description=__doc__)
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    options = parser.parse_args(arguments)
    console = Console()
    rows = measure(console)
    title = f"What is left of an update, N=K={_FEATURES}, blocks of {_BLOCKSIZE}"
    report.print_table(title, HEADINGS, cells(rows), console)
    about = environment(torch.device("cpu"))
    document = {"environment": about, "rows": [dataclasses.asdict(row) for row in rows]}
    report.write(
        options.out, STEM, document, [f"# {title}", report.markdown_table(HEADINGS, cells(rows)), sentence(about)]
    )


if __name__ == "__main__":
    main()
