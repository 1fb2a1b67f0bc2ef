"""How far gradients from a sample of columns are from the exact ones: relative variances, per kind of sample.

    python -m benchmarks.training.sample_variance

On each layer of the demo's Llama and of a GPT-2 of its size, half-way through their adaptation with exact gradients:
E‖ĝ − g‖² / ‖g‖² over draws, of the gradients of B and D together, and of A and C; the table has the medians over the
layers. Small models have even activations; large ones have a few columns that are far larger than the rest. So the same
again with one column in a hundred made 20 times as large. The peak is the largest norm of a column of X over the root
mean square of them all.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from dual_lora_kernels import calls
from dual_lora_kernels.backends import Estimator, Factors
from dual_lora_kernels.column_sampling import Sample

from ..harness import report
from ..harness.environment import environment, sentence
from .column_samples import SAMPLERS, can_sample, estimates
from .gradient_columns import FAMILIES, FRACTIONS, RATES, STEPS, Run, adapted, make_base

STEM = "sample_variance"
HEADINGS = ("model", "sample", *(f"{part}, p = 1/{round(1 / p)}" for part in ("∂B, ∂D", "∂A, ∂C") for p in FRACTIONS))
DRAWS = 50


@dataclass(frozen=True)
class Call:
    """What one layer's backward pass was called with."""

    grad: torch.Tensor
    x: torch.Tensor
    factors: Factors
    estimator: Estimator


def record(model: Any, tokens: torch.Tensor) -> list[Call]:
    """The calls of one backward pass of a model."""
    exact, recorded = calls.gradients, []

    def gradients(
        call: Any, grad: Any, input: Any, weight: Any, factors: Any, wanted: Any, estimator: Any, *_: Any
    ) -> Any:
        recorded.append(Call(grad, input, Factors(*(factor.detach() for factor in factors)), estimator))
        return exact(call, grad, input, weight, factors, wanted, estimator)

    calls.gradients = gradients  # type: ignore[assignment]
    try:
        model.train()(input_ids=tokens, labels=tokens).loss.backward()
    finally:
        calls.gradients = exact
    return recorded


def variances(call: Call, name: str, fraction: float) -> tuple[float, float]:
    """Relative variances of (∂B, ∂D) and of (∂A, ∂C)."""
    width = call.x.shape[1]
    everything = Sample(torch.arange(width), torch.ones(width))
    exact = estimates(call.grad, call.x, call.factors, call.estimator, everything)
    state: dict[str, Any] = {}
    errors = torch.zeros(4)
    for _ in range(DRAWS):
        sample = SAMPLERS[name](call.x, max(1, round(fraction * width)), state)
        found = estimates(call.grad, call.x, call.factors, call.estimator, sample)
        errors += torch.stack([(own - g).square().sum() for own, g in zip(found, exact, strict=True)]) / DRAWS
    norms = torch.stack([g.square().sum() for g in exact])
    (A, B, C, D), (a, b, c, d) = errors.tolist(), norms.tolist()
    return (B + D) / (b + d), (A + C) / (a + c)


def with_outliers(call: Call) -> Call:
    """The same call with one column of X in a hundred 20 times as large."""
    x = call.x.detach().clone()
    x[:, ::100] *= 20
    return Call(call.grad, x, call.factors, call.estimator)


def peak(x: torch.Tensor) -> float:
    """The largest norm of a column over the root mean square of all."""
    norms = x.detach().float().norm(dim=0)
    return float(norms.max() / norms.square().mean().sqrt())


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training.sample_variance", description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("results/gradient_columns"), help="folder of the bases")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="folder for the results (benchmarks/results)")
    options = parser.parse_args(arguments)
    console = Console()
    about = environment(torch.device("cpu"))
    rows, cells, peaks = [], [], {}
    for family in FAMILIES:
        make_base(family, options.work)
        run = Run(family, "dual_lora", "", 1.0, RATES["dual_lora"][1], 0)
        model, _, corpus = adapted(options.work, run, STEPS // 2)
        plain = record(model, corpus.train.blocks[:4])
        for label, found in ((family, plain), (f"{family}, outliers", [with_outliers(call) for call in plain])):
            peaks[label] = [peak(call.x) for call in found]
            for name in track(SAMPLERS, description=label, console=console):
                medians: dict[float, tuple[float, float]] = {}
                for fraction in FRACTIONS:
                    if not all(can_sample(name, call.x.shape[1], fraction) for call in found):
                        continue
                    pairs = [variances(call, name, fraction) for call in found]
                    medians[fraction] = tuple(map(statistics.median, zip(*pairs, strict=True)))  # type: ignore[assignment]
                rows.append({"model": label, "sample": name, "medians": medians})
                columns = ((part, p) for part in (0, 1) for p in FRACTIONS)
                shown = (f"{medians[p][part]:.2f}" if p in medians else "–" for part, p in columns)
                cells.append((label, name, *shown))
    report.print_table("Relative variance", HEADINGS, cells, console)
    spread = "; ".join(
        f"{family}: median {statistics.median(p):.1f}, largest {max(p):.1f}" for family, p in peaks.items()
    )
    paragraphs = [
        "# Relative variance of gradients from a sample of columns",
        report.markdown_table(HEADINGS, cells),
        f"E‖ĝ − g‖² / ‖g‖², medians over the layers; {DRAWS} draws. `package` is what `gradient_columns` does, the "
        "others are experiments (benchmarks/training/column_samples.py), whose blocks are whole, so that some have "
        f"fewer columns. Peaks, the largest norm of a column of X over the root mean square of all: {spread}.",
        sentence(about),
    ]
    report.write(options.out, STEM, {"environment": about, "draws": DRAWS, "peaks": peaks, "rows": rows}, paragraphs)


if __name__ == "__main__":
    main()
