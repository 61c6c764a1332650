"""What a ``[[method]]`` is given besides hyper-parameters: other parts, a schedule of its own, a second stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from harness.registry import RegistryError, parts, show
from harness.suite.tables import Then, Train
from harness.suite.toml.lines import Path as KeyPath
from harness.suite.toml.reader import Reader
from harness.suite.values import Second

__all__ = ["Given", "changes_of", "then_of", "train_of"]


class Given(NamedTuple):
    """A part as a suite writes it, what that means, and where it is written."""

    text: str
    choice: parts.Choice
    place: KeyPath


def changes_of(reader: Reader, path: KeyPath, given: Mapping[str, Any]) -> dict[str, list[Given]]:
    """The parts of ``with`` by slot, in the order in which they are applied; what is wrong is left out."""
    found: dict[str, list[Given]] = {}
    for slot, raw in given.items():
        listed = isinstance(raw, list)
        try:
            parts.entries(slot)
        except RegistryError as error:
            reader.refuse((*path, slot), error, slot)
            continue
        if raw == []:
            reader.bad((*path, slot), f'"{slot}" is an empty list; write at least one part.')
        for number, spec in enumerate(raw if listed else [raw]):
            place = (*path, slot, number) if listed else (*path, slot)
            try:
                if not isinstance(spec, str):
                    text = f'"{slot}" = {show(spec)}: should be the name of a part, as in "name?key=value".'
                    raise RegistryError(text)
                choice = parts.choose(slot, spec)
            except RegistryError as error:
                reader.refuse(place, error, str(spec))
            else:
                if choice in [one.choice for one in found.setdefault(slot, [])]:
                    reader.bad(place, f'"{slot}": {show(spec)} is given twice; keep one.')
                found[slot].append(Given(spec, choice, place))
    return {slot: found[slot] for slot in parts.SLOTS if slot in found}


def train_of(reader: Reader, path: KeyPath, raw: Any) -> Train | None:
    """A method's own schedule; None where it has none."""
    if raw is None:
        return None
    if not isinstance(raw, dict):
        reader.bad(path, '"train" should be a table; write train = { steps = 1 }.')
        return None
    table = reader.read(path, raw, Train)
    if table.epochs is not None and table.steps is not None:
        reader.bad(path, '"train" has both epochs and steps; keep one.')
    return table


def then_of(reader: Reader, path: KeyPath, raw: Any) -> Second | None:
    """The second stage; None where there is none, or nothing that could be read as one."""
    if raw is None:
        return None
    if not isinstance(raw, dict):
        text = '"then" should be a table; write then = { method = "dp-sgd?lr=0.5", epochs = 5 }.'
        reader.bad(path, text)
        return None
    table = reader.read(path, raw, Then)
    lengths: list[KeyPath] = [(*path, "epochs"), (*path, "steps")]
    if (table.epochs is None) == (table.steps is None) and reader.sound(*lengths):
        reader.bad((*path, "epochs"), '"then" needs one of epochs and steps.')
    data, public = (
        None,
        table.dataset is not None or (None if not reader.sound((*path, "dataset")) else False),
    )
    if table.dataset is not None and reader.lookup((*path, "dataset"), "dataset", table.dataset):
        data = table.dataset
    method = reader.sound((*path, "method")) and reader.lookup((*path, "method"), "method", table.method)
    name, options = (method["name"], method["options"]) if method else ("", {})
    return Second(name, options, table, public, data)
