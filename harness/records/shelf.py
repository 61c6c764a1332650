"""A folder of evidence: write-once files of one kind, ``<id>.json``, then ``<id>.2.json`` and so on for the same id.

Each file is validated when it is written and again when it is read. One that holds nothing valid is not skipped in
silence: it stays, and comes back in ``Found.broken`` with the reason.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from harness.records.cell import canonical_json
from harness.records.files import MOST_BYTES, Broken, StoreError, Unwritable, dumps, write_once
from harness.records.schema import decode, unreadable

_NAME = re.compile(r"([0-9a-f]{12})(?:\.([1-9][0-9]{0,2}))?\.json")

Item = dict[str, Any]


class Found(list[Item]):
    """What a folder holds, each with its ``"path"``; ``broken`` are the files that hold nothing valid."""

    def __init__(self, items: Iterable[Item] = (), broken: Iterable[Broken] = ()) -> None:
        super().__init__(items)
        self.broken = list(broken)


def attempt(item: Mapping[str, Any]) -> int:
    """Which file of its id an item that was read is: 1 for the first."""
    match = _NAME.fullmatch(Path(item["path"]).name)
    return int(match[2] or 1) if match else 0


@dataclass(frozen=True)
class Shelf:
    """One kind of files: what they are called, their fields, and what an id is made of.

    `flaw` gives what else makes an item none, or None. Every item has ``schema``, ``kind``, ``id``, ``code.hash`` and
    ``started`` besides `fields`.
    """

    kind: str
    schema: int
    fields: Mapping[str, Any]
    named: Callable[[Mapping[str, Any]], Any]
    flaw: Callable[[Item], str | None]

    def identity(self, item: Mapping[str, Any]) -> str:
        """12 hex digits of the SHA-256 over what `named` says of an item."""
        return hashlib.sha256(canonical_json(self.named(item)).encode()).hexdigest()[:12]

    def attempts(self, folder: Path, key: str) -> list[Path]:
        """The files in `folder` of this id that are there, oldest first, and then the next one's."""
        found = [folder / f"{key}.json"]
        while found[-1].exists():
            found.append(folder / f"{key}.{len(found) + 1}.json")
        return found

    def write(self, folder: Path, item: Item) -> Path:
        """Write `item` as the next file of its id in `folder`, in one step, and return its path.

        Nothing is overwritten. Raises `StoreError` where it is not valid or cannot be written.
        """
        path = self.attempts(folder, str(item.get("id")))[-1]
        data = dumps({key: value for key, value in item.items() if key != "path"}).encode()
        _, reason = self._parse(data, path.name)
        if reason:
            raise StoreError(f"the {self.kind} for {path} is not valid: {reason}")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Unwritable(folder, error) from error
        write_once(path, data)
        return path

    def load(self, folder: Path) -> Found:
        """All items in `folder`, by name; none where there is no folder."""
        found = Found()
        try:
            names = sorted(entry.name for entry in os.scandir(folder) if not entry.name.startswith("."))
        except (FileNotFoundError, NotADirectoryError):
            return found
        except OSError as error:
            found.broken.append(Broken(folder, f"cannot be read: {error.strerror}"))
            return found
        for name in names:
            path = folder / name
            try:
                with path.open("rb") as file:
                    data = file.read(MOST_BYTES + 1)
            except OSError as error:
                found.broken.append(Broken(path, f"cannot be read: {error.strerror}"))
                continue
            item, reason = self._parse(data, name)
            if item is None:
                found.broken.append(Broken(path, reason))
            else:
                found.append(item | {"path": str(path)})
        return found

    def _parse(self, data: bytes, name: str) -> tuple[Item | None, str]:
        """The item, or None and the reason why the bytes hold none."""
        if len(data) > MOST_BYTES:
            return None, f"larger than {MOST_BYTES // 2**20} MiB"
        try:
            item = decode(data)
        except (ValueError, RecursionError) as error:
            return None, f"not JSON: {error}"
        reason = self._reason(item, name)
        return (None, reason) if reason else (item, "")

    def _reason(self, item: Any, name: str) -> str | None:
        """What makes a parsed file no valid item; None where nothing does."""
        if not isinstance(item, dict):
            return "not a JSON object"
        if item.get("schema") != self.schema or item.get("kind") != self.kind:
            return f"not of the kind {self.kind!r} and schema {self.schema}"
        common = {"id": str, "code": dict, "started": str}
        for key, kind in {**common, **self.fields}.items():
            if key not in item or not fits(item[key], kind):
                return f'"{key}" is missing or not of its type'
        if reason := unreadable(item):
            return reason
        if not isinstance(item["code"].get("hash"), str):
            return '"code.hash" is missing or not a text'
        try:
            if datetime.fromisoformat(item["started"]).tzinfo is None:
                return '"started" does not say its time zone'
        except ValueError:
            return '"started" is not a moment in ISO 8601'
        if reason := self.flaw(item):
            return reason
        match = _NAME.fullmatch(name)
        if match is None or match[1] != item["id"] or item["id"] != self.identity(item):
            return f"its name {name!r} is not that of its id, or its id is not that of its content"
        return None


def fits(value: Any, kind: Any) -> bool:
    """Whether a value of strict JSON is of a type or of one of several; true and false are no numbers."""
    return kind is bool if isinstance(value, bool) else isinstance(value, kind)
