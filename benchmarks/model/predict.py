"""Predicts a layer's step on a GPU: ``python -m benchmarks.model.predict [--chip H200]``; needs none.

Device time alone, summed over what a step launches. Expected to be good to 15 %, and there to compare two
versions.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.progress import track

from dual_lora_kernels.backends.triton.architecture import Architecture
from dual_lora_kernels.backends.triton.launch import Launch
from dual_lora_kernels.panel_split import WAVE_TILE, product_waves

from ..compiler.recorded_step import Event, Product, SmallOperation, decoding, training_step
from ..harness import charts, report
from . import kernel_time
from .chips import CHIPS, Chip

RANK = 16
STEPS = (
    (4096, 4096, 512), (4096, 4096, 2048), (4096, 4096, 4096), (4096, 4096, 8192), (14336, 4096, 4096),
    (14336, 4096, 8192), (4096, 14336, 8192), (1024, 4096, 8192),
)  # fmt: skip
"""N, K, M."""
DECODES = ((4096, 4096, 1), (4096, 4096, 16), (14336, 4096, 1), (14336, 4096, 16))
_SPLITS = (1, 2, 4, 8, 16)
"""Into how many parts vendors cut a product's sum where its tiles are few."""


def product_seconds(product: Product, chip: Chip) -> float:
    """The vendor's best tile and split of the sum, in whole waves, or the product's bytes."""
    wave = 2 * WAVE_TILE * product.k / (chip.product_operations / chip.units)

    def split_seconds(parts: int) -> float:
        sums = 8 * product.m * product.n * parts / chip.cache_bytes_per_second if parts > 1 else 0.0
        return product_waves(product.m, product.n, chip.units, parts) * wave / parts + sums

    return chip.launch_seconds + max(min(map(split_seconds, _SPLITS)), product.bytes / chip.bytes_per_second)


def event_seconds(event: Event, chip: Chip) -> float:
    """The device's time for one event."""
    if isinstance(event, Launch):
        return kernel_time.seconds(event, chip)
    if isinstance(event, Product):
        return product_seconds(event, chip)
    return max(chip.small_operation_seconds, event.bytes / chip.cache_bytes_per_second)


@dataclass(frozen=True)
class Prediction:
    """One step's parts in seconds, and how many events it has."""

    rows: int
    columns: int
    tokens: int
    floor: float
    forward: float
    input_gradient: float
    parameter_products: float
    parameter_kernels: float
    small_operations: float
    launches: int
    products: int
    operations: int

    @property
    def parts(self) -> dict[str, float]:
        """What adds up to the whole step."""
        return {
            "forward": self.forward,
            "∂X": self.input_gradient,
            "H products": self.parameter_products,
            "factor gradients": self.parameter_kernels,
            "small operations": self.small_operations,
        }

    @property
    def total(self) -> float:
        """Of the whole step."""
        return sum(self.parts.values())

    @property
    def ratio(self) -> float:
        """To the three products that no method can avoid."""
        return self.total / self.floor


def floor_seconds(rows: int, columns: int, tokens: int, chip: Chip) -> float:
    """X W0ᵀ, G W0 and Gᵀ X."""
    sizes = ((tokens, rows, columns), (tokens, columns, rows), (rows, columns, tokens))
    return sum(product_seconds(Product(m, n, k, 2 * (m * n + n * k + m * k)), chip) for m, n, k in sizes)


def predict(rows: int, columns: int, tokens: int, chip: Chip, factor_dtype: torch.dtype = torch.float32) -> Prediction:
    """A bf16 layer's training step."""
    step = training_step(Architecture(chip.family, chip.units), rows, columns, tokens, RANK, factor_dtype)

    def total(events: Iterable[Event], *kinds: type) -> float:
        return sum(event_seconds(event, chip) for event in events if isinstance(event, kinds))

    events = step.events
    small = [event for event in events if isinstance(event, SmallOperation)]
    return Prediction(
        rows, columns, tokens, floor_seconds(rows, columns, tokens, chip),
        forward=total(step.forward, Launch, Product), input_gradient=total(step.input_gradient, Launch, Product),
        parameter_products=total(step.parameter_gradients, Product),
        parameter_kernels=total(step.parameter_gradients, Launch),
        small_operations=total(events, SmallOperation),
        launches=sum(isinstance(event, Launch) for event in events),
        products=sum(isinstance(event, Product) for event in events), operations=len(small),
    )  # fmt: skip


