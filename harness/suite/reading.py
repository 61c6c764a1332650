"""The document of a suite: every table of it checked, then put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from harness.registry import RegistryError
from harness.suite import expand, methods, published
from harness.suite.expand import Suite
from harness.suite.files import Files
from harness.suite.tables import (
    ARRAYS,
    MOST_CELLS,
    NEEDED,
    SINGLE,
    Budget,
    Device,
    Header,
    MethodTable,
    Privacy,
    Published,
    Reduced,
    Train,
    Tuning,
)
from harness.suite.tasks import Tasks
from harness.suite.toml.lines import Lines
from harness.suite.toml.lines import Path as KeyPath
from harness.suite.toml.problems import SuiteError
from harness.suite.toml.reader import Reader
from harness.suite.values import Scheduled, Variant

__all__ = ["SuiteReader"]

REDUCED = " (reduced)"  # what the names of a reduced profile's tasks end in


class SuiteReader(Reader):
    """Checks the document of a suite. What is wrong with ``files`` of the user's is told of there, not here again."""

    single, arrays, needed = SINGLE, ARRAYS, NEEDED

    def __init__(self, file: str, data: dict[str, Any], lines: Lines, files: Files) -> None:
        super().__init__(file, data, lines, files.names, list(files.problems))
        self.files = files

    def refuse(self, path: KeyPath, error: RegistryError, spec: str) -> None:
        if self.files.explain(error, spec.partition("?")[0]):
            self.wrong.add(path)
        else:
            super().refuse(path, error, spec)

    def suite(self, small: bool, thorough: bool) -> Suite:
        """The suite, or its reduced profile where ``small``; the tables of both are checked.

        Raises :class:`SuiteError` with all that is wrong, also with what only building the methods and asking for the
        data can tell. What follows from something that is wrong already is not told of.
        """
        self.known_tables()
        header = self.one("suite", Header, whole=False)
        privacy = self.one("privacy", Privacy, whole=False)
        train = self.one("train", Train, whole=False)
        budget = self.one("budget", Budget, whole=False)
        tuning = self.one("tuning", Tuning, whole=False)
        self._search(tuning)
        reduced = self.one("reduced", Reduced, whole=False)
        tasks = Tasks.read(self, (), ("train",), train)
        few = self._few(train) if isinstance(self.data.get("reduced"), dict) else Tasks()
        tables = self.array("method", MethodTable, whole=False)
        devices = self._devices()
        rows = self.array("published", Published, whole=False)
        self.distinct(("privacy", "epsilon"), (privacy and privacy.epsilon) or ())
        self.distinct(("suite", "seeds"), header.seeds if header else ())
        self.distinct(("reduced", "epsilon"), (reduced and reduced.epsilon) or ())
        self.distinct(("reduced", "seeds"), (reduced and reduced.seeds) or ())
        if small and "reduced" not in self.data:
            text = 'the suite has no reduced profile; write one, as [reduced] with why = "...", or leave --reduced out.'
            self.bad(("reduced",), text)
        chosen = few if small and "reduced" in self.data else tasks
        variants = methods.labels(self, methods.variants(self, tables, chosen))
        aims = (privacy and privacy.epsilon) or ()
        # Where one changes a target for a run, the published values need not be changed too.
        compared = thorough and self.sound(("privacy", "epsilon"), ("reduced", "epsilon"))
        known = (*aims, *((reduced and reduced.epsilon) or ())) if compared else ()
        published.check(self, rows, tables, tasks, variants, dict.fromkeys(known))
        seeds = header.seeds if header else ()
        if small and reduced:
            targets = reduced.epsilon or aims
            if aims:
                methods.targets(self, tables, aims, targets)
            variants = self._reached(variants, targets)
            aims, seeds = targets, reduced.seeds or seeds
        elif aims:
            methods.targets(self, tables, aims)
        if not self._count(len(variants) * len(seeds) * len(aims) * max(1, len(devices))):
            raise SuiteError(self.problems)
        suite = Suite(
            file=self.file, name=header.name if header else "", question=header.question if header else "",
            seeds=seeds, privacy=self._privacy(privacy, aims), tasks=tuple(chosen.values()), variants=tuple(variants),
            budget=budget or Budget(), tuning=tuning, devices=tuple(devices.values()) or (Device(),),
            published=tuple(rows.values()), reduced=None, names=self.names, lines=self.lines, files=self.files.named,
            thorough=thorough,
        )  # fmt: skip
        if self.problems:
            one = replace(suite, seeds=(0,), devices=(Device(),), tuning=None)
            raise SuiteError([*self.problems, *expand.problems(one)])
        return _reduced(suite, reduced.why, tasks) if small and reduced else suite

    def _privacy(self, found: Privacy | None, aims: tuple[float, ...]) -> Privacy:
        """The table with the targets that are aimed at; without any where something is wrong with it."""
        if found is None or not self.sound(("privacy",)):
            found, aims = Privacy.model_validate({"epsilon": 1.0, "delta": 0.5}), ()
        return found.model_copy(update={"epsilon": aims})

    def _search(self, tuning: Tuning | None) -> None:
        """A search on private data says how many tries it took; where there was none, what says so would do nothing."""
        if tuning is None or not self.sound(("tuning", "private")):
            return
        whole = tuning.tries is None or tuning.tries == int(tuning.tries)
        if tuning.private and tuning.tries is None and self.sound(("tuning", "tries")):
            text = '[tuning] private = true needs "tries": write how many runs the hyper-parameters were chosen by.'
            self.bad(("tuning", "private"), text)
        fixed = tuning.distribution == "fixed" and self.sound(("tuning", "distribution"))
        if tuning.private and not whole and fixed:
            text = f"[tuning] tries = {tuning.tries:g}: a fixed number is a whole one; write one, or a distribution."
            self.bad(("tuning", "tries"), text)
        for key in ("tries", "distribution", "retrained"):
            if not tuning.private and self.written(("tuning", key)) is not None:
                text = f'[tuning] "{key}" is for a search on private data; write private = true, or leave it out.'
                self.bad(("tuning", key), text)

    def _few(self, train: Train | None) -> Tasks:
        """The tasks of the reduced profile: those of the suite where it has none of its own."""
        root: KeyPath = ("reduced",)
        length: KeyPath = ("train",)
        if self.written((*root, "train")) is not None:
            length, train = (*root, "train"), self.one("train", Train, root, whole=False)
        return Tasks.read(self, root if self.written((*root, "task")) is not None else (), length, train)

    def _reached(self, variants: list[Variant], targets: Sequence[float]) -> list[Variant]:
        """The variants that are for some of the targets, and for these only."""
        kept = [
            one if one.epsilons is None
            else replace(one, epsilons=tuple(epsilon for epsilon in one.epsilons if epsilon in targets))
            for one in variants
        ]  # fmt: skip
        found = [one for one in kept if one.epsilons is None or one.epsilons]
        if variants and targets and not found and self.sound(("reduced", "epsilon")):
            text = "[reduced] epsilon: no method is for these targets; take others."
            self.bad(("reduced", "epsilon"), text)
        return found

    def _devices(self) -> dict[int, Device]:
        devices = self.array("device", Device, whole=False)
        seen: dict[tuple[str, bool], int] = {}
        for index, device in devices.items():
            path: KeyPath = ("device", index)
            numerics = [(*path, key) for key in ("device", "dtype", "tf32")]
            if not self.sound(*numerics):
                continue
            if device.tf32 and (device.device == "cpu" or device.dtype != "float32"):
                text = "[[device]] tf32 = true: it exists for float32 on cuda only; remove it."
                self.bad((*path, "tf32"), text)
            other = seen.setdefault((device.dtype, device.tf32), index)
            if other != index:
                line = self.lines.line(("device", other))
                text = (
                    f"[[device]] has the numerics of the one on line {line} ({device.dtype}), so its runs "
                    "would be the same; remove one, or give it another dtype."
                )
                self.bad(path, text)
        return devices

    def _count(self, cells: int) -> bool:
        """Whether the runs are few enough to be looked at one by one."""
        if cells > MOST_CELLS:
            text = f"the suite means up to {cells} runs; {MOST_CELLS} is the most. Shorten its lists."
            self.bad(("suite",), text)
        return cells <= MOST_CELLS


def _reduced(suite: Suite, why: str, full: Mapping[int, Scheduled]) -> Suite:
    """A suite that has the runs of its reduced profile, under names that tell it from the ``full`` one.

    What is published for a task stands beside the profile's task of the same place in the file.
    """
    tasks = {task.index: replace(task, name=task.name + REDUCED) for task in suite.tasks}
    index = {task.name: task.index for task in full.values()}
    rows = [
        row.model_copy(update={"task": tasks[index[row.task]].name})
        for row in suite.published
        if index[row.task] in tasks
    ]
    return replace(
        suite, name=f"{suite.name}-reduced", reduced=why, tasks=tuple(tasks.values()), published=tuple(rows),
        variants=tuple(replace(variant, task=tasks[variant.task.index]) for variant in suite.variants),
    )  # fmt: skip
