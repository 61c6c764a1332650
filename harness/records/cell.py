"""A cell: one run of a suite, and what makes it that run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

_NOTHING = object()


def canonical_json(value: object) -> str:
    """JSON with sorted keys, no spaces, floats by ``repr``, no NaN: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def _at(*place: str, identity: bool = True, **given: Any) -> Any:
    """A field that a record holds at `place` of its cell; `identity` says whether the id is made of it."""
    return field(metadata={"place": place, "identity": identity}, **given)


@dataclass(frozen=True, eq=False)
class Cell:
    """One run. All but ``suite label device budget method_files`` and the names in ``task`` is its identity.

    ``task`` holds ``name dataset digest mean std n_train model architecture evaluate``; ``n_train`` is the
    number of examples trained on, smaller than the data set's where a part is kept for validation.
    ``privacy`` holds ``epsilon delta relation unit accountant``, None (but the unit) for training without
    privacy, and ``tuning`` where a search on private data is charged. ``device`` holds
    ``device threads engine microbatch``, ``budget`` ``seconds memory_mib``.
    ``method_files`` are the user's own files that register its methods, its model and its data. ``changes`` are the
    parts that the suite gives the method (slot to spec, see :mod:`harness.registry.parts`); ``parts`` describes the
    method with them. All values are JSON values. ``then`` is a second stage, of another method: ``name parameters parts
    trains schedule`` and, where it trains on public data, ``task``; {} for runs of one stage.

    Each field says here where a record holds it. :meth:`canonical` and :meth:`from_canonical` both read these places,
    so that neither can know of a field that the other forgets; what has no place is not in a record's cell.
    """

    suite: str
    method: str = _at("method", "name")
    label: str = _at("method", "label", identity=False)
    parameters: dict[str, Any] = _at("method", "parameters")
    parts: dict[str, Any] = _at("method", "parts")
    task: dict[str, Any] = _at("task")
    privacy: dict[str, Any] = _at("privacy")
    schedule: dict[str, Any] = _at("schedule")
    numerics: dict[str, Any] = _at("numerics")
    seed: int = _at("seed")
    device: dict[str, Any] = field(default_factory=dict)
    budget: dict[str, Any] = field(default_factory=dict)
    method_files: list[str] = field(default_factory=list)
    changes: dict[str, str] = _at("method", "with", default_factory=dict)
    then: dict[str, Any] = _at("then", default_factory=dict)

    def canonical(self) -> dict[str, Any]:
        """The cell as a record holds it: what is run, and under which names. Empty optional fields are left out."""
        return self._placed(lambda one: True)

    def _placed(self, wanted: Callable[[dataclasses.Field[Any]], bool]) -> dict[str, Any]:
        whole: dict[str, Any] = {}
        for one, place in _places():
            value = getattr(self, one.name)
            if wanted(one) and (value or not _optional(one)):
                inner = whole
                for key in place[:-1]:
                    inner = inner.setdefault(key, {})
                inner[place[-1]] = value
        return whole

    @classmethod
    def from_canonical(cls, canonical: Mapping[str, Any], **circumstances: Any) -> Cell:
        """The cell that :meth:`canonical` wrote; ``suite`` and other fields outside a record's cell are arguments.

        Raises ValueError for a mapping that :meth:`canonical` cannot have written: a field is missing, or there is
        something that no field takes.
        """
        fields: dict[str, Any] = {}
        for one, place in _places():
            value: Any = canonical
            for key in place:
                value = value.get(key, _NOTHING) if isinstance(value, Mapping) else _NOTHING
            if value is not _NOTHING:
                fields[one.name] = value
            elif not _optional(one):
                raise ValueError(f"the cell has no {'.'.join(place)}")
        cell = cls(**fields, **circumstances)
        try:
            whole = canonical_json(cell.canonical()) == canonical_json(canonical)
        except (TypeError, ValueError) as error:
            raise ValueError(f"the cell is not made of JSON values: {error}") from error
        if not whole:
            raise ValueError(f"the cell has something that no run has: {_surplus(canonical, cell.canonical())}")
        return cell

    def identity(self) -> dict[str, Any]:
        """What the id is made of: :meth:`canonical` without the label and the names and paths of the task.

        The data set is its digest and statistics, the model its name with all options.
        """
        whole = self._placed(lambda one: bool(one.metadata["identity"]))
        whole["task"] = _unnamed(self.task)
        if "task" in self.then:
            whole["then"] = self.then | {"task": _unnamed(self.then["task"])}
        return whole

    @cached_property
    def digest(self) -> str:
        """64 hex digits: the SHA-256 of the identity. Two cells are the same run exactly when this is equal."""
        return _digest(self.identity())

    @property
    def id(self) -> str:
        """12 hex digits that name the run on every machine: the first of :attr:`digest`.

        Somebody who searches for minutes finds two cells of one id. It is a name and nothing else: what must differ
        between runs, as their noise must, is made of the digest, and who finds a run by its id compares the digest.
        """
        return self.digest[:12]

    @cached_property
    def group(self) -> str:
        """12 hex digits shared by the runs that differ in the seed only."""
        return _digest({key: value for key, value in self.identity().items() if key != "seed"})[:12]

    @property
    def private(self) -> bool:
        """Whether the run has a privacy target."""
        return self.privacy["epsilon"] is not None

    def on(self, device: str, **speed: int | str | None) -> Cell:
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
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


@cache
def _places() -> list[tuple[dataclasses.Field[Any], tuple[str, ...]]]:
    """The fields of a cell that a record holds, each with its place there."""
    return [(one, one.metadata["place"]) for one in dataclasses.fields(Cell) if "place" in one.metadata]


def _optional(one: dataclasses.Field[Any]) -> bool:
    return one.default_factory is not dataclasses.MISSING


def _surplus(found: Any, known: Any, where: str = "") -> str:
    """The first place at which `found` differs from `known`."""
    if isinstance(found, Mapping) and isinstance(known, Mapping):
        for key in sorted(found.keys() | known.keys(), key=str):
            if key not in known:
                return f"{where}{key}"
            if canonical_json(found.get(key)) != canonical_json(known[key]):
                return _surplus(found.get(key), known[key], f"{where}{key}.")
    return where.rstrip(".")
