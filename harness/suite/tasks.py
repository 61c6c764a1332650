"""``[[task]]``: data sets and models by name, and how long to train."""

from __future__ import annotations

from typing import Any

from harness.suite.tables import Task, Train
from harness.suite.toml.lines import Path as KeyPath
from harness.suite.toml.reader import Reader, heading
from harness.suite.values import Scheduled

__all__ = ["Tasks"]


class Tasks(dict[int, Scheduled]):
    """Tasks by their index in the file. ``complete`` says that the name of each is known."""

    complete = False

    @classmethod
    def read(cls, reader: Reader, root: KeyPath, length: KeyPath, train: Train | None) -> Tasks:
        """The tasks in the table at ``root``; ``train``, at ``length``, is for those that give no schedule.

        Those with something wrong in them are among them, as :class:`Scheduled` says.
        """
        if train is not None and train.epochs is not None and train.steps is not None:
            reader.bad((*length, "steps"), f"{heading(length)} has both epochs and steps; keep one.")
        tables = reader.array("task", Task, root, whole=False)
        found = cls(
            {index: _task(reader, index, (*root, "task", index), one, length, train) for index, one in tables.items()}
        )
        found.complete = bool(found) and all(task.name for task in found.values())
        names: dict[str, int] = {}
        for index, task in found.items():
            other = names.setdefault(task.name, index) if task.name else index
            if other != index:
                line = reader.lines.line((*root, "task", other))
                text = f'two tasks are called "{task.name}" (the other on line {line}); give one another name.'
                reader.bad(task.path, text)
        return found

    def names(self) -> list[str]:
        """What the tasks are called, in order of the file."""
        return [task.name for task in self.values() if task.name]


def _task(reader: Reader, index: int, path: KeyPath, table: Task, length: KeyPath, train: Train | None) -> Scheduled:
    data = _looked_up(reader, path, "dataset", table.dataset)
    model = _looked_up(reader, path, "model", table.model)
    own = reader.sound((*path, "name"))
    meant = [_meant(reader, (*path, "dataset"), table.dataset), _meant(reader, (*path, "model"), table.model)]
    name = table.name or (f"{meant[0]}/{meant[1]}" if own and None not in meant else "")
    return Scheduled(
        index=index, path=path, train=length, name=name, dataset=table.dataset if data else "", model=table.model,
        architecture=model or {}, evaluate=table.evaluate, schedule=_schedule(reader, path, table, length, train),
    )  # fmt: skip


def _looked_up(reader: Reader, path: KeyPath, kind: str, spec: str | None) -> dict[str, Any] | None:
    return None if spec is None else reader.lookup((*path, kind), kind, spec)


def _meant(reader: Reader, path: KeyPath, spec: str | None) -> str | None:
    """A spec with its name as it was meant, None where that cannot be told."""
    return spec if reader.sound(path) else reader.meant.get(path)


def _schedule(reader: Reader, path: KeyPath, table: Task, place: KeyPath, train: Train | None) -> dict[str, Any]:
    """Batch, and epochs or steps; a task that gives either replaces both of ``[train]``, which is at ``place``.

    {} where something is wrong with them.
    """
    title, shared = heading(path), heading(place)
    lengths: list[KeyPath] = [(*one, key) for one in (path, place) for key in ("epochs", "steps")]
    batches: list[KeyPath] = [(*one, "batch") for one in (path, place)]
    if table.epochs is not None and table.steps is not None:
        reader.bad((*path, "steps"), f"{title} has both epochs and steps; keep one.")
    own = table.epochs is not None or table.steps is not None
    length = table if own else train
    batch = table.batch if table.batch is not None or train is None else train.batch
    if batch is None and reader.sound(*batches):
        reader.bad((*path, "batch"), f'{title} has no batch; write "batch = 256" here or in {shared}.')
    if (length is None or (length.epochs is None and length.steps is None)) and reader.sound(*lengths):
        text = f'{title} has no length; write "epochs = 20" or "steps = 300" here or in {shared}.'
        reader.bad((*path, "epochs"), text)
    used = [(*(path if table.batch is not None else place), "batch"), *(lengths[:2] if own else lengths)]
    if length is None or batch is None or not reader.sound(*used):
        return {}
    return {"batch": batch, "epochs": length.epochs, "steps": length.steps}
