"""What saving does to files: links, permissions, failures on the way, and what killed processes leave."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import BinaryIO

import pytest
import torch

from dual_lora_kernels import save_dual_lora
from dual_lora_kernels.adapter_files import SETTINGS_FILE, WEIGHTS_FILE
from dual_lora_kernels.durable_files import replace_files

from .saving import ADAPTERS, processes, running, saved

FILES = sorted([SETTINGS_FILE, WEIGHTS_FILE])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Holds the first adapter."""
    return save_dual_lora(ADAPTERS[0], tmp_path / "adapter")


# --- failures on the way --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("after", range(5))
@pytest.mark.parametrize("exists", [True, False], ids=["over another", "first"])
def test_a_failure_at_any_step(
    error: BaseException, after: int, exists: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two files flushed, two put in place, the folder flushed: whichever fails, one adapter is there whole."""
    if not exists:
        for path in folder.iterdir():
            path.unlink()
    steps = iter(range(after + 1))

    def failing(step: Callable[..., None]) -> Callable[..., None]:
        def run(*arguments: object) -> None:
            if next(steps, None) == after:
                raise error
            step(*arguments)

        return run

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing(os.fsync))
        patch.setattr(os, "replace", failing(os.replace))
        with pytest.raises(type(error)) as raised:
            save_dual_lora(ADAPTERS[1], folder)
    if isinstance(error, OSError):
        assert f"folder: got {str(folder)!r}, expected one that an adapter can be written to: No space" in str(raised)
        assert isinstance(raised.value, OSError)
        assert raised.value.errno == errno.ENOSPC
    is_written = after >= 3  # the first file that takes its place holds all
    if exists or is_written:
        assert saved(folder) == int(is_written)
    assert set(names(folder)) <= set(FILES)
    save_dual_lora(ADAPTERS[1], folder)
    assert (saved(folder), names(folder)) == (1, FILES)


def test_all_is_flushed_before_it_takes_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    fsync, replace = os.fsync, os.replace

    def logged_fsync(descriptor: int) -> None:
        fsync(descriptor)
        log.append("flush " + ("folder" if os.path.isdir(f"/dev/fd/{descriptor}") else "file"))

    def logged_replace(source: Path, target: Path) -> None:
        replace(source, target)
        log.append(target.name)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "replace", logged_replace)
    save_dual_lora(ADAPTERS[0], tmp_path / "new" / "adapter")
    flushes = ["flush folder"] * 3  # the new ones, and the one that they are in
    assert log == ["flush file", "flush file", WEIGHTS_FILE, SETTINGS_FILE, *flushes]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["A", "D", "scale"])
def test_an_adapter_that_is_not_finite_replaces_nothing(name: str, value: float, folder: Path) -> None:
    tensor = getattr(ADAPTERS[1][0], name)
    before = tensor.detach().clone()
    try:
        tensor.data.view(-1)[0] = value
        with pytest.raises(ValueError, match=rf"^model: 0\.{name}: got {value}, expected finite values"):
            save_dual_lora(ADAPTERS[1], folder)
    finally:
        tensor.data.copy_(before)
    assert saved(folder) == 0


@contextmanager
def no_privileges() -> Iterator[None]:
    """The root user may write everywhere."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_paths_that_cannot_be_folders(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for path, error in ((tmp_path / "file", FileExistsError), (tmp_path / "file" / "below", NotADirectoryError)):
        with pytest.raises(error, match=rf"folder: got '{path}', expected one that an adapter can be written to: "):
            save_dual_lora(ADAPTERS[0], path)
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "taken" / WEIGHTS_FILE).mkdir(parents=True)
    with pytest.raises(IsADirectoryError, match=r"folder: got '.*/taken', expected one"):
        save_dual_lora(ADAPTERS[0], tmp_path / "taken")
    assert names(tmp_path / "taken") == [WEIGHTS_FILE]


def test_a_folder_without_permission(folder: Path) -> None:
    folder.chmod(0o500)
    with (
        no_privileges(),
        pytest.raises(PermissionError, match=r"folder: got '.*/adapter', expected one .*: Permission"),
    ):
        save_dual_lora(ADAPTERS[1], folder)
    folder.chmod(0o700)
    assert saved(folder) == 0


