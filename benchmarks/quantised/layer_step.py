"""A training step of one NF4 layer: time over three products and one dequantisation, and memory.

    python -m benchmarks.quantised.layer_step --shape 4096x11008 --tokens 512 --dtype bf16 --threads 2

A step is a forward and a backward pass that returns the input's and the adapter's gradients. The floor is what training
all of W's numbers needs at least: X W0ᵀ, G W0 and Gᵀ X by the vendor's library on a dense W0, and one dequantisation by
bitsandbytes. Memory is what PyTorch's allocator handed out above what was there before, the step's results included.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dual_lora_kernels import quantised_weight

from ..harness import charts, report
from ..harness.environment import DTYPE_NAMES, environment, load_average, sentence
from ..harness.report import MEBIBYTE
from ..harness.timing import Quartiles, interleaved, quartiles
from ..layers.layer_step import floor_step, step
from ..layers.memory import peak_temporary_bytes
from ..layers.methods import trainable_parameters
from .bases import LABELS, METHODS, dequantised, nf4_linear

HEADINGS = ("method", "median ms", "× floor", "peak MiB", "largest MiB", "trainable")
PRODUCTS, DEQUANTISATION = "three products", "one dequantisation"
BLOCKS = "the same by our blocks, in PyTorch"
NOTES = (
    "Step: forward, then backward to the input and the adapter. Each round runs every method once, the first one "
    "rotating; a ratio is the median over rounds of the ratio within a round. The floor is three products and one "
    "dequantisation. PEFT QLoRA stays under it: it never needs Gᵀ X.",
    "Peak MiB: the largest sum of memory that the step held at one moment above what was there before (the packed "
    "weight, X, G and the adapter), its results included; largest: its largest single allocation. Both come from "
    "PyTorch's allocator, in a pass of its own, without BLAS's own buffers.",
)


@dataclass(frozen=True)
class Settings:
    """What is measured. `tokens` is M, `rank` is r1 = r2."""

    out_features: int
    in_features: int
    tokens: int
    dtype: str
    rank: int
    rounds: int

    @property
    def stem(self) -> str:
        """The results' file name without its suffix."""
        return f"cpu_nf4_layer_step_{self.dtype}_{self.out_features}x{self.in_features}_m{self.tokens}"

    @property
    def title(self) -> str:
        """The measurement's name, for headings."""
        return (
            f"NF4 layer step, {self.dtype}, N={self.out_features}, K={self.in_features}, M={self.tokens}, "
            f"r1=r2={self.rank}"
        )


@dataclass(frozen=True)
class Row:
    """One method's measurements; bytes are None for the products and the dequantisation."""

    method: str
    milliseconds: Quartiles
    to_floor: Quartiles
    peak: int | None
    largest: int | None
    trainable: int


def measure(settings: Settings, console: Console | None = None) -> list[Row]:
    """Time and memory of every method."""
    dtype, device = DTYPE_NAMES[settings.dtype], torch.device("cpu")
    torch.manual_seed(0)
    base = nf4_linear(settings.out_features, settings.in_features, dtype)
    x = torch.randn(settings.tokens, settings.in_features, dtype=dtype).requires_grad_()
    grad = torch.randn(settings.tokens, settings.out_features, dtype=dtype)
    modules = {name: build(base, settings.rank, settings.rank).train() for name, build in METHODS.items()}
    candidates: dict[str, Callable[[], object]] = {
        PRODUCTS: floor_step(dequantised(base), x, grad),
        DEQUANTISATION: lambda: dequantised(base),
        BLOCKS: quantised_weight(base).dequantised,
        **{name: step(module, x, grad) for name, module in modules.items()},
    }
    seconds = interleaved(candidates, rounds=settings.rounds, warmup=2, device=device, console=console)
    floor = [sum(pair) for pair in zip(seconds[PRODUCTS], seconds[DEQUANTISATION], strict=True)]
    rows = []
    for name, function in candidates.items():
        trace = peak_temporary_bytes(function, device) if name in modules else None
        trainable = sum(p.numel() for p in trainable_parameters(modules[name])) if name in modules else 0
        over = quartiles([own / least for own, least in zip(seconds[name], floor, strict=True)])
        milliseconds = quartiles([value * 1e3 for value in seconds[name]])
        peak, largest = (None, None) if trace is None else (trace.peak, trace.largest)
        rows.append(Row(name, milliseconds, over, peak, largest, trainable))
    return rows


def cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """The table's cells, in the order of ``HEADINGS``."""
    return [
        (
            LABELS.get(row.method, row.method),
            f"{row.milliseconds.median:,.1f}",
            f"{row.to_floor.median:.2f}",
            "–" if row.peak is None else f"{row.peak / MEBIBYTE:,.0f}",
            "–" if row.largest is None else f"{row.largest / MEBIBYTE:,.0f}",
            f"{row.trainable:,}" if row.trainable else "–",
        )
        for row in rows
    ]


def run(settings: Settings, folder: Path, console: Console) -> list[Row]:
    """Measure, print, and write the JSON, the Markdown and the chart into `folder`."""
    about = environment(torch.device("cpu"))
    rows = measure(settings, console)
    report.print_table(settings.title, HEADINGS, cells(rows), console)
    load = load_average()
    document: dict[str, Any] = {
        "settings": dataclasses.asdict(settings),
        "environment": about,
        "load_average_after": load,
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    paragraphs = [
        f"# {settings.title}",
        report.markdown_table(HEADINGS, cells(rows)),
        f"![Step time over the floor]({settings.stem}.png)",
        "\n".join(f"- {note}" for note in NOTES),
        f"{settings.rounds} rounds after 2 of warm-up; load average {load} at the end, with this benchmark's own "
        f"{about['threads']} threads; {sentence(about)}",
    ]
    report.write(folder, settings.stem, document, paragraphs)
    bars = {LABELS[row.method]: row.to_floor for row in rows if row.method in LABELS}
    axis = "step time / (three products + one dequantisation) (median, quartiles)"
    charts.ratio_bars(bars, LABELS["dual_lora"], settings.title, axis, folder / f"{settings.stem}.png")
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantised.layer_step", description=__doc__)
    parser.add_argument("--shape", default="4096x11008", help="OUTxIN")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    out_features, in_features = map(int, options.shape.split("x"))
    settings = Settings(out_features, in_features, options.tokens, options.dtype, options.rank, options.rounds)
    run(settings, options.out, Console())


if __name__ == "__main__":
    main()
