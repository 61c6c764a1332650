"""The lock of a run's folder: one process works in it at a time."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from harness.records.files import Unwritable

__all__ = ["LOCK", "lock", "locked", "unlock"]

LOCK = ".lock"


def lock(folder: Path) -> int | None:
    """Take the lock of a run's folder, made if need be; None where another process has it.

    The descriptor returned holds the lock until :func:`unlock` or the death of the process, however it comes. Raises
    Unwritable where no lock can be made.
    """
    path = folder / LOCK
    gone = 0
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            gone += isinstance(error, FileNotFoundError)
            if isinstance(error, FileNotFoundError) and gone < 100:
                continue  # a merge that came to nothing removed the folder that it had made for its lock
            raise Unwritable(folder, error) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _same_file(descriptor, path):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        os.close(descriptor)  # its last holder removed the file between our open and our lock


def unlock(folder: Path, descriptor: int) -> None:
    """Remove the lock file, then let go of it: who opened it meanwhile sees that it is gone."""
    (folder / LOCK).unlink(missing_ok=True)
    os.close(descriptor)


def locked(folder: Path) -> bool:
    """Whether some process holds the lock of this folder."""
    try:
        descriptor = os.open(folder / LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    here = os.fstat(descriptor)
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)
