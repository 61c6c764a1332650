"""Defines the tables of a suite: their keys, the types of these, and what each is for."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from harness.registry import Registry, RegistryError, did_you_mean, show

MOST_CELLS = 100_000
MOST_SEEDS = 10_000
LONGEST_NAME = 100
FOLDERS = ("audits", "checks", "throughput")  # in results/, beside those of suites


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


def _batch(value: object) -> object:
    """A whole number from 1, or "full"."""
    if value == "full" or (isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**53):
        return value
    near = did_you_mean(value, ["full"]) if isinstance(value, str) else None
    raise RegistryError('should be a whole number from 1, without quotes, or "full", all examples', near)


def _name(value: str) -> str:
    """The name of a folder in results/: allowed on any system, and not used for anything else there."""
    if len(value) > LONGEST_NAME:
        raise ValueError(f"has {len(value)} letters; it names a folder, write {LONGEST_NAME} at most")
    if value in FOLDERS:
        raise ValueError(f"is a folder of results/ for other things ({', '.join(FOLDERS)}); write another name")
    if value.endswith("-reduced"):
        raise ValueError('would be taken for a reduced profile; write a name that does not end in "-reduced"')
    if re.fullmatch(r"con|prn|aux|nul|(com|lpt)[0-9]", value):
        raise ValueError("is not allowed as the name of a folder on Windows; write another")
    return value


def _line(value: str) -> str:
    """Text that a terminal and a table can show."""
    odd = next((one for one in value if unicodedata.category(one) in ("Cc", "Cs", "Zl", "Zp")), None)
    if odd is not None:
        raise ValueError(f"holds the control character {odd!a}; write one line of plain text")
    if not value.strip():
        raise ValueError("is blank; write a name")
    return value


def invalid(message: str, at: str | int | None = None, *, table: bool = True) -> PydanticCustomError:
    """An error of a whole table, or of one key where not ``table``; the reader puts that in front of the message.

    ``at`` is the key or the number in a list whose line is named, where that is not the line of what is validated.
    """
    return PydanticCustomError("table" if table else "key", "{text}", {"text": message, "at": at})


def distinct(values: tuple[object, ...]) -> tuple[object, ...]:
    """A list without repeats."""
    seen: set[object] = set()
    for number, value in enumerate(values):
        if value in seen:
            raise invalid(f"{show(value)} is given twice; keep one", number, table=False)
        seen.add(value)
    return values


def _one_length(steps: object, info: ValidationInfo) -> object:
    """Steps, where no epochs are given."""
    if steps is not None and info.data.get("epochs") is not None:
        raise invalid("has both epochs and steps; keep one")
    return steps


def known(kind: str, options: bool = True) -> AfterValidator:
    """The name of something registered; with ``options``, followed by some that fit it: ``name?key=value``."""

    def check(spec: str, info: ValidationInfo) -> str:
        assert isinstance(info.context, Registry)
        try:
            (info.context.lookup if options else info.context.resolve)(kind, spec)
        except RegistryError as error:
            raise PydanticCustomError("registry", "{error}", {"error": error}) from None
        return spec

    return AfterValidator(check)


Size = Annotated[int, Field(ge=1, lt=2**53)]
Steps = Annotated[Size | None, AfterValidator(_one_length)]
Positive = Annotated[float, Field(gt=0, le=1e15)]
Text = Annotated[str, Field(min_length=1)]
Line = Annotated[str, Field(min_length=1), AfterValidator(_line)]
Many = BeforeValidator(_one_or_many)
Seeds = Annotated[tuple[Annotated[int, Field(ge=0, lt=2**53)], ...], BeforeValidator(_seeds), AfterValidator(distinct)]
Batch = Annotated[int | Literal["full"], PlainValidator(_batch)]
Epsilons = Annotated[tuple[Positive, ...], Many, AfterValidator(distinct)]
Dataset = Annotated[Text, known("dataset")]


class TomlTable(BaseModel):
    """One table of a file: exact types, no other keys, no infinities."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class SuiteTable(TomlTable):
    """``[suite]``: its name, the question it answers, and the seeds of each run (a count or a list)."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$"), AfterValidator(_name)]
    question: Text
    seeds: Seeds = (0,)


class PrivacyTable(TomlTable):
    """``[privacy]``: targets for private methods; the noise is calibrated to them by ``accountant``."""

    epsilon: Epsilons
    delta: Annotated[float, Field(gt=0, lt=1)]
    relation: Literal["add-or-remove", "replace-one", "zero-out"] = "add-or-remove"
    accountant: Literal["pld", "rdp"] = "pld"


class TrainTable(TomlTable):
    """``[train]``: expected logical batch, a number or "full", and the length in epochs or in steps."""

    batch: Batch | None = None
    epochs: Positive | None = None
    steps: Steps = None


class TaskTable(TomlTable):
    """``[[task]]``: data set and model (specs), where to evaluate, and a schedule of its own."""

    dataset: Dataset
    model: Annotated[Text, known("model")]
    evaluate: Literal["test", "validation"] = "test"
    name: Line | None = None
    batch: Batch | None = None
    epochs: Positive | None = None
    steps: Steps = None


class ThenTable(TomlTable):
    """``then`` of a ``[[method]]``: the method that goes on with the trained network, under a new linear head.

    ``method`` is a spec (name?key=value). ``trains`` the head alone, or all of the network. With a ``dataset`` the
    stage trains and is evaluated on that data instead, which then counts as public.
    """

    method: Annotated[Text, known("method")]
    epochs: Positive | None = None
    steps: Steps = None
    batch: Batch | None = None
    trains: Literal["head", "all"] = "head"
    dataset: Dataset | None = None

    @model_validator(mode="after")
    def _has_length(self) -> ThenTable:
        if self.epochs is None and self.steps is None:
            raise invalid("needs one of epochs and steps")
        return self


class MethodTable(TomlTable):
    """``[[method]]``: name, label, tasks (globs) and epsilons it is for, overrides by task, other parts (``with``), a
    schedule of its own (``train``), a second stage (``then``); the other keys are hyper-parameters."""

    model_config = ConfigDict(extra="allow")

    name: Annotated[Text, known("method", options=False)]
    label: Line | None = None
    tasks: Annotated[tuple[Text, ...], Many] = ("*",)
    epsilon: Epsilons | None = None
    on: dict[str, dict[str, Any]] = Field(default_factory=dict)
    changes: dict[str, Any] = Field(default_factory=dict, alias="with")
    train: TrainTable | None = None
    then: ThenTable | None = None


class DeviceTable(TomlTable):
    """``[[device]]``: numerics (``dtype``, ``tf32``) and speed (``device``, ``threads``, ``engine``, ``microbatch``).

    ``engine`` takes the place of the default one; a method that names its own keeps it.
    """

    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:[0-9]+)?)$")] = "cpu"
    dtype: Literal["float32", "float64"] = "float32"
    tf32: bool = False
    threads: Annotated[int, Field(ge=1, le=4096)] = 1
    engine: Literal["bookkeeping", "ghost", "vmap", "loop", "auto"] | None = None
    microbatch: Size | None = None

    @field_validator("tf32")
    @classmethod
    def _numerics(cls, tf32: bool, info: ValidationInfo) -> bool:
        if tf32 and (info.data.get("device") == "cpu" or info.data.get("dtype") == "float64"):
            raise ValueError("it exists for float32 on cuda only; remove it")
        return tf32


class BudgetTable(TomlTable):
    """``[budget]``: limits for each run; None is no limit."""

    seconds: Positive | None = None
    memory_mib: Positive | None = None


class TuningTable(TomlTable):
    """``[tuning]``: how hyper-parameters were chosen, as text for the report.

    Where on data that is ``private``, also by how many ``tries``: exactly so many, or the mean of a ``distribution``.
    The run of a record comes on top where it is ``retrained`` with what was found. See
    :mod:`harness.dp.account.tuning`.
    """

    data: Text
    protocol: Text
    private: bool = False
    tries: Annotated[float, Field(ge=1, le=1e6)] | None = None
    distribution: Literal["fixed", "poisson", "geometric", "logarithmic"] = "fixed"
    retrained: bool = True

    @field_validator("tries", "distribution", "retrained")
    @classmethod
    def _of_search(cls, value: object, info: ValidationInfo) -> object:
        if info.data.get("private") is False:
            text = f'"{info.field_name}" is for a search on private data; write private = true, or leave it out'
            raise invalid(text)
        return value

    @model_validator(mode="after")
    def _counted(self) -> TuningTable:
        if self.private and self.tries is None:
            text = 'private = true needs "tries": write how many runs the hyper-parameters were chosen by'
            raise invalid(text, "private")
        if self.tries is not None and self.distribution == "fixed" and self.tries != int(self.tries):
            text = f"tries = {self.tries:g}: a fixed number is a whole one; write one, or a distribution"
            raise invalid(text, "tries")
        return self

    def charged(self) -> dict[str, Any]:
        """What a run's epsilon with tuning is made of; {} where nothing is charged."""
        return self.model_dump(include={"tries", "distribution", "retrained"}) if self.private else {}


class PublishedTable(TomlTable):
    """``[[published]]``: a value from the literature, its source, and the accountant of its epsilon where known."""

    method: Text
    task: Text
    epsilon: Positive | None = None
    metric: Text
    value: float
    source: Text
    note: str = ""
    accountant: Text | None = None


class ReducedTable(TomlTable):
    """``[reduced]``: what makes the suite small enough to run in minutes, and why its results are not the suite's.

    ``train`` and ``task`` stand in the place of the suite's own tables where they are given.
    """

    why: Text
    seeds: Seeds | None = None
    epsilon: Epsilons | None = None
    train: TrainTable | None = None
    task: Annotated[tuple[TaskTable, ...], BeforeValidator(_many)] | None = None


SINGLE: Mapping[str, type[TomlTable]] = {
    "suite": SuiteTable, "privacy": PrivacyTable, "train": TrainTable, "budget": BudgetTable,
    "tuning": TuningTable, "reduced": ReducedTable,
}  # fmt: skip
ARRAYS: Mapping[str, type[TomlTable]] = {
    "task": TaskTable, "method": MethodTable, "device": DeviceTable, "published": PublishedTable,
}  # fmt: skip
NEEDED = ("suite", "privacy", "task", "method")
