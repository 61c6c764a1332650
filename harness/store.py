"""``results/``: one write-once file a run.

Layout::

    results/<suite>/<id>/record.json    the record; its presence says that the attempt is over
                         trace.jsonl    one line a log point
                         env.json       where it ran
                         error.txt      the traceback of a crash
                         checkpoint/    only while a run is half done
                         origin.json    of a record that was merged: where it comes from
    results/<suite>/<id>.2/...          a second attempt at the same cell, and so on

A record is written to a temporary file and *linked* to its name, which fails where the name exists: an
interrupted write leaves no half record, and of two writers only one wins.

A file that holds no valid record is quarantined: it stays where it is, since nothing here is overwritten, it is
left out, and it comes back in ``Records.broken`` with the reason, which ``status`` and ``report`` show. It never stops
the others from being loaded. Whatever :func:`load` returns has the fields that other rooms look up, of the types they
expect: what a record is is settled here, whoever wrote it.
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
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from harness import draw, origin, public
from harness.cell import Cell, canonical_json
from harness.public import SCHEMA

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
    "Unwritable",
    "attempt_of",
    "cell_of",
    "content",
    "crowded",
    "current",
    "dumps",
    "encode",
    "load",
    "locked",
    "merge",
    "mismatch",
    "parse_at",
    "read",
    "stale",
    "stranger",
    "strict_json",
    "suite_of",
    "unlock",
    "write_once",
    "write_record",
    "written",
]

READ = (1, SCHEMA)
"""Versions of records that are read; :mod:`harness.public` knows what older ones have elsewhere."""
FINAL = ("ok", "diverged", "skipped", "over_budget")
"""Statuses that running again would only repeat."""
FAILED = ("crashed", "oom", "timeout")
"""Statuses that may end otherwise next time; `run --retry` makes another attempt."""
STATUSES = FINAL + FAILED

RECORD = "record.json"
LOCK = ".lock"
_COPIED = ("trace.jsonl", "env.json", "error.txt")  # what a merge takes along, before the record itself
MOST_BYTES = 64 * 2**20
"""A record that is larger is none: its ledger is run-length encoded, and thousands of them are read at once."""
DEEPEST = 64
"""A record that is nested deeper is none: not every reader could follow it."""

_ATTEMPT = re.compile(r"([0-9a-f]{12})(?:\.([1-9][0-9]{0,8}))?")
_SUITE = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")  # as a suite may be called
_TEXT, _MAP, _NUMBER, _LIST, _NULL = str, dict, (int, float), list, type(None)
_Kind = type | tuple[type, ...]
_REQUIRED: Mapping[str, _Kind] = {
    "id": _TEXT,
    "group": _TEXT,
    "suite": _TEXT,
    "status": _TEXT,
    "cell": _MAP,
    "cell.method": _MAP,
    "cell.method.name": _TEXT,
    "cell.task": _MAP,
    "cell.task.name": _TEXT,
    "cell.privacy": _MAP,
    "cell.schedule": _MAP,
    "cell.schedule.steps": int,
    "cell.numerics": _MAP,
    "cell.seed": int,
    "privacy": _MAP,
    "privacy.relation": (_TEXT, _NULL),
    "privacy.sampling": (_TEXT, _NULL),
    "metrics": _MAP,
    "measured": _MAP,
    "code": _MAP,
    "device": _MAP,
}
# How fast a run was.
_SPEED: Mapping[str, _Kind] = {
    "wall_seconds": (*_NUMBER, _NULL),
    "peak_memory_mib": (*_NUMBER, _NULL),
    "examples_per_second": (_MAP, _NULL),
    "examples_per_second.median": (*_NUMBER, _NULL),
    "examples_per_second.q1": (*_NUMBER, _NULL),
    "examples_per_second.q3": (*_NUMBER, _NULL),
}
# What need not be there, and what it is where it is.
_OPTIONAL: Mapping[str, _Kind] = {
    "reason": (_TEXT, _NULL),
    "card": (_MAP, _NULL),
    "diagnostics": (_MAP, _NULL),
    **{
        f"{where}.{name}": kind
        for where in ("diagnostics", "measured")  # of schema 1
        for name, kind in _SPEED.items()
    },
    "environment": (_MAP, _NULL),
    "started": (_TEXT, _NULL),
    "finished": (_TEXT, _NULL),
    "cell.method.label": _TEXT,
    "cell.method.parameters": _MAP,
    "cell.method.parts": _MAP,
    "cell.method.with": _MAP,
    "cell.then": _MAP,
    "cell.then.name": _TEXT,
    "cell.then.parameters": _MAP,
    "cell.then.parts": _MAP,
    "cell.then.schedule": _MAP,
    "cell.then.schedule.steps": int,
    "cell.then.task": _MAP,
    "cell.privacy.epsilon": (*_NUMBER, _NULL),
    "cell.privacy.delta": (*_NUMBER, _NULL),
    "privacy.epsilon": (*_NUMBER, _NULL),
    "privacy.noise_multiplier": (*_NUMBER, _NULL),
    "privacy.sensitivity": (_MAP, _NULL),
    "privacy.planned": (_MAP, _NULL),
    "privacy.spent": (_MAP, _NULL),
    "privacy.privately_judged": _LIST,
    "privacy.claimed": (_MAP, _NULL),
    "privacy.claimed.epsilon": (*_NUMBER, _NULL),
    "privacy.claimed.failed": _LIST,
    "metrics.accuracy": (*_NUMBER, _NULL),
    "code.hash": (_TEXT, _NULL),
    "code.commit": (_TEXT, _NULL),
    "stages": _LIST,
}
_STAGE_DIAGNOSTICS: Mapping[str, _Kind] = {
    "examples_per_second": _MAP,
    "examples_per_second.median": (*_NUMBER, _NULL),
    "examples_per_second.q1": (*_NUMBER, _NULL),
    "examples_per_second.q3": (*_NUMBER, _NULL),
    "train_seconds": _NUMBER,
    "train_loss": (*_NUMBER, _NULL),
    "clipped_fraction": (*_NUMBER, _NULL),
}
# The same of each of the stages.
_STAGE: Mapping[str, _Kind] = {
    "method": _TEXT,
    "data": _TEXT,
    "trains": _TEXT,
    "sampling": _TEXT,
    "relation": (_TEXT, _NULL),
    "batch": int,
    "steps": int,
    "epochs": _NUMBER,
    "sensitivity": (_MAP, _NULL),
    "diagnostics": _MAP,
    **{
        f"{where}{name}": kind
        for where in ("diagnostics.", "")  # of schema 1
        for name, kind in _STAGE_DIAGNOSTICS.items()
    },
    "spent": _MAP,
    "accountant": (_TEXT, _NULL),
    "epsilon": (*_NUMBER, _NULL),
}
_WORDS = {str: "text", dict: "JSON object", int: "whole number", float: "number", list: "list", _NULL: "null"}

Record = dict[str, Any]
COMPUTED = ("path", "origin", "stale")
"""Keys that a record gains when it is loaded, and that are never written."""
Vet = Callable[[Record], tuple[str, tuple[str, ...]]]
"""Why a record from elsewhere is not to be believed, and what of it could not be computed again."""


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


class Records(list[Record]):
    """Records, each with its ``"path"``; ``broken`` is the quarantine: the files that could not be used."""

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
    """Create `path` with `data`, durably and in one step. Raises AlreadyWritten where it exists, Unwritable where the
    file system refuses.

    After a power cut there is either the whole file or none.
    """
    temporary, linking = _temporary(path), False
    try:
        _write_durably(temporary, data)
        linking = True
        os.link(temporary, path)  # unlike rename, this never replaces
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
        _discard(temporary)
    _sync_folder(path.parent)


def written(record: Record) -> Record:
    """A record without what it gained when it was loaded."""
    return {key: value for key, value in record.items() if key not in COMPUTED}


def encode(record: Record, folder: str) -> bytes:
    """The bytes of a record for the folder of this name. Raises StoreError where it is not a valid one."""
    try:
        data = dumps(written(record)).encode()
    except (ValueError, RecursionError) as error:  # half a surrogate pair, or a list in itself
        raise StoreError(f"the record for {folder} is not valid: it cannot be written: {error}") from error
    found, reason = _parse(data, folder)
    if found is None:
        raise StoreError(f"the record for {folder} is not valid: {reason}")
    return data


def write_record(folder: Path, record: Record) -> Path:
    """Write `record` as ``folder/record.json`` and return that path. Raises StoreError where it is not valid.

    `folder` must be named after the record's id (with ``.2``, ``.3`` for later attempts), and lie in one named after
    its suite.
    """
    data = encode(record, folder.name)
    if record["suite"] != folder.parent.name:
        raise StoreError(f"{folder}: the record is of the suite {record['suite']!r}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Unwritable(folder, error) from error
    write_once(folder / RECORD, data)
    return folder / RECORD


def replace_file(path: Path, data: bytes) -> None:
    """Write a side file (``env.json``) in one step; unlike a record it may be replaced. Raises Unwritable."""
    temporary = _temporary(path)
    try:
        _write_durably(temporary, data)
        temporary.replace(path)
    except OSError as error:
        raise Unwritable(path, error) from error
    finally:
        _discard(temporary)


def _temporary(path: Path) -> Path:
    """A new hidden name beside `path`; what a kill leaves of it is removed by the next run in the folder."""
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")


def _discard(path: Path) -> None:
    """Remove a temporary file, or a folder of things set aside. What cannot be removed does no harm."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove what killed writers left in a folder whose lock the caller holds."""
    for leftover in folder.glob(".*.tmp"):
        _discard(leftover)


