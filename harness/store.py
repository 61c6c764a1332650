"""``results/``: one write-once file a run.

Layout::

    results/<suite>/<id>/record.json    the record; its presence says that the attempt is over
                         trace.jsonl    one line a log point
                         env.json       where it ran
                         error.txt      the traceback of a crash
                         checkpoint/    only while a run is half done
    results/<suite>/<id>.2/...          a second attempt at the same cell, and so on

A record is written to a temporary file and *linked* to its name, which fails where the name exists: an
interrupted write leaves no half record, and of two writers only one wins. A file that cannot be read never
stops the others from being loaded; it comes back in ``Records.broken`` with the reason.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.cell import Cell

__all__ = [
    "FAILED",
    "FINAL",
    "SCHEMA",
    "STATUSES",
    "AlreadyWritten",
    "Broken",
    "Folder",
    "MergeResult",
    "Records",
    "StoreError",
    "attempt_of",
    "cell_of",
    "current",
    "dumps",
    "encode",
    "load",
    "locked",
    "merge",
    "read",
    "stale",
    "unlock",
    "write_once",
    "write_record",
]

SCHEMA = 1
FINAL = ("ok", "diverged", "skipped", "over_budget")
"""Statuses that running again would only repeat."""
FAILED = ("crashed", "oom", "timeout")
"""Statuses that may end otherwise next time; `run --retry` makes another attempt."""
STATUSES = FINAL + FAILED

RECORD = "record.json"
LOCK = ".lock"
_COPIED = ("trace.jsonl", "env.json", "error.txt")  # what a merge takes along, before the record itself
_ATTEMPT = re.compile(r"([0-9a-f]{12})(?:\.([1-9][0-9]*))?")
_REQUIRED: Mapping[str, type | tuple[type, ...]] = {
    "id": str,
    "group": str,
    "suite": str,
    "status": str,
    "cell": dict,
    "privacy": dict,
    "metrics": dict,
    "measured": dict,
    "code": dict,
    "device": dict,
}

Record = dict[str, Any]


class StoreError(Exception):
    """A results folder or a record cannot be used; the message says where and what to do."""


class AlreadyWritten(StoreError):
    """There is a record of this name already. Nothing was written."""


@dataclass(frozen=True)
class Broken:
    """A record that cannot be used, and why."""

    path: Path
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class Records(list[Record]):
    """Records, each with its ``"path"``; ``broken`` holds the files that could not be used."""

    def __init__(self, records: Iterable[Record] = (), broken: Iterable[Broken] = ()) -> None:
        super().__init__(records)
        self.broken = list(broken)


# Writing --------------------------------------------------------------------------------------------------


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
    """Create `path` with `data`, durably and in one step. Raises AlreadyWritten where it exists.

    After a power cut there is either the whole file or none.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        _write_durably(temporary, data)
        os.link(temporary, path)  # unlike rename, this never replaces
    except FileExistsError as error:
        raise AlreadyWritten(f"{path}: exists already and is never overwritten") from error
    except OSError as error:
        if error.errno in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise StoreError(
                f"{path}: this file system has no hard links, which records need to be written once; "
                "choose another place with --results DIR"
            ) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def encode(record: Record, folder: str) -> bytes:
    """The bytes of a record for the folder of this name. Raises StoreError where it is not a valid one."""
    data = dumps({key: value for key, value in record.items() if key != "path"}).encode()
    reason = _flaw(json.loads(data), folder)
    if reason:
        raise StoreError(f"the record for {folder} is not valid: {reason}")
    return data


def write_record(folder: Path, record: Record) -> Path:
    """Write `record` as ``folder/record.json`` and return that path. Raises StoreError where it is not valid.

    `folder` must be named after the record's id (with ``.2``, ``.3`` for later attempts).
    """
    data = encode(record, folder.name)
    folder.mkdir(parents=True, exist_ok=True)
    write_once(folder / RECORD, data)
    return folder / RECORD


