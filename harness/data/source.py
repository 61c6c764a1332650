"""Where data comes from: a source reads raw arrays, and says cheaply whether they changed or are missing."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from harness.data.canonical import Raw
from harness.data.dataset import Dataset, Facts
from harness.dp import cache

DOWNLOAD = "EPSBENCH_DOWNLOAD"
DATA = "EPSBENCH_DATA"

T = TypeVar("T")


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
        root = Path(os.environ.get(DATA) or cache.home() / "data")
    if download is None:
        download = os.environ.get(DOWNLOAD, "").strip().lower() in ("1", "true", "yes")
    return Places(expanded(root), download)


def expanded(path: str | Path) -> Path:
    """A path with its ``~`` replaced, or as it is where that home is unknown."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def found_at(path: str, root: Places) -> list[Path]:
    """Where a path given by the user may lead: the working directory, then the data root."""
    given = expanded(path)
    return [given] if given.is_absolute() else [Path.cwd() / given, root.root / given]


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


def kept_at(folder: str, stamp: str, suffix: str = ".json") -> Path:
    """The file of the cache in which what has this stamp is kept."""
    return cache.root() / folder / f"{hashlib.sha256(stamp.encode()).hexdigest()[:24]}{suffix}"


def kept(file: Path, kind: type[T]) -> T | None:
    """A dataclass kept as JSON; None where the file is absent or damaged, to be made again."""
    try:
        return msgspec.convert(cache.load(file), kind)
    except msgspec.ValidationError:
        return None


def files_stamp(files: Iterable[Path]) -> str:
    """Absolute path, size and times of each file; of a folder its name, and the same of all that is in it.

    Links are followed, each folder once.
    """
    lines: list[str] = []
    seen: set[str] = set()

    def add(place: Path) -> None:
        real = os.path.realpath(place)
        try:
            status = place.stat()
        except OSError:  # a link that leads nowhere
            status = place.lstat()
        if not stat.S_ISDIR(status.st_mode):
            lines.append(f"{place}|{real}|{status.st_size}|{status.st_mtime_ns}|{status.st_ctime_ns}")
            return
        lines.append(f"{place}|{real}")
        if real not in seen:
            seen.add(real)
            for member in sorted(place.iterdir()):
                add(member)

    for file in files:
        add(Path(os.path.abspath(file)))
    return "\n".join(lines)


def first_of(
    name: str, candidates: Sequence[Candidate], remedies: Sequence[str], fetch: Callable[[], None] | None = None
) -> Source:
    """The first candidate that exists, else what ``fetch`` brings; else :class:`DatasetMissing`."""

    def find(fetch: Callable[[], None] | None = None) -> Candidate:
        found = next((c for c in candidates if c.missing() is None), None)
        if found is not None:
            return found
        looked = [f"{c.missing()} ({c.what}): not there" for c in candidates]
        if fetch is None:
            raise DatasetMissing(name, looked, remedies)
        try:
            fetch()
        except (OSError, RuntimeError, ImportError) as error:
            looked.append(f"the download: {type(error).__name__}: {error}")
            raise DatasetMissing(name, looked, remedies) from error
        return find()

    return Source(read=lambda: find(fetch).read(), stamp=lambda: files_stamp(find().files))
