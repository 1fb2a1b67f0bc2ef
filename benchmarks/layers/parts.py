"""The parts of a step that are not products: generating W, and the factors' gradients from H, on the native backend.

    python -m benchmarks.layers.parts --threads 2

Each is compared with what bounds it, in the rounds of the same run: generating W with a copy of W0, the factors'
gradients with the product Gᵀ X that H comes from. They run over the panels that a step uses. X [M, K], G [M, N], W0
[N, K]. The table is for people who change the kernels; it is not among the suite's results.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence

import torch
from rich.console import Console

from dual_lora_kernels import panel_split
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

from ..harness.report import print_table
from ..harness.timing import interleaved, quartiles, ratios
from ..presets.arguments import count, shape
from .methods import frozen_linear

CPU = torch.device("cpu")
COPY, PRODUCT = "copy of W0", "Gᵀ X"
BOUNDS = {
    "generating W": COPY,
    "factor gradients from H": PRODUCT,
    "factor gradients and W from H": PRODUCT,
}
"""A part → what it is compared with."""


def parts(backend: Backend, rows: int, columns: int, tokens: int, rank: int = 16) -> dict[str, Callable[[], object]]:
    """The parts on one layer, and what they are compared with.

    Raises:
        ValueError: the backend has no kernel that shares the products of factors between W and gradients.
    """
    shared = backend.shared_products
    if shared is None:
        raise ValueError(f"backend: got {backend.name!r}, expected one that shares products, such as 'native'")
    torch.manual_seed(0)
    weight = frozen_linear(columns, rows, torch.float32).weight.detach()
    x, grad = torch.randn(tokens, columns), torch.randn(tokens, rows)
    A, B, C, D = (torch.randn(size) * 0.02 for size in ((rank, columns), (rows, rank)) * 2)
    factors = Factors(A, B, C, D, torch.tensor(2.0))
    block = Block(DenseBase(weight), factors, "dither", weight.dtype)
    estimator = Estimator("clip", 1.0)
    sums = ParameterGradients(*(torch.zeros_like(factor) for factor in factors[:4]))
    settings = current_settings()
    budget = settings.workspace - backend.gradient_temporaries(settings.workspace, factors)
    height = panel_split.split(rows, columns * 4, budget)[0][1]
    width = panel_split.split(columns, rows * 4, budget)[0][1]
    copy, h = torch.empty_like(weight), torch.empty(rows, columns)
    panel = torch.empty(max(height * columns, width * rows))
    torch.mm(grad.t(), x, out=h)

    def spans(size: int, step: int) -> list[tuple[int, int]]:
        return [(start, min(start + step, size)) for start in range(0, size, step)]

    def generate() -> None:
        for start, stop in spans(rows, height):
            out = panel[: (stop - start) * columns].view(-1, columns)
            backend.effective_weight(out, block.rows(start, stop), settings)

    def contract() -> None:
        for start, stop in spans(columns, width):
            part = panel[: rows * (stop - start)].view(rows, -1)
            backend.factor_gradients(part, block.columns(start, stop), estimator, sums.columns(start, stop), settings)

    def contract_and_generate() -> None:
        for start, stop in spans(columns, width):
            part, own = panel[: rows * (stop - start)].view(rows, -1), block.columns(start, stop)
            shared.weight_and_factor_gradients(part, part, own, estimator, sums.columns(start, stop), settings)

    return {
        COPY: lambda: copy.copy_(weight),
        PRODUCT: lambda: torch.mm(grad.t(), x, out=h),
        **dict(zip(BOUNDS, (generate, contract, contract_and_generate), strict=True)),
    }


def cells(seconds: Mapping[str, Sequence[float]]) -> list[tuple[str, str, str, str]]:
    """(part, ms, what it is compared with, ratio)."""
    times = {name: list(values) for name, values in seconds.items()}
    return [
        (name, f"{quartiles(times[name]).median * 1e3:.2f}", bound, f"{ratios(times, name, bound).median:.2f}")
        for name, bound in BOUNDS.items()
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.layers.parts", description="What a step takes beside its products, in fp32."
    )
    parser.add_argument("--shape", type=shape, default=(4096, 4096), metavar="OUTxIN", help="(4096x4096)")
    parser.add_argument("--tokens", type=count, default=512, help="M (512)")
    parser.add_argument("--rank", type=count, default=16, help="r1 = r2 (16)")
    parser.add_argument("--threads", type=count, default=torch.get_num_threads(), help="CPU threads (%(default)s)")
    parser.add_argument("--rounds", type=count, default=7, help="timed rounds (7)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    console = Console()
    backend = resolve_backend("native", CPU, torch.float32, torch.float32)
    rows, columns = options.shape
    functions = parts(backend, rows, columns, options.tokens, options.rank)
    seconds = interleaved(functions, rounds=options.rounds, warmup=2, device=CPU, console=console)
    title = f"{backend.description()}; {rows} × {columns}, {options.tokens} tokens"
    print_table(title, ("part", "ms", "compared with", "ratio"), cells(seconds), console)


if __name__ == "__main__":
    main()
