"""A saved adapter's folder: written in one atomic step, read without mixing two saves.

Everything that loading needs is in one file, ``dual_lora_model.safetensors``: the tensors, and the settings as JSON in
its metadata. It is written beside its place, flushed, and renamed over it, so that a crash leaves the old adapter or
the new one, and a reader sees one of them. ``dual_lora_config.json`` repeats the settings for people.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from ._logging import logger

try:
    import fcntl
except ImportError:  # Windows, where a file that a process has open cannot be removed anyway
    fcntl = None  # type: ignore[assignment]

SETTINGS_FILE = "dual_lora_config.json"
WEIGHTS_FILE = "dual_lora_model.safetensors"
_METADATA_KEY = "dual_lora_settings"
_LENGTH_BYTES = 8  # a safetensors file starts with its header's length


def write(folder: Path, tensors: Mapping[str, torch.Tensor], settings: Mapping[str, Any]) -> None:
    """Write an adapter into `folder`, which is made if need be, over an older one.

    A link in the place of a file is replaced, not followed. What a killed process left unfinished is removed by the
    next save. Raises NotADirectoryError where `folder` is something else, OSError where it cannot be written; an older
    adapter is untouched then.
    """
    text = json.dumps(settings, indent=2, allow_nan=False)
    data = save(dict(tensors), metadata={"format": "pt", _METADATA_KEY: text})
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"folder: got {str(folder)!r}, which is a file, expected a folder or a new name")
    folder.mkdir(parents=True, exist_ok=True)
    for name in (WEIGHTS_FILE, SETTINGS_FILE):
        _remove_abandoned(folder, name)
    _replace(folder / WEIGHTS_FILE, data)
    _replace(folder / SETTINGS_FILE, f"{text}\n".encode())
    _flush_folder(folder)
    _flush_folder(folder.absolute().parent)


def read(folder: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """(settings, tensors) of the adapter in `folder`, both from one save.

    Raises FileNotFoundError where there is none, ValueError where it is damaged.
    """
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"folder: got {str(folder)!r}, which has no {WEIGHTS_FILE}; expected what save_dual_lora wrote"
        )
    # Read once: safetensors opens a file twice, and a save may have replaced it in between.
    data = file.read_bytes()
    try:
        tensors = load(data)
        header = json.loads(data[_LENGTH_BYTES : _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "little")])
        text = header["__metadata__"][_METADATA_KEY]
    except SafetensorError as error:
        raise ValueError(f"folder: {WEIGHTS_FILE} in {str(folder)!r} is damaged: {error}") from error
    except KeyError:
        raise ValueError(
            f"folder: {WEIGHTS_FILE} in {str(folder)!r} has no settings in its metadata; expected what save_dual_lora "
            "wrote"
        ) from None
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"folder: the settings of {WEIGHTS_FILE} in {str(folder)!r} are damaged: {error}") from error
    _compare_with_settings_file(folder / SETTINGS_FILE, settings)
    return settings, tensors


def _compare_with_settings_file(file: Path, settings: Any) -> None:
    """Say so where the file for people says something else: edited by hand, or of a save that was cut short."""
    try:
        same = json.loads(file.read_text(encoding="utf-8")) == settings
    except FileNotFoundError:
        return
    except (OSError, ValueError, RecursionError):
        same = False
    if not same:
        logger.warning("%s differs from the settings inside %s, which count", SETTINGS_FILE, WEIGHTS_FILE)


def _replace(target: Path, data: bytes) -> None:
    """Put `data` in the place of `target`: whole, on disk, with the permissions of a new file."""
    with _unfinished(target) as (path, descriptor):
        with os.fdopen(os.dup(descriptor), "wb") as stream:
            stream.write(data)
        os.fsync(descriptor)
        os.replace(path, target)


@contextlib.contextmanager
def _unfinished(target: Path) -> Iterator[tuple[Path, int]]:
    """A new file beside `target`, locked while its process lives, removed if it is still there in the end."""
    while True:
        path = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_BINARY", 0), 0o666)
        if fcntl is None:
            break
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if path.exists():
            break
        os.close(descriptor)  # another save took it for abandoned before it was locked
    try:
        yield path, descriptor
    finally:
        os.close(descriptor)
        path.unlink(missing_ok=True)


def _remove_abandoned(folder: Path, name: str) -> None:
    """Remove unfinished files of processes that are gone: nobody holds their locks."""
    for path in folder.glob(f".{name}.*.tmp"):
        with contextlib.suppress(OSError):  # a living process's, or gone meanwhile
            descriptor = os.open(path, os.O_WRONLY)
            try:
                if fcntl is not None:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            finally:
                os.close(descriptor)


def _flush_folder(folder: Path) -> None:
    """Have the names in `folder` on disk, where the system can flush a folder and lets us."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
