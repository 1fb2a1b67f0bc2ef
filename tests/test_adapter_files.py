"""A save is one atomic step: whatever is killed, read or saved beside it, one whole adapter is there."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import signal
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from dual_lora_kernels import adapter_files
from dual_lora_kernels.adapter_files import SETTINGS_FILE, WEIGHTS_FILE, read, write

if os.name != "posix":
    pytest.skip("processes are forked and killed", allow_module_level=True)

TIMES = 100
SAVES: list[tuple[dict[str, Any], dict[str, torch.Tensor]]] = [
    ({"format": 1, "alpha": 1.0, "ste": "clip"}, {"layer.A": torch.full((64, 1000), 1.0)}),
    ({"format": 1, "alpha": 2.0, "ste": "xnor"}, {"layer.A": torch.full((64, 1000), 2.0)}),
]
"""Two adapters of equal ranks, 250 KiB: a mixture of them would load."""


def which(folder: Path) -> int:
    """The number of the save that `folder` holds, whole."""
    settings, tensors = read(folder)
    (found,) = [i for i, (other, state) in enumerate(SAVES) if settings == other and same(tensors, state)]
    return found


def same(tensors: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    return tensors.keys() == others.keys() and all(
        torch.equal(tensor, others[name]) for name, tensor in tensors.items()
    )


def save_for_ever(folder: Path, ready: Any) -> None:
    ready.set()
    for turn in range(1_000_000):
        settings, tensors = SAVES[turn % 2]
        write(folder, tensors, settings)


@contextmanager
def saver(folder: Path) -> Iterator[None]:
    """A process that saves both adapters by turns, killed in the end."""
    fork = multiprocessing.get_context("fork")  # a fresh interpreter would take seconds to import torch
    ready = fork.Event()
    process = fork.Process(target=save_for_ever, args=(folder, ready))
    process.start()
    assert ready.wait(60)
    try:
        yield
    finally:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join(60)
        assert process.exitcode == -signal.SIGKILL  # it ran until then


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_a_killed_save_leaves_one_whole_adapter(tmp_path: Path) -> None:
    """100 kills at random moments; what they leave behind, the next save removes."""
    write(tmp_path, SAVES[0][1], SAVES[0][0])
    draw, seen, unfinished = random.Random(0), set(), 0
    for _ in range(TIMES):
        with saver(tmp_path):
            time.sleep(draw.uniform(0, 0.02))
        seen.add(which(tmp_path))
        unfinished += len(names(tmp_path)) > 2
    assert seen == {0, 1}
    assert unfinished  # some were killed within a save
    write(tmp_path, SAVES[1][1], SAVES[1][0])
    assert names(tmp_path) == sorted([SETTINGS_FILE, WEIGHTS_FILE])
    assert which(tmp_path) == 1


def test_a_reader_beside_a_saver_sees_whole_adapters(tmp_path: Path) -> None:
    write(tmp_path, SAVES[0][1], SAVES[0][0])
    with saver(tmp_path):
        seen = [which(tmp_path) for _ in range(TIMES)]
    assert set(seen) == {0, 1}


def test_savers_beside_each_other_leave_one_adapter(tmp_path: Path) -> None:
    with saver(tmp_path), saver(tmp_path):
        for turn in range(TIMES // 2):
            settings, tensors = SAVES[turn % 2]
            write(tmp_path, tensors, settings)
            which(tmp_path)
    which(tmp_path)


def test_a_full_disk_keeps_the_old_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, SAVES[0][1], SAVES[0][0])

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(adapter_files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, SAVES[1][1], SAVES[1][0])
    assert which(tmp_path) == 0
    assert names(tmp_path) == sorted([SETTINGS_FILE, WEIGHTS_FILE])


def test_everything_is_flushed_before_it_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """File, rename, file, rename, then the folder and the one that it is in."""
    calls: list[str] = []
    flush, replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        calls.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        flush(descriptor)

    def rename(source: Path, target: Path) -> None:
        calls.append(target.name)
        replace(source, target)

    monkeypatch.setattr(adapter_files.os, "fsync", fsync)
    monkeypatch.setattr(adapter_files.os, "replace", rename)
    write(tmp_path / "adapter", SAVES[0][1], SAVES[0][0])
    assert calls == ["file", WEIGHTS_FILE, "file", SETTINGS_FILE, "folder", "folder"]


def test_links_are_replaced_and_not_followed(tmp_path: Path) -> None:
    """The Hugging Face cache has folders of links; what they lead to is not ours to change."""
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshot"
    write(blobs, SAVES[0][1], SAVES[0][0])
    folder.mkdir()
    for name in (SETTINGS_FILE, WEIGHTS_FILE):
        (folder / name).symlink_to(blobs / name)
    write(folder, SAVES[1][1], SAVES[1][0])
    assert (which(blobs), which(folder)) == (0, 1)
    assert not any((folder / name).is_symlink() for name in (SETTINGS_FILE, WEIGHTS_FILE))


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_are_the_umasks(tmp_path: Path, mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        write(tmp_path, SAVES[0][1], SAVES[0][0])
    finally:
        os.umask(before)
    for name in (SETTINGS_FILE, WEIGHTS_FILE):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == mode


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter").write_text("mine")
    with pytest.raises(NotADirectoryError, match=r"^folder: got .*adapter', which is a file, expected a folder"):
        write(tmp_path / "adapter", SAVES[0][1], SAVES[0][0])
    assert (tmp_path / "adapter").read_text() == "mine"


@pytest.mark.parametrize("text", [json.dumps({**SAVES[0][0], "alpha": 7.0}), "{", "[" * 100_000])
def test_a_settings_file_that_says_something_else_does_not_count(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, SAVES[0][1], SAVES[0][0])
    assert which(tmp_path) == 0
    assert not caplog.text
    (tmp_path / SETTINGS_FILE).write_text(text)
    assert which(tmp_path) == 0
    assert f"{SETTINGS_FILE} differs from the settings inside {WEIGHTS_FILE}, which count" in caplog.text
    (tmp_path / SETTINGS_FILE).unlink()
    assert which(tmp_path) == 0
