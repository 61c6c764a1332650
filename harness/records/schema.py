"""What follows from the definition of a record: what is valid, its JSON Schema, the fields that a reader lists.

``python -m harness.records.schema docs/record.schema.json`` writes the schema; a test compares it.
"""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Struct, UnsetType

from harness.records import record as definition
from harness.records.field import Column
from harness.records.files import MOST_BYTES
from harness.records.record import READ, SCHEMA, Quartiles, Record

DEEPEST = 64
"""Levels that a record may have: not every reader could follow more."""


def decode(data: bytes | str) -> Any:
    """The value of a JSON text without NaN, infinities and halves of surrogate pairs. Raises ValueError.

    RecursionError where it is nested too deep for this interpreter.
    """
    return msgspec.json.decode(data)


def parsed(data: bytes, fault: Callable[[Any], str | None]) -> tuple[Any, str]:
    """The value in a file; or None and the reason: it is not JSON, or what `fault` says of it."""
    if len(data) > MOST_BYTES:
        return None, f"larger than {MOST_BYTES // 2**20} MiB"
    try:
        value = decode(data)
    except (ValueError, RecursionError) as error:
        return None, f"not JSON: {error}"
    reason = fault(value)
    return (None, reason) if reason else (value, "")


def fault(record: object) -> str | None:
    """What makes a JSON value no valid record, with the field; None where nothing does."""
    if not isinstance(record, dict):
        return "not a JSON object"
    version = record.get("schema")
    if type(version) is not int or version not in READ:
        newer = type(version) is int and version > SCHEMA
        return f"schema {repr(version)[:60]}, this version reads {' and '.join(map(str, READ))}" + (
            "; update epsbench" if newer else ""
        )
    if reason := unreadable(record):
        return reason
    try:
        msgspec.convert(record, Record)
    except msgspec.ValidationError as error:
        return _said(str(error))
    return None


def unreadable(value: object) -> str | None:
    """Why some reader could not print, store or compute with a JSON value; None where each can."""
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


def unknown(value: Any, kind: Any = Record, place: str = "") -> str | None:
    """The first key of a valid record, with its place, that no version of a record has, or None.

    What is under an object that may hold other keys is not looked at.
    """
    if get_origin(kind) is list and isinstance(value, list):
        each = (unknown(one, get_args(kind)[0], f"{place}{i}.") for i, one in enumerate(value, 1))
        return next(filter(None, each), None)
    if not (isinstance(kind, type) and issubclass(kind, Struct) and isinstance(value, dict)):
        return None
    inside = {field.name: field.of for field in _fields(kind)}
    for key, one in value.items():
        if key not in inside:
            if not kind.open:  # type: ignore[attr-defined]
                return f"{place}{key}"
        elif found := unknown(one, inside[key], f"{place}{key}."):
            return found
    return None


def names(kind: type[Struct], without: type | tuple[type, ...] = ()) -> tuple[str, ...]:
    """The keys of an object in a record, but for those marked as `without`."""
    return tuple(f.name for f in _fields(kind) if not any(isinstance(mark, without) for mark in f.marks))


def blank(**known: Any) -> dict[str, Any]:
    """A record to be filled: what is `known`, and null, {} or [] for what else it must have.

    What has no such value (a status, say) is left to the writer: no record without it is written.
    """
    return _blank(Record, {"schema": SCHEMA, **known})


def _blank(kind: type[Struct], known: Mapping[str, Any]) -> dict[str, Any]:
    made = dict(known)
    for field in _fields(kind):
        given, inside = known.get(field.name), isinstance(field.of, type) and issubclass(field.of, Struct)
        if inside and isinstance(given, Mapping):
            made[field.name] = _blank(field.of, given)
        elif field.name in known or not field.required:
            continue
        elif field.null:
            made[field.name] = None
        elif inside:
            made[field.name] = _blank(field.of, {})
        elif get_origin(field.of) in (dict, list):
            made[field.name] = get_origin(field.of)()
    return made


def columns() -> Iterator[tuple[str, str, str]]:
    """Of each column of the table: its name, the dotted place of its value in a record, its type in pandas."""
    found: dict[str, tuple[str, str, str]] = {}
    for column in _columns(Record, ""):
        # A second stage has none of its own.
        found.setdefault(column[0], column)
    yield from found.values()


