"""``[[published]]``: values of the literature, which must name methods and tasks of the suite."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from harness.registry import did_you_mean
from harness.suite.tables import MethodTable, Published
from harness.suite.tasks import Tasks
from harness.suite.toml.reader import Reader
from harness.suite.values import Variant

__all__ = ["check"]

# Those that every record has; a loss of one's own may have others.
METRICS = ("accuracy", "loss", "examples_per_second", "train_seconds", "wall_seconds", "peak_memory_mib")


def check(
    reader: Reader, rows: Mapping[int, Published], methods: Mapping[int, MethodTable], tasks: Tasks,
    variants: Iterable[Variant], targets: Collection[float],
) -> None:  # fmt: skip
    """Report rows that name a method, a task or a target which the suite does not have, and misspelt metrics.

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
        if row.epsilon is not None and targets and row.epsilon not in targets:
            there = ", ".join(f"{one:g}" for one in targets)
            text = f"[[published]] epsilon {row.epsilon:g} is no target of this suite; [privacy] has {there}."
            reader.bad(("published", index, "epsilon"), text)
        near = did_you_mean(row.metric, METRICS) if row.metric else None
        if near is not None and row.metric not in METRICS:
            text = f'[[published]] metric "{row.metric}": no run has a value of this name.'
            reader.bad(("published", index, "metric"), text, near)


def _known(reader: Reader, index: int, key: str, value: str | None, known: list[str]) -> None:
    place = ("published", index, key)
    if value is None or value in known or not reader.sound(place):
        return
    there = ", ".join(dict.fromkeys(known))
    text = f'[[published]] {key} "{value}" is not in this suite; it has {there}.'
    reader.bad(place, text, did_you_mean(value, known))
