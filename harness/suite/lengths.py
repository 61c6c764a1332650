"""Looks up the data sets of a suite, and works out the batch and the steps of each run on them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from harness.suite.toml.lines import KeyPath
from harness.suite.toml.problems import Problems
from harness.suite.values import ScheduledTask, Variant

Facts = dict[str, Any]
Size = dict[str, int]


@dataclass(frozen=True)
class Lengths:
    """Looks up data sets, works out schedules, and reports what is wrong with them.

    ``thorough`` says that missing files are a problem, even where all is known of the data without them.
    """

    report: Problems
    thorough: bool
    _private: set[KeyPath] = field(default_factory=set)

    def facts(self, spec: str, place: KeyPath, evaluate: str) -> Facts | None:
        """What identifies a data set, and the number of examples to train on; None where it is missing."""
        from harness import data

        try:
            known = data.describe(spec)
            absent = _absent(spec, known) if self.thorough else None
            if absent is not None:
                raise absent
        except data.DatasetMissing as error:  # once: one file supplies it everywhere
            if all(one.message != str(error) for one in self.report.problems):
                self.report.bad(place, str(error))
            return None
        except (ValueError, OSError, ImportError) as error:
            self.report.bad(place, str(error))
            return None
        n_train = int(known["n_train"])
        return {
            "digest": str(known["digest"]),
            "mean": [float(m) for m in known["mean"]],
            "std": [float(s) for s in known["std"]],
            "n_train": data.validation_size(n_train) if evaluate == "validation" else n_train,
        }

    def of_task(self, task: ScheduledTask, facts: Facts) -> Size | None:
        """Batch and steps of a task; None where something is wrong with them."""
        return self._size(f'task "{task.name}"', (task.path, task.train), facts["n_train"], **task.schedule)

    def of_variant(self, variant: Variant, shared: Size, n: int) -> Size | None:
        """The schedule of a variant on ``n`` examples: its task's, but for what its method's ``train`` says."""
        train = variant.train
        if train is None:
            return shared
        what, steps = (
            f'"train" on task "{variant.task.name}"',
            train.steps or (None if train.epochs else shared["steps"]),
        )
        place = ("method", variant.index, "train")
        return self._size(what, (place,), n, train.batch or shared["batch"], train.epochs, steps)

    def of_second(self, variant: Variant, shared: Size | None, facts: Facts | None) -> Facts | None:
        """``task`` (where it has data of its own) and ``schedule`` of a second stage; None where something is wrong."""
        if variant.then is None:
            return {}
        table, task, place = variant.then.table, variant.task, ("method", variant.index, "then")
        found: Facts = {}
        if table.dataset is not None:
            other = self.facts(table.dataset, (*place, "dataset"), task.evaluate)
            if other is None or facts is None or self._refuse_private(table.dataset, variant):
                return None
            facts, found["task"] = other, {"dataset": table.dataset, "evaluate": task.evaluate, **other}
        if facts is None or shared is None:
            return None
        batch = table.batch or shared["batch"]
        size = self._size(f'"then" on task "{task.name}"', (place,), facts["n_train"], batch, table.epochs, table.steps)
        return None if size is None else found | {"schedule": size}

    def _size(
        self, what: str, places: Sequence[KeyPath], n: int, batch: int | str, epochs: float | None, steps: int | None
    ) -> Size | None:
        """Batch and steps on ``n`` examples; ``places`` are the tables in which lengths may be written."""

        def written(key: str) -> KeyPath:
            return next((at for one in places if self.report.lines.has(at := (*one, key))), places[0])

        batch = n if isinstance(batch, str) else batch
        if batch > n:
            self.report.bad(written("batch"), f"{what}: batch {batch} is more than its {n} training examples.")
            return None
        steps = math.floor((epochs or 0) * n / batch) if steps is None else steps
        if steps < 1:
            text = f"{what}: {epochs} epochs of {n} examples are less than one step of {batch}; write more."
            self.report.bad(written("epochs"), text)
            return None
        return {"batch": batch, "steps": steps}

    def _refuse_private(self, public: str, variant: Variant) -> bool:
        """Whether data that is called public is that of the task, which is reported."""
        if not _origins(public) & _origins(variant.task.dataset):
            return False
        text = f'"then": {public} is the private data of task'
        place = ("method", variant.index, "then", "dataset")
        if place not in self._private:  # once, not for each task
            self._private.add(place)
            self.report.bad(place, f'{text} "{variant.task.name}"; name public data, or leave "dataset" out.')
        return True


def _origins(dataset: str) -> set[str]:
    """The digests of a data set and of the data that it was made of."""
    from harness import data

    known = data.describe(dataset)
    return {str(known["digest"]), *known["sources"]}


def _absent(spec: str, known: Facts) -> Exception | None:
    """The error that loading would raise for a missing file; None where all are here, or features of them are kept."""
    from harness import data
    from harness.data.dataset import Split
    from harness.data.extract import finished
    from harness.dp import cache

    absent = data.missing(spec)
    kept, width = cache.root() / "features" / str(known["digest"]), int(known["input_shape"][0])
    rows: dict[Split, int] = {"train": known["n_train"], "test": known["n_test"]}
    return None if absent is not None and kept.is_dir() and finished(kept, rows, width) else absent
