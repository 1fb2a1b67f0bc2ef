"""A merge that is killed at any moment is gone on with, to the very bytes; a folder with the final name is whole.

``DUAL_LORA_CRASHES=50`` kills as often; the default is short.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dual_lora_kernels import DualLoraConfig, merge_checkpoint
from dual_lora_kernels.adapter_files import Adapter, write_adapter
from dual_lora_kernels.checkpoint_merge import merge, shards, unfinished

from .merged_checkpoints import content
from .saving import processes, running

CRASHES = int(os.environ.get("DUAL_LORA_CRASHES", "12"))
LAYERS, SHARDS, FEATURES = 24, 6, 256


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of 3 MB in six files, an adapter, and what they give; each process would have to import transformers."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "base").mkdir()
    generator = torch.Generator().manual_seed(0)
    state, configs, places = {}, {}, {}
    for file in range(SHARDS):
        names = [f"layers.{layer}" for layer in range(file, LAYERS, SHARDS)]
        own = {f"{name}.weight": torch.randn(FEATURES, FEATURES, generator=generator).bfloat16() for name in names}
        path = folder / "base" / f"model-{file}.safetensors"
        save_file(own, path, {"format": "pt"})
        places |= dict.fromkeys(own, path.name)
        for name in names:
            configs[name] = DualLoraConfig(r1=2, r2=2, adapter_dtype=torch.float32)
            state |= {f"{name}.{factor}": torch.randn(2, FEATURES, generator=generator) for factor in "AC"}
            state |= {f"{name}.{factor}": torch.randn(FEATURES, 2, generator=generator) for factor in "BD"}
            state[f"{name}.scale"] = torch.tensor(0.5)
    (folder / "base" / "model.safetensors.index.json").write_text(f'{{"weight_map": {places!r}}}'.replace("'", '"'))
    (folder / "base" / "config.json").write_text("{}")
    write_adapter(folder / "adapter", Adapter(configs, state))
    merge_checkpoint(folder / "base", folder / "adapter", folder / "expected")
    return folder


def merge_slowly(inputs: Path, out: Path, has_begun: Event) -> None:
    """Merge in small pieces, so that there are many moments, some of them in the middle of a file."""
    shards.PIECE_BYTES, shards._GROUP_BYTES = 4096, 16384
    torch.set_num_threads(2)
    has_begun.set()
    merge_checkpoint(inputs / "base", inputs / "adapter", out)


def assert_whole_or_absent(inputs: Path, out: Path) -> bool:
    """Whether a folder of the final name is there, which is whole then."""
    if out.exists():
        assert content(out) == content(inputs / "expected")
    return out.exists()


def test_killing_a_merge_at_random_moments(inputs: Path, tmp_path: Path) -> None:
    moments = random.Random(0)
    halves = finished = 0
    for _ in range(CRASHES):
        has_begun = processes.Event()
        with running(merge_slowly, inputs, tmp_path / "out", has_begun):
            assert has_begun.wait(60)
            time.sleep(moments.uniform(0.0, 0.3))
        left = tmp_path / ".out.unfinished" / "checkpoint"
        halves += left.is_dir() and 0 < len(list(left.glob("model-*"))) < SHARDS
        if assert_whole_or_absent(inputs, tmp_path / "out"):
            finished += 1
            shutil.rmtree(tmp_path / "out")
    summary = merge_checkpoint(inputs / "base", inputs / "adapter", tmp_path / "out")
    assert content(tmp_path / "out") == content(inputs / "expected")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    print(
        f"{CRASHES} kills: {halves} left some files, {finished} came too late, {summary.resumed} files resumed at last"
    )


def stop_after(files: int, inputs: Path, out: Path, has_stopped: Event) -> None:
    """Merge, and stop for good when as many files have their names."""
    finish = unfinished.Unfinished.finish
    count = 0

    def counted(self: unfinished.Unfinished, name: str) -> None:
        nonlocal count
        if count == files:
            has_stopped.set()
            signal.pause()
        finish(self, name)
        count += 1

    unfinished.Unfinished.finish = counted  # type: ignore[method-assign]
    merge_checkpoint(inputs / "base", inputs / "adapter", out)


@pytest.mark.parametrize("files", [0, 1, 5])
def test_whole_files_are_kept_and_others_written_anew(files: int, inputs: Path, tmp_path: Path) -> None:
    has_stopped = processes.Event()
    with running(stop_after, files, inputs, tmp_path / "out", has_stopped):
        assert has_stopped.wait(60)
    assert not (tmp_path / "out").exists()
    summary = merge_checkpoint(inputs / "base", inputs / "adapter", tmp_path / "out")
    assert summary.resumed == files
    assert content(tmp_path / "out") == content(inputs / "expected")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("change", ["dtype", "adapter", "base"])
def test_what_was_begun_from_other_inputs_is_begun_anew(change: str, inputs: Path, tmp_path: Path) -> None:
    for name in ("base", "adapter"):
        shutil.copytree(inputs / name, tmp_path / name)
    has_stopped = processes.Event()
    with running(stop_after, 3, tmp_path, tmp_path / "out", has_stopped):
        assert has_stopped.wait(60)
    if change != "dtype":
        (path,) = list((tmp_path / change).glob("*0.safetensors" if change == "base" else "*.safetensors"))
        os.utime(path, ns=(0, 0))
    dtype = torch.float32 if change == "dtype" else None
    summary = merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", dtype=dtype)
    assert summary.resumed == 0
    if change != "dtype":
        assert content(tmp_path / "out") == content(inputs / "expected")


def stop_in(step: str, inputs: Path, out: Path, has_stopped: Event) -> None:
    """Merge over a checkpoint, and stop before or after it has been moved aside, or before that is removed."""
    rename: Callable[..., None] = os.rename
    calls = iter(("first rename", "second rename"))

    def stopping(source: Path, target: Path) -> None:
        if next(calls) == step:
            has_stopped.set()
            signal.pause()
        rename(source, target)

    def removal(self: unfinished.Unfinished) -> None:
        has_stopped.set()
        signal.pause()

    os.rename = stopping
    if step == "removal":
        unfinished.Unfinished.remove = removal  # type: ignore[method-assign]
    merge_checkpoint(inputs / "base", inputs / "adapter", out, overwrite=True)


@pytest.mark.parametrize("step", ["first rename", "second rename", "removal"])
def test_killing_a_merge_that_overwrites(step: str, inputs: Path, tmp_path: Path) -> None:
    """The old checkpoint is there until the new one is, and nothing of it is left afterwards."""
    shutil.copytree(inputs / "base", tmp_path / "out")
    has_stopped = processes.Event()
    with running(stop_in, step, inputs, tmp_path / "out", has_stopped):
        assert has_stopped.wait(60)
    places = [tmp_path / "out", tmp_path / ".out.unfinished" / "replaced"]
    assert content(inputs / "base") in [content(place) for place in places if place.exists()]
    summary = merge_checkpoint(inputs / "base", inputs / "adapter", tmp_path / "out", overwrite=True)
    assert summary.resumed == (0 if step == "removal" else SHARDS)
    assert content(tmp_path / "out") == content(inputs / "expected")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_error_after_a_kill_puts_the_old_checkpoint_back(inputs: Path, tmp_path: Path) -> None:
    shutil.copytree(inputs / "base", tmp_path / "out")
    has_stopped = processes.Event()
    with running(stop_in, "second rename", inputs, tmp_path / "out", has_stopped):
        assert has_stopped.wait(60)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"out: got .* which exists"):  # it is put back before it is looked for
        merge_checkpoint(inputs / "base", inputs / "adapter", tmp_path / "out")
    assert content(tmp_path / "out") == content(inputs / "base")


def test_all_is_flushed_before_the_folder_takes_its_name(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def logged_fsync(descriptor: int) -> None:
        fsync(descriptor)
        log.append(f"flush {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "replace", lambda source, target: (replace(source, target), log.append(target.name)))
    monkeypatch.setattr(os, "rename", lambda source, target: (rename(source, target), log.append(target.name)))
    merge_checkpoint(inputs / "base", inputs / "adapter", tmp_path / "out")
    files = [f"model-{file}.safetensors" for file in range(SHARDS)]
    for name in files:
        assert log.index(f"flush .{name}.partial") < log.index(name) < log.index("out")
    for name in ("config.json", "model.safetensors.index.json", "checkpoint"):
        assert log.index(f"flush {name}") < log.index("out")
    assert log[-1] == f"flush {tmp_path.name}"


def test_ctrl_c_keeps_what_is_whole(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = merge.write_shard
    names = []

    def interrupted(path: Path, *rest: object) -> None:
        if len(names) == 2:
            raise KeyboardInterrupt
        names.append(path.name)
        write(path, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(merge, "write_shard", interrupted)
        with pytest.raises(KeyboardInterrupt):
            merge_checkpoint(inputs / "base", inputs / "adapter", tmp_path / "out")
    summary = merge_checkpoint(inputs / "base", inputs / "adapter", tmp_path / "out")
    assert summary.resumed == 2
    assert content(tmp_path / "out") == content(inputs / "expected")


def test_memory_stays_bounded(tmp_path: Path) -> None:
    """A tensor of 256 MB, merged in a process of its own, costs a few pieces."""
    rows, columns = 32768, 4096
    (tmp_path / "base").mkdir()
    save_file({"big.weight": torch.zeros(rows, columns, dtype=torch.bfloat16)}, tmp_path / "base" / "model.safetensors")
    state = {"big.A": torch.ones(2, columns), "big.C": torch.ones(2, columns), "big.scale": torch.tensor(1.0)}
    state |= {f"big.{name}": torch.ones(rows, 2) for name in "BD"}
    write_adapter(
        tmp_path / "adapter", Adapter({"big": DualLoraConfig(r1=2, r2=2, adapter_dtype=torch.float32)}, state)
    )
    grown = processes.Value("q", 0)
    process = processes.Process(target=merge_and_measure, args=(tmp_path, grown))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    assert 0 < grown.value < 160 * 2**20, "two threads' pieces, factors, the workspace"


def merge_and_measure(folder: Path, grown: object) -> None:
    """Merge, and tell by how many bytes the process's memory has grown at most."""
    torch.set_num_threads(2)
    Path("/proc/self/clear_refs").write_text("5")  # the largest size so far is forgotten
    before = _largest_size()
    merge_checkpoint(folder / "base", folder / "adapter", folder / "out")
    grown.value = _largest_size() - before  # type: ignore[attr-defined]


def _largest_size() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
