"""Suites: a TOML file, checked as a whole, to the cells that are to be run.

:func:`load` reads and checks a file without importing torch or any method: names, options and their types
come from the registry's index. All that is wrong is reported at once, each problem with its line and what to
write instead. :meth:`Suite.cells` then builds the methods and asks for the data's digests, and gives one
:class:`Cell` for each run.

What a cell *is* (method, data, model, privacy, schedule, numerics, seed) makes its id; where and how fast it
runs (device, threads, engine, microbatch, budgets, paths) does not, nor does how it is shown (labels, names of
tasks).
"""

from __future__ import annotations

import fnmatch
import itertools
import math
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from harness import parts, registry
from harness.cell import Cell, canonical_json
from harness.lines import Lines
from harness.lines import Path as KeyPath
from harness.registry import Entry, Registry, RegistryError, did_you_mean, show

if TYPE_CHECKING:
    from harness.dp import Method

__all__ = [
    "Budget",
    "Cell",
    "Device",
    "Privacy",
    "Problem",
    "Published",
    "Suite",
    "SuiteError",
    "Task",
    "Tuning",
    "Variant",
    "canonical_json",
    "load",
    "parse",
]

MOST_CELLS = 100_000
MOST_SEEDS = 10_000
REDUCED = " (reduced)"  # what the names of a reduced profile's tasks end in


# Problems -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a suite: where, what, and the word that was probably meant."""

    file: str
    line: int
    message: str
    suggestion: str | None = None

    def __str__(self) -> str:
        hint = f' Did you mean "{self.suggestion}"?' if self.suggestion else ""
        return f"{self.file}:{self.line}: {self.message}{hint}"


class SuiteError(Exception):
    """A suite cannot be run; ``problems`` is everything that is wrong, in order of lines."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = sorted(problems, key=lambda p: (p.line, p.message))
        super().__init__("\n".join(map(str, self.problems)))


# Tables of the file ---------------------------------------------------------------------------------------


def _one_or_many(value: object) -> object:
    """A list or a single value as a tuple; an empty list is refused, for it would run nothing."""
    if isinstance(value, list):
        if not value:
            raise ValueError("is an empty list; write at least one value")
        return tuple(value)
    return (value,)


def _many(value: object) -> object:
    """A list as a tuple."""
    return _one_or_many(value) if isinstance(value, list) else value


def _seeds(value: object) -> object:
    """A count n as the seeds 0 to n-1, or a list of seeds."""
    if isinstance(value, int) and not isinstance(value, bool):
        if not 1 <= value <= MOST_SEEDS:
            raise ValueError(f"should be a number of seeds from 1 to {MOST_SEEDS}, or a list of seeds")
        return tuple(range(value))
    return _many(value)


Size = Annotated[int, Field(ge=1, lt=2**53)]
Positive = Annotated[float, Field(gt=0, le=1e15)]
Text = Annotated[str, Field(min_length=1)]
Seeds = Annotated[tuple[Annotated[int, Field(ge=0, lt=2**53)], ...], BeforeValidator(_seeds)]
Epsilons = Annotated[tuple[Positive, ...], BeforeValidator(_one_or_many)]


class Table(BaseModel):
    """One table of a file: exact types, no other keys, no infinities."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class Header(Table):
    """``[suite]``: its name, the question it answers, and the seeds of each run (a count or a list)."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")]
    question: Text
    seeds: Seeds = (0,)


class Privacy(Table):
    """``[privacy]``: targets for private methods; the noise is calibrated to them by ``accountant``."""

    epsilon: Epsilons
    delta: Annotated[float, Field(gt=0, lt=1)]
    relation: Literal["add-or-remove", "replace-one"] = "add-or-remove"
    accountant: Literal["pld", "rdp"] = "pld"


class Train(Table):
    """``[train]``: expected logical batch, a number or "full", and the length in epochs or in steps."""

    batch: Size | Literal["full"] | None = None
    epochs: Positive | None = None
    steps: Size | None = None


class Task(Table):
    """``[[task]]``: data set and model (specs), where to evaluate, and a schedule of its own."""

    dataset: Text
    model: Text
    evaluate: Literal["test", "validation"] = "test"
    name: Text | None = None
    batch: Size | Literal["full"] | None = None
    epochs: Positive | None = None
    steps: Size | None = None


class MethodTable(Table):
    """``[[method]]``: name, label, tasks (globs) and epsilons it is for, overrides by task, other parts (``with``), a
    schedule of its own (``train``), a second stage (``then``); the other keys are hyper-parameters."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True, allow_inf_nan=False)

    name: Text
    label: Text | None = None
    tasks: Annotated[tuple[Text, ...], BeforeValidator(_one_or_many)] = ("*",)
    epsilon: Epsilons | None = None
    on: dict[str, dict[str, Any]] = Field(default_factory=dict)
    changes: dict[str, Any] = Field(default_factory=dict, alias="with")
    train: Any = None
    then: Any = None


class Then(Table):
    """``then`` of a ``[[method]]``: the method that goes on with the trained network, under a new linear head.

    ``method`` is a spec (name?key=value). ``trains`` the head alone, or all of the network. With a ``dataset`` the
    stage trains and is judged on that data instead, which then counts as public.
    """

    method: Text
    epochs: Positive | None = None
    steps: Size | None = None
    batch: Size | Literal["full"] | None = None
    trains: Literal["head", "all"] = "head"
    dataset: Text | None = None


class Device(Table):
    """``[[device]]``: numerics (``dtype``, ``tf32``) and speed (``device``, ``threads``, ``engine``, ``microbatch``).

    ``engine`` takes the place of the default one; a method that names its own keeps it.
    """

    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:[0-9]+)?)$")] = "cpu"
    dtype: Literal["float32", "float64"] = "float32"
    tf32: bool = False
    threads: Annotated[int, Field(ge=1, le=4096)] = 1
    engine: Literal["bookkeeping", "ghost", "vmap", "loop", "auto"] | None = None
    microbatch: Size | None = None


class Budget(Table):
    """``[budget]``: limits for each run; None is no limit."""

    seconds: Positive | None = None
    memory_mib: Positive | None = None


class Tuning(Table):
    """``[tuning]``: how hyper-parameters were chosen, as text for the report.

    Where on data that is ``private``, also by how many ``tries``: exactly so many, or the mean of a ``distribution``.
    The run of a record comes on top where it is ``retrained`` with what was found. See :mod:`harness.dp.tuning`.
    """

    data: Text
    protocol: Text
    private: bool = False
    tries: Annotated[float, Field(ge=1, le=1e6)] | None = None
    distribution: Literal["fixed", "poisson", "geometric", "logarithmic"] = "fixed"
    retrained: bool = True

    def charged(self) -> dict[str, Any]:
        """What a run's epsilon with tuning is made of; {} where nothing is charged."""
        return self.model_dump(include={"tries", "distribution", "retrained"}) if self.private else {}


