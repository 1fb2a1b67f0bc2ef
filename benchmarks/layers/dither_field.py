"""Whether the dither behaves like independent noise: its moments, correlations and largest singular values.

    python -m benchmarks.layers.dither_field [--size 4096]

An input sees the dither through the product x·(rounding errors). Independent noise passes no direction preferentially:
its largest singular value is that of a random matrix. A field with structure has larger ones, and an input along their
vectors would see it. What a weight sees is whether its dropped bits, a fraction f of an ulp, carry: the field's carry
field at f is 1 where u ≥ 1 − f.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from dual_lora_kernels.rounding import dither_field

from ..harness import report
from ..harness.environment import environment, sentence

LAGS = ((0, 1), (0, 2), (1, 0), (2, 0), (1, 1), (1, 2), (2, 1), (3, 5))
"""(rows, columns) between correlated elements."""
CARRY_FRACTIONS = (0.5, 0.25, 0.0625)
STEM = "dither_field"


@dataclass(frozen=True)
class Statistics:
    """The field as numbers u in [0, 1): ideally mean 1/2, variance · 12 = 1, correlations 0, ratios 1.

    A ratio is the largest singular value over that of an independent field drawn with the same size and variance.
    """

    size: int
    mean: float
    variance_times_12: float
    largest_correlation: float
    singular_value_ratio: float
    carry_singular_value_ratios: dict[float, float]


def statistics(size: int = 4096, seed: int = 0) -> Statistics:
    """Statistics of the first `size` rows and columns, where every weight's dither lies. Half a minute at 4096."""
    field = _field(size)
    centred = field - 0.5
    deviation = centred.double().square().mean() - centred.double().mean().square()
    independent = torch.rand(size, size, generator=torch.Generator().manual_seed(seed))
    pairs = {0.0: (field, independent)} | {
        f: ((field >= 1 - f).float(), (independent >= 1 - f).float()) for f in CARRY_FRACTIONS
    }
    ratios = {
        fraction: _largest_singular_value(own) / _largest_singular_value(other)
        for fraction, (own, other) in track(pairs.items(), description="singular values", transient=True)
    }
    return Statistics(
        size=size,
        mean=field.double().mean().item(),
        variance_times_12=12 * deviation.item(),
        largest_correlation=max(abs(_correlation(centred, *lag)) for lag in LAGS),
        singular_value_ratio=ratios.pop(0.0),
        carry_singular_value_ratios=ratios,
    )


def _field(size: int) -> torch.Tensor:
    """The top 16 bits of the field, those that bf16 rounding uses, as numbers in [0, 1)."""
    bits = dither_field(size, size, 0, 0, torch.device("cpu"))
    return (bits >> 16).bitwise_and_(0xFFFF).float().div_(2**16)


def _correlation(centred: torch.Tensor, rows: int, columns: int) -> float:
    size = centred.shape[0]
    here = centred[: size - rows, : size - columns].double()
    there = centred[rows:, columns:].double()
    return ((here * there).mean() * 12).item()


def _largest_singular_value(values: torch.Tensor) -> float:
    centred = values - values.mean()
    return float(torch.linalg.eigvalsh(centred @ centred.t())[-1].sqrt())


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.layers.dither_field",
        description="Statistics of the dither against independent noise.",
    )
    parser.add_argument("--size", type=int, default=4096, help="rows and columns of the field (4096)")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="folder for the results (benchmarks/results)")
    options = parser.parse_args(arguments)
    console, about = Console(), environment(torch.device("cpu"))
    found = statistics(options.size)
    headings = ("statistic", "dither", "independent noise")
    cells = [
        ("mean", f"{found.mean:.4f}", "0.5"),
        ("variance × 12", f"{found.variance_times_12:.5f}", "1"),
        (
            f"largest correlation, {len(LAGS)} lags",
            f"{found.largest_correlation:.1e}",
            f"≈ {1 / options.size:.1e} each",
        ),
        ("largest singular value / independent", f"{found.singular_value_ratio:.3f}", "1"),
        *(
            (f"the same, carries at {fraction:g} ulp", f"{ratio:.3f}", "1")
            for fraction, ratio in found.carry_singular_value_ratios.items()
        ),
    ]
    title = f"The dither field, {options.size} × {options.size}"
    report.print_table(title, headings, cells, console)
    document = {"environment": about, "statistics": dataclasses.asdict(found)}
    report.write(options.out, STEM, document, [f"# {title}", report.markdown_table(headings, cells), sentence(about)])
    console.print(f"written to {options.out}: {STEM}.json, .md")


if __name__ == "__main__":
    main()
