"""Files that may vanish: what is kept between runs to save time, in $EPSBENCH_CACHE, else ~/.cache/epsbench.

Best effort: a file that is absent, cut, unreadable or somebody else's, and a folder that cannot be written, make things
slower, never different. So what can be read here was written by this user (or by the administrator), whole.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import IO, Any

VARIABLE = "EPSBENCH_CACHE"


def root() -> Path:
    """The folder of all caches, which need not exist."""
    given = os.environ.get(VARIABLE)
    try:
        return Path(given).expanduser() if given else home()
    except RuntimeError:  # nobody knows the home that it begins with
        return Path(given or "")


def home() -> Path:
    """~/.cache/epsbench; where this user has no home, a folder beside temporary files."""
    try:
        return Path.home() / ".cache" / "epsbench"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"epsbench-{os.geteuid()}"


def trusted(file: Path) -> bool:
    """Whether only this user and the administrator could have written a file, by itself or through its folders.

    What is run as code asks this of the folders too; values that are checked as they are read need not.
    """
    place = Path(os.path.abspath(file))
    try:
        own = [place.lstat(), place.parent.stat()]
        above = [folder.stat() for folder in list(place.parents)[1:]]
    except OSError:
        return False
    loose = stat.S_IWGRP | stat.S_IWOTH
    # In a sticky folder, such as /tmp, nobody can replace what is another's.
    return all(_ours(one) and not one.st_mode & loose for one in own) and all(
        _ours(one) and (not one.st_mode & stat.S_IWOTH or bool(one.st_mode & stat.S_ISVTX)) for one in above
    )


def _sound(status: os.stat_result) -> bool:
    return _ours(status) and not status.st_mode & stat.S_IWOTH and stat.S_ISREG(status.st_mode)


def _ours(status: os.stat_result) -> bool:
    return status.st_uid in (0, os.geteuid())


def own(file: Path) -> bool:
    """Whether a file is there that no other user could have made."""
    try:
        return _sound(file.stat())
    except OSError:
        return False


def read(file: Path) -> bytes | None:
    """What a file holds; None where it is absent, cannot be read or is another user's."""
    try:
        with open(file, "rb") as opened:
            return opened.read() if _sound(os.fstat(opened.fileno())) else None
    except (OSError, ValueError):
        return None


def usable(folder: Path) -> Path:
    """The folder, made, where it can be written to; else one of this process alone, which ends with it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return _scratch() / folder.name


@cache
def _scratch() -> Path:
    place = tempfile.mkdtemp(prefix="epsbench-")
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    return Path(place)


def load(file: Path) -> Any:
    """The JSON in a file; None as in :func:`read`, and where it is cut or damaged."""
    held = read(file)
    try:
        return None if held is None else json.loads(held)
    except (ValueError, RecursionError):
        return None


def keep(file: Path, fill: Callable[[IO[bytes]], object]) -> None:
    """Write a file whole, if it can be written."""
    with suppress(OSError):
        write_whole(file, fill)


def dump(file: Path, value: Any) -> None:
    """Write JSON whole, if it can be written."""
    keep(file, lambda opened: opened.write(json.dumps(value).encode()))


def write_whole(path: Path, fill: Callable[[IO[bytes]], object]) -> None:
    """Whole or not at all, also with several processes writing the same file and a kill at any moment.

    Raises OSError where it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=path.suffix)
    try:
        with os.fdopen(handle, "wb") as file:
            fill(file)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