def _columns(kind: type[Struct], place: str) -> Iterator[tuple[str, str, str]]:
    for name, of, marks, *_ in _fields(kind):
        mark = next((one for one in marks if isinstance(one, Column)), None)
        if mark is not None and of is Quartiles:
            yield mark.name or name, f"{place}{name}.median", "float64"
        elif mark is not None:
            yield mark.name or name, f"{place}{name}", mark.kind or _PANDAS[get_origin(of) or of]
        elif isinstance(of, type) and issubclass(of, Struct):
            yield from _columns(of, f"{place}{name}.")


_PANDAS = {str: "string", dict: "string", int: "Int64", float: "float64", bool: "boolean"}


class _Field(NamedTuple):
    """A key: what it is where it is there and not null, its marks, whether it may be null, whether it must be there."""

    name: str
    of: Any
    marks: tuple[Any, ...]
    null: bool
    required: bool


@functools.cache
def _fields(kind: type[Struct]) -> list[_Field]:
    hints = get_type_hints(kind, include_extras=True)
    found = []
    for field in msgspec.structs.fields(kind):
        of, marks, null = hints[field.name], [], False
        while True:
            if get_origin(of) is Annotated:
                of, *more = get_args(of)
                marks += more
            elif get_origin(of) in (Union, UnionType):
                null = null or type(None) in get_args(of)
                of = next(one for one in get_args(of) if one not in (type(None), UnsetType))
            else:
                break
        found.append(_Field(field.encode_name, of, tuple(marks), null, field.required))
    return found


def _said(text: str) -> str:
    """A message of msgspec's, place first: ``"cell.seed": expected int, got str``."""
    what, _, place = text.rpartition(" - at `$")
    what, place = (what, place.strip("`.")) if what else (text, "")
    what = what.replace("`", "")
    place = re.sub(r"\[(\d+)\]", lambda found: f".{int(found[1]) + 1}", place)
    if missing := re.fullmatch(r"Object missing required field (\S+)", what):
        place, what = f"{place}.{missing[1]}".strip("."), "is missing"
    elif what.startswith("Invalid enum value") and (choices := _choices(place)):
        what = f"{what.removeprefix('Invalid enum value ')} is not one of {', '.join(map(str, choices))}"
    elif what.startswith("Expected"):
        what = f"e{what[1:]}"
    return f'"{place}": {what}' if place else what


def _choices(place: str) -> tuple[Any, ...]:
    """The values that the field at a dotted place may have, if it is one of some."""
    of: Any = Record
    for key in place.split("."):
        if isinstance(of, type) and issubclass(of, Struct):
            of = next((field.of for field in _fields(of) if field.name == key), None)
        elif get_origin(of) is list:
            of = get_args(of)[0]
    return get_args(of) if get_origin(of) is Literal else ()


def schema() -> dict[str, Any]:
    """The JSON Schema of a record, draft 2020-12. What no single field can say is under ``allOf``."""
    found = msgspec.json.schema(Record)
    defs = found["$defs"]
    for name, one in defs.items():
        if not getattr(definition, name).open:
            one["additionalProperties"] = False
    defs["Claim"] |= {
        "if": {"properties": {"failed": {"minItems": 1}}},
        "then": {"properties": {"epsilon": {"type": "null"}}},
    }
    ok = {"properties": {"status": {"const": "ok"}}}
    text, judged = {"type": "string"}, {"properties": {"privately_judged": {"maxItems": 0}}}
    known = {"relation": text, "sampling": text, "ledger": {"minItems": 1}}
    ended = {
        "reason": {"type": "null"},
        "weights_sha256": text,
        "code": {"properties": {"hash": text}},
        "privacy": {"properties": known},
    }
    defs["Record"]["allOf"] = [
        {"if": ok, "then": {"properties": ended}, "else": {"properties": {"reason": {"type": "string"}}}},
        {
            "if": {"properties": {**ok["properties"], "privacy": judged}},
            "then": {"properties": {"metrics": {"required": ["accuracy", "loss"]}}},
        },
    ]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found}


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(schema(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
