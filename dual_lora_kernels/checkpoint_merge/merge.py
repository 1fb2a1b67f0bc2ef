"""Merging adapters into a checkpoint on disk, in bounded memory."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .._version import __version__
from ..backends import resolve_backend
from ..base_checkpoint import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE, BaseCheckpoint
from ..durable_files import flush_file
from ..runtime_settings import default_backend
from ..safetensors_file import LazyTensors, SafetensorsFile, file_header
from ..saved_layers import SavedLayers
from .other_files import COPIED_FOLDERS, check_own, copy_files, other_files
from .plan import Output, Plan, make_plan
from .shards import write_shard
from .unfinished import Unfinished
from .verify import Verification, verify_shard

_logger = logging.getLogger("dual_lora_kernels")
MERGE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What the whole checkpoint can be cast to."""

Progress = Callable[[str, int, int], None]
"""Is told (what is done, bytes done, bytes in all), by any thread."""


@dataclass(frozen=True)
class MergeSummary:
    """What `merge_checkpoint` did.

    Attributes:
        out: the folder.
        files, bytes: how many files of weights it has, and the bytes of their tensors.
        resumed: how many of the files an interrupted merge had written.
        merged, copied: how many tensors were updated, and how many only copied or cast.
        backend: which computed W.
        seconds: wall-clock time, verification included.
        notes: what is worth telling the user.
        verification: None unless it was asked for.
    """

    out: str
    files: int
    bytes: int
    resumed: int
    merged: int
    copied: int
    backend: str
    seconds: float
    notes: tuple[str, ...]
    verification: Verification | None


def merge_checkpoint(
    base: str | Path,
    adapters: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    verify: bool = False,
    progress: Progress | None = None,
) -> MergeSummary:
    """Merge saved adapters, one after the other, into the checkpoint in `base`, and write a plain one into `out`.

    `base` is a folder of transformers' safetensors files, sharded or not, in bf16, fp16, fp32 or fp64; `adapters` are
    folders that `save_dual_lora` or PEFT wrote. Weights are read, merged and written in pieces of some MB for each
    thread, whatever their size, so a checkpoint need not fit in memory. Merged weights are bit for bit those that
    training computed with on the backend that runs here. `out` has the base's files, names and order of tensors, with
    its configuration, tokenizer and code, and nothing of this package.

    With `dtype`, all floating-point tensors are cast to it first, as ``from_pretrained(dtype=…)`` does.

    `out` takes its name in one step, when all of it is on disk. Until then it grows in ``.<out>.unfinished``. A merge
    that was killed leaves that, and the same call goes on with it; one that fails removes it.

    Args:
        overwrite: replace `out` where it holds a checkpoint already.
        verify: recompute W by another backend before `out` takes its name; see `verify`.
        progress: is told (what, bytes done, bytes in all) now and then, by any thread.

    Raises:
        ValueError: base, adapter or `out` is not what is expected, does not fit, is damaged or hostile, or an update
            would overflow; verification found a difference. The message names file and tensor.
        TypeError: `dtype` is none of bfloat16, float16 and float32.
        OSError: something cannot be read or written (a full disk).
    """
    started = time.perf_counter()
    base, out = Path(base), Path(out)
    folders = [Path(folder) for folder in ([adapters] if isinstance(adapters, str | Path) else adapters)]
    if dtype is not None and dtype not in MERGE_DTYPES:
        raise TypeError(f"dtype: got {dtype}, expected one of {', '.join(map(str, MERGE_DTYPES))}")
    if not folders:
        raise ValueError("adapters: got none, expected folders of saved adapters")
    check_out(out, [base, *folders], overwrite)
    with BaseCheckpoint(base) as checkpoint:
        opened = [SavedLayers.open(folder) for folder in folders]
        plan = make_plan(checkpoint, opened, dtype)
        names = other_files(base)
        if plan.config is None and (base / CONFIG_FILE).exists():
            check_own(base, base / CONFIG_FILE)
            names.append(Path(CONFIG_FILE))
        backend = resolve_backend(default_backend(), torch.device("cpu"), torch.float32, torch.float32).name
        inputs = _inputs(checkpoint, opened, dtype, backend)
        unfinished = Unfinished(out, inputs)
        try:
            check_out(out, [base, *folders], overwrite)
            resumed, verification = _build(unfinished, checkpoint, plan, names, backend, verify, progress)
            check_out(out, [base, *folders], overwrite)  # somebody may have made it meanwhile
            unfinished.publish(overwrite)
        except KeyboardInterrupt:
            unfinished.keep()
            raise
        except BaseException:
            unfinished.remove()
            raise
    tensors = sum(map(len, plan.shards.values()))
    return MergeSummary(
        out=str(out),
        files=len(plan.shards),
        bytes=plan.nbytes,
        resumed=resumed,
        merged=len(plan.merged()),
        copied=tensors - len(plan.merged()),
        backend=backend,
        seconds=time.perf_counter() - started,
        notes=plan.notes,
        verification=verification,
    )


