"""Timing on a machine that others use too: interleaved rounds, medians, and ratios within a round.

Each round runs every candidate once, starting one further along each time, so a slow second hits all of them alike and
none is always the one after the largest. A ratio compares two times of the same round; its median over the rounds is
steadier than the ratio of two medians.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Seconds = dict[str, list[float]]
"""Candidate → its time in each round, in seconds; entry i of all of them is from the same round."""


FEWEST_ROUNDS = 3
"""Rounds that a time limit does not cut: fewer have no quartiles worth the name."""


@dataclass(frozen=True)
class Quartiles:
    """Median and quartiles of one quantity over the rounds."""

    lower: float
    median: float
    upper: float


def quartiles(values: Sequence[float]) -> Quartiles:
    """The three quartiles, interpolated; of a single value, that value."""
    if len(values) == 1:
        return Quartiles(values[0], values[0], values[0])
    return Quartiles(*statistics.quantiles(values, n=4, method="inclusive"))


def ratios(seconds: Seconds, candidate: str, reference: str) -> Quartiles:
    """How many times `reference`'s time `candidate` took, round by round."""
    pairs = zip(seconds[candidate], seconds[reference], strict=True)
    return quartiles([own / other for own, other in pairs])


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int,
    device: torch.device,
    console: Console | None = None,
    limit: float = math.inf,
    show: bool = True,
) -> Seconds:
    """Time every candidate once a round, after `warmup` rounds that are not counted.

    A candidate's result is released outside its time. On CUDA the time is the device's own, from the candidate's start
    on an idle device to its end, so it includes launches that the device waits for. After `limit` seconds no round is
    begun, once there are ``FEWEST_ROUNDS``. Without `show` there is no progress bar, for callers that have their own.
    """
    if not candidates or rounds < 1 or warmup < 0:
        raise ValueError(f"got {len(candidates)} candidates, {rounds} rounds, {warmup} warm-up rounds: nothing to time")
    names = list(candidates)
    seconds: Seconds = {name: [] for name in names}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    started = time.perf_counter()
    with Progress(*columns, console=console, transient=True, disable=not show) as progress:
        task = progress.add_task("timing", total=(rounds + warmup) * len(names))
        for index in range(-warmup, rounds):
            if index >= FEWEST_ROUNDS and time.perf_counter() - started > limit:
                break
            first = index % len(names)
            for name in names[first:] + names[:first]:
                progress.update(task, description="warming up" if index < 0 else f"round {index + 1}: {name}")
                elapsed = _run(candidates[name], device)
                if index >= 0:
                    seconds[name].append(elapsed)
                progress.advance(task)
    return seconds


def _run(function: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        result = function()
        elapsed = time.perf_counter() - start
        del result
        return elapsed
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.device(device):
        torch.cuda.synchronize(device)
        begin.record()
        result = function()
        end.record()
        torch.cuda.synchronize(device)
    del result
    return float(begin.elapsed_time(end)) / 1e3
