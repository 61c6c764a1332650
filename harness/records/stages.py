"""What is known of each stage of a run of two, from its record, whenever that was written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness.records.record import Stage
from harness.records.schema import names

FACTS = ("parameters", "parts", *(name for name in names(Stage) if name != "diagnostics"))


def stage_facts(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each stage with all of `FACTS`, None where the record does not know one; [] for a run of one stage.

    What was to be run is the cell's. A record whose stages lack their sampling distribution is from before they had
    one: its ``privacy.sampling`` is the first stage's, its ``privacy.sensitivity``, engine and loss are the last one's,
    and its throughput and counts are of both together and so of neither. Fields of `record` may be of any type.
    """
    cell, privacy = _map(record.get("cell")), _map(record.get("privacy"))
    then = _map(cell.get("then"))
    if not then:
        return []
    held = record.get("stages")
    known = [_map(one) for one in (held if isinstance(held, list) else [])] + [{}, {}]
    task, public = _map(cell.get("task")), "task" in then
    made = [
        _asked(_map(cell.get("method")), _map(cell.get("schedule")), task) | {"trains": "all", "public": False},
        _asked(then, _map(then.get("schedule")), _map(then["task"]) if public else task)
        | {"trains": then.get("trains"), "public": public},
    ]
    for one, found in zip(made, known, strict=False):
        one["relation"] = None if one["public"] else privacy.get("relation")
        one |= {key: value for key, value in {**found, **_map(found.get("diagnostics"))}.items() if key in FACTS}
    if known[0] and "sampling" not in known[0]:
        _recover(made[0], made[1], record)
    return made


def _asked(method: Mapping[str, Any], schedule: Mapping[str, Any], task: Mapping[str, Any]) -> dict[str, Any]:
    batch, steps, n = schedule.get("batch"), schedule.get("steps"), task.get("n_train")
    counts = [value for value in (batch, steps, n) if type(value) is int and 0 < value < 2**53]
    return dict.fromkeys(FACTS) | {
        **{key: method.get(key) for key in ("parameters", "parts")},
        "method": method.get("name"),
        "data": task.get("dataset"),
        "batch": batch,
        "steps": steps,
        "epochs": counts[0] * counts[1] / counts[2] if len(counts) == 3 else None,
    }


def _recover(first: dict[str, Any], last: dict[str, Any], record: Mapping[str, Any]) -> None:
    """Enter what an earlier record says of one stage without saying of which."""
    privacy, measured = _map(record.get("privacy")), _map(record.get("measured"))
    first["sampling"] = privacy.get("sampling")
    first["sensitivity_note"] = privacy.get("sensitivity_note")
    last["engine"], last["microbatch"] = measured.get("engine"), measured.get("microbatch")
    last["train_loss"] = _map(record.get("diagnostics")).get("train_loss")
    if not last["public"]:
        last["sensitivity"] = privacy.get("sensitivity")
        samplers = [_map(one["parts"]).get("sampler") for one in (first, last)]
        if samplers[0] is not None and samplers[0] == samplers[1] and first["batch"] == last["batch"]:
            # One distribution on one data set.
            last["sampling"] = first["sampling"]


def _map(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
