"""The trace of a run, read while it is being written."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.records.files import content


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
