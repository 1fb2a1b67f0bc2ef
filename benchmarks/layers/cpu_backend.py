"""The native CPU backend against the products it cannot avoid: steps, its two kernels, decode, threads.

    python -m benchmarks.layers.cpu_backend --threads 2

Every ratio compares times of the same round (`timing.interleaved`). Steps are `layer_step`'s, so the floor is X W0ᵀ,
G W0 and Gᵀ X. X [M, K], G [M, N], W0 [N, K].
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from dual_lora_kernels import dual_lora_linear, panel_split
from dual_lora_kernels.backends import (
    Backend,
    Block,
    DenseBase,
    Estimator,
    Factors,
    ParameterGradients,
    resolve_backend,
)
from dual_lora_kernels.runtime_settings import current_settings

from ..harness import charts, report
from ..harness.environment import environment, load_average, sentence
from ..harness.timing import Quartiles, interleaved, ratios
from . import layer_step
from .layer_step import FLOOR
from .methods import frozen_linear

STEM = "cpu_backend"
RANK = 16
STEP_HEADINGS = ("N × K, M, r1 = r2", "step ms", "× floor", "× eager", "× PEFT LoRA", "× PEFT DoRA", "× naive")
PART_HEADINGS = ("part, threads", "median ms", "compared with", "ratio")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """One layer's training step."""

    shape: tuple[int, int]
    tokens: int
    rank: int = RANK

    @property
    def label(self) -> str:
        return f"{self.shape[0]} × {self.shape[1]}, {self.tokens}, {self.rank}"


CASES = (
    Case((4096, 4096), 512),
    Case((4096, 4096), 2048),
    Case((4096, 4096), 512, 8),
    Case((4096, 4096), 512, 64),
    Case((1024, 1024), 512),
    Case((4096, 11008), 512),
    Case((14336, 4096), 512),
)
PEERS = ("dual_lora_eager", "lora", "dora", "naive")


@dataclass(frozen=True)
class Part:
    """One comparison: `name`'s time over `other`'s."""

    name: str
    other: str
    milliseconds: float
    ratio: Quartiles


def time_steps(case: Case, rounds: int, console: Console) -> dict[str, Any]:
    """The step's ratios to every peer, and its time."""
    settings = layer_step.Settings(
        *case.shape, case.tokens, "fp32", case.rank, rounds, 2, ("dual_lora", *PEERS), device="cpu"
    )
    rows, seconds = layer_step.measure(settings, console)
    own = next(row for row in rows if row.method == "dual_lora")
    return {
        "case": dataclasses.asdict(case),
        "milliseconds": own.milliseconds,
        "ratios": {peer: ratios(seconds, "dual_lora", peer) for peer in (FLOOR, *PEERS)},
        "dora_to_floor": ratios(seconds, "dora", FLOOR),
        "naive_to_floor": ratios(seconds, "naive", FLOOR),
        "temporary_bytes": own.temporary_bytes,
        "seconds": seconds,
    }


def part_functions(
    backend: Backend, size: int, tokens: int, rank: int = RANK, seed: int = 0
) -> dict[str, Callable[[], object]]:
    """The kernels over the panels that a step uses, and what each is compared with, on a square layer."""
    torch.manual_seed(seed)
    layer = frozen_linear(size, size, torch.float32)
    weight = layer.weight.detach()
    x, grad = torch.randn(tokens, size), torch.randn(tokens, size)
    token, batch = torch.randn(1, size), torch.randn(16, size)
    A, B, C, D = (torch.randn(shape) * 0.02 for shape in ((rank, size), (size, rank)) * 2)
    factors = Factors(A, B, C, D, torch.tensor(2.0))
    block = Block(DenseBase(weight), factors, "dither", weight.dtype)
    estimator = Estimator("clip", 1.0)
    sums = ParameterGradients(*(torch.zeros_like(factor) for factor in factors[:4]))
    settings = current_settings()
    budget = settings.workspace - backend.gradient_temporaries(settings.workspace, factors)
    width = panel_split.split(size, size * 4, budget)[0][1]
    copy, h = torch.empty_like(weight), torch.empty(size, size)
    panel = torch.empty(width * size)
    torch.mm(grad.t(), x, out=h)
    shared = backend.shared_products
    assert shared is not None

    def generate() -> None:
        for start in range(0, size, width):
            stop = min(start + width, size)
            out = panel[: (stop - start) * size].view(-1, size)
            backend.effective_weight(out, block.rows(start, stop), settings)

    def columns() -> list[tuple[int, int, torch.Tensor]]:
        spans = [(start, min(start + width, size)) for start in range(0, size, width)]
        return [(start, stop, panel[: size * (stop - start)].view(size, -1)) for start, stop in spans]

    def contract() -> None:
        for start, stop, h in columns():
            backend.factor_gradients(h, block.columns(start, stop), estimator, sums.columns(start, stop), settings)

    def contract_and_generate() -> None:
        for start, stop, h in columns():
            own = block.columns(start, stop)
            shared.weight_and_factor_gradients(h, h, own, estimator, sums.columns(start, stop), settings)

    def decode(inputs: torch.Tensor, name: str) -> Callable[[], object]:
        return lambda: dual_lora_linear(inputs, weight, *factors, backend=name)

    return {
        "copy of W0": lambda: copy.copy_(weight),
        "Gᵀ X": lambda: torch.mm(grad.t(), x, out=h),
        "generating W": generate,
        "factor gradients from H": contract,
        "factor gradients and W from H": contract_and_generate,
        "F.linear, 1 token": lambda: nn.functional.linear(token, weight),
        "unmerged, 1 token": decode(token, "native"),
        "unmerged eager, 1 token": decode(token, "eager"),
        "F.linear, 16 tokens": lambda: nn.functional.linear(batch, weight),
        "unmerged, 16 tokens": decode(batch, "native"),
    }


