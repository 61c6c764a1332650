"""``results/audits/``: one write-once file an audit.

``<id>.json``; the same audit made by other code is ``<id>.2.json``, and so on. docs/audits.md lists the fields. A file
that holds no valid audit is not skipped in silence: it stays, and comes back in ``.broken`` with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from harness.records.shelf import Item, Shelf, attempt

SCHEMA = 1
FOLDER = "audits"
_IDENTITY = (
    "schema", "method", "parts", "task", "epsilon_target", "delta", "relation", "instrument", "canaries", "trials",
    "steps", "rate", "level", "seed",
)  # fmt: skip
_NUMBER, _NULL = (int, float), type(None)
_FIELDS: Mapping[str, Any] = {
    "method": str, "label": str, "parameters": dict, "parts": dict, "task": dict,
    "epsilon_target": (*_NUMBER, _NULL), "epsilon_claimed": (*_NUMBER, _NULL), "delta": _NUMBER, "relation": str,
    "epsilon_audited": (*_NUMBER, _NULL), "confidence": _NUMBER, "instrument": str, "instruments": dict,
    "canaries": int, "trials": int, "steps": int, "rate": _NUMBER, "level": _NUMBER, "seed": int, "facts": dict,
    "flagged": bool, "reason": (str, _NULL), "device": dict, "environment": dict, "wall_seconds": _NUMBER,
}  # fmt: skip


def _named(audit: Mapping[str, Any]) -> dict[str, Any]:
    """What an id is made of; of the task, what is in it and not how it is called."""
    named = {key: audit[key] for key in _IDENTITY}
    return named | {"task": {key: value for key, value in audit["task"].items() if key != "name"}}


def _flaw(audit: Item) -> str | None:
    task, claimed, audited = audit["task"], audit["epsilon_claimed"], audit["epsilon_audited"]
    for key in ("name", "digest", "model"):
        if not isinstance(task.get(key), str):
            return f'"task.{key}" is missing or not a text'
    if audit["flagged"] != (claimed is not None and audited is not None and audited > claimed):
        return '"flagged" is not whether "epsilon_audited" exceeds "epsilon_claimed"'
    if audited is None and not audit["reason"]:
        return '"reason" is missing, and there is no "epsilon_audited"'
    return None


_SHELF = Shelf("audit", SCHEMA, _FIELDS, _named, _flaw)
identity, write, load = _SHELF.identity, _SHELF.write, _SHELF.load


def latest(audits: Iterable[Item]) -> list[Item]:
    """The last attempt of each id, in the order of their ids."""
    last: dict[str, Item] = {}
    for audit in audits:
        if audit["id"] not in last or attempt(audit) > attempt(last[audit["id"]]):
            last[audit["id"]] = audit
    return [last[key] for key in sorted(last)]