def _write_durably(path: Path, data: bytes) -> None:
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


# Reading --------------------------------------------------------------------------------------------------


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is beyond all numbers")
    return value


def strict_json(data: bytes | str) -> Any:
    """The value of a JSON text without NaN and infinities. Raises ValueError or RecursionError."""
    return json.loads(data, parse_constant=_refuse_constant, parse_float=_number)


def _flaw(record: object, folder: str) -> str | None:
    """What makes a parsed file no valid record of this folder; None where nothing does."""
    if not isinstance(record, dict):
        return "not a JSON object"
    schema = record.get("schema")
    if type(schema) is not int or schema not in READ:
        newer = type(schema) is int and schema > SCHEMA
        return f"schema {_short(schema)}, this version reads {' and '.join(map(str, READ))}" + (
            "; update epsbench" if newer else ""
        )
    reason = unreadable(record) or _mistyped(record)
    if reason:
        return reason
    if record["status"] not in STATUSES:
        return f"status {_short(record['status'])} is none of {', '.join(STATUSES)}"
    for name in ("relation", "sampling"):
        if record["status"] == "ok" and record["privacy"][name] is None:
            return f'"privacy.{name}" is null, so nobody can say what its epsilon means'
    if not _SUITE.fullmatch(record["suite"]):
        return f"suite {_short(record['suite'])} is not what a suite may be called"
    if record["cell"]["schedule"]["steps"] < 1:
        return '"cell.schedule.steps" is not a number of steps'
    match = _ATTEMPT.fullmatch(folder)
    if match is None:
        return (
            f"its folder {folder!r} is not named after an id (12 hex digits, then .2, .3 for later attempts)"
        )
    if match[1] != record["id"]:
        return f"its id {_short(record['id'])} is not that of its folder"
    return None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def unreadable(value: object) -> str | None:
    """Why a JSON value is none that every reader can print, store and compute with; None where it is."""
    level: list[object] = [value]
    for _ in range(DEEPEST):
        below: list[object] = []
        for one in level:
            if isinstance(one, dict):
                below += one
                below += one.values()
            elif isinstance(one, list):
                below += one
            elif isinstance(one, str):
                try:
                    one.encode()
                except UnicodeEncodeError:
                    return "it holds half a surrogate pair"
            elif type(one) is int and abs(one) >= 2**1023:
                return "it holds a whole number beyond all others"
        level = below
        if not level:
            return None
    return f"it is nested more than {DEEPEST} deep"