def predict_decoding(rows: int, columns: int, tokens: int, chip: Chip) -> tuple[float, float]:
    """(the unmerged layer's forward pass, F.linear on W0) in seconds."""
    events = decoding(Architecture(chip.family, chip.units), rows, columns, tokens, RANK)
    plain = Product(tokens, rows, columns, 2 * (rows * columns + tokens * (rows + columns)))
    return sum(
        event_seconds(event, chip) for event in events
    ), chip.launch_seconds + plain.bytes / chip.bytes_per_second


def cell_seconds(kind: str, rows: int, columns: int, tokens: int, chip: Chip) -> tuple[float, float]:
    """(the package's, the floor's) seconds of a measurement in `layers.layer_cells`."""
    if kind == "decode":
        return predict_decoding(rows, columns, tokens, chip)
    step = predict(rows, columns, tokens, chip)
    return step.total, step.floor


HEADINGS = (
    "N × K, M", "floor", "forward", "∂X", "H products", "factor gradients", "small operations", "total", "ratio",
    "launches", "products", "operations",
)  # fmt: skip


def cells(prediction: Prediction) -> list[str]:
    """A line of the table, in microseconds."""
    p = prediction
    return [
        f"{p.rows} × {p.columns}, {p.tokens}",
        *(f"{1e6 * time:.0f}" for time in (p.floor, *p.parts.values(), p.total)),
        f"{p.ratio:.2f}",
        *map(str, (p.launches, p.products, p.operations)),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model.predict", description=__doc__)
    parser.add_argument("--chip", choices=CHIPS, default="H200", help="the GPU (H200)")
    parser.add_argument("--out", type=Path, help="folder for step_model_<chip>.json and .md; printed only without")
    options = parser.parse_args(arguments)
    chip, console = CHIPS[options.chip], Console(width=200)
    steps = [predict(*sizes, chip) for sizes in track(STEPS, "steps", console=console, transient=True)]
    decodes = [(sizes, *predict_decoding(*sizes, chip)) for sizes in DECODES]
    decode_cells = [
        [f"{n} × {k}, {m}", f"{1e6 * own:.1f}", f"{1e6 * plain:.1f}", f"{own / plain:.2f}"]
        for (n, k, m), own, plain in decodes
    ]
    decode_headings = ("N × K, M", "unmerged", "F.linear", "ratio")
    report.print_table(f"Step on {options.chip}, µs (predicted)", HEADINGS, [cells(step) for step in steps], console)
    report.print_table(f"Decode on {options.chip}, µs (predicted)", decode_headings, decode_cells, console)
    if options.out is not None:
        stem = f"step_model_{options.chip.lower()}"
        document: dict[str, Any] = {
            "chip": {"name": options.chip, **asdict(chip)},
            "versions": {"triton": triton.__version__},
            "steps": [asdict(step) | {"total": step.total, "ratio": step.ratio} for step in steps],
            "decodes": [{"sizes": sizes, "unmerged": own, "linear": plain} for sizes, own, plain in decodes],
        }
        paragraphs = [
            f"# A step on {options.chip}, predicted",
            f"From kernels compiled by triton {triton.__version__} for {chip.family}; nothing here was timed. "
            "Microseconds of device time.",
            report.markdown_table(HEADINGS, [cells(step) for step in steps]),
            report.markdown_table(decode_headings, decode_cells),
            f"![parts of a step]({stem}.png)",
        ]
        report.write(options.out, stem, document, paragraphs)
        bars = {cells(step)[0]: {name: part / step.floor for name, part in step.parts.items()} for step in steps}
        title = f"A step on {options.chip}, predicted; dotted: the three products that no method avoids"
        charts.stacked_bars(bars, title, "device time / three products", options.out / f"{stem}.png")


if __name__ == "__main__":
    main()
