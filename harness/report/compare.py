"""Compares two methods, or the same cells before and after a change: paired differences with intervals.

A *pairing* is two sets of runs that differ in one thing, method or folder. Its runs are paired by seed, since runs of
one seed share their initial weights. What is compared is ``B - A`` for an accuracy (a fraction) and ``B / A - 1`` for a
speed or a size, where a difference means nothing across tasks. Speeds and sizes are paired only within one device.
Intervals are those of `statistics`: 95 % Student t over seeds, of an accuracy never narrower than counting allows.

Several pairings may be put on one line. Then the differences of a seed are averaged over them first, and the interval
is again over seeds. A pairing that lacks a seed of the line's fullest one is left out, so that every seed is averaged
over the same pairings.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.report import text
from harness.report.model.fields import RecordLike, natural
from harness.report.model.pairs import (
    METRICS,
    CompareError,
    Key,
    Metric,
    Pairing,
    named,
    order_of,
    partner,
    series,
    where,
)
from harness.report.model.rows import examples
from harness.report.model.statistics import LEVEL, Interval, mean_interval, rounding
from harness.report.model.words import bounds, by_status, epsilon, percent, tally

__all__ = ["BY", "Comparison", "Line", "folders", "methods"]

BY = ("setting", "method", "task", "epsilon", "suite", "all")
"""What a line of the table may be; ``setting`` is one suite, method, task and epsilon."""


@dataclass(frozen=True)
class Line:
    """One line of a comparison: `names` says of what. Means are over `seeds`; `incomplete` pairings lack a seed."""

    names: Mapping[str, str | float]
    pairings: int
    incomplete: int
    a: Interval | None
    b: Interval | None
    difference: Interval | None
    seeds: tuple[int, ...]
    unpaired: tuple[int, int]
    broken: int
    busy: int
    statuses: tuple[Mapping[str, int], Mapping[str, int]]
    verdict: str


@dataclass(frozen=True)
class Comparison:
    """Everything `epsbench compare` shows. `missing` names what only one side has."""

    a: str
    b: str
    metric: Metric
    by: str
    threshold: float
    lines: tuple[Line, ...]
    missing: tuple[tuple[str, ...], tuple[str, ...]]

    @property
    def regressions(self) -> int:
        """How many lines are worse beyond the threshold, or fail where A finished."""
        return sum(line.verdict in ("worse", "fails") for line in self.lines)

    def terminal(self) -> str:
        """The table and what to know about it, for a terminal."""
        return "\n".join(["\n".join(text.aligned([_titles(self), *_cells(self)])), "", *_notes(self)])

    def markdown(self) -> str:
        """The same as a page of GitHub-flavoured Markdown."""
        escape = text.escape
        grid = text.grid(_titles(self), _cells(self))
        notes = [f"- {escape(note)}" for note in _notes(self)]
        return "\n".join([f"# {escape(self.b)} against {escape(self.a)}", "", *grid, *notes, ""])

    def json(self) -> dict[str, Any]:
        """The same as plain values: fractions, numbers, null where unknown; an infinite epsilon is null."""
        return {
            "a": self.a, "b": self.b, "metric": self.metric.name, "unit": self.metric.unit, "by": self.by,
            "change": "b / a - 1" if self.metric.relative else "b - a", "better": self.metric.better,
            "threshold": self.threshold, "level": LEVEL, "regressions": self.regressions,
            "lines": [_json(line) for line in self.lines],
            "only_in_a": list(self.missing[0]), "only_in_b": list(self.missing[1]),
        }  # fmt: skip


def methods(records: Iterable[RecordLike], a: str, b: str, **how: Any) -> Comparison:
    """Compare two methods of one results folder, within each suite on each task and epsilon.

    A method is named by its label, its title in the tables, its name or its group (12 hex digits). One that has no
    privacy target is compared with the other at every epsilon. `how` are the metric (``accuracy`` by default), ``by``,
    which is one of `BY`, and the ``threshold`` (0 by default). Raises CompareError where a name matches nothing, or
    several rows of one setting.
    """
    found = series(records)
    one, other = named(found, a), named(found, b)
    pairings = []
    used: tuple[set[Key], set[Key]] = set(), set()
    for key in sorted(one.keys() | other.keys(), key=order_of):
        keys = partner(one, *key), partner(other, *key)
        if keys[0] is not None and keys[1] is not None:
            pairings.append(Pairing(*key, "", one[keys[0]], other[keys[1]]))
            used[0].add(keys[0])
            used[1].add(keys[1])
    if not pairings:
        raise CompareError(f"{a} and {b} have no task and epsilon in common, so there is nothing to pair.")
    alone = [sorted(side.keys() - its, key=order_of) for side, its in zip((one, other), used, strict=True)]
    return _comparison(a, b, pairings, [tuple(where(*key) for key in keys) for keys in alone], **how)


def folders(before: Iterable[RecordLike], after: Iterable[RecordLike], a: str, b: str, **how: Any) -> Comparison:
    """Compare the same cells in two results folders, called `a` and `b`; `how` as in `methods`.

    Raises CompareError where none is in both.
    """
    sides = [
        {(suite, row.first.group): (setting, side) for (suite, setting), rows in found.items() for row, side in rows}
        for found in map(series, (before, after))
    ]

    def order(key: tuple[str, str]) -> tuple[Any, ...]:
        setting, side = sides[0].get(key) or sides[1][key]
        return (*order_of((key[0], setting)), natural(side.title), key)

    pairings = [
        Pairing(key[0], sides[0][key][0], sides[0][key][1].title, sides[0][key][1], sides[1][key][1])
        for key in sorted(sides[0].keys() & sides[1].keys(), key=order)
    ]
    if not pairings:
        raise CompareError(
            f"{a} and {b} have no cell in common: pairs are runs of one suite that are equal but for the code."
        )
    alone = [
        tuple(f"{one[key][1].title}, {where(key[0], one[key][0])}" for key in sorted(one.keys() - other, key=order))
        for one, other in ((sides[0], sides[1].keys()), (sides[1], sides[0].keys()))
    ]
    return _comparison(a, b, pairings, alone, **how)


def _comparison(
    a: str, b: str, pairings: Sequence[Pairing], alone: Sequence[tuple[str, ...]], metric: str = "accuracy",
    by: str = "setting", threshold: float = 0.0,
) -> Comparison:  # fmt: skip
    if not 0 <= threshold < math.inf:
        raise CompareError(f"{threshold}: no threshold; write a fraction of 0 or more, such as 0.01.")
    groups: dict[Any, list[Pairing]] = defaultdict(list)
    for index, one in enumerate(pairings):
        groups[index if by == "setting" else tuple(_names(one, by).values())].append(one)
    lines = tuple(_line(_names(ones[0], by), ones, METRICS[metric], threshold) for ones in groups.values())
    return Comparison(a, b, METRICS[metric], by, threshold, lines, (alone[0], alone[1]))


def _names(one: Pairing, by: str) -> dict[str, str | float]:
    if by == "all":
        return {"lines": "all"}
    task = one.setting.task + ("" if one.setting.split == "test" else f" ({one.setting.split})")
    every: dict[str, str | float]
    every = {"suite": one.suite, "method": one.method, "task": task, "epsilon": one.setting.epsilon}
    return {name: value for name, value in every.items() if by in (name, "setting") and value != ""}


def _line(names: Mapping[str, str | float], pairings: Sequence[Pairing], metric: Metric, threshold: float) -> Line:
    every = [(one, one.pairs(metric)) for one in pairings]
    seeds = _fullest([pairs for _, pairs in every])
    paired = [(one, pairs) for one, pairs in every if pairs.keys() >= set(seeds)]
    means = [[math.fsum(pairs[s][i] for _, pairs in paired) / len(paired) for s in seeds] for i in range(3)]
    judged_on = (examples([*one.a.finished.values(), *one.b.finished.values()]) for one, _ in paired)
    # Of a mean over pairings.
    least = 0.0 if metric.relative else math.fsum(map(rounding, judged_on)) / len(paired) ** 2
    a, b = (mean_interval(values, least) for values in means[:2])
    difference = mean_interval(means[2], 2 * least)
    busy = sum(one.a.finished[seed].busy or one.b.finished[seed].busy for one, pairs in every for seed in pairs)
    broken = sum(len(one.a.finished.keys() & one.b.failed) for one in pairings)
    alone = (
        sum(len(one.a.finished.keys() - pairs.keys()) for one, pairs in every),
        sum(len(one.b.finished.keys() - pairs.keys()) for one, pairs in every),
    )
    statuses = tally(r for one in pairings for r in one.a.runs), tally(r for one in pairings for r in one.b.runs)
    return Line(
        names, len(pairings), len(every) - len(paired), a, b, difference, tuple(seeds), alone, broken,
        busy if metric.timed else 0, statuses, _verdict(difference, metric.better, threshold, broken),
    )  # fmt: skip


def _fullest(every: Sequence[Mapping[int, object]]) -> list[int]:
    """The seeds of the pairing that has most; among equals, those that most pairings have."""
    kinds = sorted({tuple(sorted(pairs)) for pairs in every})
    shared = [sum(pairs.keys() >= set(kind) for pairs in every) for kind in kinds]
    return list(max(zip(kinds, shared, strict=True), key=lambda one: (len(one[0]), one[1]))[0])


def _verdict(difference: Interval | None, better: int, threshold: float, broken: int) -> str:
    """``fails``, ``no pairs``, ``one seed``, ``worse`` or ``better`` beyond the threshold, or ``undecided``."""
    if broken:
        return "fails"
    if difference is None:
        return "no pairs"
    if difference.low is None or difference.high is None:
        return "one seed"
    low, high = sorted((better * difference.low, better * difference.high))
    return "worse" if high < -threshold else "better" if low > threshold else "undecided"


def _titles(comparison: Comparison) -> list[str]:
    unit = "%" if comparison.metric.relative else "points"
    return [
        *comparison.lines[0].names,
        "A",
        "B",
        f"change, {unit}",
        "95 % interval",
        "pairs",
        "runs of A",
        "runs of B",
        "verdict",
    ]


def _cells(comparison: Comparison) -> list[list[str]]:
    metric = comparison.metric
    return [
        [
            *(epsilon(value) if isinstance(value, float) else value for value in line.names.values()),
            *(metric.shown(one.mean if one else None) for one in (line.a, line.b)),
            percent(line.difference.mean if line.difference else None, signed=True),
            bounds(line.difference, signed=True) or "–", str(len(line.seeds)), *map(by_status, line.statuses),
            line.verdict,
        ]
        for line in comparison.lines
    ]  # fmt: skip


def _notes(comparison: Comparison) -> list[str]:
    """What a reader must know beside the table, one sentence or two each."""
    metric, lines = comparison.metric, comparison.lines
    notes = [
        f"A is {comparison.a}, B is {comparison.b}. {metric.name}: "
        + ("B / A − 1 in percent" if metric.relative else "B − A in percentage points")
        + f", paired by seed; {'more' if metric.better > 0 else 'less'} is better."
    ]
    if single := sum(line.verdict == "one seed" for line in lines):
        notes.append(
            f"{single} of {len(lines)} lines have one paired seed: there is no interval, so nothing is decided."
        )
    if empty := sum(not line.seeds for line in lines):
        notes.append(f"{empty} of {len(lines)} lines have no paired seed.")
    if incomplete := sum(line.incomplete for line in lines):
        every = sum(line.pairings for line in lines)
        notes.append(f"{incomplete} of {every} pairings are left out, since they lack a seed that others have.")
    alone = [sum(line.unpaired[i] for line in lines) for i in range(2)]
    if any(alone):
        why = " (or with one on another device)" if metric.relative else ""
        notes.append(f"Finished runs without a partner{why}: {alone[0]} of A, {alone[1]} of B.")
    if busy := sum(line.busy for line in lines):
        notes.append(f"{busy} pairs hold a run during which other work ran on the machine: their times decide nothing.")
    for name, only in zip("AB", comparison.missing, strict=True):
        if only:
            more = f"; and {len(only) - 5} more" if len(only) > 5 else ""
            notes.append(f"Only in {name}, {len(only)}: {'; '.join(only[:5])}{more}.")
    if broken := sum(line.broken for line in lines):
        notes.append(f"{broken} runs that A finished failed in B; that is a regression whatever the threshold.")
    decided = sum(line.verdict in ("worse", "better", "undecided") for line in lines)
    if decided > 1:
        notes.append(
            f"Intervals are not corrected for the number of lines: of {decided} without any change, about "
            f"{decided * (1 - LEVEL) / 2:.2g} would look worse."
        )
    limit = f"{percent(comparison.threshold)} {'%' if metric.relative else 'points'}"
    notes.append(f"Regressions beyond {limit}: {comparison.regressions} of {len(lines)} lines.")
    return notes


def _json(line: Line) -> dict[str, Any]:
    def interval(value: Interval | None) -> dict[str, Any] | None:
        return None if value is None else {"mean": value.mean, "low": value.low, "high": value.high, "n": value.n}

    names = {name: None if value == math.inf else value for name, value in line.names.items()}
    return {
        **names, "pairings": line.pairings, "incomplete": line.incomplete, "a": interval(line.a), "b": interval(line.b),
        "change": interval(line.difference), "seeds": list(line.seeds),
        "unpaired": {"a": line.unpaired[0], "b": line.unpaired[1]}, "failed_in_b": line.broken,
        "pairs_on_a_busy_machine": line.busy,
        "statuses": {"a": dict(line.statuses[0]), "b": dict(line.statuses[1])}, "verdict": line.verdict,
    }  # fmt: skip
