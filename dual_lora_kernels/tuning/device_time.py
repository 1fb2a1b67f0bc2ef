"""How long the device takes for a call, launches left out, with caches that do not hold its operands."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence

import torch

ROTATION_BYTES = 512 * 2**20
"""Operands that are used in turn add up to this: twice the largest last-level cache (MI300X, 256 MiB)."""
MOST_COPIES = 64


def copies(operand_bytes: int, device: torch.device) -> int:
    """How many sets of operands to use in turn; one on a CPU, where sizes are for tests."""
    if device.type != "cuda":
        return 1
    return max(1, min(MOST_COPIES, -(-ROTATION_BYTES // operand_bytes)))


def captured(function: Callable[[], object]) -> Callable[[], None]:
    """What `function` launches, as one CUDA (or HIP) graph to replay; its results stay in the graph's memory.

    It runs twice before on a side stream: compilation, handles and caches must not be made during the capture.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    collecting = gc.isenabled()
    gc.disable()  # a collected Triton kernel would unload its module, which a capture forbids
    try:
        with torch.cuda.graph(graph):
            function()
    finally:
        if collecting:
            gc.enable()
    return lambda: graph.replay()  # the bound method of a pybind class has no signature of its own


def seconds_per_call(calls: Sequence[Callable[[], object]], device: torch.device, milliseconds: float = 20.0) -> float:
    """The median time of one of `calls`, alike but for their operands: replays of a graph of all of them, divided.

    On a CPU, which is for tests in Triton's interpreter, one run by the host's clock.
    """

    def run() -> None:
        for call in calls:
            call()

    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) / len(calls)
    import triton.testing

    with torch.cuda.device(device):
        replay = captured(run)
        # do_bench overwrites a buffer of 256 MiB before each replay, which clears what caches kept of the last one.
        median = triton.testing.do_bench(replay, warmup=5, rep=milliseconds, return_mode="median")
    return float(median) / 1e3 / len(calls)
