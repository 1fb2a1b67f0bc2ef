"""Writing one file of a merged checkpoint: pieces of its tensors, shared among threads."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from ..backends import PANEL_UNIT, Block, DenseBase, Factors, resolve_backend
from ..backends.workers import run, worker_count
from ..base_checkpoint import piece_rows
from ..merging import dual_lora_merge_, largest_update, surely_finite
from ..panels import write_weight
from ..runtime_settings import current_settings
from ..safetensors_file import DTYPES, as_tensor, file_header
from .plan import Output, Update

PIECE_BYTES = 4 * 2**20
"""What a thread reads, merges and writes at a time. A merge of 4.4 GB took 6.2 s by 1 MB, 5.4 by 2 MB, 4.8 by 4 or 8 MB
(AMD EPYC, Zen 3, 2 cores)."""
_WRITE_BYTES = 256 * 2**10
"""Of one call to the system. On ext4 (Linux 6) writing 4.4 GB took 1.3 s so, 4.5 s by 2 MB a call, 1.5 s by 64 KB."""
_GROUP_BYTES = 256 * 2**20
"""After as many bytes the threads meet, so that Ctrl-C is heard."""
_FACTOR_BYTES = 64 * 2**20
"""Of factors that are kept for other threads; one layer's at least."""
_CPU = torch.device("cpu")

Progress = Callable[[int], None]
"""Is told of bytes that have been written, by any thread."""


class Piece(NamedTuple):
    """Rows start … stop of one stored matrix; `position`: where the file has them.

    Tensors that are only copied or cast are taken as matrices of one column.
    """

    name: str
    output: Output
    start: int
    stop: int
    position: int


def pieces_of(outputs: Mapping[str, Output], position: int) -> Iterator[Piece]:
    """The pieces of a file's tensors in order, of about `PIECE_BYTES`; its data begin at `position`."""
    for name, output in outputs.items():
        rows, _, step = _stored_rows(output)
        written = output.nbytes // max(1, rows)
        for start in range(0, rows, step):
            yield Piece(name, output, start, min(start + step, rows), position + start * written)
        position += output.nbytes


def _stored_rows(output: Output) -> tuple[int, int, int]:
    """(rows of a tensor as pieces count them, bytes of one as it is stored, rows in a piece)."""
    entry = output.entry
    if output.updates:
        row = entry.nbytes // max(1, entry.shape[0])
        return entry.shape[0], row, piece_rows(entry, max(PIECE_BYTES, PANEL_UNIT * row))
    if output.dtype == entry.dtype:
        return entry.nbytes, 1, PIECE_BYTES
    size = DTYPES[entry.dtype].itemsize
    return entry.nbytes // size, size, max(1, PIECE_BYTES // size)


class Room:
    """Memory that a thread uses again and again; it grows where it must."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def take(self, size: int) -> memoryview:
        """`size` bytes, which the next call may hand out again."""
        if len(self._bytes) < size:
            self._bytes = bytearray(size)
        return memoryview(self._bytes)[:size]


class Read(NamedTuple):
    """A layer's factors, which are finite and fit each other, and what their update is at most: `largest_update`."""

    factors: Factors
    largest: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the factors."""
        return sum(factor.nbytes for factor in self.factors)


class FactorCache:
    """The factors of the layers that threads work on, so that threads on the same layer read it once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: dict[tuple[int, str], Read] = {}

    def __getitem__(self, update: Update) -> Read:
        key = id(update.layers), update.layer
        with self._lock:
            if key not in self._kept:
                factors = update.layers.factors(update.layer)
                self._kept[key] = Read(factors, largest_update(factors))
                while len(self._kept) > 1 and sum(read.nbytes for read in self._kept.values()) > _FACTOR_BYTES:
                    del self._kept[next(iter(self._kept))]
            return self._kept[key]


