"""Taking in the records of other results folders: all or nothing, and never over what is here."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from harness.records import draw, files, origin, public
from harness.records.cell import Cell
from harness.records.store import RECORD, Record, cell_of, mismatch, parse_at, record_files, stranger

# What a merge takes along, before the record itself.
_COPIED = ("trace.jsonl", "env.json", "error.txt")
Vet = Callable[[Record], tuple[str, tuple[str, ...]]]
"""Why a record from elsewhere is not to be believed, and what of it could not be computed again."""


@dataclass(frozen=True)
class MergeResult:
    """What a merge did, as paths relative to the results folder (``suite/id``).

    ``conflicts`` are there on both sides with different bytes, ``refused`` are source records that are not
    valid; both say where and why, and neither changed anything.
    """

    added: list[str] = field(default_factory=list)
    same: list[str] = field(default_factory=list)
    conflicts: list[files.Broken] = field(default_factory=list)
    refused: list[files.Broken] = field(default_factory=list)


def merge(sources: Sequence[Path], into: Path, vet: Vet, called: Mapping[Path, str]) -> MergeResult:
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
            raise files.StoreError(
                f"{source}: no such folder; name a results folder, which holds <suite>/<id>/{RECORD}"
            )
        if into.exists() and source.samefile(into):
            raise files.StoreError(f"{source}: cannot be merged into itself; name another folder")
        found = [path for path in record_files(source, None, result.refused) if os.path.lexists(path)]
        if not found and not result.refused:
            raise files.StoreError(f"{source}: holds no <suite>/<id>/{RECORD}; name the folder above the suites")
        name = called.get(source) or source.resolve().name
        for path in found:
            _merge_one(path, into, result, vet, name)
    return result


def _merge_one(path: Path, into: Path, result: MergeResult, vet: Vet, source: str) -> None:
    data = files.content_of(path, result.refused)
    if data is None:
        return
    record, reason = parse_at(path.absolute(), data)
    if record is None or (reason := mismatch(record)):
        result.refused.append(files.Broken(path, reason))
        return
    where = f"{path.parent.parent.name}/{path.parent.name}"
    target = into / where
    if os.path.lexists(target) and not target.is_dir():
        result.conflicts.append(files.Broken(path, f"{target} is no folder, and is kept"))
        return
    if reason := _taken(cell_of(record), into):
        result.conflicts.append(files.Broken(path, reason))
        return
    held = files.lock(target)
    if held is None:
        result.conflicts.append(files.Broken(path, f"{target} is running now; merge again when it is done"))
        return
    try:
        if os.path.lexists(target / RECORD):
            difference = _difference(target / RECORD, data)
            if difference:
                result.conflicts.append(files.Broken(path, difference))
            else:
                result.same.append(where)
            return
        reason, unknown = vet(record)
        if reason:
            result.refused.append(files.Broken(path, reason))
            return
        _add(path.parent, target, data, origin.write(data, source, unknown), result.refused)
        result.added.append(where)
    finally:
        files.unlock(target, held)
        # A folder that was made for the lock alone would look like a run half done.
        with contextlib.suppress(OSError):
            target.rmdir()


def _taken(cell: Cell, results: Path) -> str:
    """Which attempt that is here under the id of `cell` is of another one; empty where none is."""
    for folder in sorted((results / cell.suite).glob(f"{cell.id}*")):
        record = None
        with contextlib.suppress(OSError):
            record, _ = parse_at((folder / RECORD).absolute(), files.content(folder / RECORD))
        reason = stranger(record, cell) if record is not None else draw.stranger(folder, cell)
        if reason:
            return f"{folder} {reason}"
    return ""


def _difference(there: Path, data: bytes) -> str:
    """Why the record that is there is not these bytes; empty where it is, or they differ by what is private alone."""
    try:
        found = files.content(there)
    except OSError as error:
        return f"{there} is there already, cannot be read ({error.strerror}), and is kept"
    if found == data:
        return ""
    record, reason = parse_at(there.absolute(), found)
    other, _ = parse_at(there.absolute(), data)
    if record is not None and other is not None and (public.view(record) == other or public.view(other) == record):
        return ""  # one of the two without what is private, and what is here stays
    if record is None:
        return f"differs from {there}, which is kept though it is damaged ({reason}); remove it and merge again"
    return f"differs from {there}, which is kept"


def _add(source: Path, target: Path, data: bytes, note: bytes, refused: list[files.Broken]) -> None:
    """Put a record, its origin and its side files into a locked folder without one, all or nothing.

    A half-done run in it is superseded: this record is what it would have become. What takes room is written before
    that is touched, and it is put back where the record cannot be written after all. A kill in between leaves a run
    that begins anew.
    """
    staged: dict[str, Path] = {}
    aside = files.temporary(target / "superseded")
    placed: list[Path] = []
    moved: list[str] = []
    try:
        for side, content in [*((side, _side(source / side, refused)) for side in _COPIED), (origin.FILE, note)]:
            if content is not None:
                staged[side] = files.temporary(target / side)
                files.write_durably(staged[side], content)
        aside.mkdir()
        for name in ("checkpoint", *_COPIED, origin.FILE):  # without its checkpoint first: a trace alone is begun again
            if os.path.lexists(target / name):
                (target / name).rename(aside / name)
                moved.append(name)
        for side, file in staged.items():
            file.rename(target / side)
            placed.append(target / side)
        files.write_once(target / RECORD, data)
    except BaseException as error:
        for path in placed:
            files.discard(path)
        for name in reversed(moved):
            (aside / name).rename(target / name)
        if isinstance(error, OSError):
            raise files.Unwritable(target, error) from error
        raise
    finally:
        for file in staged.values():
            files.discard(file)
        files.discard(aside)


def _side(path: Path, refused: list[files.Broken]) -> bytes | None:
    """The bytes of a side file; None where it is missing or is not to be taken along."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            refused.append(files.Broken(path, "not a plain file; left behind"))
            return None
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        refused.append(files.Broken(path, f"cannot be read: {error.strerror}; left behind"))
        return None
