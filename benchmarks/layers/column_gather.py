"""What it takes to choose and gather columns of X: single ones against blocks of neighbours, beside their product.

    python -m benchmarks.layers.column_gather --threads 2

Half of the columns of X [M, 4096] are gathered, then multiplied, Gᵀ X_s with G [M, 4096].
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console

from dual_lora_kernels.column_sampling import choose, draw_columns, gathered

from ..harness import report
from ..harness.environment import DTYPE_NAMES, environment, sentence
from ..harness.timing import interleaved, quartiles, ratios

STEM = "column_gather"
FEATURES = 4096
BLOCKS = (1, 16, 64)
PRODUCT = "product"
HEADINGS = ("M, dtype", "product, ms", "choosing", *(f"blocks of {b}" if b > 1 else "single columns" for b in BLOCKS))


def candidates(tokens: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Choosing, gathering in blocks of each size, and the product."""
    x, grad = (torch.randn(tokens, FEATURES, dtype=dtype) for _ in range(2))
    draws = draw_columns(FEATURES, 0.5)
    found: dict[str, Callable[[], object]] = {"choosing": lambda: choose(x, draws)}
    for block in BLOCKS:
        first = torch.randperm(FEATURES // block)[: FEATURES // block // 2].sort().values * block
        columns = (first[:, None] + torch.arange(block)).flatten()
        found[str(block)] = lambda columns=columns: gathered(x, columns)  # type: ignore[misc]
    some = x[:, : FEATURES // 2].contiguous()
    return found | {PRODUCT: lambda: grad.t() @ some}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.layers.column_gather", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (all cores)")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds (15)")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="folder for the results (benchmarks/results)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    console = Console()
    about, rows, cells = environment(torch.device("cpu")), [], []
    for dtype in ("fp32", "bf16"):
        for tokens in (512, 2048):
            names = candidates(tokens, DTYPE_NAMES[dtype])
            seconds = interleaved(names, rounds=options.rounds, warmup=2, device=torch.device("cpu"), console=console)
            share = {name: ratios(seconds, name, PRODUCT).median for name in names if name != PRODUCT}
            product = quartiles(seconds[PRODUCT]).median * 1e3
            rows.append({"tokens": tokens, "dtype": dtype, "product_ms": product, "to_product": share})
            cells.append((f"{tokens}, {dtype}", f"{product:.1f}", *(f"{value:.1%}" for value in share.values())))
    report.print_table("Time of the product with the gathered columns", HEADINGS, cells, console)
    paragraphs = [
        "# Choosing and gathering half of 4096 columns of X",
        report.markdown_table(HEADINGS, cells),
        "Parts of the time of Gᵀ X_s [4096, 2048], medians of the ratios within a round.",
        sentence(about),
    ]
    report.write(options.out, STEM, {"environment": about, "rows": rows}, paragraphs)


if __name__ == "__main__":
    main()
