"""Compares records with earlier ones, each by its ratio to the plain step of its own process."""

from __future__ import annotations

from collections.abc import Sequence

from harness.bench.table import Record, is_baseline, ratio, row


def compare(now: Sequence[Record], then: Sequence[Record], threshold: float) -> tuple[list[str], bool]:
    """A line for each workload, batch and engine that both have, and whether any got worse.

    Worse is a ratio to the plain step that grew by more than the factor `threshold`, or no time where there was one.
    Raises ValueError where nothing is in both.
    """
    earlier = {(one["workload"]["name"], one["batch"]): one for one in then}
    lines, worse = [], False
    for record in now:
        name, batch = record["workload"]["name"], record["batch"]
        other = earlier.get((name, batch))
        for engine in [one["name"] for one in record["engines"] if not is_baseline(one["name"])]:
            before = ratio(other, engine) if other else None
            if before is None:
                continue
            after = ratio(record, engine)
            if after is None:
                found = row(record, engine) or {}
                text, bad = f"was {before:.2f}, now {found.get('status', 'not measured')}", True
            else:
                bad = after / before > threshold
                text = f"was {before:.2f}, now {after:.2f}: now/then {after / before:.2f}"
            lines.append(f"{name} batch {batch} {engine}: {text}{'  WORSE' if bad else ''}")
            worse = worse or bad
    if not lines:
        raise ValueError("nothing was timed both now and then")
    return lines, worse