class Published(Table):
    """``[[published]]``: a value from the literature, its source, and the accountant of its epsilon where known."""

    method: Text
    task: Text
    epsilon: Positive | None = None
    metric: Text
    value: float
    source: Text
    note: str = ""
    accountant: Text | None = None


class Reduced(Table):
    """``[reduced]``: what makes the suite small enough to run in minutes, and why its results are not the suite's.

    ``train`` and ``task`` stand in the place of the suite's own tables where they are given.
    """

    why: Text
    seeds: Seeds | None = None
    epsilon: Epsilons | None = None
    train: Any = None
    task: Any = None


_SINGLE: Mapping[str, type[Table]] = {
    "suite": Header, "privacy": Privacy, "train": Train, "budget": Budget, "tuning": Tuning, "reduced": Reduced,
}  # fmt: skip
_ARRAYS: Mapping[str, type[Table]] = {
    "task": Task, "method": MethodTable, "device": Device, "published": Published,
}  # fmt: skip
_NEEDED = ("suite", "privacy", "task", "method")

Many = BeforeValidator(_one_or_many)
T = TypeVar("T", bound=Table)


# Suites ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scheduled:
    """A task with everything resolved: ``schedule`` has ``batch`` and one of ``epochs`` and ``steps``.

    ``path`` is where its table is in the file, ``train`` where the lengths are that it does not give itself.
    """

    index: int
    path: KeyPath
    train: KeyPath
    name: str
    dataset: str
    model: str
    architecture: dict[str, Any]
    evaluate: str
    schedule: dict[str, Any]


@dataclass(frozen=True)
class Second:
    """A second stage with its method resolved: its name, and its parameters with defaults expanded."""

    name: str
    parameters: dict[str, Any]
    table: Then


@dataclass(frozen=True)
class Variant:
    """One method with one value for each hyper-parameter, on one task; ``index`` counts ``[[method]]``.

    ``epsilons`` are the privacy targets it is for, None for all of the suite's. ``changes`` are the parts it is given
    in the place of its own (slot to spec), ``places`` says where in the file its parameters are written.
    """

    index: int
    name: str
    label: str
    parameters: dict[str, Any]
    task: Scheduled
    epsilons: tuple[float, ...] | None = None
    changes: dict[str, str] = field(default_factory=dict)
    train: Train | None = None
    then: Second | None = None
    places: Mapping[str, KeyPath] = field(default_factory=dict, repr=False)

    def meets(self, other: Variant) -> bool:
        """Whether both are for one of the same targets."""
        return self.epsilons is None or other.epsilons is None or bool({*self.epsilons} & {*other.epsilons})


class Built(NamedTuple):
    """A method with the parts that the suite gives it, and their description; the same of its second stage."""

    method: Method
    parts: dict[str, Any]
    then: Built | None = None

    @property
    def private(self) -> bool:
        """Whether it adds noise, so that a target of epsilon means something."""
        return bool(self.parts["noise"]["type"] != "NoNoise")


