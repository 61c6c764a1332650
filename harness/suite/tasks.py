"""Reads ``[[task]]``: data sets and models by name, and how long to train."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness.registry import Registry
from harness.suite.tables import TaskTable, TrainTable
from harness.suite.toml.lines import KeyPath
from harness.suite.toml.reader import Reader, heading
from harness.suite.values import ScheduledTask


def resolved(names: Registry, kind: str, spec: str) -> tuple[str, dict[str, Any]]:
    """Name and options of a spec, with defaults expanded."""
    entry, arguments = names.lookup(kind, spec)
    given = arguments.pop(entry.argument, None) if entry.argument else None
    return entry.name if given is None else f"{entry.name}:{given}", arguments


def scheduled(
    reader: Reader, tables: Mapping[int, TaskTable], root: KeyPath, length: KeyPath, train: TrainTable
) -> dict[int, ScheduledTask]:
    """The tasks of the tables at ``root``; ``train``, at ``length``, is for those that give no schedule."""
    found: dict[int, ScheduledTask] = {}
    names: dict[str, int] = {}
    for index, table in tables.items():
        path = (*root, "task", index)
        title, shared = heading(path), heading(length)
        lengths = train if table.epochs is None and table.steps is None else table
        batch = table.batch or train.batch
        if batch is None:
            reader.bad((*path, "batch"), f'{title} has no batch; write "batch = 256" here or in {shared}.')
        if lengths.epochs is None and lengths.steps is None:
            text = f'{title} has no length; write "epochs = 20" or "steps = 300" here or in {shared}.'
            reader.bad((*path, "epochs"), text)
        name = table.name or f"{table.dataset}/{table.model}"
        other = names.setdefault(name, index)
        if other != index:
            line = reader.lines.line((*root, "task", other))
            text = f'two tasks are called "{name}" (the other on line {line}); give one another name.'
            reader.bad(path, text)
        architecture, options = resolved(reader.names, "model", table.model)
        found[index] = ScheduledTask(
            index=index, path=path, train=length, name=name, dataset=table.dataset, model=table.model,
            architecture={"name": architecture, "options": options}, evaluate=table.evaluate,
            schedule={"batch": batch, "epochs": lengths.epochs, "steps": lengths.steps},
        )  # fmt: skip
    return found
