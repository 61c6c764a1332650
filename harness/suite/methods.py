"""``[[method]]``: hyper-parameters by task, and the variants that they mean."""

from __future__ import annotations

import fnmatch
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from harness import registry
from harness.registry import Entry, RegistryError, did_you_mean, show
from harness.suite.stages import Given, changes_of, then_of, train_of
from harness.suite.tables import MOST_CELLS, MethodTable
from harness.suite.tasks import Tasks
from harness.suite.toml.lines import Path as KeyPath
from harness.suite.toml.reader import Reader
from harness.suite.values import Scheduled, Second, Variant

__all__ = ["labels", "targets", "variants"]

KEYS = ("label", "tasks", "epsilon", "on", "with", "train", "then")
# Where a method is for no task, it is checked all the same.
NOWHERE = Scheduled(-1, (), (), "", "", "", {}, "test", {})


class Choices(NamedTuple):
    """The values of each hyper-parameter on one task, and where they are written."""

    task: Scheduled
    grid: dict[str, list[Any]]
    places: dict[str, KeyPath]

    def number(self) -> int:
        """How many combinations there are."""
        return math.prod(map(len, self.grid.values()))


def variants(reader: Reader, tables: Mapping[int, MethodTable], tasks: Tasks) -> list[Variant]:
    """The variants of all methods, in order of tasks; among them those that something is wrong with."""
    found = [one for index, table in tables.items() for one in _Method(reader, index, table, tasks).variants()]
    return sorted(found, key=lambda v: (v.task.index, v.index))


