"""Defines what a suite is once it is read: tasks, and variants of methods."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from harness.suite.tables import ThenTable, TrainTable
from harness.suite.toml.lines import KeyPath


@dataclass(frozen=True)
class ScheduledTask:
    """A task with everything resolved: ``schedule`` has ``batch``, ``epochs`` and ``steps``, of which one is None.

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
    table: ThenTable


@dataclass(frozen=True)
class Variant:
    """One method with one value for each hyper-parameter, on one task; ``index`` counts ``[[method]]``.

    ``epsilons`` are the privacy targets it is for, None for all of the suite's. ``changes`` are the parts it is given
    in the place of its own (slot to spec). ``places`` says where in the file its parameters are written, ``given``
    where its parts are.
    """

    index: int
    name: str
    label: str
    parameters: dict[str, Any]
    task: ScheduledTask
    epsilons: tuple[float, ...] | None = None
    changes: dict[str, str] = field(default_factory=dict)
    train: TrainTable | None = None
    then: Second | None = None
    places: Mapping[str, KeyPath] = field(default_factory=dict, repr=False)
    given: Mapping[str, KeyPath] = field(default_factory=dict, repr=False)

    def meets(self, other: Variant) -> bool:
        """Whether both are for one of the same targets."""
        return self.epsilons is None or other.epsilons is None or bool({*self.epsilons} & {*other.epsilons})

    def what(self) -> tuple[object, ...]:
        """What distinguishes a variant from another on the same task and for the same target."""
        return self.name, self.parameters, self.changes, self.train, self.then