def write_shard(
    path: Path, outputs: Mapping[str, Output], metadata: Mapping[str, str], backend: str, progress: Progress
) -> None:
    """Write a file of `outputs`; nothing has been flushed to the disk at the end.

    Raises ValueError where an update, or a cast, would write a non-finite number over a finite one, with the tensor's
    name; OSError where the file cannot be written.
    """
    header = file_header({name: (output.dtype, output.entry.shape) for name, output in outputs.items()}, metadata)
    lanes = worker_count(_CPU)
    rooms = [(Room(), Room()) for _ in range(lanes)]
    factors = FactorCache()
    with OutputFile(path) as file:
        file.write(header, 0)
        for group in _groups(pieces_of(outputs, len(header))):
            waiting = iter(group)  # next() of a list's iterator is one step for other threads

            def work(own: tuple[Room, Room], waiting: Iterator[Piece]) -> None:
                for piece in waiting:
                    content = merged_piece(piece, own, factors, backend)
                    file.write(content, piece.position)
                    progress(len(content))

            run([partial(work, own, waiting) for own in rooms], _CPU)


def _groups(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    group, size = [], 0
    for piece in pieces:
        group.append(piece)
        size += piece.output.nbytes * (piece.stop - piece.start) // max(1, _stored_rows(piece.output)[0])
        if size >= _GROUP_BYTES:
            yield group
            group, size = [], 0
    yield group


def merged_piece(piece: Piece, rooms: tuple[Room, Room], factors: FactorCache, backend: str) -> memoryview:
    """The bytes of one piece, copied, cast or updated, in one of the rooms."""
    output, entry = piece.output, piece.output.entry
    _, row, _ = _stored_rows(output)
    stored = rooms[0].take((piece.stop - piece.start) * row)
    output.source.read_into(stored, entry.start + piece.start * row)
    if not output.updates and output.dtype == entry.dtype:
        return stored
    dtype, target = DTYPES[entry.dtype], DTYPES[output.dtype]
    numbers, result = as_tensor(stored, dtype), stored
    if target != dtype:
        result = rooms[1].take(numbers.numel() * target.itemsize)
        cast = as_tensor(result, target).copy_(numbers)
        if not cast.isfinite().all() and (numbers.isfinite() & ~cast.isfinite()).any():
            raise ValueError(f"{piece.name} has numbers beyond the range of {target}, expected another dtype")
        numbers = cast
    if output.updates:
        _update_(numbers.view(piece.stop - piece.start, -1), piece, factors, backend)
    return result


def _update_(stored: torch.Tensor, piece: Piece, factors: FactorCache, backend: str) -> None:
    """Merge every update into rows of a stored matrix."""
    for update in piece.output.updates:
        own, largest = factors[update]
        if piece.output.transposed:
            weight, origin, own = stored.t(), (0, piece.start), own.columns(piece.start, piece.stop)
        else:
            weight, origin, own = stored, (piece.start, 0), own.rows(piece.start, piece.stop)
        if surely_finite(weight, largest):  # `dual_lora_merge_` would look at the factors again: a third
            block = Block(DenseBase(weight), own, update.rounding, weight.dtype, *origin)
            chosen = resolve_backend(backend, weight.device, weight.dtype, own.A.dtype)
            write_weight(weight, block, chosen, current_settings())
            continue
        try:
            dual_lora_merge_(weight, *own, rounding=update.rounding, backend=backend, origin=origin)
        except ValueError as error:
            rows = f"rows {piece.start} to {piece.stop - 1} of {piece.name} in {piece.output.source.path.name}"
            raise ValueError(f"{str(update.layers.file)!r}: {update.layer}.{error}, in {rows}") from error


class OutputFile:
    """A new file that threads write to, each at its own place."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=0)
        self._lock = threading.Lock()

    def write(self, content: memoryview | bytes, position: int) -> None:
        """Write all of `content` from `position` on. Raises OSError where it cannot be."""
        content = memoryview(content)
        done = 0
        while done < len(content):
            done += self._write_some(content[done : done + _WRITE_BYTES], position + done)

    def _write_some(self, content: memoryview, position: int) -> int:
        if hasattr(os, "pwrite"):
            return os.pwrite(self._file.fileno(), content, position)
        with self._lock:  # Windows
            self._file.seek(position)
            return self._file.write(content)

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