_NOTHING = object()


def _unlike(
    record: Mapping[str, Any], fields: Mapping[str, _Kind], required: bool = False, within: str = ""
) -> str | None:
    """The first of `fields` that has another type, or is missing though it is required; None where there is none."""
    for name, kind in fields.items():
        value: Any = record
        for key in name.split("."):
            value = value.get(key, _NOTHING) if isinstance(value, dict) else _NOTHING
        if value is _NOTHING and not required:
            continue
        if not isinstance(value, kind) or isinstance(value, bool):
            words = [_WORDS[one] for one in (kind if isinstance(kind, tuple) else (kind,))]
            return f'"{within}{name}" is {"missing or " if required else ""}not a {" or ".join(words)}'
    return None


def _mistyped(record: Record) -> str | None:
    """The first field that is missing or has another type than its readers rely on; None where all are well."""
    flaw = _unlike(record, _REQUIRED, required=True) or _unlike(record, _OPTIONAL)
    for number, stage in enumerate(() if flaw else record.get("stages", ()), 1):
        if not isinstance(stage, dict):
            return f'"stages" has in place {number} no JSON object'
        flaw = flaw or _unlike(stage, _STAGE, within=f"stages.{number}.")
    if flaw:
        return flaw
    for name in ("started", "finished"):
        moment = record.get(name)
        try:
            datetime.fromisoformat("1970-01-02" if moment is None else moment).timestamp()
        except (ValueError, OverflowError, OSError):
            return f'"{name}" is not a moment in ISO 8601'
    for one in (record["privacy"].get("claimed") or {}).get("failed", ()):
        if not isinstance(one, str):
            return '"privacy.claimed.failed" is not a list of texts'
    return None


