"""What a Triton launch costs on the host, and how many launches and other operations a layer's step has.

``python -m benchmarks.compiler.host_cost`` needs no GPU: a stand-in driver compiles for an H100 and launches nothing.
So the times are those of Python and of Triton's binder, without the vendor's driver.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode

from dual_lora_kernels import panels, passes
from dual_lora_kernels.backends import Block, DenseBase, Estimator, Factors, ParameterGradients
from dual_lora_kernels.backends.triton import TritonBackend, choice, execute
from dual_lora_kernels.backends.triton.architecture import Architecture
from dual_lora_kernels.backends.triton.arguments import Hashes
from dual_lora_kernels.backends.triton.launch import Launch
from dual_lora_kernels.runtime_settings import current_settings

from ..harness.report import print_table
from .ahead_of_time import target
from .shipped_launches import KERNELS, Case, shipped_cases
from .stand_in_driver import stand_in_driver

CHIP = Architecture("sm_90", compute_units=132)
LAYERS = ((4096, 4096, 512), (4096, 4096, 8192), (14336, 4096, 4096))
"""N, K and M of the steps that are counted."""
RANK = 16
REPEATS = 2000


def microseconds(function: Callable[[], object]) -> float:
    """The median time of a call."""
    for _ in range(50):
        function()
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return 1e6 * statistics.median(seconds)


def launch_costs(case: Case) -> tuple[float, float]:
    """(a launch that repeats, the same through Triton's own launcher), in microseconds.

    Building the `Launch` is not in it: 0.7 µs on an AMD EPYC (Zen 5).
    """
    launch = case.launch()
    plan = launch.plan()

    def through_triton() -> None:
        launch.kernel[plan.grid](*launch.arguments, plan.constants, **plan.options)

    return microseconds(launch.run), microseconds(through_triton)


class Operations(TorchDispatchMode):
    """Counts PyTorch's operations, but for views."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0
        self.others = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("mm", "addmm"):
            self.products += 1
        elif not func.is_view and not func.overloadpacket.__name__.startswith(("empty", "new_empty")):
            self.others += 1
        return func(*args, **(kwargs or {}))


def _gram(grad: torch.Tensor, x: torch.Tensor, out: torch.Tensor, cast_budget: int) -> None:
    torch.mm(grad.t(), x)  # on a GPU the product writes fp32 by itself


@contextmanager
def counted() -> Iterator[tuple[list[Launch], Operations]]:
    """Launches and operations of Triton passes over tensors on the meta device, as on a GPU."""
    launches: list[Launch] = []
    with (
        mock.patch.object(execute, "_architecture", return_value=CHIP),
        mock.patch.object(choice, "architecture", return_value=CHIP),
        mock.patch.object(execute, "_hashes", side_effect=lambda like, *_: Hashes(like, like)),
        mock.patch.object(panels, "_product_reaches", return_value=True),
        mock.patch.object(panels, "_token_product", side_effect=_gram),
        mock.patch.object(Launch, "run", lambda launch: launches.append(launch)),
        Operations() as operations,
    ):
        yield launches, operations


def step_counts(rows: int, columns: int, tokens: int) -> tuple[int, int, int]:
    """(kernel launches, large products, other operations) of a bf16 layer's training step, W0 frozen."""

    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    backend, settings = TritonBackend(), current_settings()
    x, grad, weight = meta(tokens, columns), meta(tokens, rows), meta(rows, columns)
    A, B = meta(RANK, columns, dtype=torch.float32), meta(rows, RANK, dtype=torch.float32)
    factors = Factors(A, B, A, B, meta(dtype=torch.float32))
    block = Block(DenseBase(weight), factors, "dither", torch.bfloat16)
    sums = ParameterGradients(*(torch.empty_like(factor) for factor in factors[:4]))
    with counted() as (launches, operations):
        passes.forward(x, block, None, backend, settings)
        passes.gradients(grad, x, True, block, Estimator("clip", 1.0), sums, backend, settings)
        return len(launches), operations.products, operations.others


def main() -> None:
    """The command line."""
    console = Console()
    with stand_in_driver(target(CHIP.family)):
        cells = []
        for kernel in KERNELS:
            case = next(shipped_cases([CHIP.family], [kernel], masks=("none",)))
            kept, through_triton = launch_costs(case)
            cells.append([kernel, f"{kept:.1f}", f"{through_triton:.1f}"])
    print_table("Host time of a launch, µs", ["kernel", "repeated", "Triton's launcher"], cells, console)
    counts = [[f"{n} × {k}, {m}", *map(str, step_counts(n, k, m))] for n, k, m in LAYERS]
    print_table("A step", ["N × K, tokens", "launches", "large products", "other operations"], counts, console)


if __name__ == "__main__":
    main()
