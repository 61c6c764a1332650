"""A folder of evidence: write-once files of one kind, ``<id>.json``, then ``<id>.2.json`` and so on for the same id.

Each file is validated when it is written and again when it is read. A file that holds nothing valid is not skipped in
silence: it stays, and comes back in ``Found.broken`` with the reason.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from harness.records.cell import canonical_json
from harness.records.files import Broken, Records, StoreError, content_of, dumps, listed, write_once
from harness.records.schema import parsed, unreadable

_NAME = re.compile(r"([0-9a-f]{12})(?:\.([1-9][0-9]{0,2}))?\.json")

Item = dict[str, Any]


def attempt(item: Mapping[str, Any]) -> int:
    """Which file of its id an item that was read is: 1 for the first."""
    match = _NAME.fullmatch(Path(item["path"]).name)
    return int(match[2] or 1) if match else 0


@dataclass(frozen=True)
class Shelf:
    """One kind of files: what they are called, the types of their fields, and what an id is made of.

    `flaw` says what else is wrong with an item; None where nothing is. Every item has ``schema``, ``kind``, ``id``,
    ``code.hash`` and ``started`` besides `fields`.
    """

    kind: str
    schema: int
    fields: Mapping[str, Any]
    named: Callable[[Mapping[str, Any]], Any]
    flaw: Callable[[Item], str | None]

    def identity(self, item: Mapping[str, Any]) -> str:
        """12 hex digits of the SHA-256 over what `named` says of an item."""
        return hashlib.sha256(canonical_json(self.named(item)).encode()).hexdigest()[:12]

    def write(self, folder: Path, item: Item) -> Path:
        """Write `item` as the next file of its id in `folder`, in one step, and return its path.

        Nothing is overwritten. Raises `StoreError` where it is not valid or cannot be written.
        """
        path, number = folder / f"{item.get('id')}.json", 1
        while path.exists():
            number += 1
            path = folder / f"{item.get('id')}.{number}.json"
        data = dumps({key: value for key, value in item.items() if key != "path"}).encode()
        _, reason = parsed(data, partial(self._reason, path.name))
        if reason:
            raise StoreError(f"the {self.kind} for {path} is not valid: {reason}")
        write_once(path, data)
        return path

    def load(self, folder: Path) -> Records:
        """All items in `folder`, by name; empty where there is no folder."""
        found = Records()
        for path in (folder / name for name in listed(folder, found.broken)):
            data = content_of(path, found.broken)
            if data is None:
                continue
            item, reason = parsed(data, partial(self._reason, path.name))
            if item is None:
                found.broken.append(Broken(path, reason))
            else:
                found.append(item | {"path": str(path)})
        return found

    def _reason(self, name: str, item: Any) -> str | None:
        """What makes the content of a file of this name no valid item; None where nothing does."""
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
