"""Reads fields of a record, any of which may be missing, null or of another type, and writes values as text."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import PurePath
from typing import Any, Self

RecordLike = Mapping[str, Any]


def visible(text: str) -> str:
    """`text` on one line, with every control or direction-changing character written out as ``\\u202e``.

    Names come from files that anybody may write. A mark that turns the direction of a line, a terminal escape
    or half a surrogate pair must be seen, not obeyed.
    """
    text = " ".join(text.split())
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text)


@lru_cache(maxsize=4096)
def natural(text: str) -> tuple[tuple[int, float, str], ...]:
    """Sort key under which ``lr=2`` comes before ``lr=10``."""
    pieces = re.split(r"(\d+(?:\.\d+)?)", text, flags=re.ASCII)
    return tuple((1, float(p), "") if i % 2 else (0, 0.0, p) for i, p in enumerate(pieces))


def record_path(path: Any) -> str:
    """``<suite>/<id>/record.json`` of a path to a record: what moving the results folder does not change."""
    return "/".join(PurePath(path).parts[-3:]) if isinstance(path, str) else ""


def number(value: Any) -> float | None:
    """`value` as a finite float, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def scalar(value: Any) -> str:
    """A hyper-parameter as text: numbers as short as they go, everything else as JSON."""
    if isinstance(value, str):
        return visible(value)
    if (x := number(value)) is not None:
        return f"{x:.6g}"
    return visible(json.dumps(value, sort_keys=True, ensure_ascii=False, default=str))


def canonical(value: Any) -> str:
    """`value` as JSON with sorted keys and only ASCII: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)


class Fields:
    """Typed look-ups by dotted name in a nested mapping; a missing or mistyped field is empty."""

    def __init__(self, record: RecordLike) -> None:
        self.record = record

    def any(self, name: str) -> Any:
        value: Any = self.record
        for key in name.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def text(self, name: str, default: str = "") -> str:
        value = self.any(name)
        return visible(value) if isinstance(value, str) and value.strip() else default

    def number(self, name: str) -> float | None:
        return number(self.any(name))

    def whole(self, name: str) -> int | None:
        value = self.number(name)
        return None if value is None else int(value)

    def true(self, name: str) -> bool:
        return self.any(name) is True

    def mapping(self, name: str) -> Mapping[str, Any]:
        value = self.any(name)
        return value if isinstance(value, dict) else {}

    def numbers(self, name: str) -> dict[str, float]:
        read = ((visible(str(k)), number(v)) for k, v in self.mapping(name).items())
        return {k: v for k, v in read if v is not None}

    def epsilons(self, name: str) -> dict[str, float]:
        """Epsilon by accountant. Null is infinite in a record; what is not a number is left out."""
        read = {visible(str(k)): math.inf if v is None else number(v) for k, v in self.mapping(name).items()}
        return {k: v for k, v in read.items() if v is not None}

    def pairs(self, name: str) -> tuple[tuple[str, str], ...]:
        return pairs(self.mapping(name))

    def parts(self, name: str) -> tuple[tuple[str, str], ...]:
        """A method's parts, each as it would be written."""
        return pairs(self.mapping(name), part_text)


def at(read: Callable[..., Any], *arguments: Any) -> Any:
    """A field of a `FromFields` that is ``read(fields, *arguments)``."""
    return dataclasses.field(metadata={"read": lambda f: read(f, *arguments)})


class FromFields:
    """A data class whose fields say, by `at`, where in a record they are."""

    @classmethod
    def of(cls, f: Fields, **known: Any) -> Self:
        """What is not `known` already is read from `f`."""
        fields = (one for one in dataclasses.fields(cls) if one.name not in known)  # type: ignore[arg-type]
        return cls(**known, **{one.name: one.metadata["read"](f) for one in fields})


def pairs(values: Mapping[str, Any], shown: Callable[[Any], str] = scalar) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((visible(str(k)), shown(v)) for k, v in values.items()))


def part_text(value: Any) -> str:
    """A part as it would be written: ``Flat(clip=1)``."""
    if not isinstance(value, dict):
        return scalar(value)
    inner = ", ".join(f"{k}={v}" for k, v in pairs({k: v for k, v in value.items() if k != "type"}))
    return f"{visible(str(value.get('type') or ''))}({inner})"


def listing(values: Sequence[int]) -> str:
    """Whole numbers as ranges: ``0–2, 5``."""
    out: list[list[int]] = []
    for v in sorted(set(values)):
        if out and v == out[-1][-1] + 1:
            out[-1].append(v)
        else:
            out.append([v])
    return ", ".join(f"{r[0]}–{r[-1]}" if len(r) > 2 else ", ".join(map(str, r)) for r in out)
