"""Peak memory of a stretch of work: the allocator's own count on CUDA, the process's resident set elsewhere."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
import threading
from types import TracebackType

import psutil
import torch

SAMPLE_SECONDS = 0.005


def release_memory() -> None:
    """Frees what earlier work left behind, so that the next measurement starts from the live tensors alone."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform.startswith("linux"):
        # glibc keeps freed pages, which the next method would reuse without its resident set growing. Where another
        # C library is used, the numbers are less sharp, not wrong.
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)


class PeakMemory:
    """Context manager; ``bytes`` is the peak above the level at entry.

    On the CPU a thread samples the resident set every 5 ms, so peaks shorter than that may be missed.
    """

    def __init__(self, device: torch.device) -> None:
        self.bytes = 0
        self._cuda = device.type == "cuda"
        self._stop = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._start = 0

    def __enter__(self) -> PeakMemory:
        release_memory()
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            self._start = torch.cuda.memory_allocated()
        else:
            self._start = psutil.Process().memory_info().rss
            self._sampler.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._cuda:
            self.bytes = torch.cuda.max_memory_allocated() - self._start
        else:
            self._stop.set()
            self._sampler.join()

    def _sample(self) -> None:
        process = psutil.Process()
        while not self._stop.wait(SAMPLE_SECONDS):
            self.bytes = max(self.bytes, process.memory_info().rss - self._start)
