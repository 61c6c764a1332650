"""The records of a results folder as a pandas table: one row a record, the same columns and types whatever is in it."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.records import public, store
from harness.records.schema import columns

if TYPE_CHECKING:
    import pandas

_Value = Callable[[Any], Any]


def _field(name: str, kind: str = "") -> _Value:
    """Looks up a dotted name; None where it is missing, or has a value that a column of this kind cannot hold."""

    def value(record: Any) -> Any:
        for key in name.split("."):
            record = record.get(key) if isinstance(record, dict) else None
        return _HELD.get(kind, lambda x: x)(record)

    return value


def _number(x: Any) -> float | None:
    return float(x) if isinstance(x, int | float) and not isinstance(x, bool) else None


def _text(x: Any) -> str | None:
    """A text as it is, an object as JSON with sorted keys."""
    return (
        json.dumps(x, sort_keys=True, ensure_ascii=False) if isinstance(x, dict) else x if isinstance(x, str) else None
    )


# By type in pandas. Whole numbers must fit into 64 bits.
_HELD: Mapping[str, _Value] = {
    "float64": _number,
    "Int64": lambda x: x if isinstance(x, int) and not isinstance(x, bool) and abs(x) < 2**63 else None,
    "boolean": lambda x: x if isinstance(x, bool) else None,
    "string": _text,
    "category": _text,
    "datetime64[us, UTC]": _text,
}


def _target(record: Any) -> float:
    """The target epsilon; infinite without a target."""
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


# What a column holds that is not as the record has it, or that no record holds.
_COMPUTED: Mapping[str, tuple[str, _Value]] = {
    "label": ("category", lambda r: r["cell"]["method"].get("label") or r["cell"]["method"]["name"]),
    "parameters": ("string", lambda r: _text(r["cell"]["method"].get("parameters") or {})),
    "with_parts": ("string", lambda r: _text(r["cell"]["method"].get("with") or {})),
    "target_epsilon": ("float64", _target),
    "epsilon": ("float64", _spent()),
    "epsilon_pld": ("float64", _spent("pld")),
    "epsilon_rdp": ("float64", _spent("rdp")),
    "attempt": ("int64", store.attempt_of),
    "origin": ("string", _field("origin.source", "string")),
    "path": ("string", _field("path", "string")),
}
COLUMNS: Mapping[str, tuple[str, _Value]] = {
    **{name: (kind, _field(place, kind)) for name, place, kind in columns()},
    **_COMPUTED,
}
"""Name of each column, its type in pandas, and how a record gives its value: those of the record's fields that
`harness.records.record` marks, then computed ones. docs/submitting.md says what they mean."""


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
        raise ValueError(f"{folder}: is the folder of one run; name the results folder, or that of a suite in it")
    records = store.load(*(store.suite_of(place) or (place,)))
    shown = [{**record, "diagnostics": public.diagnostics(record)} for record in records]
    for one in records.broken:
        warnings.warn(f"quarantined: {one}", stacklevel=3)
    table = {}
    for name, (kind, value) in COLUMNS.items():
        values = [value(record) for record in shown]
        if kind.startswith("datetime64"):
            moments = pd.to_datetime(pd.Series(values, dtype="object"), utc=True, format="ISO8601", errors="coerce")
            table[name] = moments.dt.as_unit("us")
        else:
            table[name] = pd.Series(values, dtype=kind)
    frame = pd.DataFrame(table)
    frame.attrs["broken"] = [str(one) for one in records.broken]
    return frame
