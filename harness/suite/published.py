"""``[[published]]``: values of the literature, which must name methods and tasks of the suite."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from harness.registry import did_you_mean
from harness.suite.reader import Reader
from harness.suite.tables import MethodTable, Published
from harness.suite.tasks import Tasks
from harness.suite.values import Variant

__all__ = ["check"]


def check(
    reader: Reader, rows: Mapping[int, Published], methods: Mapping[int, MethodTable], tasks: Tasks,
    variants: Iterable[Variant],
) -> None:  # fmt: skip
    """Report rows that name a method or a task which the suite does not have.

    What a misspelt name of the suite, or one without its parts, may mean is passed over.
    """
    known = [name for m in methods.values() for name in (m.name, m.label) if name]
    known += [one.label for one in variants if one.label and (one.changes or one.then)]
    known += [name for i in methods if (name := reader.meant.get(("method", i, "name")))]
    parts = ("label", "with", "then")
    unsure = [m.name for i, m in methods.items() if not reader.sound(*(("method", i, key) for key in parts))]
    for index, row in rows.items():
        if methods and not any(row.method and name and row.method.startswith(name) for name in unsure):
            _known(reader, index, "method", row.method, known)
        if tasks.complete:
            _known(reader, index, "task", row.task, tasks.names())


def _known(reader: Reader, index: int, key: str, value: str | None, known: list[str]) -> None:
    place = ("published", index, key)
    if value is None or value in known or not reader.sound(place):
        return
    there = ", ".join(dict.fromkeys(known))
    text = f'[[published]] {key} "{value}" is not in this suite; it has {there}.'
    reader.bad(place, text, did_you_mean(value, known))