@dataclass(frozen=True, eq=False)
class Suite:
    """A checked suite. ``file`` is as the user named it, the rest in order of the file.

    ``reduced`` says what is reduced where this is the reduced profile of the suite, and is None where it is all of it.
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

    def cells(self) -> list[Cell]:
        """Every run of the suite, all methods of the first seed first.

        Imports torch, builds the methods and asks for the data's digests. Raises :class:`SuiteError` with
        every method that refuses its parameters or its parts, targets that need more noise than a clipping rule
        can serve, data that is missing, and runs that would be the same.
        """
        problems: list[Problem] = []
        facts = self._facts(problems)
        built = self._built(problems)
        shared = {task.index: self._schedule(task, facts, problems) for task in self.tasks}
        schedules = [
            self._own(variant, shared[variant.task.index], facts, problems) for variant in self.variants
        ]
        for variant, one in zip(self.variants, built, strict=True):
            if variant.epsilons is not None and one is not None and not one.private:
                message = f'method "{variant.name}" trains without privacy; leave "epsilon" out.'
                problems.append(self._problem(("method", variant.index, "epsilon"), message))
        self._refuse_splits(built, facts, schedules, problems)
        seconds = [
            self._second(variant, one, facts, size, problems) if one and size else {}
            for variant, one, size in zip(self.variants, built, schedules, strict=True)
        ]
        if problems:
            raise SuiteError(problems)
        cells = [
            self._cell(variant, facts, size, one, then, epsilon, device, seed)
            for seed in self.seeds
            for variant, one, size, then in zip(self.variants, built, schedules, seconds, strict=True)
            if one is not None
            for epsilon in (self._targets(variant) if one.private else (None,))
            for device in self.devices
        ]
        self._refuse_twins(cells)
        return cells

    def _targets(self, variant: Variant) -> tuple[float, ...]:
        return self.privacy.epsilon if variant.epsilons is None else variant.epsilons

    def _problem(self, path: KeyPath, message: str) -> Problem:
        return Problem(self.file, self.lines.line(path), message)

    def _facts(self, problems: list[Problem]) -> dict[int, dict[str, Any]]:
        """What identifies each task's data, and the number of examples to train on."""
        found: dict[int, dict[str, Any]] = {}
        for task in self.tasks:
            try:
                found[task.index] = self._described(task.dataset, task.evaluate)
            except (ValueError, OSError, ImportError) as error:
                problems.append(self._problem((*task.path, "dataset"), str(error)))
        return found

    @staticmethod
    def _origins(dataset: str) -> set[str]:
        """The digests of a data set and of the data that it was made of."""
        from harness import data

        known = data.describe(dataset)
        return {str(known["digest"]), *known["sources"]}

    @staticmethod
    def _described(dataset: str, evaluate: str) -> dict[str, Any]:
        from harness import data

        known = data.describe(dataset)
        n_train = int(known["n_train"])
        return {
            "digest": str(known["digest"]),
            "mean": [float(m) for m in known["mean"]],
            "std": [float(s) for s in known["std"]],
            "n_train": data.validation_size(n_train) if evaluate == "validation" else n_train,
        }

    def _built(self, problems: list[Problem]) -> list[Built | None]:
        """The method of each variant, in order of variants; None where it cannot be built."""
        built: dict[str, Built | None] = {}
        keys = [
            canonical_json(
                [one.name, one.parameters, one.changes, one.then and [one.then.name, one.then.parameters]]
            )
            for one in self.variants
        ]
        for key, variant in zip(keys, self.variants, strict=True):
            if key not in built:
                built[key] = self._build(variant, problems)
        return [built[key] for key in keys]

    def _made(
        self, name: str, parameters: dict[str, Any], place: KeyPath, problems: list[Problem]
    ) -> Built | None:
        """A method as its function returns it; None, with a problem at ``place``, where it does not."""
        from harness.dp.method import describe

        try:
            method = self.names.load(self.names.resolve("method", name))(**parameters)
            return Built(method, _plain(describe(method)))
        except Exception as error:  # the function may be a user's: whatever it raises has a line
            given = ", ".join(f"{k} = {show(v)}" for k, v in parameters.items())
            what = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            text = what if isinstance(error, RegistryError) else f"{what} (with {given})"
            problems.append(self._problem(place, f'method "{name}" cannot be built: {text}'))
            return None

    def _build(self, variant: Variant, problems: list[Problem]) -> Built | None:
        from harness.dp.method import describe

        made = self._made(variant.name, variant.parameters, ("method", variant.index), problems)
        second = None
        if variant.then is not None:
            place = ("method", variant.index, "then", "method")
            second = self._made(variant.then.name, variant.then.parameters, place, problems)
            if made and second:
                self._refuse_stages(variant, variant.then, made, second, problems)
        if made is None or (variant.then is not None and second is None):
            return None
        method, described = made.method, made.parts
        fits = True
        for slot, spec in variant.changes.items():
            try:
                method = parts.put(method, slot, spec)
                described = describe(method)
            except ValueError as error:
                message = f'method "{variant.name}" cannot take {slot} = "{spec}": {error}.'
                problems.append(self._problem(("method", variant.index, "with", slot), message))
                fits = False
        if fits and variant.changes:
            function = self.names.load(self.names.resolve("method", variant.name))
            self._refuse_idle(variant, function, described, problems)
        return Built(method, _plain(described), second) if fits else None

    def _refuse_stages(
        self, variant: Variant, then: Second, first: Built, second: Built, problems: list[Problem]
    ) -> None:
        """Report a second stage that would void the first one's privacy, or pay for data that is public."""
        place, what = ("method", variant.index, "then", "method"), None
        if then.table.dataset is not None and second.private:
            what = 'adds noise to public data, which needs none; write non-private, or leave "dataset" out'
        elif then.table.dataset is None and first.private and not second.private:
            what = (
                'would train on the private data without noise; write a private method, or a public "dataset"'
                " (how good the encoder is, its own score says already)"
            )
        elif then.table.dataset is None and second.private and not first.private:
            what = f"cannot make private what {variant.name} has learnt without noise; write non-private"
        elif second.private and first.method.sampler.relation is not second.method.sampler.relation:
            what = (
                f"is analysed for {second.method.sampler.relation.value} neighbours, and {variant.name} for"
                f" {first.method.sampler.relation.value}; take samplers of one relation"
            )
        if what:
            problems.append(self._problem(place, f'"then": {then.name} {what}.'))

    def _refuse_idle(
        self, variant: Variant, function: Callable[..., Method], described: object, problems: list[Problem]
    ) -> None:
        """Report hyper-parameters that are written for parts which ``with`` replaces: they would do nothing."""
        from harness.dp.method import describe

        own = describe(function(**variant.parameters))
        entry = self.names.resolve("method", variant.name)
        for key, place in variant.places.items():
            if entry.parameters[key].required:
                continue
            try:
                other = function(**variant.parameters | {key: entry.parameters[key].default})
                idle = describe(parts.combine(other, variant.changes)) == described
            except ValueError:  # the default does not go with the other values: so the value matters
                continue
            if idle and describe(other) != own:
                text = f'method "{variant.name}": "{key}" is for a part that "with" replaces; leave it out.'
                problem = self._problem(place, text)
                if problem not in problems:
                    problems.append(problem)

    def _refuse_splits(
        self, built: Sequence[Built | None], facts: Mapping[int, dict[str, Any]],
        schedules: Sequence[dict[str, Any]], problems: list[Problem],
    ) -> None:  # fmt: skip
        """Report targets that need more noise than a clipping rule with a ceiling can serve.

        Its side releases have noise of a size of their own, which the joint noise multiplier must stay below.
        """
        known: dict[
            str, str | None
        ] = {}  # by what decides the answer: most variants differ in learning rates
        for variant, one, size in zip(self.variants, built, schedules, strict=True):
            if one is None or not one.private or not size or math.isinf(one.method.clip.ceiling):
                continue
            if one.method.sampler.relation.value != self.privacy.relation:  # no run of it will be made
                continue
            n, batch, steps = facts[variant.task.index]["n_train"], size["batch"], size["steps"]
            plan = one.method.plan(one.method.clip.ceiling / 2, n, batch, steps).to_json()
            for epsilon in self._targets(variant):
                key = canonical_json([plan, n, batch, epsilon])
                if key not in known:
                    known[key] = self._unreachable(one.method, n, batch, steps, epsilon)
                if known[key] is not None:
                    place: KeyPath = ("method", variant.index)
                    place = variant.places.get("count_noise", place)
                    place = ("method", variant.index, "with", "clip") if "clip" in variant.changes else place
                    text = f'method "{variant.name}" on task "{variant.task.name}": {known[key]}.'
                    problem = self._problem(place, text)
                    if problem not in problems:
                        problems.append(problem)

    def _unreachable(self, method: Method, n: int, batch: int, steps: int, epsilon: float) -> str | None:
        """Why no noise multiplier meets a target, or None. What is calibrated is kept for the run."""
        from harness.data.source import cache_root
        from harness.dp.calibrate import calibrate

        folder, privacy = cache_root() / "calibration", self.privacy
        try:
            calibrate(method, n, batch, steps, epsilon, privacy.delta, privacy.accountant, folder)
        except ValueError as error:
            return str(error)
        return None

    def _second(
        self, variant: Variant, built: Built, facts: Mapping[int, dict[str, Any]], size: dict[str, Any],
        problems: list[Problem],
    ) -> dict[str, Any]:  # fmt: skip
        """``Cell.then`` of a variant; {} where it has one stage."""
        if variant.then is None or built.then is None:
            return {}
        then, task = variant.then.table, variant.task
        found: dict[str, Any] = {
            "name": variant.then.name, "parameters": variant.then.parameters, "parts": built.then.parts,
            "trains": then.trains,
        }  # fmt: skip
        n = facts[task.index]["n_train"]
        if then.dataset is not None:
            try:
                other = self._described(then.dataset, task.evaluate)
                if self._origins(then.dataset) & self._origins(task.dataset):
                    text = f"{then.dataset} is the private data of task"
                    raise ValueError(
                        f'"then": {text} "{task.name}"; name public data, or leave "dataset" out.'
                    )
                n = other["n_train"]
                found["task"] = {"dataset": then.dataset, "evaluate": task.evaluate, **other}
            except (ValueError, OSError, ImportError) as error:
                if all(known.message != str(error) for known in problems):  # once, not for each method
                    problems.append(self._problem(("method", variant.index, "then", "dataset"), str(error)))
                return {}
        batch = n if then.batch == "full" else then.batch or size["batch"]
        steps = then.steps or math.floor((then.epochs or 0) * n / batch)
        if batch > n or steps < 1:
            text = f'"then" on task "{task.name}": {steps} steps of {batch} of {n} examples; write other lengths.'
            problem = self._problem(("method", variant.index, "then"), text)
            if problem not in problems:
                problems.append(problem)
            return {}
        return found | {"schedule": {"batch": batch, "steps": steps}}

    def _schedule(
        self, task: Scheduled, facts: Mapping[int, dict[str, Any]], problems: list[Problem]
    ) -> dict[str, Any]:
        if task.index not in facts:
            return {}
        n, batch, epochs = facts[task.index]["n_train"], task.schedule["batch"], task.schedule["epochs"]
        batch = n if batch == "full" else batch
        steps = task.schedule["steps"] if epochs is None else math.floor(epochs * n / batch)
        if batch > n:
            text = f'task "{task.name}": batch {batch} is more than its {n} training examples.'
            problems.append(self._problem(self._written(task, "batch"), text))
            return {}
        if steps < 1:
            text = f'task "{task.name}": {epochs} epochs of {n} examples are no step of {batch}; write more.'
            problems.append(self._problem(self._written(task, "epochs"), text))
            return {}
        return {"batch": batch, "steps": steps}

    def _own(
        self,
        variant: Variant,
        shared: dict[str, Any],
        facts: Mapping[int, dict[str, Any]],
        problems: list[Problem],
    ) -> dict[str, Any]:
        """The schedule of a variant: its task's, but for what its method's ``train`` says."""
        train = variant.train
        if train is None or not shared:
            return shared
        n = facts[variant.task.index]["n_train"]
        batch = n if train.batch == "full" else train.batch or shared["batch"]
        steps = train.steps or (math.floor(train.epochs * n / batch) if train.epochs else shared["steps"])
        if batch > n or steps < 1:
            text = f'"train" on task "{variant.task.name}": {steps} steps of {batch} of {n} examples; write others.'
            problems.append(self._problem(("method", variant.index, "train"), text))
            return {}
        return {"batch": batch, "steps": steps}

    def _written(self, task: Scheduled, key: str) -> KeyPath:
        """Where a task's schedule is written: in its own table, else in ``[train]``."""
        own = (*task.path, key)
        return own if self.lines.has(own) else (*task.train, key)

    def _cell(
        self, variant: Variant, facts: Mapping[int, dict[str, Any]], schedule: dict[str, Any],
        built: Built, then: dict[str, Any], epsilon: float | None, device: Device, seed: int,
    ) -> Cell:  # fmt: skip
        task = variant.task
        private = epsilon is not None
        entry = self.names.resolve("method", variant.name)
        return Cell(
            suite=self.name,
            method=variant.name,
            label=variant.label,
            parameters=variant.parameters,
            parts=built.parts,
            changes=variant.changes,
            then=then,
            task={
                "name": task.name, "dataset": task.dataset, "model": task.model, "evaluate": task.evaluate,
                "architecture": task.architecture, **facts[task.index],
            },
            privacy={
                "epsilon": epsilon,
                "delta": self.privacy.delta if private else None,
                "relation": self.privacy.relation if private else None,
                "unit": "example",
                "accountant": self.privacy.accountant if private else None,
                **({"tuning": self.tuning.charged()} if private and self.tuning and self.tuning.private else {}),
            },
            schedule=schedule,
            numerics={"dtype": device.dtype, "tf32": device.tf32},
            seed=seed,
            device=device.model_dump(include={"device", "threads", "engine", "microbatch"}),
            budget={"seconds": self.budget.seconds, "memory_mib": self.budget.memory_mib},
            method_file=None if entry.module else str(entry.file),
        )  # fmt: skip

    def _refuse_twins(self, cells: Iterable[Cell]) -> None:
        """Two tasks may name the same data, two labels the same method: their runs would share one record."""
        first: dict[str, Cell] = {}
        problems: dict[str, Problem] = {}
        for cell in cells:
            other = first.setdefault(cell.id, cell)
            if other is not cell:
                here, there = (f'"{one.label}" on task "{one.task["name"]}"' for one in (cell, other))
                text = f"{here} is the same run as {there}; remove one."
                place = next(t.path for t in self.tasks if t.name == cell.task["name"])
                problems.setdefault(text, self._problem(place, text))
        if problems:
            raise SuiteError(problems.values())