@dataclass(frozen=True)
class _Method:
    """One ``[[method]]`` table, to be read."""

    reader: Reader
    index: int
    table: MethodTable
    tasks: Tasks

    @property
    def path(self) -> KeyPath:
        return ("method", self.index)

    def variants(self) -> list[Variant]:
        path, table, reader = self.path, self.table, self.reader
        entry = self._entry()
        changes = changes_of(reader, (*path, "with"), table.changes)
        then = then_of(reader, (*path, "then"), table.then)
        train = train_of(reader, (*path, "train"), table.train)
        choices = self._choices(entry)
        each = math.prod(map(len, changes.values()))
        if each * sum(one.number() for one in choices) > MOST_CELLS:
            text = f'[[method]] "{table.name}" means more than {MOST_CELLS} runs; shorten its lists.'
            reader.bad(path, text)
        written = [(*path, key) for key in (*(table.model_extra or {}), "on")]
        ready, whole = entry is not None and reader.sound(*written), reader.sound(path)
        label = self._label(entry, changes)
        found: list[Variant] = []
        for one in choices or [Choices(NOWHERE, {}, {})]:
            expanded = (
                _product(self.index, table, entry, one, changes)
                if entry is not None and ready
                else _each(self.index, table, one, changes)
            )
            found += [
                replace(
                    variant, places=one.places, train=train, then=then, ready=ready, whole=whole,
                    label=_followed(variant.label if whole else label, table, then),
                )
                for variant in expanded
            ]  # fmt: skip
        return found

    def _entry(self) -> Entry | None:
        """The method, None where its name is not known."""
        place = (*self.path, "name")
        if not self.reader.sound(place):
            return None
        try:
            return self.reader.names.resolve("method", self.table.name)
        except RegistryError as error:
            self.reader.refuse(place, error, self.table.name)
            return None

    def _label(self, entry: Entry | None, changes: Mapping[str, list[Given]]) -> str:
        """The label of a method that something is wrong with, empty where it cannot be told."""
        path, table = self.path, self.table
        lists = [*(table.model_extra or {}).values(), *changes.values()]
        swept = any(isinstance(one, list) and len(one) > 1 for one in lists)
        if swept or not self.reader.sound((*path, "label"), (*path, "epsilon")):
            return ""
        if table.label:
            return table.label
        named = entry is not None and self.reader.sound((*path, "with"), (*path, "then"))
        return _title(table, changes) if named else ""

    def _choices(self, entry: Entry | None) -> list[Choices]:
        """The hyper-parameters on each task that the method is for."""
        reader, path, table, tasks = self.reader, self.path, self.table, self.tasks
        for number, glob in enumerate(table.tasks):
            self._matches((*path, "tasks", number), glob, tasks.names())
        selected = [task for task in tasks.values() if any(_match(task.name, glob) for glob in table.tasks)]
        base = self._grid(path, entry, table.model_extra or {})
        overrides: dict[str, Choices] = {}
        for glob, values in table.on.items():
            place = (*path, "on", glob)
            self._matches(place, glob, [task.name for task in selected])
            if "with" in values:
                text = '"with" is for all tasks of a [[method]]; write another [[method]], with "tasks", for these.'
                reader.bad((*place, "with"), text)
            options = {key: value for key, value in values.items() if key != "with"}
            written = {key: (*place, key) for key in options}
            overrides[glob] = Choices(NOWHERE, self._grid(place, entry, options), written)
        found: list[Choices] = []
        for task in selected:
            grid, places = dict(base), {key: (*path, key) for key in table.model_extra or {}}
            for glob, override in overrides.items():
                if _match(task.name, glob):
                    grid |= override.grid
                    places |= override.places
            found.append(Choices(task, grid, places))
        self._required(entry, found)
        return found

    def _required(self, entry: Entry | None, found: Sequence[Choices]) -> None:
        """Report parameters without a default that some task gives no value."""
        for key, parameter in (entry.parameters if entry else {}).items():
            without = [f'"{one.task.name}"' for one in found if key not in one.places]
            if parameter.required and without and self.reader.sound((*self.path, key)):
                text = f'method "{self.table.name}" needs parameter "{key}" ({parameter.type})'
                self.reader.bad((*self.path, key), f"{text} on {', '.join(without)}.")

    def _matches(self, path: KeyPath, glob: str, names: list[str]) -> None:
        if self.tasks.complete and names and not any(_match(name, glob) for name in names):
            text = f'"{glob}" matches no task; tasks are {", ".join(names)}.'
            self.reader.bad(path, text, did_you_mean(glob, names))

    def _grid(self, path: KeyPath, entry: Entry | None, given: Mapping[str, Any]) -> dict[str, list[Any]]:
        """Each hyper-parameter and its values in its type; what does not fit is reported and left out."""
        grid: dict[str, list[Any]] = {}
        for key, raw in given.items():
            values = raw if isinstance(raw, list) else [raw]
            if not values:
                self.reader.bad((*path, key), f'"{key}" is an empty list; write at least one value.')
            good: list[Any] = []
            for number, value in enumerate(values):
                place = (*path, key, number) if isinstance(raw, list) else (*path, key)
                for one in self._value(place, entry, key, value):
                    if one in good:
                        self.reader.bad(place, f'"{key}": {show(value)} is given twice; keep one.')
                    good.append(one)
            if good:
                grid[key] = good
        return grid

    def _value(self, place: KeyPath, entry: Entry | None, key: str, value: object) -> Iterator[object]:
        """One value in the type of its parameter; none where it does not fit, or where the method is not known."""
        if entry is None:
            return
        if key not in entry.parameters:
            place = place[:-1] if isinstance(place[-1], int) else place  # one mistake, whatever its values
        arguments, problems = registry.check_options(entry, {key: value}, text=False)
        mine = [problem for problem in problems if problem.key == key]
        for problem in mine:
            near = problem.suggestion or did_you_mean(key, () if key in entry.parameters else KEYS)
            self.reader.bad(place, problem.message, near)
            if near in entry.parameters:
                self.reader.wrong.add((*place[:-1], near))
        if not mine:
            yield arguments[key]


def targets(
    reader: Reader, methods: Mapping[int, MethodTable], known: Sequence[float], few: Sequence[float] = ()
) -> None:
    """A method may be for some of the ``known`` targets only, or for some of the ``few`` of the reduced profile."""
    for index, table in methods.items():
        given = table.epsilon or ()
        for number, epsilon in enumerate(given):
            place = ("method", index, "epsilon", number)
            if epsilon in given[:number]:
                reader.bad(place, f"[[method]] epsilon: {show(epsilon)} is given twice; keep one.")
            if epsilon not in (*known, *few):
                there = ", ".join(f"{one:g}" for one in known)
                text = f"epsilon {epsilon:g} is no target of this suite; [privacy] has {there}."
                reader.bad(place, text)


