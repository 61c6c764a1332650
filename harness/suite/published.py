"""Checks ``[[published]]``: values of the literature must name methods, tasks and targets of the suite."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from harness.registry import did_you_mean
from harness.suite.tables import PublishedTable
from harness.suite.toml.reader import Reader

# Those that every record has; a loss of one's own may have others.
METRICS = ("accuracy", "loss", "examples_per_second", "train_seconds", "wall_seconds", "peak_memory_mib")


def check(reader: Reader, rows: Mapping[int, PublishedTable], known: Mapping[str, Collection[str]]) -> None:
    """Report misspelt metrics, and rows that name what is not among the ``known`` values of a key."""
    for index, row in rows.items():
        for key, names in known.items():
            value = getattr(row, key)
            if value not in names:
                text = f'[[published]] {key} "{value}" is not in this suite; it has {", ".join(dict.fromkeys(names))}.'
                reader.bad(("published", index, key), text, did_you_mean(value, names))
        near = did_you_mean(row.metric, METRICS)
        if near is not None and row.metric not in METRICS:
            text = f'[[published]] metric "{row.metric}": no run has a value of this name.'
            reader.bad(("published", index, "metric"), text, near)


def targets(reader: Reader, rows: Mapping[int, PublishedTable], known: Collection[float]) -> None:
    """Report rows at a target which the suite does not have."""
    for index, row in rows.items():
        if row.epsilon is not None and row.epsilon not in known:
            there = ", ".join(f"{one:g}" for one in known)
            text = f"[[published]] epsilon {row.epsilon:g} is no target of this suite; [privacy] has {there}."
            reader.bad(("published", index, "epsilon"), text)