def _plain(value: Any) -> Any:
    """Parts as strict JSON: a bound of infinity is text."""
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


# Reading --------------------------------------------------------------------------------------------------


def load(
    path: str | Path,
    files: Iterable[str | Path] = (),
    *,
    names: Registry | None = None,
    reduced: bool = False,
) -> Suite:
    """Read and check a suite, or its reduced profile; ``files`` are Python files with methods of the user.

    ``names`` is the registry to look names up in, by default the installation's. Raises :class:`SuiteError`
    with every problem, whatever the file holds.
    """
    names = names or registry.installed()
    problems: list[Problem] = []
    for file in files:
        try:
            names.add_file(file)
        except OSError as error:
            problems.append(Problem(str(file), 1, str(error)))
    return parse(source(path, problems), str(path), names=names, problems=problems, reduced=reduced)


def parse(
    text: str,
    file: str = "suite.toml",
    *,
    names: Registry | None = None,
    problems: Iterable[Problem] = (),
    reduced: bool = False,
) -> Suite:
    """Check the text of a suite; ``file`` is the name that errors give. Raises :class:`SuiteError`."""
    data = document(text, file, problems)
    return _Reader(file, data, Lines(text), names or registry.installed(), list(problems)).suite(reduced)


def source(path: str | Path, problems: Iterable[Problem] = ()) -> str:
    """The text of a file. Raises :class:`SuiteError` where it cannot be read."""
    try:
        return Path(path).read_bytes().decode("utf-8")
    except (OSError, ValueError) as error:
        raise SuiteError([*problems, _unreadable(Path(path), error)]) from None


def document(text: str, file: str, problems: Iterable[Problem] = ()) -> dict[str, Any]:
    """The tables of a TOML text. Raises :class:`SuiteError` where it is not one."""
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise SuiteError([*problems, Problem(file, 1, "not valid TOML: nested too deeply.")]) from None
    except ValueError as error:
        raise SuiteError([*problems, _not_toml(file, text, error)]) from None


