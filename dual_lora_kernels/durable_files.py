"""Replacing files of a folder so that neither a crash nor a full disk nor another process costs what was there."""

from __future__ import annotations

import errno
import os
import secrets
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

if sys.platform != "win32":
    import fcntl


def replace_files(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Put files with `contents`, by name, into `folder`, which is made if need be.

    All are written and flushed under temporary names before the first takes its place, so a failure until then (a full
    disk, say) leaves everything as it was. Each takes its place in one step, in the order given, with the permissions
    that the umask leaves; a symbolic link of that name is replaced, and what it points to stays. If `folder` is a link
    itself, a folder takes its place in the same way, though not in one step: until the first file is there, nothing is.

    A process that is killed can leave a temporary file, ``.<name>.<random>.tmp``. The next call removes it, as the lock
    on it has gone with its process; where files cannot be locked (Windows, some network file systems) it stays.

    Raises OSError where the file system refuses.
    """
    beside = folder.parent if folder.is_symlink() else folder
    missing = [parent for parent in (beside, *beside.parents) if not parent.exists()]
    beside.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        staged = {name: stack.enter_context(_staged(beside, name, content)) for name, content in contents.items()}
        if folder.is_symlink():
            folder.unlink()
            folder.mkdir(exist_ok=True)
        for name, temporary in staged.items():
            os.replace(temporary, folder / name)
    for changed in {folder, beside, *(parent.parent for parent in missing)}:
        flush_folder(changed)


@contextmanager
def _staged(folder: Path, name: str, content: bytes) -> Iterator[Path]:
    """A flushed temporary file in `folder`; whoever does not move it away finds it removed afterwards."""
    _remove_abandoned(folder, name)
    temporary = folder / f".{name}.{secrets.token_hex(8)}.tmp"
    try:
        with _created(temporary) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            if sys.platform == "win32":
                file.close()  # an open file cannot be moved there
            yield temporary  # locked, so that no other process takes it for abandoned
    finally:
        temporary.unlink(missing_ok=True)


def _created(path: Path) -> BinaryIO:
    """A new file, open for writing and, where that can be, locked."""
    while True:
        file = path.open("xb")
        if sys.platform == "win32":
            return file
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # another process removed it before it was locked


def _remove_abandoned(folder: Path, name: str) -> None:
    """Remove the temporary files of processes that were killed."""
    if sys.platform == "win32":
        return
    for path in folder.glob(f".{name}.*.tmp"):
        with suppress(OSError), path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises while its writer lives
            path.unlink()


def flush_file(path: Path) -> None:
    """Have a file's content on disk."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Have the folder's list of names on disk, where the system can."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems flush no folders
            raise
    finally:
        os.close(descriptor)
