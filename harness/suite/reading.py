"""Reads the document of a suite: every table by itself, then what the tables say of each other."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from harness.registry import RegistryError, did_you_mean
from harness.suite import methods, tables
from harness.suite.expand import Suite
from harness.suite.files import Files
from harness.suite.tasks import scheduled
from harness.suite.toml.lines import KeyPath
from harness.suite.toml.reader import Reader
from harness.suite.values import ScheduledTask, Variant

# Of published values: those that every record has; a loss of one's own may have others.
METRICS = ("accuracy", "loss", "examples_per_second", "train_seconds", "wall_seconds", "peak_memory_mib")
REDUCED = " (reduced)"  # what the names of a reduced profile's tasks end in


class SuiteReader(Reader):
    """Reads the document of a suite. What is wrong with ``files`` of the user's is reported there, not here again."""

    single, arrays, needed = tables.SINGLE, tables.ARRAYS, tables.NEEDED

    def __init__(self, text: str, file: str, files: Files) -> None:
        super().__init__(text, file, files.names, files.problems)
        self.files = files

    def refuse(self, path: KeyPath, error: RegistryError, spec: str) -> None:
        """Report what the registry says of a spec, unless a file that cannot be read explains it."""
        if self.files.explain(error, spec.partition("?")[0]):
            self._faulty.update(path[:1])
        else:
            super().refuse(path, error, spec)

    def suite(self, small: bool, thorough: bool) -> Suite:
        """The suite, or its reduced profile where ``small``; the tables of both are checked.

        Raises :class:`SuiteError` with all that is wrong. Tables are compared with each other where they are valid
        themselves, so that nothing is reported which only follows from another error.
        """
        header, privacy = self.one("suite", tables.SuiteTable), self.one("privacy", tables.PrivacyTable)
        budget, tuning = self.one("budget", tables.BudgetTable), self.one("tuning", tables.TuningTable)
        train, reduced = self.one("train", tables.TrainTable), self.one("reduced", tables.ReducedTable)
        train = train or tables.TrainTable()
        tasks, given = self.array("task", tables.TaskTable), self.array("method", tables.MethodTable)
        devices, rows = self.array("device", tables.DeviceTable), self.array("published", tables.PublishedTable)
        named = methods.read(self)
        if small and "reduced" not in self.data:
            text = 'the suite has no reduced profile; write one, as [reduced] with why = "...", or leave --reduced out.'
            self.bad(("reduced",), text)
        self._numerics(devices)
        full = scheduled(self, tasks, (), ("train",), train) if self.valid("task", "train") else None
        few = self._few(reduced, tasks, train) if reduced and self.valid("task", "train", "reduced") else None
        chosen, variants = few if small else full, None
        if chosen is not None and self.valid("method"):
            variants = methods.variants(self, given, named, chosen.values())
        known = {} if full is None else {"task": [task.name for task in full.values()]}
        if variants is not None:
            known["method"] = [name for table in given.values() for name in (table.name, table.label) if name]
            known["method"] += [one.label for one in variants if one.changes or one.then]
        self._published(rows, known)
        aims, aims_of_few = (privacy and privacy.epsilon) or (), (reduced and reduced.epsilon) or ()
        if self.valid("privacy", "reduced"):
            methods.targets(self, given, aims, aims_of_few if small else ())
            # Where one changes a target for a run, the published values need not be changed too.
            if thorough:
                self._published_targets(rows, dict.fromkeys((*aims, *aims_of_few)))
        self.stop()
        assert header and privacy and chosen is not None and variants is not None
        seeds = header.seeds
        if small and reduced:
            aims, seeds = aims_of_few or aims, reduced.seeds or seeds
            variants = self._reached(variants, aims)
        cells = len(variants) * len(seeds) * len(aims) * max(1, len(devices))
        if cells > tables.MOST_CELLS:
            most = f"{tables.MOST_CELLS} is the most. Shorten its lists."
            self.bad(("suite",), f"the suite means up to {cells} runs; {most}")
        self.stop()
        suite = Suite(
            file=self.file, name=header.name, question=header.question, seeds=seeds,
            privacy=privacy.model_copy(update={"epsilon": aims}), tasks=tuple(chosen.values()),
            variants=tuple(variants), budget=budget or tables.BudgetTable(), tuning=tuning,
            devices=tuple(devices.values()) or (tables.DeviceTable(),), published=tuple(rows.values()), reduced=None,
            names=self.names, lines=self.lines, files=self.files.named, thorough=thorough,
        )  # fmt: skip
        return _reduced(suite, reduced.why, full or {}) if small and reduced else suite

    def _few(
        self, reduced: tables.ReducedTable, tasks: Mapping[int, tables.TaskTable], train: tables.TrainTable
    ) -> dict[int, ScheduledTask]:
        """The tasks of the reduced profile: those of the suite where it has none of its own."""
        own = dict(enumerate(reduced.task or ()))
        length: KeyPath = ("reduced", "train") if reduced.train else ("train",)
        return scheduled(self, own or tasks, ("reduced",) if own else (), length, reduced.train or train)

    def _reached(self, variants: Sequence[Variant], targets: Sequence[float]) -> list[Variant]:
        """The variants that are for some of the targets, and for these only."""
        kept = [
            one if one.epsilons is None
            else replace(one, epsilons=tuple(epsilon for epsilon in one.epsilons if epsilon in targets))
            for one in variants
        ]  # fmt: skip
        found = [one for one in kept if one.epsilons is None or one.epsilons]
        if not found:
            self.bad(("reduced", "epsilon"), "[reduced] epsilon: no method is for these targets; take others.")
        return found

    def _published(self, rows: Mapping[int, tables.PublishedTable], known: Mapping[str, Collection[str]]) -> None:
        """Report misspelt metrics, and rows that name what is not among the ``known`` values of a key."""
        for index, row in rows.items():
            for key, names in known.items():
                value = getattr(row, key)
                if value not in names:
                    there = ", ".join(dict.fromkeys(names))
                    text = f'[[published]] {key} "{value}" is not in this suite; it has {there}.'
                    self.bad(("published", index, key), text, did_you_mean(value, names))
            near = did_you_mean(row.metric, METRICS)
            if near is not None and row.metric not in METRICS:
                text = f'[[published]] metric "{row.metric}": no run has a value of this name.'
                self.bad(("published", index, "metric"), text, near)

    def _published_targets(self, rows: Mapping[int, tables.PublishedTable], known: Collection[float]) -> None:
        """Report rows at a target which the suite does not have."""
        for index, row in rows.items():
            if row.epsilon is not None and row.epsilon not in known:
                there = ", ".join(f"{one:g}" for one in known)
                text = f"[[published]] epsilon {row.epsilon:g} is no target of this suite; [privacy] has {there}."
                self.bad(("published", index, "epsilon"), text)

    def _numerics(self, devices: Mapping[int, tables.DeviceTable]) -> None:
        """Report devices whose runs would be those of another one."""
        seen: dict[tuple[str, bool], int] = {}
        for index, device in devices.items():
            other = seen.setdefault((device.dtype, device.tf32), index)
            if other != index:
                line = self.lines.line(("device", other))
                text = (
                    f"[[device]] has the numerics of the one on line {line} ({device.dtype}), so its runs "
                    "would be the same; remove one, or give it another dtype."
                )
                self.bad(("device", index), text)


def _reduced(suite: Suite, why: str, full: Mapping[int, ScheduledTask]) -> Suite:
    """A suite that has the runs of its reduced profile, under names that distinguish it from the ``full`` one.

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
