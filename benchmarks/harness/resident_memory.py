"""The process's own memory, as Linux counts it."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_MMAP_THRESHOLD, _MMAP_BYTES = -3, 65536
"""glibc's M_MMAP_THRESHOLD, and a value at which a released tensor's pages go back at once."""


def return_pages_at_once() -> None:
    """Let the resident size follow what is alive: of glibc's allocator, before the first tensor; elsewhere nothing."""
    with suppress(AttributeError):  # what is in the heap already stays there
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _MMAP_BYTES)


def resident_growth(function: Callable[[], object]) -> int | None:
    """Bytes by which the resident size's peak in a call exceeds what it was before; None where Linux is not."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        reset.write_text("5")
    except (AttributeError, OSError):
        return None

    def kibibytes(name: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(f"{name}:"))

    before = kibibytes("VmRSS")
    function()
    return (kibibytes("VmHWM") - before) * 1024
