"""Runs that stand beside each other: of two methods in one setting, or of one method in two folders."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from harness.report.model.fields import RecordLike, natural
from harness.report.model.rows import Row, rows_of
from harness.report.model.runs import Run, Setting, read
from harness.report.model.words import count, epsilon, percent


class CompareError(ValueError):
    """What was asked for cannot be compared; the message says why and what to write instead."""


@dataclass(frozen=True)
class Metric:
    """What is compared: its value in a run, whether more is better (1) or less (-1), whether changes are ratios, and
    whether it is a timing, which other work on the machine spoils."""

    name: str
    unit: str
    better: int
    relative: bool
    of: Callable[[Run], float | None]
    timed: bool = False

    def change(self, a: float, b: float) -> float | None:
        """From `a` to `b`: their difference, or ``b / a - 1``; None where that has no meaning."""
        if not self.relative:
            return b - a
        return b / a - 1 if a > 0 else None

    def shown(self, value: float | None) -> str:
        """A value as text: an accuracy in percent, plain otherwise."""
        return count(value) if self.relative else percent(value)


METRICS = {
    one.name: one
    for one in (
        Metric("accuracy", "fraction", 1, False, lambda run: run.accuracy),
        Metric("examples_per_second", "1/s", 1, True, lambda run: run.rate, timed=True),
        Metric("peak_memory_mib", "MiB", -1, True, lambda run: run.peak_memory),
    )
}


@dataclass(frozen=True)
class Side:
    """The runs of one side of a pairing."""

    title: str
    runs: tuple[Run, ...]

    @cached_property
    def finished(self) -> dict[int, Run]:
        """The runs that count, by seed."""
        return {run.seed: run for run in self.runs if run.ok and run.seed is not None}

    @cached_property
    def failed(self) -> set[int]:
        """Seeds that were tried and gave no result."""
        return {run.seed for run in self.runs if run.seed is not None} - self.finished.keys()


@dataclass(frozen=True)
class Pairing:
    """Runs of one suite and setting on two sides. `method` is what both run, empty where it is what differs."""

    suite: str
    setting: Setting
    method: str
    a: Side
    b: Side

    def pairs(self, metric: Metric) -> dict[int, tuple[float, float, float]]:
        """(value of A, value of B, change) by seed, where both finished and may be compared."""
        found = {}
        for seed in self.a.finished.keys() & self.b.finished.keys():
            one, other = self.a.finished[seed], self.b.finished[seed]
            x, y = metric.of(one), metric.of(other)
            if x is None or y is None or (metric.relative and one.device.fingerprint != other.device.fingerprint):
                continue
            if (change := metric.change(x, y)) is not None:
                found[seed] = (x, y, change)
        return found


Key = tuple[str, Setting]
Series = dict[Key, list[tuple[Row, Side]]]


def series(records: Iterable[RecordLike]) -> Series:
    """The runs that are equal but for the seed, wherever they ran, by suite and setting."""
    suites: dict[str, list[RecordLike]] = defaultdict(list)
    for record in records:
        suites[str(record.get("suite"))].append(record)
    found: Series = {}
    for suite, members in suites.items():
        groups: dict[tuple[Setting, str], list[Row]] = defaultdict(list)
        for row in rows_of(read(members)):
            groups[row.setting, row.first.group].append(row)
        for (setting, _), rows in groups.items():
            side = Side(rows[0].title, tuple(run for row in rows for run in row.runs))
            found.setdefault((suite, setting), []).append((rows[0], side))
    return found


def named(found: Series, name: str) -> dict[Key, Side]:
    """What a user's name means, by suite and setting."""
    tests: tuple[Callable[[Row], bool], ...] = (
        lambda row: row.label == name, lambda row: row.title == name, lambda row: row.first.method == name,
        lambda row: row.first.group == name,
    )  # fmt: skip
    for test in tests:
        chosen = {key: [(row, side) for row, side in rows if test(row)] for key, rows in found.items()}
        chosen = {key: rows for key, rows in chosen.items() if rows}
        if not chosen:
            continue
        for (suite, setting), rows in chosen.items():
            if len(rows) > 1:
                there = "".join(f"\n  {row.first.group}  {row.title}" for row, _ in rows[:10])
                raise CompareError(
                    f"{name}: {len(rows)} rows of {where(suite, setting)} are called so; write group or title:" + there
                )
        return {key: rows[0][1] for key, rows in chosen.items()}
    known = sorted({row.first.method for rows in found.values() for row, _ in rows}, key=natural)
    raise CompareError(f"{name}: no record is of such a method; there are {', '.join(known) or 'none'}.")


def partner(side: Mapping[Key, Side], suite: str, setting: Setting) -> Key | None:
    """The setting of a side that stands beside this one: the same, else the one without a privacy target."""
    if (suite, setting) in side:
        return suite, setting
    place = (setting.task, setting.digest, setting.split)
    for other, one in side:
        if other == suite and math.isinf(one.epsilon) and (one.task, one.digest, one.split) == place:
            return other, one
    return None


def order_of(key: Key) -> tuple[Any, ...]:
    """The order of suites and settings in a table."""
    suite, s = key
    return natural(suite), natural(s.task), s.split, s.epsilon, s.digest, s.delta or 0.0, s.relation, s.unit


def where(suite: str, setting: Setting) -> str:
    """A suite and a setting in words."""
    split = "" if setting.split == "test" else f" ({setting.split})"
    return f"{suite}: {setting.task}{split}, ε = {epsilon(setting.epsilon)}"
