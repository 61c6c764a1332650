"""Reads ``[[method]]``: hyper-parameters by task, other parts, and the variants that they make."""

from __future__ import annotations

import fnmatch
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from harness import registry
from harness.registry import Entry, RegistryError, did_you_mean, parts, show
from harness.suite.tables import MOST_CELLS, MethodTable
from harness.suite.tasks import resolved
from harness.suite.toml.lines import KeyPath
from harness.suite.toml.reader import Reader
from harness.suite.values import ScheduledTask, Second, Variant

KEYS = ("label", "tasks", "epsilon", "on", "with", "train", "then")


class Given(NamedTuple):
    """A part as a suite writes it, what that means, and where it is written."""

    text: str
    choice: parts.PartChoice
    place: KeyPath


class Values(NamedTuple):
    """The values of a hyper-parameter, and where they are written."""

    values: list[Any]
    place: KeyPath


Grid = dict[str, Values]


class MethodValues(NamedTuple):
    """What a ``[[method]]`` gives its method: hyper-parameters, others by a glob of tasks, and parts by slot."""

    entry: Entry
    base: Grid
    on: dict[str, Grid]
    parts: dict[str, list[Given]]


def read(reader: Reader) -> dict[int, MethodValues]:
    """Each ``[[method]]`` by its index. What is wrong with its values is reported, also where its keys are wrong."""
    entries = reader.names.index("method")
    found: dict[int, MethodValues] = {}
    for index, raw in enumerate(reader.rows("method")):
        path: KeyPath = ("method", index)
        given = _parts(reader, (*path, "with"), _table(raw.get("with")))
        entry = entries.get(raw["name"]) if isinstance(raw.get("name"), str) else None
        if entry is None:
            continue
        base = _grid(reader, path, entry, {key: raw[key] for key in raw if key not in ("name", *KEYS)})
        grids = {}
        for glob, values in _table(raw.get("on")).items():
            place = (*path, "on", glob)
            if "with" in _table(values):
                text = '"with" is for all tasks of a [[method]]; write another [[method]], with "tasks", for these.'
                reader.bad((*place, "with"), text)
            grids[glob] = _grid(reader, place, entry, {k: v for k, v in _table(values).items() if k != "with"})
        found[index] = MethodValues(entry, base, grids, given)
    return found


def _table(raw: object) -> dict[str, Any]:
    """A table inside a ``[[method]]``; empty where it is something else, which is reported elsewhere."""
    return raw if isinstance(raw, dict) else {}


def _parts(reader: Reader, path: KeyPath, given: Mapping[str, Any]) -> dict[str, list[Given]]:
    """The parts of ``with`` by slot, in the order in which they are applied; what is wrong is reported."""
    found: dict[str, list[Given]] = {}
    for slot, raw in given.items():
        try:
            parts.entries(slot)
        except RegistryError as error:
            reader.refuse((*path, slot), error, slot)
            continue
        if raw == []:
            reader.bad((*path, slot), f'"{slot}" is an empty list; write at least one part.')
        chosen = found.setdefault(slot, [])
        for place, spec in _each((*path, slot), raw):
            if not isinstance(spec, str):
                reader.bad(place, f'"{slot}" = {show(spec)}: should be the name of a part, as in "name?key=value".')
                continue
            try:
                choice = parts.choose(slot, spec)
            except RegistryError as error:
                reader.refuse(place, error, spec)
                continue
            if choice in [one.choice for one in chosen]:
                reader.bad(place, f'"{slot}": {show(spec)} is given twice; keep one.')
            chosen.append(Given(spec, choice, place))
    return {slot: found[slot] for slot in parts.SLOTS if slot in found}


def _grid(reader: Reader, path: KeyPath, entry: Entry, given: Mapping[str, Any]) -> Grid:
    """Each hyper-parameter and its values in its type; what does not fit is reported and left out."""
    grid: Grid = {}
    for key, raw in given.items():
        if raw == []:
            reader.bad((*path, key), f'"{key}" is an empty list; write at least one value.')
        grid[key] = Values([], (*path, key))
        for place, value in _each((*path, key), raw):
            arguments, problems = registry.check_options(entry, {key: value}, text=False)
            mine = [one for one in problems if one.key == key]
            for one in mine:
                # An unknown key is one mistake, whatever its values.
                where = place if key in entry.parameters else (*path, key)
                near = one.suggestion or did_you_mean(key, () if key in entry.parameters else KEYS)
                reader.bad(where, one.message, near)
            if not mine:
                if arguments[key] in grid[key].values:
                    reader.bad(place, f'"{key}": {show(value)} is given twice; keep one.')
                grid[key].values.append(arguments[key])
    return grid


def _each(path: KeyPath, raw: Any) -> list[tuple[KeyPath, Any]]:
    """A value, or the values of a list, each with its place."""
    return [((*path, number), one) for number, one in enumerate(raw)] if isinstance(raw, list) else [(path, raw)]


# Variants -------------------------------------------------------------------------------------------------


