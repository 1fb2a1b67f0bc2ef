"""What a device keeps between calls: the dither's vectors, and counters of split sums."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from ...rounding import column_hashes, is_dithered, row_hashes
from .arguments import Hashes

_Buffer = TypeVar("_Buffer")
_TILE_MARGIN = 1024
"""Hashes beyond the weight's last line that a tile may read; larger than any tile."""
_LEAST_HASHES = 16384
_LEAST_COUNTERS = 4096
_hashes: dict[torch.device, list[Hashes]] = {}
"""The vectors made so far, the longest last. None is ever released: captured CUDA graphs hold their addresses."""
_counters: dict[tuple[torch.device, int], list[torch.Tensor]] = {}
"""Zeros of each stream, since kernels of two streams may run at once. None is ever released: kernels may be queued."""


def hashes(like: torch.Tensor, rounding: str, rows: int, columns: int, origin: tuple[int, int] = (0, 0)) -> Hashes:
    """The dither's vectors for a block of at least rows × columns and a tile more, at `origin`; kept per device."""
    if not is_dithered(like.dtype, rounding):
        return Hashes(like, like)  # never read
    if origin != (0, 0):
        row0, col0 = origin
        whole = hashes(like, rounding, row0 + rows, col0 + columns)
        return Hashes(whole.rows[row0:], whole.columns[col0:])
    needed = max(rows, columns) + _TILE_MARGIN
    kept = _hashes.setdefault(like.device, [])
    if kept and len(kept[-1].rows) >= needed:
        return kept[-1]
    length = max(_LEAST_HASHES, 1 << (needed - 1).bit_length())
    return _lasting(lambda: _make_hashes(length, like.device), like.device, kept)


def counters(device: torch.device, count: int) -> torch.Tensor:
    """At least `count` zeros, int32, for kernels of the current stream; a kernel leaves them as zeros."""
    on_gpu = device.type == "cuda"
    kept = _counters.setdefault((device, torch.cuda.current_stream(device).cuda_stream if on_gpu else 0), [])
    # A graph has its own: it may be replayed on another stream than it was captured on.
    if kept and len(kept[-1]) >= count and not (on_gpu and torch.cuda.is_current_stream_capturing()):
        return kept[-1]
    length = max(_LEAST_COUNTERS, 1 << (count - 1).bit_length())
    return _lasting(lambda: _synchronized(torch.zeros(length, dtype=torch.int32, device=device)), device, kept)


def _lasting(make: Callable[[], _Buffer], device: torch.device, kept: list[_Buffer]) -> _Buffer:
    """What `make` returns, kept unless a graph is being captured: then it lies in that graph's memory."""
    if device.type != "cuda":
        kept.append(make())
    elif torch.cuda.is_current_stream_capturing():
        return make()  # written anew by each replay
    else:
        # In a thread of its own: what torch.compile's CUDA graphs allocate on theirs belongs to a pool that they reuse.
        # Its exceptions are raised here: a kernel would read past the end of a shorter buffer.
        with ThreadPoolExecutor(1) as pool:
            kept.append(pool.submit(make).result())
    return kept[-1]


def _make_hashes(length: int, device: torch.device) -> Hashes:
    made = Hashes(row_hashes(0, length, device), column_hashes(0, length, device))
    _synchronized(made.rows)
    return made


def _synchronized(buffer: torch.Tensor) -> torch.Tensor:
    """`buffer`, complete: calls on other streams than its own will use it."""
    if buffer.is_cuda and not torch.cuda.is_current_stream_capturing():
        torch.cuda.current_stream(buffer.device).synchronize()
    return buffer
