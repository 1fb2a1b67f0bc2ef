"""The share of W's elements that have other bits in a block than in the whole weight, by library path and threads.

    python -m benchmarks.layers.block_bits

W = ΔW = max(B A, 0) ⊙ sgn(D C), Gaussian factors, is computed whole and in blocks of random shapes and places, single
rows and columns among them: by the specification, which multiplies a block's factors by one call of the vendor's, and
by the CPU's backends. Every setting of `benchmarks.harness.machines` is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from dual_lora_kernels import available_backends, reference
from dual_lora_kernels.backends import Block, Factors, Settings, resolve_backend

from ..harness import report
from ..harness.environment import environment, sentence
from ..harness.machines import LIBRARIES, THREADS, Machine

SIZE = 1024
RANKS = (4, 16, 64, 300)
BLOCKS = 24
DTYPES = (torch.float32, torch.float64)
STEM = "cpu_block_bits"
_WORKSPACE = 1 << 25

Place = tuple[int, int, int, int]
"""First row, end of rows, first column, end of columns."""


def blocks() -> Iterator[Place]:
    """Random ones; every fourth has one row, and every fourth one column."""
    draw = random.Random(0)
    for index in range(BLOCKS):
        (row, row_end), (col, col_end) = (sorted(draw.sample(range(SIZE + 1), 2)) for _ in range(2))
        yield row, row + 1 if index % 4 == 0 else row_end, col, col + 1 if index % 4 == 1 else col_end


def ways(dtype: torch.dtype) -> dict[str, Callable[[Factors, int, int], torch.Tensor]]:
    """Name → W of a block from its factors and origin."""

    def by_backend(name: str) -> Callable[[Factors, int, int], torch.Tensor]:
        backend = resolve_backend(name, torch.device("cpu"), dtype, dtype)

        def weight(factors: Factors, row0: int, col0: int) -> torch.Tensor:
            out = factors.A.new_empty(factors.B.shape[0], factors.A.shape[1])
            backend.effective_weight(
                out, Block(None, factors, "nearest", dtype, row0, col0), Settings("auto", _WORKSPACE)
            )
            return out

        return weight

    def plain(factors: Factors, row0: int, col0: int) -> torch.Tensor:
        return reference.effective_weight(None, *factors, dtype, "nearest")

    names = [name for name in available_backends() if name != "triton"]
    return {"one product a block": plain} | {name: by_backend(name) for name in names}


def shares() -> list[dict[str, object]]:
    """Of this process: a row for each dtype and rank, with the share of each way."""
    rows: list[dict[str, object]] = []
    for dtype in DTYPES:
        for rank in RANKS:
            generator = torch.Generator().manual_seed(rank)
            shapes = ((rank, SIZE), (SIZE, rank), (rank, SIZE), (SIZE, rank))
            tensors = [torch.randn(shape, dtype=dtype, generator=generator) for shape in shapes]
            A, B, C, D = tensors
            factors = Factors(A, B, C, D, torch.ones((), dtype=dtype))
            row: dict[str, object] = {"dtype": str(dtype).removeprefix("torch."), "rank": rank}
            for name, weight in ways(dtype).items():
                whole, differing, total = weight(factors, 0, 0), 0, 0
                for top, bottom, left, right in blocks():
                    part = weight(factors.rows(top, bottom).columns(left, right), top, left)
                    differing += int((part != whole[top:bottom, left:right]).sum())
                    total += part.numel()
                row[name] = differing / total
            rows.append(row)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layers.block_bits", description=__doc__.splitlines()[0])
    parser.add_argument("--here", action="store_true", help="only print this process's shares, as JSON")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="folder for the results")
    options = parser.parse_args(arguments)
    if options.here:
        print(json.dumps(shares()))
        return
    console = Console(stderr=True)
    machines = [Machine(None, libraries, threads) for libraries in LIBRARIES for threads in THREADS]
    results = []
    for machine in track(machines, description="settings", console=console):
        command = [sys.executable, "-m", "benchmarks.layers.block_bits", "--here"]
        done = subprocess.run(command, env=machine.environment(), stdout=subprocess.PIPE, text=True, check=True)
        rows = json.loads(done.stdout)
        results += [{"libraries": machine.libraries, "threads": machine.threads, **row} for row in rows]
    _write(options.out, results, console)


def _write(folder: Path, results: list[dict[str, object]], console: Console) -> None:
    names = [name for name in results[0] if name not in ("libraries", "threads", "dtype", "rank")]
    headings = ["libraries", "threads", "dtype", *(f"{name}, ranks {', '.join(map(str, RANKS))}" for name in names)]
    cells = []
    for start in range(0, len(results), len(RANKS)):
        group = results[start : start + len(RANKS)]
        first = group[0]
        columns = [" / ".join(f"{100 * float(str(row[name])):.3g}" for row in group) for name in names]
        cells.append([str(first["libraries"]), str(first["threads"]), str(first["dtype"]), *columns])
    title = f"Per cent of W's elements with other bits in a block, {SIZE} × {SIZE}"
    report.print_table(title, headings, cells, console)
    about = environment(torch.device("cpu"))
    settings = "; ".join(f"{name}: {' '.join(map('='.join, set.items()))}" for name, set in LIBRARIES.items() if set)
    document = {"environment": about, "settings": LIBRARIES, "results": results}
    paragraphs = [f"# {title}", report.markdown_table(headings, cells), f"Settings: {settings}.", sentence(about)]
    report.write(folder, STEM, document, paragraphs)


if __name__ == "__main__":
    main()