# --- permissions and links ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o002, 0o027, 0o077])
def test_the_umask_decides_permissions(umask: int, folder: Path, tmp_path: Path) -> None:
    """Of new files, and of those that replace files with other permissions."""
    (folder / SETTINGS_FILE).chmod(0o600)
    before = os.umask(umask)
    try:
        for path in (folder, tmp_path / "new"):
            save_dual_lora(ADAPTERS[0], path)
            assert {path.stat().st_mode & 0o777 for path in path.iterdir()} == {0o666 & ~umask}
        assert (tmp_path / "new").stat().st_mode & 0o777 == 0o777 & ~umask
    finally:
        os.umask(before)


def test_links_to_files_are_replaced(folder: Path, tmp_path: Path) -> None:
    """A Hugging Face cache's snapshot is a folder of links to blobs."""
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    blobs = {}
    for name in FILES:
        (snapshot / name).symlink_to(folder / name)
        blobs[name] = (folder / name).read_bytes()
    assert saved(snapshot) == 0
    save_dual_lora(ADAPTERS[1], snapshot)
    assert saved(snapshot) == 1
    assert not any(path.is_symlink() for path in snapshot.iterdir())
    assert {name: (folder / name).read_bytes() for name in FILES} == blobs


@pytest.mark.parametrize("dangling", [False, True])
def test_a_link_to_a_folder_is_replaced(
    dangling: bool, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere" if dangling else folder)
    save_dual_lora(ADAPTERS[1], link)
    assert not link.is_symlink()
    assert (saved(link), saved(folder)) == (1, 0)
    assert names(tmp_path) == ["adapter", "link"]
    assert f"{link} is a link to" in caplog.text


def test_a_failure_leaves_a_link_to_a_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = tmp_path / "link"
    link.symlink_to(folder)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_dual_lora(ADAPTERS[1], link)
    assert link.is_symlink()
    assert saved(link) == 0
    assert names(tmp_path) == ["adapter", "link"]


# --- what killed processes leave ------------------------------------------------------------------------------------


def save_and_stop(folder: Path, has_written: Event) -> None:
    """Save, but stop before the first file takes its place."""

    def stop(*_: object) -> None:
        has_written.set()
        signal.pause()

    os.replace = stop
    save_dual_lora(ADAPTERS[1], folder)


def test_what_a_killed_process_leaves_is_removed(folder: Path) -> None:
    """Not, however, what one still writes."""
    has_written = processes.Event()
    with running(save_and_stop, folder, has_written):
        assert has_written.wait(60)
        left = set(names(folder)) - set(FILES)
        assert len(left) == 2
        save_dual_lora(ADAPTERS[0], folder)
        assert set(names(folder)) - set(FILES) == left
    assert set(names(folder)) - set(FILES) == left
    assert saved(folder) == 0
    save_dual_lora(ADAPTERS[1], folder)
    assert (saved(folder), names(folder)) == (1, FILES)


def test_other_files_stay(folder: Path) -> None:
    (folder / ".mine.tmp").write_text("mine")
    (folder / "README.md").write_text("mine")
    save_dual_lora(ADAPTERS[1], folder)
    assert names(folder) == [".mine.tmp", "README.md", *FILES]


def test_file_systems_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saving works there; what killed processes leave stays, since nothing says that they were killed."""

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    left = tmp_path / ".a.0123.tmp"
    left.write_bytes(b"half")
    replace_files(tmp_path, {"a": b"whole"})
    assert (tmp_path / "a").read_bytes() == b"whole"
    assert names(tmp_path) == [left.name, "a"]


def test_a_temporary_file_taken_for_abandoned_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another saver may come between its creation and its lock."""
    flock, removed = fcntl.flock, []

    def late(file: BinaryIO, operation: int) -> None:
        if not removed:
            removed.append(file.name)
            os.unlink(file.name)
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    replace_files(tmp_path, {"a": b"whole"})
    assert removed
    assert (tmp_path / "a").read_bytes() == b"whole"
    assert names(tmp_path) == ["a"]


def test_file_systems_that_flush_no_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def files_only(descriptor: int) -> None:
        if os.path.isdir(f"/dev/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", files_only)
    replace_files(tmp_path, {"a": b"whole"})
    assert names(tmp_path) == ["a"]
