"""Files of results: written once or in one step, durably; strict JSON. The lock of a run's folder."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import secrets
import shutil
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

MOST_BYTES = 64 * 2**20
"""The largest record: its ledger is run-length encoded, and thousands of them are read at once."""
_LOCK = ".lock"


class StoreError(Exception):
    """A results folder or a record cannot be used; the message says where and what to do."""


class AlreadyWritten(StoreError):
    """There is a record of this name already. Nothing was written."""


class Unwritable(StoreError):
    """The file system takes no file here: it is full, read-only or not ours. Nothing that was there is changed."""

    def __init__(self, path: Path, error: OSError) -> None:
        super().__init__(
            f"{path}: cannot be written: {error.strerror or error}. Nothing that was finished is lost; make room or "
            "get leave to write there, then give the same command again"
        )
        self.errno = error.errno


@dataclass(frozen=True)
class Broken:
    """A record that cannot be used, and why. As text it is one printable line, whatever the file is called."""

    path: Path
    reason: str

    def __str__(self) -> str:
        text = f"{self.path}: {self.reason}"
        return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class Records(list[dict[str, Any]]):
    """What a folder holds, each with its ``"path"``. ``broken`` is the quarantine: the files that could not be used."""

    def __init__(self, records: Iterable[dict[str, Any]] = (), broken: Iterable[Broken] = ()) -> None:
        super().__init__(records)
        self.broken = list(broken)


def dumps(value: object) -> str:
    """Strict JSON with sorted keys, one space of indentation and a final newline.

    Values that JSON lacks (NaN, infinities) become null. Raises TypeError for anything else that is not JSON.
    """
    return json.dumps(_finite(value), sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def write_once(path: Path, data: bytes) -> None:
    """Create `path` and its folder, durably and in one step. Raises AlreadyWritten where it exists, Unwritable where
    the file system refuses.

    After a power cut there is either the whole file or none.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Unwritable(path.parent, error) from error
    fresh, linking = temporary(path), False
    try:
        write_durably(fresh, data)
        linking = True
        os.link(fresh, path)  # unlike rename, this never replaces
    except FileExistsError as error:
        raise AlreadyWritten(f"{path}: exists already and is never overwritten") from error
    except OSError as error:
        if linking and error.errno in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise StoreError(
                f"{path}: this file system has no hard links, which records need to be written once; "
                "choose another place with --results DIR"
            ) from error
        raise Unwritable(path, error) from error
    finally:
        discard(fresh)
    _sync_folder(path.parent)


def replace_file(path: Path, data: bytes) -> None:
    """Write a side file (``env.json``) in one step; unlike a record it may be replaced. Raises Unwritable."""
    fresh = temporary(path)
    try:
        write_durably(fresh, data)
        fresh.replace(path)
    except OSError as error:
        raise Unwritable(path, error) from error
    finally:
        discard(fresh)


def temporary(path: Path) -> Path:
    """A new hidden name beside `path`; what a kill leaves of it is removed by the next run in the folder."""
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")


def discard(path: Path) -> None:
    """Remove a temporary file, or a folder of things set aside. What cannot be removed does no harm."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove what killed writers left in a folder whose lock the caller holds."""
    for leftover in folder.glob(".*.tmp"):
        discard(leftover)


def write_durably(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    # The files in it are on disk, and some network file systems cannot do this.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def listed(folder: Path, broken: list[Broken]) -> list[str]:
    """What is in a folder and not hidden, in order; a folder that cannot be listed is added to `broken`."""
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        broken.append(Broken(folder, f"cannot be read: {error.strerror}"))
        return []


def content(path: Path) -> bytes:
    """The bytes of a plain file, no more than make it too large for a record. Raises OSError, also for all else.

    Opening a pipe would wait for a writer, and reading a device might never end.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "not a plain file", str(path))
    with path.open("rb") as file:
        return file.read(MOST_BYTES + 1)


def content_of(path: Path, broken: list[Broken]) -> bytes | None:
    """The same, or None. A file that cannot be read is added to `broken`; a missing file is not."""
    try:
        return content(path)
    except OSError as error:
        if path.is_symlink() or not isinstance(error, FileNotFoundError):
            broken.append(Broken(path, f"cannot be read: {error.strerror}"))
        return None


def opened(path: Path, mode: str = "wb", **options: Any) -> IO[Any]:
    """Open a file to write it, as :func:`open` does, readable and writable by its owner alone (mode 0600).

    For what no accountant has charged for. Also where there is a file of this name already, left by a killed run or an
    older version.
    """
    file = open(path, mode, opener=lambda name, flags: os.open(name, flags, 0o600), **options)  # noqa: SIM115
    os.fchmod(file.fileno(), 0o600)
    return file


def lock(folder: Path) -> FileLock | None:
    """Take the lock of a run's folder, made if need be; None where another process has it.

    What is returned holds the lock until :func:`unlock` or the death of the process, however it comes. Raises
    Unwritable where no lock can be made.
    """
    path, gone = folder / _LOCK, 0
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
    (folder / _LOCK).unlink(missing_ok=True)
    held.release()


def locked(folder: Path) -> bool:
    """Whether some process holds the lock of this folder."""
    if not (folder / _LOCK).exists():
        return False
    try:
        with FileLock(folder / _LOCK, blocking=False, thread_local=False):
            return False
    except FileNotFoundError:
        return False
    except (Timeout, PermissionError):
        # Somebody else's file is there for as long as their run is.
        return True
