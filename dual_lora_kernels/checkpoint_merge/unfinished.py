"""The hidden folder in which a checkpoint grows until it is whole and takes its name in one step.

``.<name>.unfinished`` beside the folder that is to be has ``inputs.json``, which says what is merged, and
``checkpoint/``. A process that goes on with it must merge the very same; files that have their final names are whole.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..durable_files import flush_file, flush_folder

if sys.platform != "win32":
    import fcntl


class Unfinished:
    """A checkpoint under construction, which one process at a time has.

    Attributes:
        folder: where its files are put.
        resumes: another process began it, from the same inputs.

    Raises OSError where it cannot be made, or where another process is at it.
    """

    def __init__(self, out: Path, inputs: Mapping[str, Any]) -> None:
        self._out, self._root = out, out.with_name(f".{out.name}.unfinished")
        self.folder = self._root / "checkpoint"
        out.parent.mkdir(parents=True, exist_ok=True)
        self._root.mkdir(exist_ok=True)
        self._lock = (self._root / "lock").open("wb")
        self._take()
        try:
            self.resumes = self._begin(json.dumps(inputs, indent=1, sort_keys=True))
        except BaseException:
            self.remove()
            raise

    def _begin(self, text: str) -> bool:
        """Go on with what is there where `text` is what it says of itself, else begin anew; whether it goes on."""
        if (self._root / "replaced").exists() and not self._out.exists():  # a process was killed within `publish`
            os.rename(self._root / "replaced", self._out)
        record = self._root / "inputs.json"
        if self.folder.is_dir() and record.is_file() and record.read_text(encoding="utf-8") == text:
            return True
        shutil.rmtree(self.folder, ignore_errors=True)
        record.write_text(text, encoding="utf-8")
        flush_file(record)
        self.folder.mkdir()
        return False

    def _take(self) -> None:
        if sys.platform == "win32":
            return
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                self._lock.close()
                raise OSError(error.errno, f"out: another process is merging into {str(self._out)!r}") from None
            # A file system without locks.

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

    def publish(self) -> None:
        """Give the folder its name. What has that name is moved aside, and removed once the new one is there."""
        for path in self.folder.iterdir():
            if path.name.endswith(".partial"):
                path.unlink()
        flush_folder(self.folder)
        before = self._root / "replaced"
        shutil.rmtree(before, ignore_errors=True)
        if self._out.exists():
            os.rename(self._out, before)
        os.rename(self.folder, self._out)
        flush_folder(self._out.parent)
        self.remove()

    def remove(self) -> None:
        """Remove what is unfinished."""
        self._lock.close()
        shutil.rmtree(self._root, ignore_errors=True)

    def keep(self) -> None:
        """Leave it for a later process."""
        self._lock.close()