def _unreadable(path: Path, error: Exception) -> Problem:
    if isinstance(error, UnicodeDecodeError):
        return Problem(str(path), 1, "is not UTF-8 text; save it as UTF-8.")
    if isinstance(error, FileNotFoundError):
        near = {p.name: p for folder in (Path("suites"), path.parent) for p in folder.glob("*.toml")}
        word = did_you_mean(path.name, near) or did_you_mean(f"{path.name}.toml", near)
        return Problem(str(path), 1, "there is no such file.", str(near[word]) if word else None)
    return Problem(str(path), 1, f"cannot be read: {getattr(error, 'strerror', None) or error}.")


def _not_toml(file: str, text: str, error: ValueError) -> Problem:
    place = re.search(r" \(at (?:line (\d+), column (\d+)|end of document)\)$", str(error))
    if place is None:
        return Problem(file, 1, f"not valid TOML: {error}.")
    message = str(error)[: place.start()].rstrip(".")
    if place[1] is None:
        return Problem(
            file, text.rstrip().count("\n") + 1, f"not valid TOML: {message}, at the end of the file."
        )
    return Problem(file, int(place[1]), f"not valid TOML: {message} (column {place[2]}).")


class Reader:
    """Checks the tables of one document and gathers every problem before it gives up."""

    kind: ClassVar[str] = "suite"
    single: ClassVar[Mapping[str, type[Table]]]
    arrays: ClassVar[Mapping[str, type[Table]]]
    needed: ClassVar[Sequence[str]]

    def __init__(
        self, file: str, data: dict[str, Any], lines: Lines, names: Registry, problems: list[Problem]
    ) -> None:
        self.file, self.data, self.lines, self.names, self.problems = file, data, lines, names, problems

    def bad(self, path: KeyPath, message: str, suggestion: str | None = None) -> None:
        """Report a problem at the line of a key path."""
        problem = Problem(self.file, self.lines.line(path), message, suggestion)
        if problem not in self.problems:
            self.problems.append(problem)

    def known_tables(self) -> None:
        """Report tables that are unknown, and those that are missing."""
        known = [*self.single, *self.arrays]
        for key in self.data:
            if key not in known:
                self.bad(
                    (key,),
                    f'a {self.kind} has no table "{key}"; it has {", ".join(known)}.',
                    did_you_mean(key, known),
                )
        for key in self.needed:
            if key not in self.data:
                self.bad((), f"the {self.kind} needs {self._title(key)}.")

    def _title(self, key: str) -> str:
        return f"[[{key}]]" if key in self.arrays else f"[{key}]"

    def written(self, path: KeyPath) -> Any:
        """What the document has at a path of keys; None where it has nothing there."""
        found: Any = self.data
        for key in path:
            found = found.get(key) if isinstance(found, dict) else None
        return found

    def one(self, key: str, table: type[T], within: KeyPath = ()) -> T | None:
        """The table ``[key]``, or that ``within`` another; None where it is absent or wrong."""
        path = (*within, key)
        raw = self.written(path)
        if raw is None:
            return None
        if not isinstance(raw, dict):
            self.bad(path, f'"{_dotted(path)}" should be one table; write [{_dotted(path)}].')
            return None
        return self._table(path, raw, table)

    def array(self, key: str, table: type[T], within: KeyPath = ()) -> dict[int, T]:
        """The valid tables of an array by index."""
        path = (*within, key)
        raw = self.written(path)
        if raw is None:
            return {}
        if not isinstance(raw, list) or not all(isinstance(one, dict) for one in raw):
            text = f'"{_dotted(path)}" should be a list of tables; write [[{_dotted(path)}]] above each.'
            self.bad(path, text)
            return {}
        if not raw:
            self.bad(path, f'"{_dotted(path)}" is an empty list; write at least one [[{_dotted(path)}]].')
        found = {index: self._table((*path, index), one, table) for index, one in enumerate(raw)}
        return {index: one for index, one in found.items() if one is not None}

    def _table(self, path: KeyPath, raw: dict[str, Any], table: type[T]) -> T | None:
        try:
            return table.model_validate(raw)
        except ValidationError as error:
            for one in error.errors(include_url=False):
                self._explain(path, raw, one, list(table.model_fields))
            return None

    def _explain(self, path: KeyPath, raw: dict[str, Any], error: Any, keys: list[str]) -> None:
        """One error of pydantic as a problem."""
        place: KeyPath = error["loc"]
        title, key = _heading(path), str(place[0]) if place else ""
        if error["type"] == "extra_forbidden":
            text = f'{title} has no key "{key}"; it has {", ".join(keys)}.'
            self.bad((*path, *place), text, did_you_mean(key, keys))
        elif error["type"] == "missing":
            self.bad(path, f'{title} needs "{key}".')
        else:
            message = str(error["ctx"]["error"]) if error["type"] == "value_error" else error["msg"]
            message = message.removeprefix("Input ").replace("dictionary", "table").replace("tuple", "list")
            value = error["input"]
            guess = None
            if error["type"] in ("float_type", "int_type", "bool_type") and isinstance(value, str):
                message += "; write it without quotes"
            if error["type"] == "literal_error" and isinstance(value, str):
                guess = did_you_mean(value, re.findall(r"'([^']*)'", error["ctx"]["expected"]))
            if error["type"] == "string_pattern_mismatch":
                message = _PATTERNS.get((str(path[0]), key), message)
            self.bad((*path, *place), f"{title} {key} = {show(_listed(value))}: {message}.", guess)

    def distinct(self, path: KeyPath, values: Iterable[object]) -> None:
        """Report values of a list that are given twice."""
        seen: set[object] = set()
        for number, value in enumerate(values):
            if value in seen:
                self.bad((*path, number), f"[{path[0]}] {path[1]}: {show(value)} is given twice; keep one.")
            seen.add(value)

    def lookup(self, path: KeyPath, kind: str, spec: str) -> dict[str, Any] | None:
        """``{"name", "options"}`` of a spec, with defaults expanded."""
        try:
            entry, arguments = self.names.lookup(kind, spec)
        except registry.OptionError as error:
            for one in error.problems:
                self.bad(path, one.message, one.suggestion)
        except RegistryError as error:
            self.bad(path, error.message, error.suggestion)
        else:
            given = arguments.pop(entry.argument, None) if entry.argument else None
            name = entry.name if given is None else f"{entry.name}:{given}"
            return {"name": name, "options": arguments}
        return None


