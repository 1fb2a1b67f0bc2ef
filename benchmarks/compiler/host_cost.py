"""What a Triton launch costs on the host, and how many launches and other operations a layer's step has.

``python -m benchmarks.compiler.host_cost`` needs no GPU: a stand-in driver compiles for an H100 and launches nothing.
So the times are those of Python and of Triton's binder, without the vendor's driver.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console

from dual_lora_kernels.backends.triton.architecture import Architecture
from dual_lora_kernels.backends.triton.launch import Launch

from ..harness.report import print_table
from .ahead_of_time import target
from .recorded_step import LayerStep, Product, SmallOperation, on_chip, training_step
from .shipped_launches import KERNELS, Case, shipped_cases
from .stand_in_driver import stand_in_driver

CHIP = Architecture("sm_90", compute_units=132)
LAYERS = ((4096, 4096, 512), (4096, 4096, 8192), (14336, 4096, 4096))
"""N, K and M of the steps that are counted."""
RANK = 16
REPEATS = 2000


def microseconds(function: Callable[[], object], repeats: int = REPEATS) -> float:
    """The median time of a call."""
    for _ in range(50):
        function()
    seconds = []
    for _ in range(repeats):
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


def step_counts(rows: int, columns: int, tokens: int) -> tuple[int, int, int]:
    """(kernel launches, large products, other operations) of a bf16 layer's training step, W0 frozen."""
    events = training_step(CHIP, rows, columns, tokens, RANK).events
    kinds = (Launch, Product, SmallOperation)
    launches, products, others = (sum(isinstance(event, kind) for event in events) for kind in kinds)
    return launches, products, others


def step_microseconds(rows: int, columns: int, tokens: int) -> float:
    """The host's time for such a step: Python, and launches as far as the driver. Products only have their shapes."""
    step = LayerStep(rows, columns, tokens, RANK)

    def run() -> None:
        step.forward()
        step.input_gradient()
        step.parameter_gradients()

    with on_chip(CHIP), torch.no_grad():
        return microseconds(run, repeats=100)


def main() -> None:
    """The command line."""
    console = Console()
    with stand_in_driver(target(CHIP.family)):
        cells = []
        for kernel in KERNELS:
            case = next(shipped_cases([CHIP.family], [kernel], masks=("none",)))
            kept, through_triton = launch_costs(case)
            cells.append([kernel, f"{kept:.1f}", f"{through_triton:.1f}"])
        steps = [
            [f"{n} × {k}, {m}", *map(str, step_counts(n, k, m)), f"{step_microseconds(n, k, m):.0f}"]
            for n, k, m in LAYERS
        ]
    print_table("Host time of a launch, µs", ["kernel", "repeated", "Triton's launcher"], cells, console)
    headings = ["N × K, tokens", "launches", "large products", "other operations", "host µs"]
    print_table("A step", headings, steps, console)


if __name__ == "__main__":
    main()
