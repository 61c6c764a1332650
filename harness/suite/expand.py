"""A suite to its cells, one for each run, and all that stands in their way."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from harness import registry
from harness.records.cell import Cell, canonical_json
from harness.registry import Entry, Registry
from harness.suite.build import Builder, Built
from harness.suite.files import unimportable
from harness.suite.lengths import Facts, Lengths, Size
from harness.suite.tables import Budget, Device, Privacy, Published, Tuning
from harness.suite.toml.lines import Lines
from harness.suite.toml.problems import Problem, Report, SuiteError
from harness.suite.trial import refuse_models
from harness.suite.values import Scheduled, Variant

if TYPE_CHECKING:
    from harness.dp import Method
    from harness.suite.toml.lines import Path as KeyPath

__all__ = ["Suite", "expand", "problems", "try_models"]


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
    privacy: Privacy
    tasks: tuple[Scheduled, ...]
    variants: tuple[Variant, ...]
    devices: tuple[Device, ...]
    budget: Budget
    tuning: Tuning | None
    published: tuple[Published, ...]
    reduced: str | None
    names: Registry = field(repr=False)
    lines: Lines = field(repr=False)
    files: tuple[str, ...] = ()
    thorough: bool = False

    def cells(self) -> list[Cell]:
        """Every run of the suite, all methods of the first seed first.

        Imports torch, builds the methods and asks for the data's digests. Raises :class:`SuiteError` with
        every method that refuses its parameters or its parts, targets that need more noise than a clipping rule
        can serve, data that is missing, and runs that would be the same.
        """
        return expand(self)

    def try_models(self, cells: Iterable[Cell]) -> None:
        """Build the models of these cells, each once, and try them on examples of their data's shape.

        Raises :class:`SuiteError` with every one that cannot be built, does not fit its data, or mixes examples.
        """
        try_models(self, cells)


class _Run(NamedTuple):
    """A variant with what it needs to run; None where something is wrong with that."""

    variant: Variant
    built: Built | None
    facts: Facts | None
    size: Size | None
    second: Facts | None


def expand(suite: Suite) -> list[Cell]:
    """Every run, all methods of the first seed first. Raises :class:`SuiteError`."""
    cells, found = _expanded(suite)
    if found:
        raise SuiteError(found)
    return cells


def problems(suite: Suite) -> list[Problem]:
    """What is wrong with a suite besides what reading it tells; parts that are wrong already are passed over."""
    return _expanded(suite)[1]


def _expanded(suite: Suite) -> tuple[list[Cell], list[Problem]]:
    report = Report(suite.file, suite.lines, [])
    refused = unimportable(suite.files, suite.names)
    builder, lengths = Builder(suite.names, report, refused), Lengths(report, suite.thorough)
    facts = {
        task.index: lengths.facts(task.dataset, (*task.path, "dataset"), task.evaluate) if task.dataset else None
        for task in suite.tasks
    }
    shared = {task.index: lengths.of_task(task, facts[task.index]) for task in suite.tasks}
    runs: list[_Run] = []
    for variant in suite.variants:
        built, known = builder.of(variant), facts.get(variant.task.index)
        if variant.epsilons is not None and built is not None and not built.private:
            text = f'method "{variant.name}" trains without privacy; leave "epsilon" out.'
            report.bad(("method", variant.index, "epsilon"), text)
        size = lengths.of_variant(variant, shared.get(variant.task.index), known)
        runs.append(_Run(variant, built, known, size, lengths.of_second(variant, size, known)))
    _refuse_unreachable(suite.privacy, runs, report)
    cells = [
        _cell(suite, run.variant, run.built, run.facts, run.size, run.second, epsilon, device, seed)
        for seed in suite.seeds
        for run in runs
        if run.variant.whole and run.variant.task.architecture
        if run.built is not None and run.facts is not None and run.size is not None and run.second is not None
        for epsilon in (_targets(suite.privacy, run.variant) if run.built.private else (None,))
        for device in suite.devices
    ]
    _refuse_twins(suite, cells, report)
    if suite.thorough:
        refuse_models(suite.variants, report, refused)
    return cells, [*refused.values(), *report.problems]


def try_models(suite: Suite, cells: Iterable[Cell]) -> None:
    """Try the models of some of a suite's cells. Raises :class:`SuiteError`."""
    report, wanted = Report(suite.file, suite.lines, []), {(c.label, c.task["name"]) for c in cells}
    refuse_models([v for v in suite.variants if (v.label, v.task.name) in wanted], report)
    if report.problems:
        raise SuiteError(report.problems)


def _targets(privacy: Privacy, variant: Variant) -> tuple[float, ...]:
    return privacy.epsilon if variant.epsilons is None else variant.epsilons


def _refuse_unreachable(privacy: Privacy, runs: Sequence[_Run], report: Report) -> None:
    """Report targets that need more noise than a clipping rule with a ceiling can serve.

    Its side releases have noise of a size of their own, which the joint noise multiplier must stay below.
    """
    known: dict[str, str | None] = {}  # by what decides the answer: most variants differ in learning rates
    for variant, one, facts, size, _ in runs:
        if one is None or facts is None or size is None or not one.private or not variant.whole:
            continue
        if math.isinf(one.method.clip.ceiling) or one.method.sampler.relation.value != privacy.relation:
            continue  # no run of another relation will be made
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


def _unreachable(method: Method, n: int, batch: int, steps: int, epsilon: float, privacy: Privacy) -> str | None:
    """Why no noise multiplier meets a target, or None. What is calibrated is kept for the run."""
    from harness.dp import cache
    from harness.dp.calibrate import calibrate

    folder = cache.root() / "calibration"
    try:
        calibrate(method, n, batch, steps, epsilon, privacy.delta, privacy.accountant, folder)
    except ValueError as error:
        return str(error)
    return None


def _cell(
    suite: Suite, variant: Variant, built: Built, facts: Facts, size: Size, second: Facts, epsilon: float | None,
    device: Device, seed: int,
) -> Cell:  # fmt: skip
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
    for spec in (task.dataset, then.dataset if then else None):
        name = registry.parse_spec(spec)[0] if spec else ""
        while name:
            named.append(("dataset", name))
            name = registry.split_name(name)[1] or ""
            if registry.split_name(name)[0] not in suite.names.index("dataset"):  # then it is a path
                name = ""
    for kind, name in named:
        yield suite.names.resolve(kind, name)


def _refuse_twins(suite: Suite, cells: Iterable[Cell], report: Report) -> None:
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