class _Reader(Reader):
    """Checks the document of a suite."""

    single, arrays, needed = _SINGLE, _ARRAYS, _NEEDED

    def suite(self, small: bool) -> Suite:
        """The suite, or its reduced profile where ``small``. The tables of both are checked."""
        self.known_tables()
        header = self.one("suite", Header)
        privacy = self.one("privacy", Privacy)
        train = self.one("train", Train)
        budget = self.one("budget", Budget)
        tuning = self.one("tuning", Tuning)
        self._search(tuning)
        reduced = self.one("reduced", Reduced)
        tasks = self._tasks((), ("train",), train)
        few = self._few(train) if isinstance(self.data.get("reduced"), dict) else {}
        methods = self.array("method", MethodTable)
        devices = self._devices()
        published = self.array("published", Published)
        self.distinct(("privacy", "epsilon"), privacy.epsilon if privacy else ())
        self.distinct(("suite", "seeds"), header.seeds if header else ())
        self.distinct(("reduced", "epsilon"), (reduced and reduced.epsilon) or ())
        self.distinct(("reduced", "seeds"), (reduced and reduced.seeds) or ())
        if small and "reduced" not in self.data:
            text = 'the suite has no reduced profile; write one, as [reduced] with why = "...", or leave --reduced out.'
            self.bad((), text)
        chosen = few if small else tasks
        variants = self._variants(methods, chosen)
        self._published(published, methods, tasks, variants)
        if small and privacy and reduced and header:
            header = header.model_copy(update={"seeds": reduced.seeds or header.seeds})
            targets = reduced.epsilon or privacy.epsilon
            self._filters(methods, privacy.epsilon, targets)
            privacy = privacy.model_copy(update={"epsilon": targets})
            variants = self._reached(variants, targets)
        elif privacy:
            self._filters(methods, privacy.epsilon)
        self._count(variants, header, privacy, devices)
        if self.problems or header is None or privacy is None:
            raise SuiteError(self.problems)
        suite = Suite(
            file=self.file, name=header.name, question=header.question, seeds=header.seeds, privacy=privacy,
            tasks=tuple(chosen.values()), variants=tuple(variants), budget=budget or Budget(), tuning=tuning,
            devices=tuple(devices.values()) or (Device(),), published=tuple(published.values()), reduced=None,
            names=self.names, lines=self.lines,
        )  # fmt: skip
        return _reduced(suite, reduced.why, tasks) if small and reduced else suite

    def _search(self, tuning: Tuning | None) -> None:
        """A search on private data says how many tries it took; where there was none, what says so would do nothing."""
        if tuning is None:
            return
        if tuning.private and tuning.tries is None:
            text = '[tuning] private = true needs "tries": write how many runs the hyper-parameters were chosen by.'
            self.bad(("tuning", "private"), text)
        elif tuning.private and tuning.distribution == "fixed" and tuning.tries != int(tuning.tries or 0):
            text = f"[tuning] tries = {tuning.tries:g}: a fixed number is a whole one; write one, or a distribution."
            self.bad(("tuning", "tries"), text)
        for key in ("tries", "distribution", "retrained"):
            if not tuning.private and self.written(("tuning", key)) is not None:
                text = f'[tuning] "{key}" is for a search on private data; write private = true, or leave it out.'
                self.bad(("tuning", key), text)

    def _few(self, train: Train | None) -> dict[int, Scheduled]:
        """The tasks of the reduced profile: those of the suite where it has none of its own."""
        root: KeyPath = ("reduced",)
        length: KeyPath = ("train",)
        if self.written((*root, "train")) is not None:
            length, train = (*root, "train"), self.one("train", Train, root)
        return self._tasks(root if self.written((*root, "task")) is not None else (), length, train)

    def _reached(self, variants: list[Variant], targets: Sequence[float]) -> list[Variant]:
        """The variants that are for some of the targets, and for these only."""
        kept = [
            one if one.epsilons is None
            else replace(one, epsilons=tuple(epsilon for epsilon in one.epsilons if epsilon in targets))
            for one in variants
        ]  # fmt: skip
        found = [one for one in kept if one.epsilons is None or one.epsilons]
        if variants and not found:
            self.bad(
                ("reduced", "epsilon"), "[reduced] epsilon: no method is for these targets; take others."
            )
        return found

    def _devices(self) -> dict[int, Device]:
        devices = self.array("device", Device)
        seen: dict[tuple[str, bool], int] = {}
        for index, device in devices.items():
            if device.tf32 and (device.device == "cpu" or device.dtype != "float32"):
                self.bad(
                    ("device", index, "tf32"),
                    "[[device]] tf32 = true: it exists for float32 on cuda only; remove it.",
                )
            other = seen.setdefault((device.dtype, device.tf32), index)
            if other != index:
                line = self.lines.line(("device", other))
                text = (
                    f"[[device]] has the numerics of the one on line {line} ({device.dtype}), so its runs "
                    "would be the same; remove one, or give it another dtype."
                )
                self.bad(("device", index), text)
        return devices

    # tasks

    def _tasks(self, root: KeyPath, length: KeyPath, train: Train | None) -> dict[int, Scheduled]:
        """The tasks in the table at ``root``; ``train``, at ``length``, is for those that give no schedule."""
        if train is not None and train.epochs is not None and train.steps is not None:
            self.bad((*length, "steps"), f"{_heading(length)} has both epochs and steps; keep one.")
        tables = self.array("task", Task, root)
        found: dict[int, Scheduled] = {}
        names: dict[str, int] = {}
        for index, table in tables.items():
            task = self._task(index, (*root, "task", index), table, length, train)
            if task is None:
                continue
            other = names.setdefault(task.name, index)
            if other != index:
                line = self.lines.line((*root, "task", other))
                text = (
                    f'two tasks are called "{task.name}" (the other on line {line}); give one another name.'
                )
                self.bad((*root, "task", index), text)
            found[index] = task
        return found

    def _task(
        self, index: int, path: KeyPath, table: Task, length: KeyPath, train: Train | None
    ) -> Scheduled | None:
        before = len(self.problems)
        self.lookup((*path, "dataset"), "dataset", table.dataset)
        model = self.lookup((*path, "model"), "model", table.model)
        schedule = self._schedule(path, table, length, train)
        if len(self.problems) > before or model is None or schedule is None:
            return None
        return Scheduled(
            index=index, path=path, train=length, name=table.name or f"{table.dataset}/{table.model}",
            dataset=table.dataset, model=table.model, architecture=model, evaluate=table.evaluate, schedule=schedule,
        )  # fmt: skip

    def _schedule(
        self, path: KeyPath, table: Task, place: KeyPath, train: Train | None
    ) -> dict[str, Any] | None:
        """Batch, and epochs or steps; a task that gives either replaces both of ``[train]``, which is at ``place``."""
        title, shared = _heading(path), _heading(place)
        if table.epochs is not None and table.steps is not None:
            self.bad((*path, "steps"), f"{title} has both epochs and steps; keep one.")
            return None
        own = table.epochs is not None or table.steps is not None
        length = table if own else train
        batch = table.batch if table.batch is not None or train is None else train.batch
        if train is None and self.written(place) is not None:  # its own problem is reported already
            return None
        if batch is None:
            self.bad(path, f'{title} has no batch; write "batch = 256" here or in {shared}.')
        if length is None or (length.epochs is None and length.steps is None):
            self.bad(
                path, f'{title} has no length; write "epochs = 20" or "steps = 300" here or in {shared}.'
            )
            return None
        return {"batch": batch, "epochs": length.epochs, "steps": length.steps}

    # methods

    def _variants(self, methods: Mapping[int, MethodTable], tasks: Mapping[int, Scheduled]) -> list[Variant]:
        place = next((task.path[:-1] for task in tasks.values()), ("task",))
        complete = len(tasks) == len(_tables(self.written(place)))
        found: list[Variant] = []
        for index, table in methods.items():
            path: KeyPath = ("method", index)
            try:
                entry = self.names.resolve("method", table.name)
            except RegistryError as error:
                self.bad((*path, "name"), error.message, error.suggestion)
                continue
            found += self._of_method(path, table, entry, tasks, complete)
        self._labels(found)
        return sorted(found, key=lambda v: (v.task.index, v.index))

    def _of_method(
        self, path: KeyPath, table: MethodTable, entry: Entry, tasks: Mapping[int, Scheduled], complete: bool
    ) -> list[Variant]:
        """The variants of one ``[[method]]``; ``complete`` says that every task could be read."""
        names = [task.name for task in tasks.values()]
        before = len(self.problems)
        for number, glob in enumerate(table.tasks):
            self._matches((*path, "tasks", number), glob, names, complete)
        selected = [task for task in tasks.values() if any(_match(task.name, glob) for glob in table.tasks)]
        base = self._grid(path, entry, table.model_extra or {})
        changes = self._changes((*path, "with"), table.changes)
        then = self._then((*path, "then"), table.then)
        train = self._train((*path, "train"), table.train)
        places: dict[str, dict[str, KeyPath]] = {"": {key: (*path, key) for key in table.model_extra or {}}}
        overrides: dict[str, dict[str, list[Any]]] = {}
        for glob, values in table.on.items():
            self._matches((*path, "on", glob), glob, [task.name for task in selected], complete)
            if "with" in values:
                text = '"with" is for all tasks of a [[method]]; write another [[method]], with "tasks", for these.'
                self.bad((*path, "on", glob, "with"), text)
            options = {key: value for key, value in values.items() if key != "with"}
            overrides[glob] = self._grid((*path, "on", glob), entry, options)
            places[glob] = {key: (*path, "on", glob, key) for key in options}
        grids: list[tuple[Scheduled, dict[str, list[Any]], dict[str, KeyPath]]] = []
        for task in selected:
            grid, written = dict(base), dict(places[""])
            for glob, values in overrides.items():
                if _match(task.name, glob):
                    grid |= values
                    written |= places[glob]
            for key, parameter in entry.parameters.items():
                if parameter.required and key not in written:
                    text = (
                        f'method "{entry.name}" needs parameter "{key}" ({parameter.type}) on "{task.name}".'
                    )
                    self.bad(path, text)
            grids.append((task, grid, written))
        each = math.prod(map(len, changes.values()))
        if each * sum(math.prod(map(len, grid.values())) for _, grid, _ in grids) > MOST_CELLS:
            self.bad(path, f'[[method]] "{table.name}" means more than {MOST_CELLS} runs; shorten its lists.')
        if len(self.problems) > before:
            return []
        return [
            replace(
                variant, places=written, train=train, then=then, label=_followed(variant.label, table, then)
            )
            for task, grid, written in grids
            for variant in _expand(int(path[1]), table, entry, task, grid, changes)
        ]

    def _train(self, path: KeyPath, raw: Any) -> Train | None:
        """A method's own schedule; None where it has none, or where what is wrong has been reported."""
        if raw is None:
            return None
        if not isinstance(raw, dict):
            self.bad(path, '"train" should be a table; write train = { steps = 1 }.')
            return None
        table = self._table(path, raw, Train)
        if table is not None and table.epochs is not None and table.steps is not None:
            self.bad(path, '"train" has both epochs and steps; keep one.')
        return table

    def _then(self, path: KeyPath, raw: Any) -> Second | None:
        """The second stage; None where there is none, or where what is wrong has been reported."""
        if raw is None:
            return None
        if not isinstance(raw, dict):
            text = '"then" should be a table; write then = { method = "dp-sgd?lr=0.5", epochs = 5 }.'
            self.bad(path, text)
            return None
        table = self._table(path, raw, Then)
        if table is None:
            return None
        if (table.epochs is None) == (table.steps is None):
            self.bad(path, '"then" needs one of epochs and steps.')
        if table.dataset is not None:
            self.lookup((*path, "dataset"), "dataset", table.dataset)
        found = self.lookup((*path, "method"), "method", table.method)
        return Second(found["name"], found["options"], table) if found else None

    def _changes(self, path: KeyPath, given: Mapping[str, Any]) -> dict[str, list[_Given]]:
        """The parts of ``with`` by slot, in the order in which they are applied; what is wrong is left out."""
        found: dict[str, list[_Given]] = {}
        for slot, raw in given.items():
            listed = isinstance(raw, list)
            if raw == []:
                self.bad((*path, slot), f'"{slot}" is an empty list; write at least one part.')
            for number, spec in enumerate(raw if listed else [raw]):
                place = (*path, slot, number) if listed else (*path, slot)
                try:
                    parts.entries(slot)
                    if not isinstance(spec, str):
                        text = (
                            f'"{slot}" = {show(spec)}: should be the name of a part, as in "name?key=value".'
                        )
                        raise RegistryError(text)
                    choice = parts.choose(slot, spec)
                except registry.OptionError as error:
                    for one in error.problems:
                        self.bad(place, one.message, one.suggestion)
                except RegistryError as error:
                    self.bad(place, error.message, error.suggestion)
                else:
                    if choice in [one.choice for one in found.setdefault(slot, [])]:
                        self.bad(place, f'"{slot}": {show(spec)} is given twice; keep one.')
                    found[slot].append(_Given(spec, choice))
        return {slot: found[slot] for slot in parts.SLOTS if slot in found}

    def _matches(self, path: KeyPath, glob: str, names: list[str], complete: bool) -> None:
        if complete and names and not any(_match(name, glob) for name in names):
            text = f'"{glob}" matches no task; tasks are {", ".join(names)}.'
            self.bad(path, text, did_you_mean(glob, names))

    def _grid(self, path: KeyPath, entry: Entry, given: Mapping[str, Any]) -> dict[str, list[Any]]:
        """Each hyper-parameter and its values in its type; what does not fit is reported and left out."""
        grid: dict[str, list[Any]] = {}
        for key, raw in given.items():
            values = raw if isinstance(raw, list) else [raw]
            if not values:
                self.bad((*path, key), f'"{key}" is an empty list; write at least one value.')
            good: list[Any] = []
            for number, value in enumerate(values):
                place = (*path, key, number) if isinstance(raw, list) else (*path, key)
                arguments, problems = registry.check_options(entry, {key: value}, text=False)
                mine = [p for p in problems if p.key == key]
                for problem in mine:
                    self.bad(place, problem.message, problem.suggestion)
                if mine:
                    continue
                if arguments[key] in good:
                    self.bad(place, f'"{key}": {show(value)} is given twice; keep one.')
                good.append(arguments[key])
            if good:
                grid[key] = good
        return grid

    def _filters(
        self, methods: Mapping[int, MethodTable], targets: Sequence[float], few: Sequence[float] = ()
    ) -> None:
        """A method may be for some of the suite's targets only, or for some of the ``few`` of its reduced profile."""
        for index, table in methods.items():
            given = table.epsilon or ()
            for number, epsilon in enumerate(given):
                if epsilon in given[:number]:
                    text = f"[[method]] epsilon: {show(epsilon)} is given twice; keep one."
                    self.bad(("method", index, "epsilon", number), text)
                if epsilon not in (*targets, *few):
                    known = ", ".join(f"{one:g}" for one in targets)
                    text = f"epsilon {epsilon:g} is no target of this suite; [privacy] has {known}."
                    self.bad(("method", index, "epsilon", number), text)

    def _labels(self, variants: Iterable[Variant]) -> None:
        """On a task and for a target, no two variants may share a label or be the same."""
        before: dict[int, list[Variant]] = {}
        for one in variants:
            others = [other for other in before.setdefault(one.task.index, []) if other.meets(one)]
            before[one.task.index].append(one)
            what = _written_as(one)
            twin = next((other for other in others if _written_as(other) == what), one)
            named = next((o for o in others if o.label == one.label), one)
            if twin is not one:
                line = self.lines.line(("method", twin.index))
                text = f'[[method]] "{one.label}" is the same as the one on line {line}; remove one.'
                self.bad(("method", one.index), text)
            elif named is not one:
                line = self.lines.line(("method", named.index))
                text = f'two methods are labelled "{one.label}" (the other on line {line}); give one a label.'
                self.bad(("method", one.index), text)

    def _count(
        self,
        variants: list[Variant],
        header: Header | None,
        privacy: Privacy | None,
        devices: Mapping[int, Device],
    ) -> None:
        if header is None or privacy is None:
            return
        cells = len(variants) * len(header.seeds) * len(privacy.epsilon) * max(1, len(devices))
        if cells > MOST_CELLS:
            self.bad(
                ("suite",),
                f"the suite means up to {cells} runs; {MOST_CELLS} is the most. Shorten its lists.",
            )

    def _published(
        self,
        rows: Mapping[int, Published],
        methods: Mapping[int, MethodTable],
        tasks: Mapping[int, Scheduled],
        variants: Iterable[Variant],
    ) -> None:
        known = [name for m in methods.values() for name in (m.name, m.label) if name]
        known += [variant.label for variant in variants if variant.changes or variant.then]
        if methods and len(methods) == len(_tables(self.data.get("method"))):
            self._rows(rows, "method", known)
        if tasks and len(tasks) == len(_tables(self.data.get("task"))):
            self._rows(rows, "task", [task.name for task in tasks.values()])

    def _rows(self, rows: Mapping[int, Published], key: str, known: list[str]) -> None:
        for index, row in rows.items():
            value = getattr(row, key)
            if value not in known:
                there = ", ".join(dict.fromkeys(known))
                text = f'[[published]] {key} "{value}" is not in this suite; it has {there}.'
                self.bad(("published", index, key), text, did_you_mean(value, known))


