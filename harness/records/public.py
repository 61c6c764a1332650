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

DIAGNOSTICS = "diagnostics"
MEASURED = names(Measured, Private)
"""Keys of `measured` that are public; what else records of version 1 have there is private. A session ends when
somebody stops it, or with a status that is public."""
STAGE = names(Stage, (Private, Came))
"""The same of a stage, whatever comes of it."""
BEGUN = names(Stage, Private)
"""The same of a stage that was begun."""
TRACE = ("stage", "step", "epsilon")
"""The same of a log point."""
SCORES = ("accuracy",)
"""The same, where it was not judged with private examples."""

FOLLOWS = ("ok", "diverged", "over_budget")
"""Statuses that follow from what was released. How far another run came is a matter of time, of memory, or of an audit
that looks at private examples."""
UNTOLD: Mapping[str, Any] = {
    "ledger": [],
    "spent": {},
    "accountant": None,
    "epsilon": None,
    "sensitivity": None,
    "claimed": None,
}
"""What the privacy of a run of another status says where nothing is reported of how far it came."""
HIDDEN = "what ended this run may tell of private data, and is left out"
_PROBED = ("InfoNCE", "Rotations")  # losses that records of schema 1 do not say to be judged by private labels

Told = Mapping[str, Any]


def diagnostics(record: Told) -> dict[str, Any]:
    """What is private of a record, wherever records of its version have it. Any key may be absent."""
    measured = _map(record.get("measured"))
    return {k: v for k, v in measured.items() if k not in MEASURED} | dict(_map(record.get(DIAGNOSTICS)))


def view(record: Told) -> dict[str, Any]:
    """The record without what is private: a valid record, of which this is the same again.

    Of its times the day is left on which it was started. A run that failed, or that was ended by what an engine found
    out on private examples, tells neither why nor how far it came.
    """
    found = {**record, DIAGNOSTICS: {}, "started": _day(record.get("started")), "finished": None}
    if isinstance(measured := record.get("measured"), dict):
        found["measured"] = _only(measured, MEASURED)
    if isinstance(stages := record.get("stages"), list):
        keys = BEGUN if record.get("status") in FOLLOWS else STAGE
        found["stages"] = [_only(_map(one), keys) for one in stages]
    if private := privately_judged(record):
        found["privacy"] = {**_map(record.get("privacy")), "privately_judged": private}
    if len(_stages(record)) in private:
        found["metrics"] = {}
    if record.get("status") not in FOLLOWS:
        told = _map(found.get("privacy"))
        found["privacy"] = {key: UNTOLD.get(key, value) for key, value in told.items()}
        found["measured"] = _only(_map(found.get("measured")), ("jobs",))
    began = _map(record.get("privacy")).get("noise_multiplier") is not None
    if record.get("status") in FAILED or (record.get("status") == "skipped" and began):
        found["reason"] = HIDDEN
    return found


def trace(record: Told, data: bytes) -> bytes | None:
    """What may be published of a record's trace, one JSON object a line; None where none of it may.

    Raises ValueError where a line is not JSON.
    """
    lines = (json.loads(line) for line in data.splitlines() if line.strip())
    found = points(record, [one for one in lines if isinstance(one, dict)])
    return "".join(json.dumps(one) + "\n" for one in found).encode() if found else None


def points(record: Told, log: Iterable[Told]) -> list[dict[str, Any]]:
    """The same of log points that are read already."""
    if record.get("status") not in FOLLOWS:
        return []
    private = privately_judged(record)
    told = [_map(one) for one in log]
    return [_only(one, TRACE if one.get("stage", 1) in private else (*TRACE, *SCORES)) for one in told]


def privately_judged(record: Told) -> list[int]:
    """The stages, from 1, whose accuracy and loss count private examples, or follow labels of private ones.

    Those that the record names and those that its cell shows, whichever a record leaves out.
    """
    told = _map(record.get("privacy")).get("privately_judged")
    held_out = _map(_map(record.get("cell")).get("task")).get("evaluate") == "validation"
    losses = [_map(_map(_map(one).get("parts")).get("loss")).get("type") for one in _stages(record)]
    public = "task" in _map(_map(record.get("cell")).get("then"))
    private = losses[:1] if public else losses
    shown = {number for number, loss in enumerate(private, 1) if held_out or loss in _PROBED}
    return sorted(shown.union(told if isinstance(told, list) else ()))


def _stages(record: Told) -> list[Any]:
    """The methods of the stages of a record, one or two."""
    cell = _map(record.get("cell"))
    return [cell.get("method"), *([cell["then"]] if cell.get("then") else [])]


def _day(moment: Any) -> Any:
    return moment[:10] if isinstance(moment, str) else moment


def _only(told: Told, keys: Iterable[str]) -> dict[str, Any]:
    return {key: value for key, value in told.items() if key in keys}


def _map(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
