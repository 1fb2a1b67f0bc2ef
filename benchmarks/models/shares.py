"""What a step's time on a CPU goes to, by PyTorch's profiler."""

from __future__ import annotations

import time
from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile

_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_scaled_dot", "mkldnn::", "aten::linear")
_KERNELS = "dual_lora_kernels::cpu"
_PYTHON = ("DualLoraFunction", "_ThreeProducts", "autograd::engine")
SHARES = ("products", "kernels", "python", "other")
"""Matrix products, the native backend's kernels, autograd's engine with Python functions, and PyTorch's other
operations: parts of the time that the profiler sees in operations."""


def shares(step: Callable[[], object]) -> dict[str, float]:
    """Run `step` once, for each of ``SHARES`` its part of the time."""
    started = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU]) as recording:
        step()
    wall = (time.perf_counter() - started) * 1e6
    events = recording.key_averages()
    span = min(wall, sum(event.self_cpu_time_total for event in events))
    found = {
        name: sum(event.self_cpu_time_total for event in events if event.key.startswith(prefixes)) / span
        for name, prefixes in (("products", _PRODUCTS), ("kernels", _KERNELS), ("python", _PYTHON))
    }
    return {**found, "other": 1 - sum(found.values())}
