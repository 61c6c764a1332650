"""What of a run may be published, and what may not: the one place that says so. docs/privacy.md has the reasons.

A record's `diagnostics`, and those of its stages, are private, not for publication: functions of private examples, of
the batches that were really drawn, or of how long and in how much memory they were worked on. `view` is a record
without them, and `trace` its trace. What is in them follows from the plan of the run, from what was released, and from
public data, whatever the private data are: it is listed, and all else is private. `diagnostics` finds that also in
records of version 1, which had some elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from harness.records.field import Came, Private
from harness.records.record import FAILED, Measured, Stage
from harness.records.schema import names

SWITCH = "--with-private-diagnostics"
"""What has commands show and pass on what is private: for benchmarks on public data."""
LEFT_OUT = f"losses, speeds, memory and times are private and left out; for benchmarks on public data: {SWITCH}"
"""What commands say that leave it out."""

MEASURED = names(Measured, Private)
"""Keys of `measured` that are public; what else records of version 1 have there is private. A session ends when
somebody stops it, or with a status that is public."""
STAGE = names(Stage, (Private, Came))
"""Public keys of a stage that was perhaps not begun."""
BEGUN = names(Stage, Private)
"""Public keys of a stage that was begun."""
TRACE = ("stage", "step", "epsilon")
"""Public keys of a log point."""
SCORES = ("accuracy",)
"""More of them, where it was not judged with private examples."""

FOLLOWS = ("ok", "diverged", "over_budget")
"""Statuses that follow from what was released. How far another run came is a matter of time, of memory, or of an audit
that looks at private examples."""
_NULL = ("accountant", "epsilon", "sensitivity", "claimed")
NOT_REPORTED: Mapping[str, Any] = {"ledger": [], "spent": {}, **dict.fromkeys(_NULL)}
"""What the privacy of a run of another status says, since nothing is reported of how far it came."""
HIDDEN = "what ended this run may tell of private data, and is left out"
_PROBED = ("InfoNCE", "Rotations")  # losses that records of schema 1 do not say to be judged by private labels


def diagnostics(record: Mapping[str, Any]) -> dict[str, Any]:
    """What is private of a record, wherever records of its version have it. Any key may be absent, or of any type."""
    values = (record.get(key) for key in ("measured", "diagnostics"))
    measured, own = (value if isinstance(value, dict) else {} for value in values)
    return {k: v for k, v in measured.items() if k not in MEASURED} | own


def view(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record without what is private: a valid record, of which this is the same again.

    Of its times the day is left on which it was started. A run that failed, or that was ended by what an engine found
    out on private examples, tells neither why nor how far it came.
    """
    follows, private = record["status"] in FOLLOWS, privately_judged(record)
    found = {**record, "diagnostics": {}, "started": record["started"] and record["started"][:10], "finished": None}
    found["measured"] = _only(record["measured"], MEASURED if follows else ("jobs",))
    if "stages" in record:
        found["stages"] = [_only(one, BEGUN if follows else STAGE) for one in record["stages"]]
    if private:
        found["privacy"] = {**record["privacy"], "privately_judged": private}
    if len(_stages(record)) in private:
        found["metrics"] = {}
    if not follows:
        found["privacy"] = {key: NOT_REPORTED.get(key, value) for key, value in found["privacy"].items()}
    began = record["privacy"]["noise_multiplier"] is not None
    if record["status"] in FAILED or (record["status"] == "skipped" and began):
        found["reason"] = HIDDEN
    return found


def trace(record: Mapping[str, Any], data: bytes) -> bytes | None:
    """What may be published of a record's trace, one JSON object a line; None where none of it may.

    Raises ValueError where a line is not JSON.
    """
    lines = (json.loads(line) for line in data.splitlines() if line.strip())
    found = points(record, [one for one in lines if isinstance(one, dict)])
    return "".join(json.dumps(one) + "\n" for one in found).encode() if found else None


def points(record: Mapping[str, Any], log: Iterable[Any]) -> list[dict[str, Any]]:
    """What may be published of log points that are read already; what is not an object becomes an empty one."""
    if record["status"] not in FOLLOWS:
        return []
    private = privately_judged(record)
    objects = [one if isinstance(one, dict) else {} for one in log]
    return [_only(one, TRACE if one.get("stage", 1) in private else (*TRACE, *SCORES)) for one in objects]


def privately_judged(record: Mapping[str, Any]) -> list[int]:
    """The stages, from 1, whose accuracy and loss count private examples, or follow labels of private ones.

    Those that the record names and those that its cell shows, whichever a record leaves out.
    """
    cell = record["cell"]
    held_out = cell["task"]["evaluate"] == "validation"
    losses = [one["parts"].get("loss", {}).get("type") for one in _stages(record)]
    private = losses[:1] if "task" in cell.get("then", {}) else losses
    shown = {number for number, loss in enumerate(private, 1) if held_out or loss in _PROBED}
    return sorted(shown.union(record["privacy"].get("privately_judged", ())))


def _stages(record: Mapping[str, Any]) -> list[Any]:
    """The methods of the stages of a record, one or two."""
    cell = record["cell"]
    return [cell["method"], cell["then"]] if "then" in cell else [cell["method"]]


def _only(found: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    return {key: value for key, value in found.items() if key in keys}
