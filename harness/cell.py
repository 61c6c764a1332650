"""A cell: one run of a suite, and what makes it that run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

__all__ = ["Cell", "canonical_json"]


def canonical_json(value: object) -> str:
    """JSON with sorted keys, no spaces, floats by ``repr``, no NaN: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


@dataclass(frozen=True, eq=False)
class Cell:
    """One run. All but ``suite label device budget method_files`` and the names in ``task`` is its identity.

    ``task`` holds ``name dataset digest mean std n_train model architecture evaluate``; ``n_train`` is the
    number of examples trained on, smaller than the data set's where a part is kept for validation.
    ``privacy`` holds ``epsilon delta relation unit accountant``, None (but the unit) for training without
    privacy, and ``tuning`` where a search on private data is charged. ``device`` holds
    ``device threads engine microbatch``, ``budget`` ``seconds memory_mib``.
    ``method_files`` are the user's own files that register its methods, its model and its data. ``changes`` are the
    parts that the suite gives the method (slot to spec, see :mod:`harness.parts`); ``parts`` describes the method with
    them. All values are JSON values. ``then`` is a second stage, of another method: ``name parameters parts trains
    schedule`` and, where it trains on public data, ``task``; {} for runs of one stage.
    """

    suite: str
    method: str
    label: str
    parameters: dict[str, Any]
    parts: dict[str, Any]
    task: dict[str, Any]
    privacy: dict[str, Any]
    schedule: dict[str, Any]
    numerics: dict[str, Any]
    seed: int
    device: dict[str, Any] = field(default_factory=dict)
    budget: dict[str, Any] = field(default_factory=dict)
    method_files: list[str] = field(default_factory=list)
    changes: dict[str, str] = field(default_factory=dict)
    then: dict[str, Any] = field(default_factory=dict)

    def canonical(self) -> dict[str, Any]:
        """The cell as a record holds it: what is run, and under which names."""
        method = {
            "name": self.method,
            "label": self.label,
            "parameters": self.parameters,
            "parts": self.parts,
            **({"with": self.changes} if self.changes else {}),
        }
        return {
            "method": method, "task": self.task, "privacy": self.privacy, "schedule": self.schedule,
            "numerics": self.numerics, "seed": self.seed, **({"then": self.then} if self.then else {}),
        }  # fmt: skip

    def identity(self) -> dict[str, Any]:
        """What the id is made of: :meth:`canonical` without the label and the names and paths of the task.

        The data set is its digest and statistics, the model its name with all options.
        """
        full = self.canonical()
        method = {key: value for key, value in full["method"].items() if key != "label"}
        whole = full | {"method": method, "task": _unnamed(full["task"])}
        if "task" in self.then:
            whole["then"] = self.then | {"task": _unnamed(self.then["task"])}
        return whole

    @cached_property
    def id(self) -> str:
        """12 hex digits that name the run on every machine."""
        return _digest(self.identity())

    @cached_property
    def group(self) -> str:
        """12 hex digits shared by the runs that differ in the seed only."""
        return _digest({key: value for key, value in self.identity().items() if key != "seed"})

    @property
    def private(self) -> bool:
        """Whether the run has a privacy target."""
        return self.privacy["epsilon"] is not None

    def on(self, device: str, **speed: int | None) -> Cell:
        """The same cell on another device, with other ``threads``, ``engine`` or ``microbatch``; the id stays."""
        return dataclasses.replace(self, device=self.device | {"device": device} | speed)

    def to_json(self) -> str:
        """Everything as JSON, for a child process; :meth:`from_json` gives an equal cell."""
        return canonical_json({f.name: getattr(self, f.name) for f in dataclasses.fields(self)})

    @classmethod
    def from_json(cls, text: str) -> Cell:
        """The cell that :meth:`to_json` wrote."""
        return cls(**json.loads(text))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Cell) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(self.id)


def _unnamed(task: dict[str, Any]) -> dict[str, Any]:
    """A task without the names under which its data and its model were found."""
    return {key: value for key, value in task.items() if key not in ("name", "dataset", "model")}


def _digest(value: object) -> str:
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:12]