COMPARISONS = (
    ("generating W", "copy of W0"),
    ("factor gradients from H", "Gᵀ X"),
    ("factor gradients and W from H", "Gᵀ X"),
    ("unmerged, 1 token", "F.linear, 1 token"),
    ("unmerged eager, 1 token", "F.linear, 1 token"),
    ("unmerged, 16 tokens", "F.linear, 16 tokens"),
)


def time_parts(size: int, tokens: int, threads: int, rounds: int, console: Console) -> tuple[list[Part], Any]:
    """Every comparison with all threads, then each part with one thread against all of them."""
    backend = resolve_backend("native", CPU, torch.float32, torch.float32)
    functions = part_functions(backend, size, tokens)

    def on(count: int, function: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            torch.set_num_threads(count)
            return function()

        return run

    counts = sorted({1, threads})
    candidates = {f"{name}; {count}": on(count, run) for name, run in functions.items() for count in counts}
    seconds = interleaved(candidates, rounds=rounds, warmup=2, device=CPU, console=console)
    torch.set_num_threads(threads)
    pairs = [(f"{name}; {threads}", f"{other}; {threads}") for name, other in COMPARISONS]
    pairs += [(f"{name}; 1", f"{name}; {threads}") for name in functions if threads > 1]
    parts = [
        Part(name, other, 1e3 * sorted(seconds[name])[rounds // 2], ratios(seconds, name, other))
        for name, other in pairs
    ]
    return parts, seconds


def step_cells(steps: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The table's cells, in the order of ``STEP_HEADINGS``."""
    return [
        (
            Case(**step["case"]).label,
            f"{step['milliseconds'].median:,.0f}",
            *(f"{step['ratios'][peer].median:.2f}" for peer in (FLOOR, *PEERS)),
        )
        for step in steps
    ]


def part_cells(parts: Sequence[Part]) -> list[tuple[str, ...]]:
    """The table's cells, in the order of ``PART_HEADINGS``."""
    return [(part.name, f"{part.milliseconds:,.2f}", part.other, f"{part.ratio.median:.2f}") for part in parts]


def run(cases: Sequence[Case], size: int, tokens: int, threads: int, rounds: int, folder: Path) -> None:
    """Measure, print, and write the JSON, the Markdown and the chart into `folder`."""
    console = Console()
    about = environment(CPU)
    about["kernels"] = resolve_backend("native", CPU, torch.float32, torch.float32).description()
    steps = []
    for case in cases:
        console.print(f"step {case.label}")
        steps.append(time_steps(case, rounds, console))
    parts, seconds = time_parts(size, tokens, threads, rounds, console)
    report.print_table("Training step, fp32, native backend", STEP_HEADINGS, step_cells(steps), console)
    part_title = f"Parts of a step and decode, fp32, N = K = {size}, M = {tokens}, r1 = r2 = {RANK}"
    report.print_table(part_title, PART_HEADINGS, part_cells(parts), console)
    main = steps[0]
    document = {
        "environment": about,
        "rounds": rounds,
        "steps": [{key: _plain(value) for key, value in step.items()} for step in steps],
        "parts": [dataclasses.asdict(part) for part in parts],
        "part_seconds": seconds,
    }
    paragraphs = [
        "# The native CPU backend",
        "## Training step, fp32",
        report.markdown_table(STEP_HEADINGS, step_cells(steps)),
        f"![Step times over the floor]({STEM}.png)",
        f"Floor: X W0ᵀ, G W0 and Gᵀ X. In the first row's run PEFT DoRA took {main['dora_to_floor'].median:.2f} × the "
        f"floor and naive Dual LoRA {main['naive_to_floor'].median:.2f} ×, so the floor itself is "
        f"{1 / main['dora_to_floor'].median:.2f} × DoRA and {1 / main['naive_to_floor'].median:.2f} × naive. "
        f"Temporary memory of that step: {main['temporary_bytes'] / layer_step.MEBIBYTE:.1f} MiB.",
        f"## {part_title}",
        report.markdown_table(PART_HEADINGS, part_cells(parts)),
        f"{rounds} rounds after 2 of warm-up, interleaved; a ratio is the median of the ratios within a round. "
        f"Backend: {about['kernels']}; load average {load_average()} at the end; {sentence(about)}",
    ]
    report.write(folder, STEM, document, paragraphs)
    bars = {Case(**step["case"]).label: step["ratios"][FLOOR] for step in steps}
    axis = "step time / three products (median, quartiles)"
    charts.ratio_bars(
        bars, Case(**main["case"]).label, "Training step, fp32, native backend", axis, folder / f"{STEM}.png"
    )
    console.print(f"written to {folder}: {STEM}.json, .md, .png")


def _plain(value: Any) -> Any:
    if isinstance(value, Quartiles):
        return dataclasses.asdict(value)
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, dict) else value


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.layers.cpu_backend",
        description="The native CPU backend against what it cannot avoid.",
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (all cores)")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (7)")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="folder for the results (benchmarks/results)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    run(CASES, 4096, 512, options.threads, options.rounds, options.out)


if __name__ == "__main__":
    main()