def check_out(out: Path, inputs: Sequence[Path], overwrite: bool) -> None:
    """Raise ValueError unless `out` is new, or a checkpoint that may be overwritten, and apart from all `inputs`."""
    if out.is_symlink():
        raise ValueError(f"out: got {str(out)!r}, which is a symbolic link, expected a new folder")
    if out.name in ("", "..") or os.path.ismount(out):  # these cannot be renamed
        raise ValueError(f"out: got {str(out)!r}, expected a new folder's name; of a mounted volume, one in it")
    real = out.resolve()
    for path in inputs:
        other = path.resolve()
        if real == other or real in other.parents or other in real.parents:
            raise ValueError(f"out: got {str(out)!r}, expected a folder apart from {str(path)!r}, which is read")
    if not out.exists():
        return
    if not overwrite:
        raise ValueError(f"out: got {str(out)!r}, which exists, expected a new folder, or overwrite (--overwrite)")
    if not out.is_dir() or (
        any(out.iterdir()) and not any((out / name).exists() for name in (WEIGHTS_FILE, INDEX_FILE))
    ):
        raise ValueError(
            f"out: got {str(out)!r}, which holds no checkpoint, expected one to overwrite, or a new folder"
        )
    more = sorted(path.name for path in out.iterdir() if path.is_dir() and path.name not in COPIED_FOLDERS)
    if more:
        raise ValueError(
            f"out: got {str(out)!r}, which holds the folder {more[0]!r} too, expected a checkpoint alone to overwrite"
        )


def _inputs(
    base: BaseCheckpoint, adapters: Sequence[SavedLayers], dtype: torch.dtype | None, backend: str
) -> dict[str, Any]:
    """What the merged bytes depend on: whoever goes on with an unfinished merge has to have the very same."""
    opened: list[SafetensorsFile] = list(base.files.values())
    for layers in adapters:
        assert isinstance(layers.adapter.state, LazyTensors)
        opened.append(layers.adapter.state.file)
    states = [os.fstat(file.fileno()) for file in opened]
    return {
        "version": __version__,
        "backend": backend,
        "dtype": str(dtype),
        "config": base.config,
        # Not by the time of change alone, which tools can set, to the same for all files.
        "files": [
            [str(file.path.resolve()), state.st_size, state.st_mtime_ns, state.st_ctime_ns]
            for file, state in zip(opened, states, strict=True)
        ],
        "settings": [{layer: repr(config) for layer, config in layers.adapter.configs.items()} for layers in adapters],
    }


def _build(
    unfinished: Unfinished,
    base: BaseCheckpoint,
    plan: Plan,
    names: list[Path],
    backend: str,
    verify: bool,
    progress: Progress | None,
) -> tuple[int, Verification | None]:
    """Write what is not yet there; (how many files of weights were, what verifying found)."""
    done = [name for name, outputs in plan.shards.items() if unfinished.has(name, _file_size(base, name, outputs))]
    left = sum(_bytes(outputs) for name, outputs in plan.shards.items() if name not in done)
    free = shutil.disk_usage(unfinished.folder).free
    if left > free:
        raise OSError(errno.ENOSPC, f"out: got a disk with {free:,} bytes free, expected {left:,} for what is missing")
    if done:
        _logger.info("going on with an unfinished merge: %d of %d files are there", len(done), len(plan.shards))
    _write_shards(unfinished, base, plan, done, backend, _Counter(plan.nbytes, progress))
    _write_others(unfinished, base, plan, names)
    found = None
    if verify:
        report = _Counter(plan.nbytes, progress)
        for name, outputs in plan.shards.items():
            with SafetensorsFile(unfinished.folder / name) as file:
                part = verify_shard(file, outputs, backend, report.about(f"verifying {name}"))
            found = part if found is None else found + part
    return len(done), found


def _write_shards(
    unfinished: Unfinished, base: BaseCheckpoint, plan: Plan, done: list[str], backend: str, report: _Counter
) -> None:
    # Flushing waits for the disk alone, so it goes on beside the next file's merging.
    with ThreadPoolExecutor(1, "dual_lora_flush") as flusher:
        flush: Future[None] | None = None
        for name, outputs in plan.shards.items():
            if name in done:
                report.about(name)(_bytes(outputs))
                continue
            write_shard(unfinished.partial(name), outputs, _metadata(base, name), backend, report.about(name))
            if flush is not None:
                flush.result()
            flush = flusher.submit(unfinished.finish, name)
        if flush is not None:
            flush.result()


def _write_others(unfinished: Unfinished, base: BaseCheckpoint, plan: Plan, names: list[Path]) -> None:
    """Configuration, index, and the base's other files."""
    written = list(names)
    for file, content in ((CONFIG_FILE, plan.config), (INDEX_FILE, plan.index)):
        if content is not None:
            (unfinished.folder / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            written.append(Path(file))
    copy_files(base.folder, names, unfinished.folder)
    for name in written:
        flush_file(unfinished.folder / name)


class _Counter:
    """Adds up bytes for a `Progress`."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._done, self._total, self._progress, self._lock = 0, total, progress, threading.Lock()

    def about(self, what: str) -> Callable[[int], None]:
        """What is to be told of bytes of `what`."""
        return partial(self._add, what)

    def _add(self, what: str, size: int) -> None:
        with self._lock:
            self._done += size
            if self._progress is not None:
                self._progress(what, self._done, self._total)


def _bytes(outputs: Mapping[str, Output]) -> int:
    return sum(output.nbytes for output in outputs.values())


def _metadata(base: BaseCheckpoint, name: str) -> dict[str, str]:
    """A file's metadata: the base's, with the format, which transformers asks for."""
    return {"format": "pt", **base.files[name].metadata}


def _file_size(base: BaseCheckpoint, name: str, outputs: Mapping[str, Output]) -> int:
    entries = {key: (output.dtype, output.entry.shape) for key, output in outputs.items()}
    return len(file_header(entries, _metadata(base, name))) + _bytes(outputs)
