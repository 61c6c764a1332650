"""Where data comes from: a source reads raw arrays, and says cheaply whether they changed or are missing."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from harness.data.canonical import Raw
from harness.data.dataset import Dataset, Facts

DOWNLOAD = "EPSBENCH_DOWNLOAD"
DATA = "EPSBENCH_DATA"
CACHE = "EPSBENCH_CACHE"


class DatasetError(ValueError):
    """A data set cannot be used as asked: wrong file content, wrong option, or missing."""


class DatasetMismatch(DatasetError):
    """The file found under a known name does not hold the known examples."""


class DatasetMissing(DatasetError):
    """The data is nowhere. ``looked`` are the places looked at, ``remedies`` what supplies it."""

    def __init__(self, name: str, looked: Sequence[str], remedies: Sequence[str]) -> None:
        self.name, self.looked, self.remedies = name, tuple(looked), tuple(remedies)
        lines = [f'data set "{name}" was not found. Looked at:', *(f"  - {place}" for place in looked)]
        lines += ["Supply it in one of these ways:", *(f"  - {remedy}" for remedy in remedies)]
        super().__init__("\n".join(lines))


@dataclass(frozen=True)
class Places:
    """Where to look for files, and whether a missing data set may be downloaded."""

    root: Path
    download: bool = False


def places(root: Path | None = None, download: bool | None = None) -> Places:
    """``root``, else ``$EPSBENCH_DATA``, else ``~/.cache/epsbench/data``.

    Downloads only if ``download``, or where that is None if ``EPSBENCH_DOWNLOAD=1``.
    """
    if root is None:
        root = Path(os.environ.get(DATA) or "~/.cache/epsbench/data")
    if download is None:
        download = os.environ.get(DOWNLOAD, "").strip().lower() in ("1", "true", "yes")
    return Places(Path(root).expanduser(), download)


def cache_root() -> Path:
    """``$EPSBENCH_CACHE``, else ``~/.cache/epsbench``. What is in it may be deleted at any time."""
    return Path(os.environ.get(CACHE) or "~/.cache/epsbench").expanduser()


def found_at(path: str, root: Places) -> list[Path]:
    """Where a path given by the user may lead: the working directory, then the data root."""
    given = Path(path).expanduser()
    return [given] if given.is_absolute() else [Path.cwd() / given, root.root / given]


def write_whole(path: Path, fill: Callable[[IO[bytes]], object]) -> None:
    """Whole or not at all, also with several processes writing the same file and a kill at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=path.suffix)
    try:
        with os.fdopen(handle, "wb") as file:
            fill(file)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


@dataclass(frozen=True)
class Source:
    """What a registered data set function returns.

    ``read`` gives the arrays (or raises :class:`DatasetError`). ``stamp`` is a short text that changes when
    they could have changed, found without reading them; it keys the cache of digests. ``normalise`` gives
    mean, deviation and where they are from, where these are not literals of the decorator (a user's own
    data); it may look at the shape and type of the arrays, never at their values. ``keep`` stores the
    arrays in the cache, for data that is slow to make.
    """

    read: Callable[[], Raw]
    stamp: Callable[[], str]
    normalise: Callable[[Raw], tuple[tuple[float, ...], tuple[float, ...], str]] | None = None
    keep: bool = False


@dataclass(frozen=True)
class Derived:
    """What a data set function returns whose data is made from another data set.

    ``facts`` answers without making the data, ``load`` makes it unless it is kept, ``missing`` is the error
    that loading would raise for want of files, as :func:`harness.data.missing` has it.
    """

    facts: Callable[[], Facts]
    load: Callable[[], Dataset]
    missing: Callable[[], DatasetMissing | None]


@dataclass(frozen=True)
class Candidate:
    """One place where a data set may be: ``files`` must all exist, then ``read`` reads them."""

    what: str
    files: tuple[Path, ...]
    read: Callable[[], Raw]

    def missing(self) -> Path | None:
        """The first file that is not there."""
        return next((file for file in self.files if not file.exists()), None)


def files_stamp(files: Iterable[Path]) -> str:
    """Absolute path, size and modification time of each file (of a folder: of the files in it)."""
    parts = []
    for file in files:
        members = sorted(p for p in file.rglob("*") if p.is_file()) if file.is_dir() else [file]
        for member in members:
            status = member.stat()
            parts.append(f"{member.resolve()}|{status.st_size}|{status.st_mtime_ns}")
    return "\n".join(parts)


def first_of(
    name: str,
    candidates: Sequence[Candidate],
    remedies: Sequence[str],
    fetch: Callable[[], None] | None = None,
) -> Source:
    """The first candidate that exists, else what ``fetch`` brings; else :class:`DatasetMissing`."""

    def look() -> Candidate | None:
        return next((c for c in candidates if c.missing() is None), None)

    def missing(reason: str = "") -> DatasetMissing:
        looked = [f"{c.missing()} ({c.what}): not there" for c in candidates]
        return DatasetMissing(name, [*looked, reason] if reason else looked, remedies)

    def find() -> Candidate:
        found = look()
        if found is None and fetch is not None:
            try:
                fetch()
            except (OSError, RuntimeError, ImportError) as error:
                raise missing(f"the download: {type(error).__name__}: {error}") from error
            found = look()
        if found is None:
            raise missing()
        return found

    def stamp() -> str:
        found = look()
        if found is None:
            raise missing()
        return files_stamp(found.files)

    return Source(read=lambda: find().read(), stamp=stamp)