def _parse(data: bytes, folder: str) -> tuple[Record | None, str]:
    """The record, or None and the reason why the bytes hold none."""
    if len(data) > MOST_BYTES:
        return None, f"larger than {MOST_BYTES // 2**20} MiB"
    try:
        record = strict_json(data)
    except (ValueError, RecursionError) as error:
        return None, f"not JSON: {error}"
    reason = _flaw(record, folder)
    return (None, reason) if reason else (record, "")


def parse_at(path: Path, data: bytes) -> tuple[Record | None, str]:
    """The record that these bytes are at ``<suite>/<id>/record.json``, or None and the reason why they are none."""
    record, reason = _parse(data, path.parent.name)
    if record is not None and record["suite"] != path.parent.parent.name:
        return None, f"its suite {record['suite']!r} is not that of its folder"
    return record, reason


def content(path: Path) -> bytes:
    """The bytes of a plain file, no more than make it too large for a record. Raises OSError, also for all else.

    Opening a pipe would wait for a writer, and reading a device might never end.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "not a plain file", str(path))
    with path.open("rb") as file:
        return file.read(MOST_BYTES + 1)


def read(path: Path) -> Record:
    """One record as :func:`load` has it. Raises StoreError saying what is wrong with the file."""
    record, reason = _parse_here(path, content(path))
    if record is None:
        raise StoreError(str(Broken(path, reason)))
    return record


def _parse_here(path: Path, data: bytes) -> tuple[Record | None, str]:
    """:func:`parse_at` of a file in this results folder, with what is known of it besides."""
    record, reason = parse_at(path.absolute(), data)
    if record is None:
        return None, reason
    record = {**written(record), "path": str(path)}
    found, reason = origin.of(path.parent, data)
    if found is not None:
        record["origin"] = found
    return (None, reason) if reason else (record, "")


def load(results: Path, suite: str | None = None) -> Records:
    """All records under `results` (of one suite where named), in order of suite and folder.

    Each gains ``"path"``, and ``"origin"`` where it was merged: what :mod:`harness.origin` knows of it. Files that
    cannot be used are in ``.broken``. A missing folder holds no records.
    """
    found = Records()
    for path in _record_files(results, suite, found.broken):
        try:
            data = content(path)
        except OSError as error:
            if isinstance(error, FileNotFoundError) and not path.is_symlink():
                continue  # a run that has no record yet
            found.broken.append(Broken(path, f"cannot be read: {error.strerror}"))
            continue
        record, reason = _parse_here(path, data)
        if record is None:
            found.broken.append(Broken(path, reason))
        else:
            found.append(record)
    return found


def suite_of(folder: Path) -> tuple[Path, str] | None:
    """The results folder and the suite in it where `folder` is one suite's own, None elsewhere."""
    if not any(folder.glob(f"*/{RECORD}")):
        return None
    named = folder if folder.name not in ("", "..") else folder.resolve()
    return named.parent, named.name


