"""Files are read as the safetensors library reads them, and what it refuses is refused."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save, save_file

from dual_lora_kernels.safetensors_file import DTYPES, SafetensorsFile, byte_count, file_header, format_name

STATES = st.dictionaries(
    st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
    st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 4), max_size=3)),
    max_size=5,
)


def _numbers(dtype: str, shape: list[int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randint(0, 2, shape, generator=generator).to(DTYPES[dtype])


def _bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.reshape(-1).view(torch.uint8).tolist())


# Without tensors and with empty metadata the library writes what is no JSON.
@given(wanted=STATES, metadata=st.dictionaries(st.text(max_size=4), st.text(max_size=4), min_size=1, max_size=2))
def test_what_the_library_writes_is_read(
    wanted: dict[str, Any], metadata: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("written") / "file"
    state = {name: _numbers(*what) for name, what in wanted.items()}
    save_file(state, path, metadata)
    with SafetensorsFile(path) as file:
        assert file.tensors.keys() == state.keys()
        assert file.metadata == metadata
        for name, tensor in state.items():
            own = file.read(name)
            assert (own.dtype, own.shape) == (tensor.dtype, tensor.shape)
            assert _bytes(own) == _bytes(tensor)


@given(wanted=STATES)
def test_the_library_reads_what_a_header_begins(wanted: dict[str, Any]) -> None:
    state = {name: _numbers(*what) for name, what in wanted.items()}
    entries = {name: (format_name(tensor.dtype), tuple(tensor.shape)) for name, tensor in state.items()}
    data = b"".join(map(_bytes, state.values()))
    read = load(file_header(entries, {"format": "pt"}) + data)
    assert read.keys() == state.keys()
    assert all(_bytes(read[name]) == _bytes(tensor) for name, tensor in state.items())


ORDINARY = save({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}, {"format": "pt"})


@given(
    position=st.integers(0, len(ORDINARY) - 1), byte=st.integers(0, 255), cut=st.one_of(st.none(), st.integers(0, 400))
)
def test_a_damaged_byte_is_found_where_the_library_finds_it(
    position: int, byte: int, cut: int | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Of a file that the library reads, every tensor is the same; what it refuses is refused, with the file's name."""
    damaged = bytearray(ORDINARY)
    damaged[position] = byte
    path = tmp_path_factory.mktemp("damaged") / "file"
    path.write_bytes(damaged[:cut])
    try:
        library = load_file(path)
    except (SafetensorError, ValueError, KeyError):
        with pytest.raises(ValueError, match=re.escape(repr(str(path)))):
            SafetensorsFile(path)
        return
    with SafetensorsFile(path) as file:
        own = {name: file.read(name) for name in file.tensors}
    assert own.keys() == library.keys()
    assert all(_bytes(own[name]) == _bytes(library[name]) for name in own)


def _file(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def _entry(start: int, stop: int, shape: list[Any] | None = None, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(stop - start) // 4] if shape is None else shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "truncated"),
        (b"\x05\0\0\0", "truncated"),
        (b"\xff" * 16, "truncated"),
        (_file(b"[]"), "expected an object"),
        (_file(b"{"), "Expecting property name"),
        (_file(b"[" * 100_000 + b"]" * 100_000), "recursion"),
        (_file(b"\xff\xfe"), "decode"),
        (_file({"__metadata__": {"a": 1}}), "metadata"),
        (_file({"a": _entry(0, 8)}, bytes(4)), "truncated"),
        (_file({"a": _entry(0, 8)}, bytes(12)), "more behind"),
        (_file({"a": _entry(0, 8), "b": _entry(4, 12)}, bytes(12)), "overlap"),
        (_file({"a": _entry(0, 4), "b": _entry(8, 12)}, bytes(12)), "gap"),
        (_file({"a": _entry(0, 8, [3])}, bytes(8)), "expected 12 by its shape"),
        (_file({"a": _entry(0, 8, [-2])}, bytes(8)), "expected integers of 0 and more"),
        (_file({"a": _entry(0, 8, [2.0])}, bytes(8)), "expected integers of 0 and more"),
        (_file({"a": _entry(0, 8, [2**62, 2**62])}, bytes(8)), "by its shape"),
        (_file({"a": _entry(0, 8, dtype="Q4")}, bytes(8)), "expected one of BOOL"),
        (_file({"a": _entry(0, 8, [2**62] * 100_000)}, bytes(8)), "has 100000 dimensions, expected 64 at most"),
        (_file({"a": _entry(0, 8) | {"dtype": []}}, bytes(8)), "expected one of BOOL"),
        (_file({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)), "has not dtype"),
        (_file({"a": _entry(0, 1, [3], "F4")}, bytes(1)), "no whole bytes"),
        (b"PK\x03\x04" + bytes(100), "truncated|header"),
        (b"\x80\x02}q\x00." * 20, "truncated"),
    ],
)
def test_hostile_headers_are_refused(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"model\.safetensors' is no safetensors file, or damaged: .*({reason})"):
        SafetensorsFile(path)
    with pytest.raises((SafetensorError, ValueError)):
        load_file(path)


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe' is no regular file"):
        SafetensorsFile(tmp_path / "pipe")
    with pytest.raises(ValueError, match="is no regular file"):
        SafetensorsFile(tmp_path)
    with pytest.raises(FileNotFoundError):
        SafetensorsFile(tmp_path / "none")


def test_a_file_that_is_cut_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    save_file({"a": torch.zeros(10_000)}, path)
    with SafetensorsFile(path) as file:
        os.truncate(path, 5_000)
        with pytest.raises(ValueError, match="was cut while it was read"):
            file.read("a")


def test_a_file_that_is_replaced_stays_the_one_that_was_opened(tmp_path: Path) -> None:
    path = tmp_path / "file"
    save_file({"a": torch.zeros(3)}, path)
    with SafetensorsFile(path) as file:
        save_file({"a": torch.ones(3)}, tmp_path / "new")
        (tmp_path / "new").replace(path)
        assert torch.equal(file.read("a"), torch.zeros(3))


def test_dtypes_of_less_than_a_byte_are_counted() -> None:
    assert byte_count("F4", (3, 4)) == 6
    assert byte_count("F8_E4M3", (3,)) == 3
