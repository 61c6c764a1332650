"""Records for tests, made as writers make them: from what a record is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.records import merge as merging
from harness.records import store
from harness.records.cell import Cell
from harness.records.schema import blank

TASK = {
    "name": "digits/mlp", "dataset": "digits", "digest": "ab", "model": "mlp", "evaluate": "test", "n_train": 1437,
    "architecture": {"name": "mlp", "options": {}}, "mean": [0.5], "std": [0.25],
}  # fmt: skip
# What happened in a run that ended well.
OK = {
    "metrics": {"accuracy": 0.9, "loss": 0.3},
    "weights_sha256": "0" * 64,
    "privacy": {"ledger": [[{"type": "Gaussian"}, 33]]},
    "code": {"hash": "c" * 12},
}


def make_cell(seed: int = 0, label: str = "dp-sgd") -> Cell:
    return Cell(
        suite="core",
        method="dp-sgd",
        label=label,
        parameters={"clip": 1.0, "lr": 0.5},
        parts={"clip": {"type": "Flat", "clip": 1.0}},
        task=TASK,
        privacy={"epsilon": 3.0, "delta": 1e-5, "relation": "add-or-remove", "unit": "example", "accountant": "pld"},
        schedule={"batch": 128, "steps": 33},
        numerics={"dtype": "float32", "tf32": False},
        seed=seed,
    )


def record_of(cell: Cell, /, suite: str = "core", status: str = "ok", **changes: Any) -> store.Record:
    """A valid record of a cell. Objects in `changes` are merged into those that are there, all else takes its place."""
    known = {
        "id": cell.id, "group": cell.group, "suite": suite, "status": status, "cell": cell.canonical(),
        "reason": None if status == "ok" else "for the test",
        "privacy": {"epsilon": 2.9, "relation": "add-or-remove", "sampling": "Poisson, q = 0.1", "unit": "example"},
        "measured": {"jobs": 1}, "diagnostics": {"wall_seconds": 1.0}, "device": {"spec": "cpu", "kind": "cpu"},
    }  # fmt: skip
    return blank(**merged(merged(known, OK if status == "ok" else {}), changes))


def merged(into: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """`more` laid over `into`, object by object."""
    both = {
        key: merged(into[key], value)
        for key, value in more.items()
        if isinstance(value, Mapping) and isinstance(into.get(key), Mapping)
    }
    return {**into, **more, **both}


def make_record(seed: int = 0, status: str = "ok", code: str | None = "c" * 12, **changes: Any) -> store.Record:
    return record_of(make_cell(seed), status=status, **merged({"code": {"hash": code}}, changes))


def put(results: Path, record: store.Record, attempt: int = 1) -> Path:
    return store.write_record(store.Folder(results, record["suite"], record["id"]).attempt(attempt), record)


def merge(sources: Sequence[Path], into: Path) -> merging.MergeResult:
    """Take in records of which nothing is computed again."""
    return merging.merge(sources, into, lambda record: ("", ("nothing of it was computed again",)), {})
