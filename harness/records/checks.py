"""``results/checks/``: one write-once file for what `epsbench check` found of a method.

``<id>.json``; the same check made by other code, elsewhere, or with another outcome is ``<id>.2.json``, and so on.
docs/verification.md lists the fields. A file that holds no valid check stays, and comes back in ``.broken``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from harness import registry
from harness.provenance import code as codehash
from harness.records.files import Records
from harness.records.shelf import Item, Shelf, fits

SCHEMA = 1
FOLDER = "checks"
_NUMBER, _NULL = (int, float), type(None)
_FIELDS: Mapping[str, Any] = {
    "method": str, "label": str, "parameters": dict, "parts": dict, "relation": str, "repeat": (dict, _NULL),
    "lines": list, "wall_seconds": _NUMBER, "cpu_seconds": _NUMBER, "load_average": (*_NUMBER, _NULL),
    "device": dict, "environment": dict,
}  # fmt: skip
_LINE: Mapping[str, Any] = {
    "function": str, "name": str, "ok": bool, "detail": str, "applies": bool, "seconds": _NUMBER,
    "failures": (int, _NULL),
}  # fmt: skip
_ROOT = Path(__file__).parents[2]


def _flaw(check: Item) -> str | None:
    if not check["lines"]:
        return '"lines" is empty: nothing was checked'
    for line in check["lines"]:
        if not isinstance(line, dict) or any(k not in line or not fits(line[k], v) for k, v in _LINE.items()):
            return f'"lines" has one whose fields are not {", ".join(_LINE)}, each of its type'
        if line["ok"] and line["failures"]:
            return f'"lines": {line["name"]!r} is ok and has failures'
        if not line["ok"] and not (line["applies"] and line["detail"]):
            return f'"lines": {line["name"]!r} fails, and does not say of what'
    files = check["code"].get("files")
    if not isinstance(files, dict) or not all(isinstance(one, str) for one in files.values()):
        return '"code.files" is missing or no digests by file'
    repeat = check["repeat"]
    if repeat is not None:
        count, first, last = (repeat.get(key) for key in ("count", "first", "last"))
        if not all(type(one) is int for one in (count, first, last)) or not count == last - first + 1 > 0:
            return '"repeat" is not a count of seeds, the first and the last'
    return None


def _named(check: Mapping[str, Any]) -> dict[str, Any]:
    return {key: check[key] for key in ("schema", "kind", "method", "parameters", "parts", "relation", "repeat")}


_SHELF = Shelf("check", SCHEMA, _FIELDS, _named, _flaw)
identity, write, load = _SHELF.identity, _SHELF.write, _SHELF.load


def outcome(check: Mapping[str, Any]) -> list[tuple[str, bool, bool, int | None]]:
    """What a check found, without words and times: of each line whether it holds, applies, and how often it fails."""
    return [(line["function"], line["ok"], line["applies"], line["failures"]) for line in check["lines"]]


def failing(check: Mapping[str, Any]) -> list[Item]:
    """The lines that do not hold."""
    return [line for line in check["lines"] if not line["ok"]]


def kept(check: Item, known: Iterable[Item]) -> Item | None:
    """The one of `known` that says the same: the same id, code, outcome, device and environment."""

    def said(one: Mapping[str, Any]) -> list[Any]:
        return [one["id"], one["code"]["hash"], outcome(one), one["device"], one["environment"]]

    return next((one for one in known if said(one) == said(check)), None)


def latest(checks: Iterable[Item]) -> Records:
    """The check of each method that counts, and its repetitions, in the order of their names, each with ``"stale"``.

    Checks of today's code count, or those of the code that was checked last. Of these a failure stands,
    until the code changes; then the most repetitions, for a few seeds do not undo many; then the last.
    """
    groups: dict[tuple[str, bool], list[Item]] = {}
    for check in sorted(checks, key=lambda one: (datetime.fromisoformat(one["started"]), one["path"])):
        groups.setdefault((check["method"], check["repeat"] is not None), []).append(check)
    found = Records()
    for _, group in sorted(groups.items()):
        of_last = [one for one in group if one["code"]["hash"] == group[-1]["code"]["hash"]]
        same = [one for one in group if not stale(one)] or of_last
        one = max(reversed(same), key=lambda one: (bool(failing(one)), (one["repeat"] or {"count": 0})["count"]))
        found.append({**one, "stale": stale(one)})
    return found


def stale(check: Mapping[str, Any]) -> bool:
    """Whether one of the files that decided a check is another today, or is not found."""
    files: Mapping[str, str] = check["code"]["files"]
    return dict(_today(check["method"], files)) != files


def _today(method: str, names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Today's digests of the files that are there; a user's own file is where the registry knows it."""
    known = registry.index("method").get(method)
    for name in names:
        path = _ROOT / name
        if not path.is_file() and known is not None and Path(known.file).name == name:
            path = Path(known.file)
        if path.is_file():
            yield name, _digest(path.resolve())


def _digest(path: Path) -> str:
    try:
        return next(iter(codehash.hashes([path]).values()))
    except (SyntaxError, ValueError, OSError):  # half an edit: certainly not what was checked
        return ""