_PATTERNS = {
    ("suite", "name"): 'write lower-case letters, digits and dashes, as in "core"',
    ("device", "device"): 'write "cpu", "cuda" or "cuda:0"',
}


class _Given(NamedTuple):
    """A part as a suite writes it, and what that means."""

    text: str
    choice: parts.Choice


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


def _dotted(path: KeyPath) -> str:
    return ".".join(key for key in path if isinstance(key, str))


def _heading(path: KeyPath) -> str:
    """The header of a table as the file writes it: ``[train]``, ``[[task]]``, ``[[reduced.task]]``."""
    return f"[[{_dotted(path)}]]" if isinstance(path[-1], int) else f"[{_dotted(path)}]"


def _listed(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _tables(raw: object) -> list[Any]:
    return raw if isinstance(raw, list) else []


def _match(name: str, glob: str) -> bool:
    return name == glob or fnmatch.fnmatchcase(name, glob)


def _expand(
    index: int, table: MethodTable, entry: Entry, task: Scheduled, grid: Mapping[str, list[Any]],
    changes: Mapping[str, list[_Given]],
) -> Iterable[Variant]:  # fmt: skip
    """The product of the lists; a label names the parts, and the values of the lists that have more than one."""
    keys = [key for key in entry.parameters if key in grid]
    defaults = {key: parameter.default for key, parameter in entry.parameters.items()}
    fixed = [f"{slot}: {ones[0].choice.name}" for slot, ones in changes.items() if len(ones) == 1]
    label = table.label or ", ".join([table.name, *fixed])
    for values in itertools.product(*(grid[key] for key in keys), *changes.values()):
        given = dict(zip(keys, values[: len(keys)], strict=True))
        chosen: dict[str, _Given] = dict(zip(changes, values[len(keys) :], strict=True))
        swept = [f"{key}={given[key]}" for key in keys if len(grid[key]) > 1]
        swept += [f"{slot}={_short(chosen[slot], ones)}" for slot, ones in changes.items() if len(ones) > 1]
        yield Variant(
            index, table.name, f"{label} ({', '.join(swept)})" if swept else label, defaults | given, task,
            table.epsilon, {slot: one.choice.spec for slot, one in chosen.items()},
        )  # fmt: skip


def _followed(label: str, table: MethodTable, then: Second | None) -> str:
    """A label that names the second stage, unless the suite gives one."""
    return f"{label}, then {then.name}" if then and not table.label else label


def _written_as(one: Variant) -> tuple[object, ...]:
    """What tells a variant from another on the same task and for the same target."""
    return one.name, one.parameters, one.changes, one.train, one.then


def _short(one: _Given, among: Sequence[_Given]) -> str:
    """The name of a part where it tells the part from the others of its list, else all that is written."""
    return one.choice.name if [o.choice.name for o in among].count(one.choice.name) == 1 else one.text
