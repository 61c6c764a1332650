"""The records of a results folder as a pandas table: one row a record, the same columns and types whatever is in it."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import public, store

if TYPE_CHECKING:
    import pandas

__all__ = ["COLUMNS", "load_results"]

_Value = Callable[[Any], Any]


def _field(name: str) -> _Value:
    """Looks up a dotted name; None where there is none."""

    def value(record: Any) -> Any:
        for key in name.split("."):
            record = record.get(key) if isinstance(record, dict) else None
        return record

    return value


def _number(name: str) -> _Value:
    """A number; missing where there is another thing."""
    found = _field(name)

    def value(record: Any) -> float | None:
        x = found(record)
        return float(x) if isinstance(x, int | float) and not isinstance(x, bool) else None

    return value


def _whole(name: str) -> _Value:
    """A whole number that fits into 64 bits; missing where there is another thing."""
    found = _field(name)

    def value(record: Any) -> int | None:
        x = found(record)
        return x if isinstance(x, int) and not isinstance(x, bool) and abs(x) < 2**63 else None

    return value


def _words(name: str) -> _Value:
    """A text; missing where there is another thing."""
    found = _field(name)
    return lambda record: x if isinstance(x := found(record), str) else None


def _truth(name: str) -> _Value:
    """True or false; missing where there is another thing."""
    found = _field(name)
    return lambda record: x if isinstance(x := found(record), bool) else None


def _json(name: str) -> _Value:
    """A JSON object as text with sorted keys."""
    found = _field(name)
    return lambda record: json.dumps(found(record) or {}, sort_keys=True, ensure_ascii=False)


def _target(record: Any) -> float:
    """The target epsilon; infinite where there is none."""
    value = record["cell"]["privacy"].get("epsilon")
    return math.inf if value is None else float(value)


def _spent(accountant: str | None = None) -> _Value:
    """Epsilon by an accountant, or by the one that ranks. Null is infinite once a run has finished; of an accountant
    it says that this one does not apply where another has a finite epsilon."""

    def value(record: Any) -> float | None:
        spent = record["privacy"].get("spent") or {}
        name = accountant or record["privacy"].get("accountant")
        x = spent.get(name) if isinstance(name, str) else None
        if isinstance(x, int | float) and not isinstance(x, bool):
            return float(x)
        if x is not None or record["status"] != "ok" or not (accountant is None or name in spent):
            return None
        refused = accountant is not None and any(one is not None for one in spent.values())
        return None if refused else math.inf

    return value


COLUMNS: Mapping[str, tuple[str, _Value]] = {
    "suite": ("category", _words("suite")),
    "id": ("string", _words("id")),
    "attempt": ("int64", store.attempt_of),
    "group": ("string", _words("group")),
    "status": ("category", _words("status")),
    "reason": ("string", _words("reason")),
    "method": ("category", _words("cell.method.name")),
    "label": ("category", lambda r: _words("cell.method.label")(r) or r["cell"]["method"]["name"]),
    "family": ("category", _words("card.family")),
    "parameters": ("string", _json("cell.method.parameters")),
    "with_parts": ("string", _json("cell.method.with")),
    "task": ("category", _words("cell.task.name")),
    "dataset": ("category", _words("cell.task.dataset")),
    "model": ("category", _words("cell.task.model")),
    "split": ("category", _words("cell.task.evaluate")),
    "n_train": ("Int64", _whole("cell.task.n_train")),
    "target_epsilon": ("float64", _target),
    "delta": ("float64", _number("cell.privacy.delta")),
    "relation": ("category", _words("cell.privacy.relation")),
    "batch": ("Int64", _whole("cell.schedule.batch")),
    "steps": ("Int64", _whole("cell.schedule.steps")),
    "dtype": ("category", _words("cell.numerics.dtype")),
    "seed": ("Int64", _whole("cell.seed")),
    "accuracy": ("float64", _number("metrics.accuracy")),
    "loss": ("float64", _number("metrics.loss")),
    "epsilon": ("float64", _spent()),
    "epsilon_pld": ("float64", _spent("pld")),
    "epsilon_rdp": ("float64", _spent("rdp")),
    "epsilon_claimed": ("float64", _number("privacy.claimed.epsilon")),
    "noise_multiplier": ("float64", _number("privacy.noise_multiplier")),
    "examples_per_second": ("float64", _number("diagnostics.examples_per_second.median")),
    "peak_memory_mib": ("float64", _number("diagnostics.peak_memory_mib")),
    "train_seconds": ("float64", _number("diagnostics.train_seconds")),
    "wall_seconds": ("float64", _number("diagnostics.wall_seconds")),
    "jobs": ("Int64", _whole("measured.jobs")),
    "device": ("category", _words("device.name")),
    "device_kind": ("category", _words("device.kind")),
    "device_fingerprint": ("category", _words("device.fingerprint")),
    "threads": ("Int64", _whole("device.threads")),
    "commit": ("category", _words("code.commit")),
    "dirty": ("boolean", _truth("code.dirty")),
    "code_hash": ("category", _words("code.hash")),
    "started": ("datetime64[us, UTC]", _words("started")),
    "finished": ("datetime64[us, UTC]", _words("finished")),
    "origin": ("string", _words("origin.source")),
    "path": ("string", _words("path")),
}
"""Name of each column, its type in pandas, and how a record gives its value. docs/submitting.md says what they mean."""


def load_results(folder: str | Path = "results") -> pandas.DataFrame:
    """Every valid record under `folder` as a row with `COLUMNS`, in order of suite and folder; see docs/submitting.md.

    Every attempt is there; ``frame.sort_values("attempt").drop_duplicates(["suite", "id"], keep="last")`` keeps the
    newest. `folder` may be that of one suite, ``results/core``. A file that holds no valid record is left out: each is
    named in a warning and in ``frame.attrs["broken"]`` (texts). A missing folder gives an empty table of the same
    columns. Epsilons may be infinite; one by an accountant that does not apply is missing.

    Raises ValueError where `folder` is that of a single run.
    """
    import pandas as pd

    place = Path(folder)
    if (place / store.RECORD).is_file():
        raise ValueError(
            f"{folder}: is the folder of one run; name the results folder, or that of a suite in it"
        )
    records = store.load(*(store.suite_of(place) or (place,)))
    told = [{**record, "diagnostics": public.diagnostics(record)} for record in records]
    for one in records.broken:
        warnings.warn(f"quarantined: {one}", stacklevel=3)
    columns = {}
    for name, (kind, value) in COLUMNS.items():
        values = [value(record) for record in told]
        if kind.startswith("datetime64"):
            moments = pd.to_datetime(
                pd.Series(values, dtype="object"), utc=True, format="ISO8601", errors="coerce"
            )
            columns[name] = moments.dt.as_unit("us")
        else:
            columns[name] = pd.Series(values, dtype=kind)
    frame = pd.DataFrame(columns)
    frame.attrs["broken"] = [str(one) for one in records.broken]
    return frame
