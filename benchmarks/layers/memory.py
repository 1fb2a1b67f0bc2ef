"""What a function allocates: every allocation and release, in time order, replayed.

On a CPU from the profiler's allocation events, on CUDA from the caching allocator's own history. Both see what runs
inside ``torch.library`` operators and on autograd's threads, which a TorchDispatchMode does not. Neither sees memory
that a library takes without PyTorch's allocators, such as BLAS's packing buffers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch._C._profiler import _EventType, _ExtraFields_Allocation, _ProfilerEvent
from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or each recording prints two lines; read at the first one
_CUDA_HISTORY_ENTRIES = 1_000_000
"""Allocator events kept; a layer's step makes a few hundred."""


@dataclass(frozen=True)
class AllocationTrace:
    """Bytes that a function allocated, over whatever was alive when it started.

    peak: most bytes alive at once. peak_temporary: the same, of the allocations that were released before the function
    returned, so without its results; a tensor that its caller keeps is no temporary, at whatever time it was made.
    largest: the largest single allocation, result or not.
    """

    peak: int
    peak_temporary: int
    largest: int


class _Event(NamedTuple):
    address: int
    bytes: int
    """Positive for an allocation, negative for a release."""


def peak_temporary_bytes(function: Callable[[], object], device: torch.device | str = "cpu") -> AllocationTrace:
    """Run `function` once, recording the memory of `device` (CPU or CUDA), and say what it allocated.

    What `function` returns counts as its results. Call it once before: what a first call sets up (handles, caches)
    would be counted otherwise.
    """
    device = torch.device(device)
    events = _cuda_events(function, device) if device.type == "cuda" else _cpu_events(function)
    return replay(events)


def replay(events: Iterable[tuple[int, int]]) -> AllocationTrace:
    """The trace of (address, signed bytes) in time order. Releases of memory from before the start are ignored."""
    sizes: list[int] = []
    lifetimes: list[tuple[int, bool]] = []  # (index into sizes, whether it is the allocation)
    alive: dict[int, int] = {}  # address → index into sizes
    for address, size in events:
        if size > 0:
            alive[address] = len(sizes)
            lifetimes.append((len(sizes), True))
            sizes.append(size)
        elif address in alive:
            lifetimes.append((alive.pop(address), False))
    kept = set(alive.values())
    return AllocationTrace(
        peak=_peak(sizes, lifetimes),
        peak_temporary=_peak(sizes, [entry for entry in lifetimes if entry[0] not in kept]),
        largest=max(sizes, default=0),
    )


def _peak(sizes: list[int], lifetimes: list[tuple[int, bool]]) -> int:
    live = peak = 0
    for index, allocated in lifetimes:
        live += sizes[index] if allocated else -sizes[index]
        peak = max(peak, live)
    return peak


def _cpu_events(function: Callable[[], object]) -> list[_Event]:
    # The profiler's flat "[memory]" events carry no address, so a release could not be told from that of a tensor which
    # was there before, nor a result from a temporary; the tree's events carry it.
    # The eager backend's threads are not seen, and it has none where PyTorch has one.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as recording:
            result = function()
    finally:
        torch.set_num_threads(threads)
    del result  # kept until the recording has ended: a result's release must not be in it
    assert recording.profiler is not None
    assert recording.profiler.kineto_results is not None
    roots = recording.profiler.kineto_results.experimental_event_tree()
    allocations = [event for event in _walk(roots) if event.tag == _EventType.Allocation]
    allocations.sort(key=lambda event: event.start_time_ns)  # threads are interleaved in time, not in the tree
    return [
        _Event(fields.ptr, fields.alloc_size)
        for event in allocations
        if isinstance(fields := event.extra_fields, _ExtraFields_Allocation) and fields.device.type == "cpu"
    ]


def _walk(events: list[_ProfilerEvent]) -> Iterator[_ProfilerEvent]:
    pending = list(reversed(events))
    while pending:
        event = pending.pop()
        yield event
        pending.extend(reversed(event.children))


def _cuda_events(function: Callable[[], object], device: torch.device) -> list[_Event]:
    torch.cuda.synchronize(device)
    torch.cuda.memory._record_memory_history(context=None, max_entries=_CUDA_HISTORY_ENTRIES)
    try:
        result = function()
        torch.cuda.synchronize(device)
        index = torch.cuda.current_device() if device.index is None else device.index
        history = torch.cuda.memory._snapshot(device)["device_traces"][index]
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    del result
    signs = {"alloc": 1, "free_requested": -1}
    return [
        _Event(entry["addr"], signs[entry["action"]] * entry["size"]) for entry in history if entry["action"] in signs
    ]
