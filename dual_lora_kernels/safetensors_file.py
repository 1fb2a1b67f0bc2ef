"""A safetensors file piece by piece: its header is checked, and only what is asked for is read.

The safetensors library maps a file into memory, or reads it whole; a merge or an inspection may do neither with files
that are larger than memory. Pages of a mapped file count as the process's, and reading it twice may find another file.
"""

from __future__ import annotations

import json
import math
import os
import stat
import threading
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
    "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32,
    "F64": torch.float64, "C64": torch.complex64,
}  # fmt: skip
"""The format's dtypes that are read as tensors."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_BITS = {name: 8 * dtype.itemsize for name, dtype in DTYPES.items()} | {
    "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
"""Of one element, for all of the format's dtypes."""
_LONGEST_HEADER = 100_000_000
"""Bytes; the safetensors library's own limit."""
_MOST_DIMENSIONS = 64
"""PyTorch's own limit. The product of a million sizes would take hours."""


class StoredTensor(NamedTuple):
    """Where a file has a tensor: the format's name of its dtype, its shape, and its bytes start … stop in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.stop - self.start


class SafetensorsFile:
    """An open safetensors file. It stays the same one if another takes its place by name.

    `close`, the end of a ``with`` block, or its last reference's going closes it.

    Attributes:
        path: as given.
        tensors: by name, in the order of their bytes.
        metadata: the header's texts.
        size: bytes of the file.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is no regular file, or its header is damaged or does not describe exactly its bytes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for a writer
            raise ValueError(f"{str(path)!r} is no regular file, expected a safetensors file")
        self._file = path.open("rb")
        self._lock = threading.Lock()
        self.close = weakref.finalize(self, self._file.close)
        try:
            self.size = self._file.seek(0, 2)
            header, data = self._read_header()
            self.metadata = _metadata(header.pop("__metadata__", {}))
            self.tensors = _tensors(header, data, self.size)
        except (ValueError, RecursionError) as error:
            self.close()
            raise ValueError(f"{str(path)!r} is no safetensors file, or damaged: {error}") from error

    def _read_header(self) -> tuple[dict[str, Any], int]:
        """(the header, where the data begin)."""
        self._file.seek(0)
        length = int.from_bytes(self._file.read(8), "little")
        if self.size < 8 or length > min(self.size - 8, _LONGEST_HEADER):
            raise ValueError(f"its header has {length} bytes, the file {self.size}: it is truncated")
        header = json.loads(self._file.read(length).decode())
        if not isinstance(header, dict):
            raise ValueError(f"its header is a {type(header).__name__}, expected an object")
        return header, 8 + length

    def read_into(self, buffer: memoryview, start: int) -> None:
        """Fill `buffer` with the bytes from `start` on; threads may do so at the same time.

        Raises ValueError where the file has been cut meanwhile.
        """
        done = 0
        while done < len(buffer):
            count = self._read_some(buffer[done:], start + done)
            if not count:
                raise ValueError(f"{str(self.path)!r} ends at {start + done}: it was cut while it was read")
            done += count

    def _read_some(self, buffer: memoryview, start: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [buffer], start)
        with self._lock:  # Windows
            self._file.seek(start)
            return self._file.readinto(buffer)

    def read(self, name: str) -> torch.Tensor:
        """A tensor, on the CPU. KeyError for an unknown name, ValueError for a dtype that is not read."""
        entry = self.tensors[name]
        if entry.dtype not in DTYPES:
            raise ValueError(f"{name} in {str(self.path)!r} is of {entry.dtype}, expected one of {', '.join(DTYPES)}")
        buffer = bytearray(entry.nbytes)
        self.read_into(memoryview(buffer), entry.start)
        return as_tensor(memoryview(buffer), DTYPES[entry.dtype]).view(entry.shape)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows start … stop of a matrix. Raises as `read` does."""
        entry = self.tensors[name]
        row = entry.nbytes // max(1, entry.shape[0])
        buffer = bytearray((stop - start) * row)
        self.read_into(memoryview(buffer), entry.start + start * row)
        return as_tensor(memoryview(buffer), DTYPES[entry.dtype]).view(stop - start, *entry.shape[1:])

    def fileno(self) -> int:
        """The open file's descriptor."""
        return self._file.fileno()

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class LazyTensors(Mapping[str, torch.Tensor]):
    """The tensors of a file by other names; each is read when it is asked for, and not kept."""

    def __init__(self, file: SafetensorsFile, names: Mapping[str, str]) -> None:
        self.file, self._names = file, names

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.file.read(self._names[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def entry(self, name: str) -> StoredTensor:
        """Dtype and shape, without reading the tensor."""
        return self.file.tensors[self._names[name]]

    def stored_name(self, name: str) -> str:
        """What the file calls it."""
        return self._names[name]

    def renamed(self, names: Mapping[str, str]) -> LazyTensors:
        """The tensors by other names again; `names`: new → present."""
        return LazyTensors(self.file, {new: self._names[present] for new, present in names.items()})


def as_tensor(buffer: memoryview, dtype: torch.dtype) -> torch.Tensor:
    """The numbers in `buffer` as a tensor [n] that shares its memory."""
    if not len(buffer):
        return torch.empty(0, dtype=dtype, device="cpu")  # frombuffer refuses none
    return torch.frombuffer(buffer, dtype=dtype)


def file_header(tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """The beginning of a file whose tensors, name → (the format's dtype, shape), follow each other in this order."""
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    position = 0
    for name, (dtype, shape) in tensors.items():
        end = position + byte_count(dtype, shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors stay aligned
    return len(text).to_bytes(8, "little") + text


def byte_count(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor. ValueError where they are no whole number."""
    bits = math.prod(shape) * _BITS[dtype]
    if bits % 8:
        raise ValueError(f"{shape} numbers of {dtype} are no whole bytes")
    return bits // 8


def format_name(dtype: torch.dtype) -> str:
    """The format's name of a dtype that `DTYPES` has."""
    return _NAMES[dtype]


def _metadata(texts: object) -> dict[str, str]:
    if not isinstance(texts, dict) or not all(isinstance(value, str) for value in texts.values()):
        raise ValueError("its metadata are no texts by name")
    return texts


def _tensors(header: Mapping[str, Any], data: int, size: int) -> dict[str, StoredTensor]:
    """Every tensor's place. Raises ValueError unless they fill the file from `data` on, without gaps or overlaps."""
    found = {name: _tensor(name, entry, data) for name, entry in header.items()}
    ordered = dict(sorted(found.items(), key=lambda item: item[1][2:]))
    position = data
    for name, entry in ordered.items():
        if entry.start != position:
            raise ValueError(f"{name} begins at {entry.start}, where {position} was expected: a gap or an overlap")
        position = entry.stop
    if position != size:
        raise ValueError(f"its tensors end at {position}, the file at {size}: it is truncated, or has more behind them")
    return ordered


def _tensor(name: str, entry: object, data: int) -> StoredTensor:
    if not isinstance(entry, dict) or not entry.keys() >= {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name} has not dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"{name} is of {dtype!r}, expected one of {', '.join(_BITS)}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{name} has the shape {shape!r} at {offsets!r}, expected integers of 0 and more")
    if len(shape) > _MOST_DIMENSIONS:
        raise ValueError(f"{name} has {len(shape)} dimensions, expected {_MOST_DIMENSIONS} at most")
    start, stop = offsets
    if stop - start != byte_count(dtype, tuple(shape)):
        raise ValueError(f"{name} has {stop - start} bytes, expected {byte_count(dtype, tuple(shape))} by its shape")
    return StoredTensor(dtype, tuple(shape), data + start, data + stop)


def _are_sizes(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)