def labels(reader: Reader, found: Sequence[Variant]) -> list[Variant]:
    """The variants; on a task and for a target, no two may share a label or be the same. One that is is not whole."""
    before: dict[int, list[Variant]] = {}
    kept: list[Variant] = []
    for one in found:
        others = [other for other in before.get(one.task.index, []) if other.meets(one)]
        twin = next((o for o in others if one.whole and o.whole and o.what() == one.what()), None)
        named = next((o for o in others if o.label == one.label and o.label), None)
        kept.append(one if twin is None else replace(one, whole=False))
        if one.task is not NOWHERE:
            before.setdefault(one.task.index, []).append(one)
        if twin is not None:
            line = reader.lines.line(("method", twin.index))
            text = f'[[method]] "{one.label}" is the same as the one on line {line}; remove one.'
            reader.bad(("method", one.index), text)
        elif named is not None and (one.whole or named.index != one.index):
            line = reader.lines.line(("method", named.index))
            text = f'two methods are labelled "{one.label}" (the other on line {line}); give one a label.'
            reader.bad(("method", one.index), text)
    return kept


# Variants -------------------------------------------------------------------------------------------------


def _match(name: str, glob: str) -> bool:
    return name == glob or fnmatch.fnmatchcase(name, glob)


def _title(table: MethodTable, changes: Mapping[str, list[Given]]) -> str:
    """The label of a method: the one that it gives, else one that names the parts it is given."""
    fixed = [f"{slot}: {ones[0].choice.name}" for slot, ones in changes.items() if len(ones) == 1]
    return table.label or ", ".join([table.name, *fixed])


def _product(
    index: int, table: MethodTable, entry: Entry, choices: Choices, changes: Mapping[str, list[Given]]
) -> Iterator[Variant]:
    """The product of the lists; a label names the parts, and the values of the lists that have more than one."""
    grid = choices.grid
    keys = [key for key in entry.parameters if key in grid]
    defaults = {key: parameter.default for key, parameter in entry.parameters.items()}
    label = _title(table, changes)
    for values in itertools.product(*(grid[key] for key in keys), *changes.values()):
        given = dict(zip(keys, values[: len(keys)], strict=True))
        chosen: dict[str, Given] = dict(zip(changes, values[len(keys) :], strict=True))
        swept = [f"{key}={given[key]}" for key in keys if len(grid[key]) > 1]
        swept += [f"{slot}={_short(chosen[slot], ones)}" for slot, ones in changes.items() if len(ones) > 1]
        yield _variant(
            index,
            table,
            f"{label} ({', '.join(swept)})" if swept else label,
            defaults | given,
            choices.task,
            chosen,
        )


def _each(index: int, table: MethodTable, choices: Choices, changes: Mapping[str, list[Given]]) -> Iterator[Variant]:
    """Variants of a method that cannot be called, in which each of its parts occurs."""
    for number in range(max([1, *map(len, changes.values())])):
        chosen = {slot: ones[min(number, len(ones) - 1)] for slot, ones in changes.items()}
        yield _variant(index, table, "", {}, choices.task, chosen)


def _variant(
    index: int, table: MethodTable, label: str, parameters: dict[str, Any], task: Scheduled, chosen: Mapping[str, Given]
) -> Variant:  # fmt: skip
    return Variant(
        index, table.name, label, parameters, task, table.epsilon,
        {slot: one.choice.spec for slot, one in chosen.items()}, given={s: one.place for s, one in chosen.items()},
    )  # fmt: skip


def _followed(label: str, table: MethodTable, then: Second | None) -> str:
    """A label that names the second stage, unless the suite gives one."""
    return f"{label}, then {then.name}" if label and then and not table.label else label


def _short(one: Given, among: Sequence[Given]) -> str:
    """The name of a part where it tells the part from the others of its list, else all that is written."""
    return one.choice.name if [o.choice.name for o in among].count(one.choice.name) == 1 else one.text