def replace_file(path: Path, data: bytes) -> None:
    """Write a side file (``env.json``) in one step; unlike a record it may be replaced."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        _write_durably(temporary, data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_durably(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems cannot; the file itself is on disk
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Reading --------------------------------------------------------------------------------------------------


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


def _flaw(record: object, folder: str) -> str | None:
    """What makes a parsed file no valid record of this folder; None where nothing does."""
    if not isinstance(record, dict):
        return "not a JSON object"
    if record.get("schema") != SCHEMA:
        newer = isinstance(record.get("schema"), int) and record["schema"] > SCHEMA
        return f"schema {record.get('schema')!r}, this version reads {SCHEMA}" + (
            "; update epsbench" if newer else ""
        )
    for key, kind in _REQUIRED.items():
        if not isinstance(record.get(key), kind):
            return f'"{key}" is missing or not a {"text" if kind is str else "JSON object"}'
    if record["status"] not in STATUSES:
        return f"status {record['status']!r} is none of {', '.join(STATUSES)}"
    match = _ATTEMPT.fullmatch(folder)
    if match is None:
        return (
            f"its folder {folder!r} is not named after an id (12 hex digits, then .2, .3 for later attempts)"
        )
    if match[1] != record["id"]:
        return f"its id {record['id']!r} is not that of its folder"
    return None


def _parse(data: bytes, folder: str) -> tuple[Record | None, str]:
    """The record, or None and the reason why the bytes hold none."""
    try:
        record = json.loads(data, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        return None, f"not JSON: {error}"
    reason = _flaw(record, folder)
    return (None, reason) if reason else (record, "")


def read(path: Path) -> Record:
    """One record with its ``"path"``. Raises StoreError saying what is wrong with the file."""
    record, reason = _parse(path.read_bytes(), path.parent.name)
    if record is None:
        raise StoreError(f"{path}: {reason}")
    record["path"] = str(path)
    return record


def load(results: Path, suite: str | None = None) -> Records:
    """All records under `results` (of one suite where named), in order of suite and folder.

    Each gains ``"path"``. Files that cannot be used are in ``.broken``. A missing folder holds no records.
    """
    found = Records()
    for path in _record_files(results, suite):
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            continue  # a run that has no record yet
        except OSError as error:
            found.broken.append(Broken(path, f"cannot be read: {error.strerror}"))
            continue
        record, reason = _parse(data, path.parent.name)
        if record is None:
            found.broken.append(Broken(path, reason))
        else:
            record["path"] = str(path)
            found.append(record)
    return found


def _record_files(results: Path, suite: str | None = None) -> Iterator[Path]:
    suites = [suite] if suite is not None else _folders(results)
    for name in suites:
        for folder in _folders(results / name):
            yield results / name / folder / RECORD


def _folders(path: Path) -> list[str]:
    try:
        with os.scandir(path) as entries:
            return sorted(e.name for e in entries if not e.name.startswith(".") and e.is_dir())
    except (FileNotFoundError, NotADirectoryError):
        return []


# Which record counts --------------------------------------------------------------------------------------


def cell_of(record: Record) -> Cell:
    """The cell of a record, on the device that it ran on.

    Raises KeyError or TypeError where parts are missing.
    """
    cell = record["cell"]
    method = cell["method"]
    device = record["device"]
    return Cell(
        suite=record["suite"],
        method=method["name"],
        label=method["label"],
        parameters=method["parameters"],
        parts=method["parts"],
        changes=method.get("with", {}),
        task=cell["task"],
        privacy=cell["privacy"],
        schedule=cell["schedule"],
        numerics=cell["numerics"],
        seed=cell["seed"],
        device={
            "device": device.get("spec"),
            "threads": device.get("threads"),
            "engine": None,
            "microbatch": None,
        },
    )


def attempt_of(record: Record) -> int:
    """1 for ``<id>``, 2 for ``<id>.2``, and so on."""
    match = _ATTEMPT.fullmatch(Path(record["path"]).parent.name)
    return int(match[2] or 1) if match else 1


def stale(record: Record, code: str | Mapping[str, Any] | None) -> bool:
    """Whether the record was made by other code than `code` (a hash, or a mapping with ``"hash"``).

    False where either hash is unknown: there is no evidence of a difference.
    """
    now = code.get("hash") if isinstance(code, Mapping) else code
    then = record["code"].get("hash")
    return now is not None and then is not None and now != then


def current(
    records: Iterable[Record], codes: Mapping[str, str | Mapping[str, Any]] | None = None
) -> list[Record]:
    """The one record of each cell that counts, in the order in which the cells first appear.

    Preferred are, in turn: final ones of today's code, final ones that are stale, failures; among equals the
    newest attempt. ok is *not* preferred to diverged, else a second attempt could hide a bad result. `codes`
    gives today's code by id; where it does, the result has ``"stale"`` (bool). The records given are not
    changed.
    """
    best: dict[tuple[str, str], tuple[tuple[bool, bool, int], Record]] = {}
    for record in records:
        code = codes.get(record["id"]) if codes else None
        old = stale(record, code)
        rank = (record["status"] in FINAL, not old, attempt_of(record))
        key = (record["suite"], record["id"])
        if key not in best or rank > best[key][0]:
            best[key] = (rank, record if code is None else {**record, "stale": old})
    return [record for _, record in best.values()]


# Folders of runs and their locks --------------------------------------------------------------------------


@dataclass(frozen=True)
class Folder:
    """The attempts at one cell: ``results/<suite>/<id>``, ``<id>.2``, ..."""

    results: Path
    suite: str
    id: str

    def attempt(self, number: int) -> Path:
        """The folder of the attempt of this number (from 1)."""
        return self.results / self.suite / (self.id if number == 1 else f"{self.id}.{number}")

    def latest(self) -> int:
        """Number of the newest attempt that has a folder; 0 where there is none."""
        number = 0
        while self.attempt(number + 1).exists():
            number += 1
        return number

    def unfinished(self) -> Path:
        """Where the next run goes: the newest attempt where it has no record, else the next number."""
        number = max(1, self.latest())
        if (self.attempt(number) / RECORD).exists():
            number += 1
        return self.attempt(number)


def lock(folder: Path) -> int | None:
    """Take the lock of a run's folder, made if need be; None where another process has it.

    The descriptor returned holds the lock until :func:`unlock` or the death of the process, however it comes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
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