def variants(
    reader: Reader,
    tables: Mapping[int, MethodTable],
    methods: Mapping[int, MethodValues],
    tasks: Iterable[ScheduledTask],
) -> list[Variant]:
    """The variants of all methods, in order of tasks. No two on a task and for a target may be alike."""
    found = [
        variant for index, table in tables.items() for variant in _of_table(reader, index, table, methods[index], tasks)
    ]
    found.sort(key=lambda one: (one.task.index, one.index))
    before: dict[int, list[Variant]] = {}
    for one in found:
        same = before.setdefault(one.task.index, [])
        others = [other for other in same if other.meets(one)]
        twin = next((other for other in others if other.what() == one.what()), None)
        named = next((other for other in others if other.label == one.label), None)
        same.append(one)
        if twin is not None:
            line = reader.lines.line(("method", twin.index))
            text = f'[[method]] "{one.label}" is the same as the one on line {line}; remove one.'
            reader.bad(("method", one.index), text)
        elif named is not None:
            line = reader.lines.line(("method", named.index))
            text = f'two methods are labelled "{one.label}" (the other on line {line}); give one a label.'
            reader.bad(("method", one.index), text)
    return found


def _of_table(
    reader: Reader, index: int, table: MethodTable, method: MethodValues, tasks: Iterable[ScheduledTask]
) -> Iterator[Variant]:
    """The variants of one table, on each task that it is for."""
    path: KeyPath = ("method", index)
    selected = [task for task in tasks if any(_match(task.name, glob) for glob in table.tasks)]
    for number, glob in enumerate(table.tasks):
        _matches(reader, (*path, "tasks", number), glob, tasks)
    for glob in method.on:
        _matches(reader, (*path, "on", glob), glob, selected)
    grids = {}
    for task in selected:
        overrides = (grid for glob, grid in method.on.items() if _match(task.name, glob))
        grids[task.index] = {key: one for grid in (method.base, *overrides) for key, one in grid.items()}
    for key, parameter in method.entry.parameters.items():
        without = [f'"{task.name}"' for task in selected if key not in grids[task.index]]
        if parameter.required and without:
            text = f'method "{table.name}" needs parameter "{key}" ({parameter.type}) on {", ".join(without)}.'
            reader.bad((*path, key), text)
    each = math.prod(map(len, method.parts.values()))
    if each * sum(math.prod(len(one.values) for one in grid.values()) for grid in grids.values()) > MOST_CELLS:
        reader.bad(path, f'[[method]] "{table.name}" means more than {MOST_CELLS} runs; shorten its lists.')
        return
    then = None
    if table.then is not None:
        then = Second(*resolved(reader.names, "method", table.then.method), table.then)
    for task in selected:
        yield from _product(index, table, method, task, grids[task.index], then)


def _product(
    index: int, table: MethodTable, method: MethodValues, task: ScheduledTask, grid: Grid, then: Second | None
) -> Iterator[Variant]:
    """The product of the lists; a label names the parts, and the values of the lists that have more than one."""
    keys = [key for key in method.entry.parameters if key in grid]
    defaults = {key: parameter.default for key, parameter in method.entry.parameters.items()}
    changes = method.parts
    fixed = [f"{slot}: {ones[0].choice.name}" for slot, ones in changes.items() if len(ones) == 1]
    title = table.label or ", ".join([table.name, *fixed])
    for values in itertools.product(*(grid[key].values for key in keys), *changes.values()):
        given = dict(zip(keys, values[: len(keys)], strict=True))
        chosen: dict[str, Given] = dict(zip(changes, values[len(keys) :], strict=True))
        swept = [f"{key}={given[key]}" for key in keys if len(grid[key].values) > 1]
        swept += [f"{slot}={_short(chosen[slot], ones)}" for slot, ones in changes.items() if len(ones) > 1]
        label = f"{title} ({', '.join(swept)})" if swept else title
        yield Variant(
            index=index, name=table.name, label=label if table.label or then is None else f"{label}, then {then.name}",
            parameters=defaults | given, task=task, epsilons=table.epsilon,
            changes={slot: one.choice.spec for slot, one in chosen.items()}, train=table.train, then=then,
            places={key: one.place for key, one in grid.items()},
            given={slot: one.place for slot, one in chosen.items()},
        )  # fmt: skip


def _match(name: str, glob: str) -> bool:
    return name == glob or fnmatch.fnmatchcase(name, glob)


def _matches(reader: Reader, path: KeyPath, glob: str, tasks: Iterable[ScheduledTask]) -> None:
    """Report a glob that matches none of these tasks."""
    names = [task.name for task in tasks]
    if names and not any(_match(name, glob) for name in names):
        text = f'"{glob}" matches no task; tasks are {", ".join(names)}.'
        reader.bad(path, text, did_you_mean(glob, names))


def _short(one: Given, among: Sequence[Given]) -> str:
    """The name of a part where it distinguishes the part from the others of its list, else all that is written."""
    return one.choice.name if [o.choice.name for o in among].count(one.choice.name) == 1 else one.text


def targets(
    reader: Reader, tables: Mapping[int, MethodTable], known: Sequence[float], few: Sequence[float] = ()
) -> None:
    """A method may be for some of the ``known`` targets only, or for some of the ``few`` of the reduced profile."""
    for index, table in tables.items():
        for number, epsilon in enumerate(table.epsilon or ()):
            if epsilon not in (*known, *few):
                there = ", ".join(f"{one:g}" for one in known)
                text = f"epsilon {epsilon:g} is no target of this suite; [privacy] has {there}."
                reader.bad(("method", index, "epsilon", number), text)
