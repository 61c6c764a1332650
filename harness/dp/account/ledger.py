"""What was released, in order: the ledger that accountants read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import attr
import attrs
from dp_accounting import ComposedDpEvent, DpEvent, SelfComposedDpEvent, dp_event


class Ledger:
    """What was released, in order, run-length encoded: a list of (event, how often in a row)."""

    def __init__(self, entries: Iterable[tuple[DpEvent, int]] = ()) -> None:
        self.entries: list[tuple[DpEvent, int]] = list(entries)

    def add(self, event: DpEvent, count: int = 1) -> None:
        """Write the event of one step, or of `count` equal ones."""
        if self.entries and self.entries[-1][0] == event:
            self.entries[-1] = (event, self.entries[-1][1] + count)
        else:
            self.entries.append((event, count))

    def __iter__(self) -> Iterator[tuple[DpEvent, int]]:
        return iter(self.entries)

    def __len__(self) -> int:
        return sum(count for _, count in self.entries)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ledger) and self.entries == other.entries

    def __repr__(self) -> str:
        return f"Ledger({self.entries})"

    def composed(self) -> list[tuple[DpEvent, int]]:
        """Equal events gathered: composition commutes, and an accountant is fast on few distinct events."""
        counts: Counter[str] = Counter()
        first: dict[str, DpEvent] = {}
        for event, count in self.entries:
            key = repr(event)
            counts[key] += count
            first.setdefault(key, event)
        return [(first[key], counts[key]) for key in sorted(counts)]

    def total(self) -> DpEvent:
        """The whole ledger as one event."""
        return ComposedDpEvent([SelfComposedDpEvent(event, count) for event, count in self.composed()])

    def to_json(self) -> list[list[Any]]:
        """Entries as [event, count], an event being a dictionary of its dp_accounting class name and fields."""
        return [[_to_json(event), count] for event, count in self.entries]

    @classmethod
    def from_json(cls, entries: Iterable[Any]) -> Ledger:
        """The inverse of `to_json`. An event that nothing here knows stays what it was, and costs infinity."""
        return cls((_from_json(event), int(count)) for event, count in entries)


@attr.s(frozen=True, slots=True, auto_attribs=True)
class Unknown(DpEvent):
    """An event of a ledger that neither dp_accounting nor this version knows, as JSON."""

    text: str


def _to_json(value: Any) -> Any:
    if isinstance(value, Unknown):
        return json.loads(value.text)
    if isinstance(value, DpEvent):
        fields = {f.name: _to_json(getattr(value, f.name)) for f in attrs.fields(type(value))}
        return {"type": type(value).__name__, **fields}
    return [_to_json(item) for item in value] if isinstance(value, (list, tuple)) else value


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        kind = getattr(dp_event, str(value.get("type")), None)
        if not (isinstance(kind, type) and issubclass(kind, DpEvent)):
            # An accountant of another version may know it. Here it has no finite epsilon.
            return Unknown(json.dumps(value, sort_keys=True))
        return kind(**{key: _from_json(item) for key, item in value.items() if key != "type"})
    return [_from_json(item) for item in value] if isinstance(value, list) else value