# Merging --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MergeResult:
    """What a merge did, as paths relative to the results folder (``suite/id``).

    ``conflicts`` are there on both sides with different bytes, ``refused`` are source records that are not
    valid; both say where and why, and neither changed anything.
    """

    added: list[str] = field(default_factory=list)
    same: list[str] = field(default_factory=list)
    conflicts: list[Broken] = field(default_factory=list)
    refused: list[Broken] = field(default_factory=list)


def merge(sources: Sequence[Path], into: Path) -> MergeResult:
    """Add the records of other results folders to `into`. Never overwrites.

    A record is refused by name where its id is not that of its cell. Raises StoreError where a source is not
    a folder of results or is `into` itself.
    """
    result = MergeResult()
    for source in sources:
        if not source.is_dir():
            raise StoreError(
                f"{source}: no such folder; name a results folder, which holds <suite>/<id>/{RECORD}"
            )
        if into.exists() and source.samefile(into):
            raise StoreError(f"{source}: cannot be merged into itself; name another folder")
        files = [path for path in _record_files(source) if path.is_file()]
        if not files:
            raise StoreError(f"{source}: holds no <suite>/<id>/{RECORD}; name the folder above the suites")
        for path in files:
            _merge_one(path, into, result)
    return result


def _merge_one(path: Path, into: Path, result: MergeResult) -> None:
    data = path.read_bytes()
    record, reason = _parse(data, path.parent.name)
    suite, name = path.parent.parent.name, path.parent.name
    if record is not None:
        reason = _mismatch(record, suite)
    if reason:
        result.refused.append(Broken(path, reason))
        return
    where = f"{suite}/{name}"
    target = into / suite / name
    held = lock(target)
    if held is None:
        result.conflicts.append(Broken(path, f"{target} is running now; merge again when it is done"))
        return
    try:
        if (target / RECORD).exists():
            if (target / RECORD).read_bytes() == data:
                result.same.append(where)
            else:
                result.conflicts.append(Broken(path, f"differs from {target / RECORD}, which is kept"))
            return
        # A half-done run of the same cell is superseded: this record is what it would have become.
        shutil.rmtree(target / "checkpoint", ignore_errors=True)
        for side in _COPIED:
            (target / side).unlink(missing_ok=True)
            if (path.parent / side).is_file():
                shutil.copyfile(path.parent / side, target / side)
        write_once(target / RECORD, data)
        result.added.append(where)
    finally:
        unlock(target, held)


def _mismatch(record: Record, suite: str) -> str:
    if record["suite"] != suite:
        return f"its suite {record['suite']!r} is not that of its folder"
    try:
        actual = cell_of(record).id
    except (KeyError, TypeError, AttributeError) as error:
        return f"its cell cannot be read: {type(error).__name__}: {error}"
    claimed = record["id"]
    return "" if actual == claimed else f"its id {claimed!r} is not that of its cell, which is {actual!r}"
