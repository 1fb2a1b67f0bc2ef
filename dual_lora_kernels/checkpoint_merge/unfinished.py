"""The hidden folder in which a checkpoint grows until it is whole and takes its name in one step.

``.<name>.unfinished`` beside the folder that is to be has ``inputs.json``, which says what is merged, and
``checkpoint/``. A process that goes on with it must merge the very same; files that have their final names are whole.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from ..durable_files import flush_file, flush_folder

if sys.platform != "win32":
    import fcntl

_logger = logging.getLogger("dual_lora_kernels")


class Unfinished:
    """A checkpoint under construction, which one process at a time has.

    Attributes:
        folder: where its files are put.
        resumes: another process began it, from the same inputs.

    Raises OSError where it cannot be made, or where another process is at it.
    """

    def __init__(self, out: Path, inputs: Mapping[str, Any]) -> None:
        self._out, self._root = out, out.with_name(f".{out.name}.unfinished")
        self.folder, self._before = self._root / "checkpoint", self._root / "replaced"
        self._is_published = False
        out.parent.mkdir(parents=True, exist_ok=True)
        if self._root.is_symlink():
            raise OSError(errno.EEXIST, f"out: {str(self._root)!r} is a symbolic link, expected none, or a folder")
        self._lock = self._taken()
        try:
            self.resumes = self._begin(json.dumps(inputs, indent=1, sort_keys=True))
        except BaseException:
            self.remove()
            raise

    def _begin(self, text: str) -> bool:
        """Go on with what is there where `text` is what it says of itself, else begin anew; whether it goes on."""
        if self._before.exists() and not self._out.exists():  # a process was killed within `publish`
            os.rename(self._before, self._out)
        record = self._root / "inputs.json"
        if self.folder.is_dir() and record.is_file() and record.read_bytes() == text.encode():
            for path in self.folder.iterdir():  # half a file; what was copied from the base may be no longer there
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.suffix != ".safetensors":
                    path.unlink()
            return True
        shutil.rmtree(self.folder, ignore_errors=True)
        record.write_text(text, encoding="utf-8")
        flush_file(record)
        self.folder.mkdir()
        return False

    def _taken(self) -> BinaryIO:
        """The lock, which this process has."""
        while True:
            self._root.mkdir(exist_ok=True)
            lock = (self._root / "lock").open("wb")
            if sys.platform == "win32":
                return lock
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    lock.close()
                    raise OSError(error.errno, f"out: another process is merging into {str(self._out)!r}") from None
                # A file system without locks.
            if os.fstat(lock.fileno()).st_nlink:
                return lock
            lock.close()  # its process removed it, and the folder, before it was locked

    def partial(self, name: str) -> Path:
        """Where a file is written before it is whole."""
        return self.folder / f".{name}.partial"

    def has(self, name: str, size: int) -> bool:
        """Whether a file is whole already."""
        path = self.folder / name
        return path.is_file() and path.stat().st_size == size

    def finish(self, name: str) -> None:
        """Flush a file that has been written, and give it its name."""
        flush_file(self.partial(name))
        os.replace(self.partial(name), self.folder / name)

    def publish(self, overwrite: bool) -> None:
        """Give the folder its name.

        What has that name is moved aside with `overwrite`, and removed once the new one is there. Without, OSError is
        raised unless it is an empty folder.
        """
        flush_folder(self.folder)
        shutil.rmtree(self._before, ignore_errors=True)
        if overwrite and self._out.exists():
            os.rename(self._out, self._before)
        os.rename(self.folder, self._out)
        self._is_published = True
        flush_folder(self._out.parent)
        self.remove()

    def remove(self) -> None:
        """Remove what is unfinished. What was moved aside for it is put back, or stays there where that fails."""
        if not self._is_published and self._before.exists():
            try:
                os.rename(self._before, self._out)
            except OSError as error:
                _logger.warning("%s is in %s, and cannot be put back: %s", self._out, self._before, error)
                self.keep()
                return
        if sys.platform == "win32":  # an open file cannot be removed there
            self._lock.close()
        # The lock goes last: who gets it must not have its files removed.
        for path in (self.folder, self._before, self._root):
            shutil.rmtree(path, ignore_errors=True)
        self._lock.close()

    def keep(self) -> None:
        """Leave it for a later process."""
        self._lock.close()
