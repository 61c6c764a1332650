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

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.records import origin
from harness.records.cell import Cell, canonical_json
from harness.records.files import Broken, Records, StoreError, content, content_of, dumps, listed, write_once
from harness.records.record import FINAL
from harness.records.schema import fault, parsed

RECORD = "record.json"

_ATTEMPT = re.compile(r"([0-9a-f]{12})(?:\.([1-9][0-9]{0,8}))?")

Record = dict[str, Any]
COMPUTED = ("path", "origin", "stale")
"""Keys that a record gains when it is loaded, and that are never written."""


# Writing --------------------------------------------------------------------------------------------------


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
    write_once(folder / RECORD, data)
    return folder / RECORD


# Reading --------------------------------------------------------------------------------------------------


def _parse(data: bytes, folder: str) -> tuple[Record | None, str]:
    """The record; or None and the reason why the bytes are not a valid one."""
    return parsed(data, lambda record: fault(record) or _misplaced(record, folder))


def _misplaced(record: Record, folder: str) -> str:
    """Why a record is not of the folder of this name; empty where it is."""
    match = _ATTEMPT.fullmatch(folder)
    if match is None:
        return f"its folder {folder!r} is not named after an id (12 hex digits, then .2, .3 for later attempts)"
    return "" if match[1] == record["id"] else f"its id {record['id']!r} is not that of its folder"


def parse_at(path: Path, data: bytes) -> tuple[Record | None, str]:
    """The record at ``<suite>/<id>/record.json`` with these bytes; or None and the reason why it is not valid."""
    record, reason = _parse(data, path.parent.name)
    if record is not None and record["suite"] != path.parent.parent.name:
        return None, f"its suite {record['suite']!r} is not that of its folder"
    return record, reason


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

    Each gains ``"path"``, and ``"origin"`` where it was merged: what :mod:`harness.records.origin` knows of it. Files
    that cannot be used are in ``.broken``. A missing folder holds no records.
    """
    found = Records()
    for path in record_files(results, suite, found.broken):
        data = content_of(path, found.broken)
        # A run has no record yet where there is no file.
        if data is None:
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


def record_files(results: Path, suite: str | None, broken: list[Broken]) -> Iterator[Path]:
    """Where records are or will be, in order; folders that cannot be listed are added to `broken`."""
    suites = [suite] if suite is not None else _folders(results, broken)
    for name in suites:
        for folder in _folders(results / name, broken):
            yield results / name / folder / RECORD


def _folders(path: Path, broken: list[Broken]) -> list[str]:
    return [name for name in listed(path, broken) if os.path.isdir(path / name)]


# Which record counts --------------------------------------------------------------------------------------


def cell_of(record: Record) -> Cell:
    """The cell of a record, on the device that it ran on. Raises ValueError where they are not the parts of a cell."""
    device = record["device"]
    return Cell.from_canonical(
        record["cell"],
        suite=record["suite"],
        device={"device": device.get("spec"), "threads": device.get("threads"), "engine": None, "microbatch": None},
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


def current(records: Iterable[Record], codes: Mapping[str, str | Mapping[str, Any]] | None = None) -> list[Record]:
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
    """The records that share their id, in one suite, with a record of another cell: nothing tells them apart."""
    families: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        families.setdefault((record["suite"], record["id"]), []).append(record)
    return [
        Broken(Path(record["path"]), "is a run of one of two cells with the same id: keep them in two results folders")
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
        """Number of the newest attempt that has a folder; 0 without one."""
        number = 0
        while os.path.lexists(self.attempt(number + 1)):
            number += 1
        return number

    def unfinished(self, first: int = 1) -> Path:
        """Where the next run goes: the newest attempt where it has no record, else the next number, from `first` on."""
        number = max(first, self.latest())
        if os.path.lexists(self.attempt(number) / RECORD):  # good or damaged: no record is written over another
            number += 1
        return self.attempt(number)
