"""Threads of the eager backend's own on CPUs, each of which runs PyTorch's operations on one OpenMP thread.

The eager backend is hundreds of small operations. Shared among OpenMP's threads, each ends in a barrier where one
thread spins, or sleeps, until the other has had its turn: beside busy processes a step took 24 times as long as alone.
Here each thread has its own rows from beginning to end, and they meet once. PyTorch's own number of threads stays as
it is.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import torch

_lock = threading.Lock()
_pool: tuple[tuple[int, int], ThreadPoolExecutor] | None = None
_inside = threading.local()


def worker_count(device: torch.device) -> int:
    """How many shares of an operation run at a time: as many as PyTorch has threads, and 1 on other devices.

    1 also where a dispatch mode watches, which other threads would not be seen by.
    """
    is_alone = device.type != "cpu" or getattr(_inside, "works", False) or torch._C._len_torch_dispatch_stack() > 0
    return 1 if is_alone else torch.get_num_threads()


def shares(lines: int, unit: int, most: int, first: int = 0) -> list[tuple[int, int]]:
    """(first line, line after the last) of nearly equal shares of `lines` lines: at most `most`, and at least one.

    They end at multiples of `unit`, counted from `first` lines before.
    """
    units = -(-(first + lines) // unit)
    count = max(1, min(most, units))
    edges = [0, *(units * i // count * unit - first for i in range(1, count)), lines]
    return list(pairwise(edges))


def run(work: Sequence[Callable[[], None]], device: torch.device) -> None:
    """Run all of `work`, and raise what the first of them raised, if any did.

    A single one runs on a worker, too: a product's bits may depend on its number of threads.
    """
    if worker_count(device) == 1:
        for share in work:
            share()
        return
    inference = torch.is_inference_mode_enabled()
    jobs = [_workers().submit(_work, share, inference) for share in work]
    for job in jobs:  # all have ended before the caller's memory may go
        job.exception()
    for job in jobs:
        job.result()


def _workers() -> ThreadPoolExecutor:
    """The threads of this process, as many as PyTorch has."""
    global _pool
    key = os.getpid(), torch.get_num_threads()
    with _lock:
        if _pool is None or _pool[0] != key:
            if _pool is not None and _pool[0][0] == key[0]:
                _pool[1].shutdown(wait=False)
            pool = ThreadPoolExecutor(key[1], "dual_lora", initializer=_begin, initargs=(key[1],))
            all_there = threading.Barrier(key[1])  # each of these needs a thread of its own
            list(pool.map(lambda _: all_there.wait(), range(key[1])))
            _pool = key, pool
        return _pool[1]


def _begin(everyones: int) -> None:
    """Give a new worker one OpenMP thread, and threads to come `everyones`.

    OpenMP's and MKL's counts are the thread's own. PyTorch also keeps the last one that was set, for threads to come,
    so a thread that ends sets it back. What a worker reads there may be another worker's 1.
    """
    torch.get_num_threads()  # or PyTorch would give this thread the common number at its first operation
    torch.set_num_threads(1)
    restoring = threading.Thread(target=torch.set_num_threads, args=(everyones,))
    restoring.start()
    restoring.join()
    _inside.works = True


def _work(share: Callable[[], None], inference: bool) -> None:
    with torch.inference_mode(inference), torch.no_grad():
        share()
