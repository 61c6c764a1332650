"""Which of a cell's random numbers a run draws, and the note in its checkpoint's folder that says so.

Two attempts at a cell are two releases. If they drew the same noise while the code between them changed, their
difference would be free of it. So noise, sampling and path are those of an attempt and of the code that it began with
(:mod:`harness.running.seeds`). A run that is killed goes on with those that it began with, or begins anew.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import msgspec

from harness.records.cell import Cell
from harness.records.files import opened

NOTE = "draw.json"
CHECKPOINT = "checkpoint"
TRACE = "trace.jsonl"


class OtherCell(Exception):
    """The folder holds the half-done run of another cell, which is not to be touched."""


class Draw(msgspec.Struct, frozen=True):
    """What the seeds of a run are derived from besides its cell: the number of the attempt, and a hash of its code.

    And `setting`, a hash of what else decides its sums to the bit: device, threads, engine, microbatch, libraries,
    kernels.
    """

    attempt: int
    code: str
    setting: str = ""

    def to_json(self) -> dict[str, Any]:
        """As a record's ``randomness`` holds it."""
        return msgspec.structs.asdict(self)


def begin(folder: Path, cell: Cell, code: str, setting: str = "") -> tuple[Draw, int]:
    """The draw of the run in `folder`, and the number of this session of it; notes both before anything is drawn.

    A run goes on with the draw that it began with; a new one draws by the folder's number, `code` and `setting`. What
    other code or another setting has begun, or what does not say what it drew, is forgotten with its trace: half of a
    run by one and half by another is a run of neither. Raises OtherCell where it is of another cell.

    That a run was begun is noted at once and not with its first checkpoint: whether it came to one is a matter of
    time, and what its next session draws would tell.
    """
    if reason := stranger(folder, cell):
        raise OtherCell(f"{folder}: {reason}")
    before = begun(folder)
    if before is not None and (before.code, before.setting) == (code, setting):
        draw, session = Draw(before.attempt, code, setting), before.sessions + 1
    else:
        shutil.rmtree(folder / CHECKPOINT, ignore_errors=True)
        (folder / TRACE).unlink(missing_ok=True)
        draw, session = Draw(_number(folder), code, setting), 1
    (folder / CHECKPOINT).mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = folder / CHECKPOINT / f".{NOTE}.tmp"
    with opened(temporary, "w") as file:
        json.dump({"cell": cell.digest, "sessions": session, **draw.to_json()}, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / CHECKPOINT / NOTE)
    return draw, session


class Note(Draw, frozen=True, kw_only=True):
    """What is noted of a half-done run: its draw, the digest of its cell, and how many sessions it has had."""

    cell: str
    sessions: int


def begun(folder: Path) -> Note | None:
    """The note of the half-done run in `folder`; None without a readable one."""
    try:
        return msgspec.json.decode((folder / CHECKPOINT / NOTE).read_bytes(), type=Note)
    except (OSError, ValueError, RecursionError):
        return None


def stranger(folder: Path, cell: Cell) -> str:
    """Why the half-done run in `folder` is not one of `cell`; empty where it is, or where none is begun."""
    before = begun(folder)
    if before is None or before.cell == cell.digest:
        return ""
    return (
        f"holds the half-done run of another cell with the same id ({before.cell[:16]}..., the one asked for is "
        f"{cell.digest[:16]}...): move one of the two to another results folder"
    )


def _number(folder: Path) -> int:
    """The attempt that a folder ``<id>.<number>`` is; 1 for any other name."""
    match = re.fullmatch(r"[0-9a-f]{12}\.([1-9][0-9]{0,8})", folder.name)
    return int(match[1]) if match else 1
