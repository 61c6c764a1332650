"""``results/audits/``: one write-once file an audit.

``<id>.json``; the same audit made by other code is ``<id>.2.json``, and so on. docs/audits.md lists the fields. A file
that holds no valid audit is not skipped in silence: it stays, and comes back in ``Audits.broken`` with the reason.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from harness import store
from harness.cell import canonical_json

__all__ = ["FOLDER", "SCHEMA", "Audits", "attempts", "identity", "latest", "load", "write"]

SCHEMA = 1
FOLDER = "audits"
IDENTITY = (
    "schema", "method", "parts", "task", "epsilon_target", "delta", "relation", "instrument", "canaries", "trials",
    "steps", "rate", "level", "seed",
)  # fmt: skip
"""The fields that an id is made of; of the task, what is in it and not how it is called."""

_NAME = re.compile(r"([0-9a-f]{12})(?:\.([1-9][0-9]{0,2}))?\.json")
_NUMBER, _NULL = (int, float), type(None)
_FIELDS: Mapping[str, Any] = {
    "schema": int, "kind": str, "id": str, "method": str, "label": str, "parameters": dict, "parts": dict, "task": dict,
    "epsilon_target": (*_NUMBER, _NULL), "epsilon_claimed": (*_NUMBER, _NULL), "delta": _NUMBER, "relation": str,
    "epsilon_audited": (*_NUMBER, _NULL), "confidence": _NUMBER, "instrument": str, "instruments": dict,
    "canaries": int, "trials": int, "steps": int, "rate": _NUMBER, "level": _NUMBER, "seed": int, "facts": dict,
    "flagged": bool, "reason": (str, _NULL), "code": dict, "device": dict, "environment": dict, "started": str,
    "wall_seconds": _NUMBER,
}  # fmt: skip

Audit = dict[str, Any]


class Audits(list[Audit]):
    """Audits, each with its ``"path"``; ``broken`` are the files that hold none."""

    def __init__(self, audits: Iterable[Audit] = (), broken: Iterable[store.Broken] = ()) -> None:
        super().__init__(audits)
        self.broken = list(broken)


def identity(audit: Mapping[str, Any]) -> str:
    """12 hex digits of the SHA-256 over what was audited and how (`IDENTITY`)."""
    named = {key: audit[key] for key in IDENTITY}
    named["task"] = {key: value for key, value in audit["task"].items() if key != "name"}
    return hashlib.sha256(canonical_json(named).encode()).hexdigest()[:12]


def attempts(folder: Path, key: str) -> list[Path]:
    """The files in `folder` of the audit with this id that are there, oldest first, and then the next one's."""
    found = [folder / f"{key}.json"]
    while found[-1].exists():
        found.append(folder / f"{key}.{len(found) + 1}.json")
    return found


def write(folder: Path, audit: Audit) -> Path:
    """Write `audit` as the next file of its id in `folder` (``results/audits``), in one step, and return its path.

    Nothing is overwritten. Raises `store.StoreError` where it is no valid audit or cannot be written.
    """
    path = attempts(folder, str(audit.get("id")))[-1]
    data = store.dumps({key: value for key, value in audit.items() if key != "path"}).encode()
    _, reason = _parse(data, path.name)
    if reason:
        raise store.StoreError(f"the audit for {path} is not valid: {reason}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise store.Unwritable(folder, error) from error
    store.write_once(path, data)
    return path


def load(folder: Path) -> Audits:
    """All audits in `folder` (``results/audits``), by name; none where there is no folder."""
    found = Audits()
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if not entry.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return found
    except OSError as error:
        found.broken.append(store.Broken(folder, f"cannot be read: {error.strerror}"))
        return found
    for name in names:
        path = folder / name
        try:
            with path.open("rb") as file:
                data = file.read(store.MOST_BYTES + 1)
        except OSError as error:
            found.broken.append(store.Broken(path, f"cannot be read: {error.strerror}"))
            continue
        audit, reason = _parse(data, name)
        if audit is None:
            found.broken.append(store.Broken(path, reason))
        else:
            found.append(audit | {"path": str(path)})
    return found


def latest(audits: Iterable[Audit]) -> list[Audit]:
    """The last attempt of each id, in the order of their ids."""
    last: dict[str, Audit] = {}
    for audit in audits:
        if audit["id"] not in last or _attempt(audit) > _attempt(last[audit["id"]]):
            last[audit["id"]] = audit
    return [last[key] for key in sorted(last)]


def _attempt(audit: Audit) -> int:
    match = _NAME.fullmatch(Path(audit["path"]).name)
    return int(match[2] or 1) if match else 0


def _parse(data: bytes, name: str) -> tuple[Audit | None, str]:
    """The audit, or None and the reason why the bytes hold none."""
    if len(data) > store.MOST_BYTES:
        return None, f"larger than {store.MOST_BYTES // 2**20} MiB"
    try:
        audit = json.loads(data, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        return None, f"not JSON: {error}"
    reason = _flaw(audit, name)
    return (None, reason) if reason else (audit, "")


def _refuse(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


def _flaw(audit: Any, name: str) -> str | None:
    """What makes a parsed file no valid audit; None where nothing does."""
    if not isinstance(audit, dict):
        return "not a JSON object"
    if audit.get("schema") != SCHEMA or audit.get("kind") != "audit":
        return f"not an audit of schema {SCHEMA}"
    for key, kind in _FIELDS.items():
        value = audit.get(key)
        if key not in audit or not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            return f'"{key}" is missing or not of its type'
        if isinstance(value, float) and not math.isfinite(value):
            return f'"{key}" is beyond all numbers'
    if reason := store.unreadable(audit):
        return reason
    for key, task in (("name", audit["task"]), ("digest", audit["task"]), ("model", audit["task"])):
        if not isinstance(task.get(key), str):
            return f'"task.{key}" is missing or not a text'
    if not isinstance(audit["code"].get("hash"), str):
        return '"code.hash" is missing or not a text'
    try:
        datetime.fromisoformat(audit["started"])
    except ValueError:
        return '"started" is not a moment in ISO 8601'
    claimed, audited = audit["epsilon_claimed"], audit["epsilon_audited"]
    if audit["flagged"] != (claimed is not None and audited is not None and audited > claimed):
        return '"flagged" is not whether "epsilon_audited" exceeds "epsilon_claimed"'
    if audited is None and not audit["reason"]:
        return '"reason" is missing, and there is no "epsilon_audited"'
    match = _NAME.fullmatch(name)
    if match is None or match[1] != audit["id"] or audit["id"] != identity(audit):
        return f"its name {name!r} is not that of its id, or its id is not that of its content"
    return None
