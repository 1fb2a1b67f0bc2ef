"""A native library that is damaged or missing is told in a line, and never loaded."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from dual_lora_kernels.backends import native

LIBRARY = Path(native.__file__).parents[1] / "_native.abi3.so"
RECORD = "_native_build.json"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that the backend takes for the package's."""
    monkeypatch.setattr(native, "_PACKAGE", tmp_path)
    native._load_failure.cache_clear()
    yield tmp_path
    native._load_failure.cache_clear()


@pytest.mark.parametrize("share", [0.0, 0.00001, 0.5, 0.999999])
def test_a_truncated_library_is_not_loaded(package: Path, share: float) -> None:
    """Loading it would end the process with a bus error."""
    data = LIBRARY.read_bytes()
    (package / LIBRARY.name).write_bytes(data[: int(share * len(data))])
    reason = native.NativeBackend().why_unavailable()
    assert reason is not None
    assert "library is damaged" in reason or "cannot be loaded" in reason


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.9])
def test_a_library_that_ends_in_zeros_is_not_loaded(package: Path, share: float) -> None:
    """A file of the right length that a power cut kept from being written; loading it is a segmentation fault."""
    data = LIBRARY.read_bytes()
    start = int(share * len(data))
    (package / LIBRARY.name).write_bytes(data[:start] + bytes(len(data) - start))
    assert "library is damaged" in str(native.NativeBackend().why_unavailable())


def test_a_library_that_cannot_be_read_is_no_traceback(package: Path) -> None:
    (package / LIBRARY.name).mkdir()
    assert "library cannot be loaded" in str(native.NativeBackend().why_unavailable())


def test_another_library_is_no_traceback(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of another version, say, whose operators have other names."""
    shutil.copy(LIBRARY, package)
    monkeypatch.setattr("torch.ops.load_library", lambda _: None)  # twice in a process is one too many
    monkeypatch.setattr(native, "_ops", SimpleNamespace)
    assert "library is another version's" in str(native.NativeBackend().why_unavailable())


def test_a_whole_library_is_loaded(package: Path) -> None:
    shutil.copy(LIBRARY, package)
    assert native._is_whole(package / LIBRARY.name)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'"text"', b"null"])
def test_a_damaged_build_record_is_no_traceback(package: Path, content: bytes) -> None:
    (package / RECORD).write_bytes(content)
    reason = native.NativeBackend().why_unavailable()
    assert reason is not None
    assert "not in this installation (the record of its build is damaged, too)" in reason
