"""The folder that merging writes: what of it may be lost, and when; and what a resumed merge may take over."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from dual_lora_kernels import merge_checkpoint
from dual_lora_kernels.checkpoint_merge import unfinished

from .merged_checkpoints import content, save_adapter, save_base
from .models import llama


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in shards and two adapters for it, which tests copy."""
    folder = tmp_path_factory.mktemp("saved")
    save_base(llama(), folder / "base")
    for seed in (1, 2):
        save_adapter(folder / "base", folder / f"adapter{seed}", seed=seed, target_modules=["q_proj"])
    return folder


@pytest.fixture
def here(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "here")
    return tmp_path / "here"


def merge(here: Path, out: Path | None = None, base: str = "base", **options: Any) -> Any:
    return merge_checkpoint(here / base, here / "adapter1", here / "out" if out is None else out, **options)


def test_an_adapter_is_never_overwritten(here: Path) -> None:
    """``dual-lora merge BASE ADAPTER ADAPTER --overwrite``, with OUT forgotten."""
    before = content(here)
    with pytest.raises(ValueError, match=r"out: got '.*/adapter2', which holds no checkpoint"):
        merge(here, here / "adapter2", overwrite=True)
    assert content(here) == before


def test_a_training_runs_folder_is_never_overwritten(here: Path) -> None:
    shutil.copytree(here / "base", here / "out")
    (here / "out" / "checkpoint-500").mkdir()
    (here / "out" / "checkpoint-500" / "optimizer.pt").write_text("weeks")
    before = content(here)
    with pytest.raises(ValueError, match=r"out: got '.*/out', which holds the folder 'checkpoint-500' too"):
        merge(here, overwrite=True)
    assert content(here) == before


@pytest.mark.parametrize("out", [".", "..", "new/.."])
def test_folders_that_cannot_be_renamed(out: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "cwd" / "inner").mkdir(parents=True)
    monkeypatch.chdir(here / "cwd" / "inner")
    with pytest.raises(ValueError, match=r"out: got '.*', expected a new folder's name"):
        merge(here, Path(out), overwrite=True)


def test_a_mounted_file_system_cannot_be_renamed(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's volume: all would be lost at the very end."""
    (here / "out").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == here / "out")
    with pytest.raises(ValueError, match=r"out: got '.*/out', expected a new folder's name"):
        merge(here, overwrite=True)


def test_a_folder_that_appears_meanwhile_stays(here: Path) -> None:
    def appears(*_: object) -> None:
        (here / "out").mkdir(exist_ok=True)
        (here / "out" / "thesis.tex").write_text("years")

    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"out: got '.*/out', which (exists|holds no checkpoint)"):
            merge(here, overwrite=overwrite, progress=appears)
        assert content(here / "out") == {"thesis.tex": b"years"}
        shutil.rmtree(here / "out")


def test_what_appears_at_the_last_moment_stays(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish = unfinished.Unfinished.publish

    def late(self: unfinished.Unfinished, overwrite: bool) -> None:
        (here / "out").mkdir()
        (here / "out" / "thesis.tex").write_text("years")
        publish(self, overwrite)

    monkeypatch.setattr(unfinished.Unfinished, "publish", late)
    with pytest.raises(OSError, match="not empty"):
        merge(here)
    assert content(here / "out") == {"thesis.tex": b"years"}


@pytest.mark.parametrize("is_back", [True, False])
def test_the_old_checkpoint_survives_a_rename_that_fails(
    is_back: bool, here: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is put back, or stays where it was moved to, and the next merge puts it back."""
    shutil.copytree(here / "base", here / "out")
    rename, count = os.rename, 0

    def failing(source: Path, target: Path) -> None:
        nonlocal count
        count += 1
        if count == 2 or (count > 2 and not is_back):
            raise OSError(5, "Input/output error")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", failing)
        with pytest.raises(OSError, match="Input/output error"):
            merge(here, overwrite=True)
    aside = here / ".out.unfinished"
    assert content(here / "out" if is_back else aside / "replaced") == content(here / "base")
    assert aside.exists() != is_back
    assert any("cannot be put back" in record.getMessage() for record in caplog.records) != is_back
    merge(here, overwrite=True)
    merge(here, here / "other")
    assert content(here / "out") == content(here / "other")
    assert not aside.exists()


def interrupt(here: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """Ctrl-C when all is written."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(unfinished.Unfinished, "publish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            merge(here, **options)


def test_a_file_that_the_base_has_no_more_is_not_published(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "base" / "secret.json").write_text("key")
    (here / "base" / "additional_chat_templates").mkdir()
    (here / "base" / "additional_chat_templates" / "secret.jinja").write_text("key")
    interrupt(here, monkeypatch)
    (here / "base" / "secret.json").unlink()
    shutil.rmtree(here / "base" / "additional_chat_templates")
    assert merge(here).resumed > 1
    merge(here, here / "other")
    assert content(here / "out") == content(here / "other")


def test_another_base_of_the_same_times_is_another(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Archives and build systems give all files one time of change."""

    def reset() -> None:
        for path in (here / "base").glob("*.safetensors"):
            os.utime(path, ns=(0, 0))

    reset()
    interrupt(here, monkeypatch)
    shutil.copytree(here / "base", here / "copy")
    for path in (here / "base").glob("*.safetensors"):
        save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    reset()
    assert merge(here).resumed == 0
    merge(here, here / "other")
    assert content(here / "out") == content(here / "other")
    shutil.rmtree(here / "out")
    interrupt(here, monkeypatch)
    assert merge(here, base="copy").resumed == 0


def test_a_link_in_the_way_is_not_followed(here: Path) -> None:
    (here / "elsewhere").mkdir()
    (here / ".out.unfinished").symlink_to("elsewhere")
    with pytest.raises(OSError, match=r"\.out\.unfinished' is a symbolic link"):
        merge(here)
    assert not any((here / "elsewhere").iterdir())


def test_a_merge_that_ends_takes_nothing_from_the_next(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the folder is gone its lock is held; who waited for a lock that is gone makes another."""
    own = unfinished.Unfinished(here / "out", {"merge": "mine"})
    rmtree, refused = shutil.rmtree, []

    def checking(path: Path, **options: Any) -> None:
        try:
            unfinished.Unfinished(here / "out", {"merge": "other"})
        except OSError:
            refused.append(path)
        rmtree(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(unfinished.shutil, "rmtree", checking)
        own.remove()
    assert len(refused) == 3
    own, opened = unfinished.Unfinished(here / "out", {"merge": "mine"}), threading.Event()
    flock = unfinished.fcntl.flock

    def late(lock: Any, how: int) -> None:
        """Another process ends between opening its lock and locking it."""
        if not opened.is_set():
            opened.set()
            own.remove()
        flock(lock, how)

    monkeypatch.setattr(unfinished.fcntl, "flock", late)
    other = unfinished.Unfinished(here / "out", {"merge": "other"})
    assert other.folder.is_dir()
    with pytest.raises(OSError, match="another process is merging"):
        unfinished.Unfinished(here / "out", {"merge": "third"})
    other.remove()
