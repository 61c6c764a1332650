"""The lock of a run's folder: one process works in it at a time."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock, Timeout

from harness.records.files import Unwritable

LOCK = ".lock"


def lock(folder: Path) -> FileLock | None:
    """Take the lock of a run's folder, made if need be; None where another process has it.

    What is returned holds the lock until :func:`unlock` or the death of the process, however it comes. Raises
    Unwritable where no lock can be made.
    """
    path, gone = folder / LOCK, 0
    held = FileLock(path, blocking=False, thread_local=False)
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held.acquire()
            return held
        except Timeout:
            # Its last holder may have removed the file between our open and our lock.
            if path.exists():
                return None
        except OSError as error:
            # A merge that came to nothing removes the folder that it had made for its lock.
            gone += isinstance(error, FileNotFoundError)
            if not isinstance(error, FileNotFoundError) or gone == 100:
                raise Unwritable(folder, error) from error


def unlock(folder: Path, held: FileLock) -> None:
    """Remove the lock file, then let go of it: who opened it meanwhile sees that it is gone."""
    (folder / LOCK).unlink(missing_ok=True)
    held.release()


def locked(folder: Path) -> bool:
    """Whether some process holds the lock of this folder."""
    if not (folder / LOCK).exists():
        return False
    try:
        with FileLock(folder / LOCK, blocking=False, thread_local=False):
            return False
    except FileNotFoundError:
        return False
    except (Timeout, PermissionError):
        # Somebody else's file is there for as long as their run is.
        return True
