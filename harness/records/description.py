"""A record and its trace as MLflow is to hold them: flat parameters, metrics and tags, and points."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness.records import public, store
from harness.records.files import content

_LONGEST = 5000  # characters of a parameter or tag; MLflow's limit is 6000


@dataclass(frozen=True)
class Finished:
    """A record on disk: its directory, what goes out of it and of its trace, the record as bytes, and their digest.

    Without what is private all times are the beginning of the day on which the run began.
    """

    run_dir: Path
    record: dict[str, Any]
    data: bytes
    digest: str
    private: bool

    @classmethod
    def read(cls, run_dir: Path, private: bool) -> Finished:
        """The record in `run_dir`. Raises `StoreError` where it is no valid one."""
        return cls._of(run_dir, store.read(run_dir / store.RECORD), private)

    @classmethod
    def _of(cls, run_dir: Path, record: dict[str, Any], private: bool) -> Finished:
        if private:
            data = (run_dir / store.RECORD).read_bytes()
        else:
            record = public.view(record)
            data = store.encode(record, run_dir.name)
        return cls(run_dir, record, data, hashlib.sha256(data).hexdigest()[:16], private)

    @classmethod
    def load(cls, results: Path, suites: Iterable[str] | None, private: bool) -> Iterator[Finished]:
        """All valid records under `results`, or those of some suites."""
        for suite in [None] if suites is None else sorted(set(suites)):
            for record in store.load(results, suite):
                yield cls._of(Path(record["path"]).parent, record, private)

    def points(self) -> list[Point]:
        """What goes out of the trace."""
        found = read_points(self.run_dir / "trace.jsonl")[0]
        if self.private:
            return found
        shown = public.points(self.record, [point.values for point in found])
        return [Point(point.step, 0.0, values) for point, values in zip(found, shown, strict=False)]


def key_of(run_dir: Path) -> str:
    """The place of a run's folder under results/: "<suite>/<id>"."""
    return f"{run_dir.parent.name}/{run_dir.name}"


def parameters(cell: Mapping[str, Any]) -> dict[str, str]:
    """A cell as flat MLflow parameters: `method.lr`, `parts.clip`, `task.dataset`, ..., `seed`."""
    method = cell["method"]
    parts = {name: _call(part) for name, part in method["parts"].items()}
    privacy = cell["privacy"] | ({"epsilon": "inf"} if cell["privacy"]["epsilon"] is None else {})
    sections = {"method": method["parameters"], "parts": parts, "privacy": privacy}
    sections |= {name: cell[name] for name in ("task", "schedule", "numerics")}
    flat = {"method": method["name"], "method.label": method["label"], "seed": cell["seed"]}
    flat |= {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}
    return {cleaned(key): _text(value) for key, value in flat.items() if value is not None}


def final_metrics(record: Mapping[str, Any]) -> dict[str, float]:
    """The record's finite numbers, named `final/...` so that they stand apart from the trace."""
    privacy = record["privacy"]
    flat: dict[str, Any] = dict(record["metrics"])
    flat |= {"epsilon": privacy["epsilon"], "noise_multiplier": privacy["noise_multiplier"]}
    flat |= {f"epsilon_{name}": value for name, value in privacy["spent"].items()}
    flat |= {f"planned_epsilon_{name}": value for name, value in privacy["planned"].items()}
    for key, value in (record["measured"] | public.diagnostics(record)).items():
        flat[key] = value.get("median") if isinstance(value, dict) else value
    return {cleaned(f"final/{key}"): float(value) for key, value in flat.items() if finite(value)}


def tags(finished: Finished) -> dict[str, str]:
    """The tags of a finished run, all but `epsbench.record`, which is written last."""
    record = finished.record
    found = identity(finished.run_dir, record["cell"]) | {
        "epsbench.group": record["group"],
        "epsbench.status": record["status"],
        "epsbench.reason": record["reason"],
        "epsbench.device": record["device"]["name"],
        "epsbench.code": record["code"]["hash"],
        "epsbench.paper": record["card"]["paper"],
        "epsbench.family": record["card"]["family"],
        "mlflow.note.content": record["card"]["summary"],
    }
    return {key: _text(value) for key, value in found.items() if value is not None}


def identity(run_dir: Path, cell: Mapping[str, Any]) -> dict[str, Any]:
    """The tags that say whose run this is."""
    epsilon = cell["privacy"]["epsilon"]
    title = [
        cell["method"]["label"] or cell["method"]["name"],
        cell["task"]["name"],
        "" if epsilon is None else f"epsilon {epsilon}",
        f"seed {cell['seed']}",
    ]
    return {
        "epsbench.run": run_dir.name,
        "epsbench.id": run_dir.name.partition(".")[0],
        "epsbench.suite": run_dir.parent.name,
        "epsbench.seed": _text(cell["seed"]),
        "mlflow.runName": ", ".join(filter(None, title)),
    }


def _call(part: Any) -> Any:
    """A part as it would be written in Python: {"type": "Flat", "clip": 1.0} is Flat(clip=1.0)."""
    if not isinstance(part, dict) or "type" not in part:
        return part
    fields = (f"{key}={_call(value)}" for key, value in sorted(part.items()) if key != "type")
    return f"{part['type']}({', '.join(fields)})"


def cleaned(key: str) -> str:
    """A key without the letters that MLflow does not take."""
    return re.sub(r"[^\w./: -]", "_", key)[:250]


def _text(value: Any) -> str:
    return (value if isinstance(value, str) else json.dumps(value, sort_keys=True))[:_LONGEST]


def milliseconds(moment: Any, otherwise: float) -> int:
    """A moment in ISO 8601, or `otherwise` (seconds since 1970), in milliseconds. A day begins in UTC."""
    if not isinstance(moment, str):
        return int(otherwise * 1000)
    found = datetime.fromisoformat(moment)
    return int((found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp() * 1000)


@dataclass(frozen=True)
class Point:
    """One line of a trace: its step, seconds of training so far, and its finite numbers."""

    step: int
    seconds: float
    values: dict[str, float]


def read_points(trace: Path, offset: int = 0) -> tuple[list[Point], int]:
    """The points after byte `offset`, and the offset after the last complete line.

    A last line without its newline is still being written and is left for the next call; a line that is not
    a point (torn by a kill, then appended to) is passed over. A file that has become shorter is read from the
    start. Raises OSError where it cannot be read or is not a plain file.
    """
    try:
        data = content(trace)
    except FileNotFoundError:
        return [], 0
    if len(data) < offset:
        offset = 0
    data = data[offset:]
    end = data.rfind(b"\n") + 1
    return [point for line in data[:end].splitlines() if (point := _point(line))], offset + end


def _point(line: bytes) -> Point | None:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(fields, dict) or not finite(fields.get("step")):
        return None
    values = {key: float(value) for key, value in fields.items() if key not in ("step", "seconds") and finite(value)}
    seconds = fields.get("seconds")
    return Point(int(fields["step"]), float(seconds) if seconds is not None and finite(seconds) else 0.0, values)


def finite(value: Any) -> bool:
    """Whether this is a number that a float can hold, and no truth value."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond any float
        return False
