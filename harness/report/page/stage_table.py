"""The table of the stages of a row on its page, and what else the page says of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

from harness.report.model.rows import Row
from harness.report.model.runs import StageFacts
from harness.report.model.words import BUSY, count, epsilon

UNKNOWN = "not recorded"
HEADS = (
    ("Stage", ""), ("Method", ""), ("Trains", ""), ("Data", ""), ("Batch", "num"), ("Steps", "num"), ("Epochs", "num"),
    ("Sampling", "prose"), ("Relation", "prose"), ("Sensitivity", "prose"), ("ε spent by its end", "num"),
    ("Examples/s", "num"), ("Training, s", "num"), ("Engine", ""),
)  # fmt: skip
"""The heads of the table, each with its style."""
_TRAINS = {"head": "the head", "all": "everything"}


def lines(row: Row) -> list[list[str]]:
    """A line for each stage of the row's runs; [] where there is one stage.

    Speeds are medians over the runs that are timed, as in the row; epsilon is the largest over those that count.
    """
    return [_line(row, number) for number in range(len(row.first.stages))]


def _line(row: Row, number: int) -> list[str]:
    asked = row.first.stages[number]
    timed, counted = ([run.stages[number] for run in runs if run.stages] for runs in (row.timed, row.counted))
    known = next((one for one in counted if one.sampling), asked)
    without = math.inf if math.isinf(row.setting.epsilon) else None  # privacy that nobody asked for
    spent = max((one.epsilon for one in counted if one.epsilon is not None), default=without)
    return [
        str(number + 1), asked.method, _TRAINS.get(asked.trains, UNKNOWN),
        (asked.data or UNKNOWN) + (" (public)" if asked.public else ""), _count(asked.batch), _count(asked.steps),
        UNKNOWN if asked.epochs is None else f"{asked.epochs:.3g}", known.sampling or UNKNOWN,
        "none: public data" if asked.public else asked.relation or UNKNOWN, _sensitivity(known),
        UNKNOWN if spent is None else epsilon(spent), _middle([one.rate for one in timed], row.busy),
        _middle([one.seconds for one in timed], row.busy), known.engine or UNKNOWN,
    ]  # fmt: skip


def _count(value: int | None) -> str:
    return UNKNOWN if value is None else str(value)


def _middle(values: Sequence[float | None], busy: bool) -> str:
    known = [value for value in values if value is not None]
    return count(median(known)) + BUSY * busy if known else UNKNOWN


def _sensitivity(stage: StageFacts) -> str:
    if stage.public:
        return "none: public data"
    bounds = ", ".join(f"{k} {'∞' if math.isinf(v) else format(v, '.4g')}" for k, v in stage.sensitivity.items())
    return (bounds or UNKNOWN) + (f" ({stage.note})" if stage.note else "")


def details(stages: Sequence[StageFacts]) -> list[tuple[str, str]]:
    """The method of each stage in one line: its parameters and its parts."""
    return [(f"Stage {i}", f"{one.method}({one.parameters}): {one.parts}") for i, one in enumerate(stages, 1)]