def _record_files(results: Path, suite: str | None, broken: list[Broken]) -> Iterator[Path]:
    """Where records are or will be, in order; folders that cannot be listed are added to `broken`."""
    suites = [suite] if suite is not None else _folders(results, broken)
    for name in suites:
        for folder in _folders(results / name, broken):
            yield results / name / folder / RECORD


def _folders(path: Path, broken: list[Broken]) -> list[str]:
    try:
        with os.scandir(path) as entries:
            return sorted(e.name for e in entries if not e.name.startswith(".") and _is_folder(e))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        broken.append(Broken(path, f"cannot be read: {error.strerror}"))
        return []


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # links in a circle
        return False


# Which record counts --------------------------------------------------------------------------------------


def cell_of(record: Record) -> Cell:
    """The cell of a record, on the device that it ran on. Raises ValueError where its parts are none of a cell's."""
    device = record["device"]
    return Cell.from_canonical(
        record["cell"],
        suite=record["suite"],
        device={
            "device": device.get("spec"),
            "threads": device.get("threads"),
            "engine": None,
            "microbatch": None,
        },
    )


def stranger(record: Record, cell: Cell) -> str:
    """Why a record with the id of `cell` is not of it; empty where it is.

    Ids are short names, and two cells may have the same one. A record of the other is a conflict: it is no result of
    `cell`, and its folder is not free for one.
    """
    if record["cell"] == cell.canonical():  # as nearly always, and quick to see
        return ""
    flaw = mismatch(record)
    if flaw:
        return flaw
    there = cell_of(record)
    if there.digest == cell.digest:
        return ""
    return (
        f"holds a run of another cell with the same id ({there.digest[:16]}..., the one asked for is "
        f"{cell.digest[:16]}...): move one of the two to another results folder"
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

    Those that were made here come before all that were merged, and of these those that came first: what somebody sends
    never takes the place of what is here, whatever its folder is called. Then preferred are, in turn: final ones of
    today's code, final ones that are stale, failures; among equals the newest attempt. ok is *not* preferred to
    diverged, else a second attempt could hide a bad result. `codes` gives today's code by id; where it does, the result
    has ``"stale"`` (bool). The records given are not changed.
    """
    families: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        families.setdefault((record["suite"], record["id"]), []).append(record)
    found = []
    for attempts in families.values():
        code = codes.get(attempts[0]["id"]) if codes else None
        for same in _by_cell(attempts):
            found.append(max(same, key=lambda one: _rank(one, stale(one, code))))
            if code is not None:
                found[-1] = {**found[-1], "stale": stale(found[-1], code)}
    return found


def _rank(record: Record, old: bool) -> tuple[float, bool, bool, int]:
    first = -origin.arrival(record.get("origin"))
    return (first, record["status"] in FINAL, not old, attempt_of(record))


def crowded(records: Iterable[Record]) -> list[Broken]:
    """The records that share their id, in one suite, with a record of another cell: none of them can be told apart."""
    families: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        families.setdefault((record["suite"], record["id"]), []).append(record)
    return [
        Broken(
            Path(record["path"]),
            "is a run of one of two cells with the same id: keep them in two results folders",
        )
        for attempts in families.values()
        if len(list(_by_cell(attempts))) > 1
        for record in attempts
    ]


def _by_cell(attempts: Sequence[Record]) -> Iterable[list[Record]]:
    """Records of one id, by their cells: where they are of two, they are no attempts at the same."""
    if len(attempts) == 1:
        return [list(attempts)]
    cells: dict[str, list[Record]] = {}
    for record in attempts:
        try:
            key = cell_of(record).digest
        except (ValueError, TypeError, AttributeError):
            key = f"not a cell: {canonical_json(record['cell'])}"
        cells.setdefault(key, []).append(record)
    return cells.values()


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
        while os.path.lexists(self.attempt(number + 1)):
            number += 1
        return number

    def unfinished(self, first: int = 1) -> Path:
        """Where the next run goes: the newest attempt where it has no record, else the next number, from `first` on."""
        number = max(first, self.latest())
        if os.path.lexists(
            self.attempt(number) / RECORD
        ):  # good or damaged: no record is written over another
            number += 1
        return self.attempt(number)


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


def merge(
    sources: Sequence[Path], into: Path, vet: Vet | None = None, called: Mapping[Path, str] | None = None
) -> MergeResult:
    """Add the records of other results folders to `into`, each with its origin. Never overwrites.

    `vet` is asked of each record that would be added; `called` are the names of sources by which origins know them.
    A record is refused by name where its id is not that of its cell, and a side file where it is no plain file: a link
    could bring in any file of this machine. Raises StoreError where a source is not a folder of results or is `into`
    itself, Unwritable where `into` cannot be written; what was added until then stays, and a half-done run of the
    same cell is as it was.
    """
    result = MergeResult()
    for source in sources:
        if not source.is_dir():
            raise StoreError(
                f"{source}: no such folder; name a results folder, which holds <suite>/<id>/{RECORD}"
            )
        if into.exists() and source.samefile(into):
            raise StoreError(f"{source}: cannot be merged into itself; name another folder")
        files = [path for path in _record_files(source, None, result.refused) if os.path.lexists(path)]
        if not files and not result.refused:
            raise StoreError(f"{source}: holds no <suite>/<id>/{RECORD}; name the folder above the suites")
        name = (called or {}).get(source) or source.resolve().name
        for path in files:
            _merge_one(path, into, result, vet, name)
    return result


def _merge_one(path: Path, into: Path, result: MergeResult, vet: Vet | None, source: str) -> None:
    try:
        data = content(path)
    except OSError as error:
        result.refused.append(Broken(path, f"cannot be read: {error.strerror}"))
        return
    record, reason = parse_at(path.absolute(), data)
    if record is not None:
        reason = mismatch(record)
    if reason:
        result.refused.append(Broken(path, reason))
        return
    where = f"{path.parent.parent.name}/{path.parent.name}"
    target = into / where
    if os.path.lexists(target) and not target.is_dir():
        result.conflicts.append(Broken(path, f"{target} is no folder, and is kept"))
        return
    if reason := _taken(cell_of(record), into) if record is not None else "":
        result.conflicts.append(Broken(path, reason))
        return
    held = lock(target)
    if held is None:
        result.conflicts.append(Broken(path, f"{target} is running now; merge again when it is done"))
        return
    try:
        if os.path.lexists(target / RECORD):
            difference = _difference(target / RECORD, data)
            if difference:
                result.conflicts.append(Broken(path, difference))
            else:
                result.same.append(where)
            return
        assert record is not None
        reason, unknown = vet(record) if vet else ("", ("nothing of it was computed again",))
        if reason:
            result.refused.append(Broken(path, reason))
            return
        _add(path.parent, target, data, origin.write(data, source, unknown), result.refused)
        result.added.append(where)
    finally:
        unlock(target, held)
        with contextlib.suppress(
            OSError
        ):  # one that was made for the lock alone would look like a run half done
            target.rmdir()


def _taken(cell: Cell, results: Path) -> str:
    """Which attempt that is here under the id of `cell` is of another one; empty where none is."""
    for folder in sorted((results / cell.suite).glob(f"{cell.id}*")):
        record = None
        with contextlib.suppress(OSError):
            record, _ = parse_at((folder / RECORD).absolute(), content(folder / RECORD))
        reason = stranger(record, cell) if record is not None else draw.stranger(folder, cell)
        if reason:
            return f"{folder} {reason}"
    return ""


def _difference(there: Path, data: bytes) -> str:
    """Why the record that is there is not these bytes; empty where it is, or they differ by what is private alone."""
    try:
        found = content(there)
    except OSError as error:
        return f"{there} is there already, cannot be read ({error.strerror}), and is kept"
    if found == data:
        return ""
    record, reason = parse_at(there.absolute(), found)
    other, _ = parse_at(there.absolute(), data)
    if (
        record is not None
        and other is not None
        and (public.view(record) == other or public.view(other) == record)
    ):
        return ""  # one of the two without what is private, and what is here stays
    if record is None:
        return (
            f"differs from {there}, which is kept though it is damaged ({reason}); remove it and merge again"
        )
    return f"differs from {there}, which is kept"


def _add(source: Path, target: Path, data: bytes, note: bytes, refused: list[Broken]) -> None:
    """Put a record, its origin and its side files into a locked folder without one, all or nothing.

    A half-done run in it is superseded: this record is what it would have become. What takes room is written before
    that is touched, and it is put back where the record cannot be written after all. A kill in between leaves a run
    that begins anew.
    """
    staged: dict[str, Path] = {}
    aside = _temporary(target / "superseded")
    placed: list[Path] = []
    moved: list[str] = []
    try:
        for side in _COPIED:
            content = _side(source / side, refused)
            if content is not None:
                staged[side] = _temporary(target / side)
                _write_durably(staged[side], content)
        staged[origin.FILE] = _temporary(target / origin.FILE)
        _write_durably(staged[origin.FILE], note)
        aside.mkdir()
        for name in (
            "checkpoint",
            *_COPIED,
            origin.FILE,
        ):  # without its checkpoint first: a trace alone is begun again
            if os.path.lexists(target / name):
                (target / name).rename(aside / name)
                moved.append(name)
        for side, file in staged.items():
            file.rename(target / side)
            placed.append(target / side)
        write_once(target / RECORD, data)
    except BaseException as error:
        for path in placed:
            _discard(path)
        for name in reversed(moved):
            (aside / name).rename(target / name)
        if isinstance(error, OSError):
            raise Unwritable(target, error) from error
        raise
    finally:
        for file in staged.values():
            _discard(file)
        _discard(aside)


def _side(path: Path, refused: list[Broken]) -> bytes | None:
    """The bytes of a side file, None where there is none or it is not to be taken along."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            refused.append(Broken(path, "not a plain file; left behind"))
            return None
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        refused.append(Broken(path, f"cannot be read: {error.strerror}; left behind"))
        return None


def mismatch(record: Record) -> str:
    """Why a record's id or group is not that of its cell; empty where both are."""
    try:
        cell = cell_of(record)
        actual = {"id": cell.id, "group": cell.group}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        return f"its cell cannot be read: {type(error).__name__}: {error}"
    for name, value in actual.items():
        if record[name] != value:
            return f"its {name} {record[name]!r} is not that of its cell, which is {value!r}"
    return ""
