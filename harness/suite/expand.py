"""Builds the cells of a suite, one for each run, and reports every error that prevents one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from harness import registry
from harness.records.cell import Cell, canonical_json
from harness.registry import Entry, Registry
from harness.suite.build import Builder, Built
from harness.suite.files import unimportable
from harness.suite.lengths import Facts, Lengths, Size
from harness.suite.tables import BudgetTable, DeviceTable, PrivacyTable, PublishedTable, TuningTable
from harness.suite.toml.lines import KeyPath, LineNumbers
from harness.suite.toml.problems import FileProblem, Problems
from harness.suite.trial import refuse_models
from harness.suite.values import ScheduledTask, Variant

if TYPE_CHECKING:
    from harness.dp import Method


@dataclass(frozen=True, eq=False)
class Suite:
    """A checked suite. ``file`` is as the user named it, the rest in order of the file.

    ``reduced`` says what is reduced where this is the reduced profile of the suite, and is None where it is all of it.
    ``files`` are the user's own; ``thorough`` says that data which is not here and models that do not fit it are
    something wrong.
    """

    file: str
    name: str
    question: str
    seeds: tuple[int, ...]
    privacy: PrivacyTable
    tasks: tuple[ScheduledTask, ...]
    variants: tuple[Variant, ...]
    devices: tuple[DeviceTable, ...]
    budget: BudgetTable
    tuning: TuningTable | None
    published: tuple[PublishedTable, ...]
    reduced: str | None
    names: Registry = field(repr=False)
    lines: LineNumbers = field(repr=False)
    files: tuple[str, ...] = ()
    thorough: bool = False

    def cells(self) -> list[Cell]:
        """Every run of the suite, all methods of the first seed first.

        Imports torch, builds the methods and asks for the data's digests. Raises :class:`SuiteError` with
        every method that refuses its parameters or its parts, targets that need more noise than a clipping rule
        can serve, data that is missing, and runs that would be the same.
        """
        report, refused = Problems(self.file, self.lines), unimportable(self.files, self.names)
        report.problems += refused.values()
        runs = list(_runs(self, report, refused))
        _refuse_unreachable(self.privacy, runs, report)
        _refuse_unfit(runs, report)
        cells = [
            _cell(self, run, epsilon, device, seed)
            for seed in self.seeds
            for run in runs
            for epsilon in (_targets(self.privacy, run.variant) if run.built.private else (None,))
            for device in self.devices
        ]
        _refuse_twins(self, cells, report)
        if self.thorough:
            refuse_models(self.variants, report, refused)
        report.stop()
        return cells

    def try_models(self, cells: Iterable[Cell]) -> None:
        """Build the models of these cells, each once, and try them on examples of their data's shape.

        Raises :class:`SuiteError` with every one that cannot be built, does not fit its data, or mixes examples.
        """
        report, wanted = Problems(self.file, self.lines), {(c.label, c.task["name"]) for c in cells}
        refuse_models([v for v in self.variants if (v.label, v.task.name) in wanted], report)
        report.stop()


class _Runnable(NamedTuple):
    """A variant with what it needs to run."""

    variant: Variant
    built: Built
    facts: Facts
    size: Size
    second: Facts


def _runs(suite: Suite, report: Problems, refused: Mapping[Path, FileProblem]) -> Iterator[_Runnable]:
    """The variants that can be run; what is wrong with the others is reported. ``refused`` files cannot be imported."""
    builder, lengths = Builder(suite.names, report, refused), Lengths(report, suite.thorough)
    known = {t.index: lengths.facts(t.dataset, (*t.path, "dataset"), t.evaluate) for t in suite.tasks}
    shared = {t.index: lengths.of_task(t, facts) for t in suite.tasks if (facts := known[t.index]) is not None}
    for variant in suite.variants:
        built, facts, size = builder.of(variant), known[variant.task.index], shared.get(variant.task.index)
        if variant.epsilons is not None and built is not None and not built.private:
            text = f'method "{variant.name}" trains without privacy; leave "epsilon" out.'
            report.bad(("method", variant.index, "epsilon"), text)
        if size is not None and facts is not None:
            size = lengths.of_variant(variant, size, facts["n_train"])
        second = lengths.of_second(variant, size, facts)
        if built is not None and facts is not None and size is not None and second is not None:
            yield _Runnable(variant, built, facts, size, second)


def _targets(privacy: PrivacyTable, variant: Variant) -> tuple[float, ...]:
    return privacy.epsilon if variant.epsilons is None else variant.epsilons


def _refuse_unreachable(privacy: PrivacyTable, runs: Sequence[_Runnable], report: Problems) -> None:
    """Report targets that need more noise than a clipping rule with a ceiling can serve.

    Its side releases have noise of a size of their own, which the joint noise multiplier must stay below.
    """
    known: dict[str, str | None] = {}  # by what decides the answer: most variants differ in learning rates
    for variant, one, facts, size, _ in runs:
        if not one.private or math.isinf(one.method.clip.ceiling):
            continue
        if one.method.sampler.relation.value != privacy.relation:  # it will be skipped
            continue
        n, batch, steps = facts["n_train"], size["batch"], size["steps"]
        plan = one.method.plan(one.method.clip.ceiling / 2, n, batch, steps).to_json()
        for epsilon in _targets(privacy, variant):
            key = canonical_json([plan, n, batch, epsilon])
            if key not in known:
                known[key] = _unreachable(one.method, n, batch, steps, epsilon, privacy)
            if known[key] is not None:
                place: KeyPath = ("method", variant.index)
                place = variant.given.get("clip", variant.places.get("count_noise", place))
                text = f'method "{variant.name}" on task "{variant.task.name}": {known[key]}.'
                report.bad(place, text)


def _refuse_unfit(runs: Sequence[_Runnable], report: Problems) -> None:
    """Report methods whose parts do not fit each other at the size of a task."""
    for variant, one, facts, size, _ in runs:
        reason = one.method.unfit(facts["n_train"], size["batch"], size["steps"])
        if reason:
            place: KeyPath = ("method", variant.index)
            report.bad(place, f'method "{variant.name}" on task "{variant.task.name}": {reason}.')


def _unreachable(method: Method, n: int, batch: int, steps: int, epsilon: float, privacy: PrivacyTable) -> str | None:
    """Why no noise multiplier meets a target, or None. What is calibrated is kept for the run."""
    from harness.dp import cache
    from harness.dp.calibrate import calibrate

    folder = cache.root() / "calibration"
    try:
        calibrate(method, n, batch, steps, epsilon, privacy.delta, privacy.accountant, folder)
    except ValueError as error:
        return str(error)
    return None


def _cell(suite: Suite, run: _Runnable, epsilon: float | None, device: DeviceTable, seed: int) -> Cell:
    variant, built, facts, size, second = run
    task, privacy, tuning, then = variant.task, suite.privacy, suite.tuning, variant.then
    private = epsilon is not None
    return Cell(
        suite=suite.name,
        method=variant.name,
        label=variant.label,
        parameters=variant.parameters,
        parts=built.parts,
        changes=variant.changes,
        then={} if then is None or built.then is None else {
            "name": then.name, "parameters": then.parameters, "parts": built.then.parts, "trains": then.table.trains,
            **second,
        },
        task={
            "name": task.name, "dataset": task.dataset, "model": task.model, "evaluate": task.evaluate,
            "architecture": task.architecture, **facts,
        },
        privacy={
            "epsilon": epsilon,
            "delta": privacy.delta if private else None,
            "relation": privacy.relation if private else None,
            "unit": "example",
            "accountant": privacy.accountant if private else None,
            **({"tuning": tuning.charged()} if private and tuning and tuning.private else {}),
        },
        schedule=size,
        numerics={"dtype": device.dtype, "tf32": device.tf32},
        seed=seed,
        device=device.model_dump(include={"device", "threads", "engine", "microbatch"}),
        budget={"seconds": suite.budget.seconds, "memory_mib": suite.budget.memory_mib},
        method_files=sorted({str(entry.file) for entry in _named(suite, variant) if not entry.module}),
    )  # fmt: skip


def _named(suite: Suite, variant: Variant) -> Iterator[Entry]:
    """Everything that a run is made of by name: methods, its model, its data and what that is made of."""
    task, then = variant.task, variant.then
    named = [("method", variant.name), ("model", registry.parse_spec(task.model)[0])]
    named += [("method", then.name)] if then else []
    for spec in (task.dataset, then.table.dataset if then else None):
        name = registry.parse_spec(spec)[0] if spec else ""
        while name:
            named.append(("dataset", name))
            name = registry.split_name(name)[1] or ""
            if registry.split_name(name)[0] not in suite.names.index("dataset"):  # then it is a path
                name = ""
    for kind, name in named:
        yield suite.names.resolve(kind, name)


def _refuse_twins(suite: Suite, cells: Iterable[Cell], report: Problems) -> None:
    """Two tasks may name the same data, two labels the same method: their runs would share one record."""
    first: dict[str, Cell] = {}
    for cell in cells:
        other = first.setdefault(cell.id, cell)
        if other is not cell:
            here, there = (f'"{one.label}" on task "{one.task["name"]}"' for one in (cell, other))
            place = next(t.path for t in suite.tasks if t.name == cell.task["name"])
            same = f"{here} is the same run as {there}; remove one."
            shared = f"{here} has the id of {there}, which is another run: change a hyper-parameter of one."
            report.bad(place, same if cell.digest == other.digest else shared)
