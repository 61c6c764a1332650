"""What is known of the data of a suite, and how many steps of which batch that makes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from harness.suite.toml.lines import KeyPath
from harness.suite.toml.problems import Problems
from harness.suite.values import Scheduled, Variant

Facts = dict[str, Any]
Size = dict[str, int]


@dataclass(frozen=True)
class Lengths:
    """Data sets and schedules; reports what only a look at the data can tell.

    ``thorough`` says that files which are not here are a problem, even where what is asked of the data is known.
    """

    report: Problems
    thorough: bool
    _private: set[KeyPath] = field(default_factory=set)

    def facts(self, spec: str, place: KeyPath, evaluate: str) -> Facts | None:
        """What identifies a data set, and the number of examples to train on; None where it cannot be had."""
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

    def of_task(self, task: Scheduled, facts: Facts) -> Size | None:
        """Batch and steps of a task; None where something is wrong with them."""
        n, batch, epochs = facts["n_train"], task.schedule["batch"], task.schedule["epochs"]
        batch = n if batch == "full" else batch
        steps = task.schedule["steps"] if epochs is None else math.floor(epochs * n / batch)
        if batch > n:
            text = f'task "{task.name}": batch {batch} is more than its {n} training examples.'
            self.report.bad(self._written(task, "batch"), text)
            return None
        if steps < 1:
            text = f'task "{task.name}": {epochs} epochs of {n} examples are no step of {batch}; write more.'
            self.report.bad(self._written(task, "epochs"), text)
            return None
        return {"batch": batch, "steps": steps}

    def of_variant(self, variant: Variant, shared: Size, n: int) -> Size | None:
        """The schedule of a variant on ``n`` examples: its task's, but for what its method's ``train`` says."""
        train = variant.train
        if train is None:
            return shared
        batch = n if train.batch == "full" else train.batch or shared["batch"]
        steps = train.steps or (math.floor(train.epochs * n / batch) if train.epochs else shared["steps"])
        if batch > n or steps < 1:
            text = f'"train" on task "{variant.task.name}": {steps} steps of {batch} of {n} examples; write others.'
            self.report.bad(("method", variant.index, "train"), text)
            return None
        return {"batch": batch, "steps": steps}

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
        n = facts["n_train"]
        batch = n if table.batch == "full" else table.batch or shared["batch"]
        steps = table.steps or math.floor((table.epochs or 0) * n / batch)
        if batch > n or steps < 1:
            text = f'"then" on task "{task.name}": {steps} steps of {batch} of {n} examples; write other lengths.'
            self.report.bad(place, text)
            return None
        return found | {"schedule": {"batch": batch, "steps": steps}}

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

    def _written(self, task: Scheduled, key: str) -> KeyPath:
        """Where a task's schedule is written: in its own table, else in ``[train]``."""
        own = (*task.path, key)
        return own if self.report.lines.has(own) else (*task.train, key)


def _origins(dataset: str) -> set[str]:
    """The digests of a data set and of the data that it was made of."""
    from harness import data

    known = data.describe(dataset)
    return {str(known["digest"]), *known["sources"]}


def _absent(spec: str, known: Facts) -> Exception | None:
    """The error that loading would raise for want of files. Features that are kept need none."""
    from harness import data
    from harness.data.dataset import Split
    from harness.data.extract import finished
    from harness.dp import cache

    absent = data.missing(spec)
    kept, width = cache.root() / "features" / str(known["digest"]), int(known["input_shape"][0])
    rows: dict[Split, int] = {"train": known["n_train"], "test": known["n_test"]}
    return None if absent is not None and kept.is_dir() and finished(kept, rows, width) else absent
