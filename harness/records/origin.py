"""Where a record comes from, where that is not here: ``origin.json`` beside it, written when it is merged.

It is no part of the record, which stays as its sender wrote it, byte for byte. A record without it was made here. It
names what the record was merged from, and what of it could not be computed again and is its sender's word; it holds for
the very bytes that were looked at then.
"""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TypedDict

import msgspec

FILE = "origin.json"


class Origin(TypedDict):
    """What a record was merged from and when, the SHA-256 of its bytes then, and what could not be computed again."""

    source: str
    merged: str
    record: str
    unknown: list[str]


LOST: Origin = {"source": "somewhere: its origin.json cannot be read", "merged": "", "record": "", "unknown": []}


def write(data: bytes, source: str, unknown: tuple[str, ...]) -> bytes:
    """The text of ``origin.json`` for the bytes of a record."""
    found: Origin = {
        "source": source,
        "merged": datetime.now(UTC).isoformat(timespec="microseconds"),
        "record": hashlib.sha256(data).hexdigest(),
        "unknown": list(unknown),
    }
    return (json.dumps(found, indent=1, sort_keys=True) + "\n").encode()


def of(folder: Path, data: bytes) -> tuple[Origin | None, str]:
    """What ``origin.json`` says of the record with these bytes, None where it was made here; and what is wrong with it.

    A damaged one does not make a stranger's record one of ours.
    """
    try:
        one = msgspec.json.decode((folder / FILE).read_bytes(), type=Origin)
        datetime.fromisoformat(one["merged"])
    except (FileNotFoundError, NotADirectoryError):
        return None, ""
    except (OSError, ValueError, RecursionError):
        return LOST, ""
    if one["record"] != hashlib.sha256(data).hexdigest():
        return one, f"was changed after it was merged from {one['source']}: merge it again"
    return one, ""


def arrival(origin: Origin | None) -> float:
    """When a record came here, in seconds: minus infinity where it was made here, infinity where that is not known."""
    if origin is None:
        return float("-inf")
    return datetime.fromisoformat(origin["merged"]).timestamp() if origin["merged"] else float("inf")


def words(origin: Origin | None) -> list[str]:
    """What to say of a record from elsewhere, a line each; nothing of a record that was made here."""
    if origin is None:
        return []
    date = origin["merged"][:10]
    known = "its privacy too" if origin["unknown"] else "its privacy was computed again here"
    return [
        f"merged from {origin['source']}" + (f" on {date}" if date else ""),
        f"its accuracy and its times are its sender's word; {known}",
        *origin["unknown"],
    ]
