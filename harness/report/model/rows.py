"""Runs that are equal but for the seed, put together: one row for each method variant on one device."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import median
from typing import Any

from harness.report.model.runs import Machine, Run, Setting
from harness.report.model.statistics import Interval, counted_on, mean_interval, rounding
from harness.report.model.words import ABSENT, by_status, device_text, epsilon, tally

BASELINE = "dp-sgd"
REFERENCE = "non-private"
# How the names of a suite's reduced profile, and of its tasks, end.
REDUCED_SUITE, REDUCED_TASK = "-reduced", " (reduced)"


@dataclass(frozen=True)
class Row:
    """Runs that are equal but for the seed, on one device. `variant` tells rows of one label apart."""

    runs: tuple[Run, ...]
    device: Machine
    variant: str = ""

    @property
    def first(self) -> Run:
        """A run that stands for what all runs of the row share."""
        return self.runs[0]

    @property
    def setting(self) -> Setting:
        """What the row's runs were asked to do."""
        return self.first.setting

    @property
    def label(self) -> str:
        """The method's label as the suite gave it."""
        return self.first.label

    @property
    def title(self) -> str:
        """The label, with what sets this row apart from another of the same label."""
        return f"{self.label} ({self.variant})" if self.variant else self.label

    @cached_property
    def counted(self) -> tuple[Run, ...]:
        """The runs that count: status ok, one a seed (ours before merged, fresh before stale, then the latest)."""
        best: dict[int, Run] = {}
        for run in sorted(self.runs, key=lambda r: (not r.origin, not r.stale, r.finished, r.order)):
            if run.ok and run.seed is not None:
                best[run.seed] = run
        return tuple(best[seed] for seed in sorted(best))

    @cached_property
    def scores(self) -> dict[int, float]:
        """Accuracy (a fraction) by seed."""
        return {run.seed: run.accuracy for run in self.counted if run.seed is not None and run.accuracy is not None}

    @cached_property
    def accuracy(self) -> Interval | None:
        """Mean accuracy over the seeds that count."""
        return mean_interval(self.scores.values(), rounding(self.examples))

    @cached_property
    def examples(self) -> int | None:
        """How many examples its accuracies are counted on."""
        return examples(self.counted)

    @cached_property
    def counts(self) -> dict[str, int]:
        """Number of runs by status, in the order of `STATUSES`."""
        return tally(self.runs)

    @cached_property
    def failures(self) -> list[tuple[str, str, int]]:
        """(status, reason, how many runs) of everything that is not ok."""
        found = Counter((r.status, r.reason or "no reason recorded") for r in self.runs if r.status != "ok")
        return [(status, reason, n) for (status, reason), n in sorted(found.items())]

    @property
    def seeds(self) -> list[int]:
        """Every seed that was run or tried."""
        return sorted({run.seed for run in self.runs if run.seed is not None})

    @property
    def stale(self) -> int:
        """How many runs were made by other code than today's."""
        return sum(run.stale for run in self.runs)

    @property
    def merged(self) -> int:
        """How many runs came from elsewhere."""
        return sum(bool(run.origin) for run in self.runs)

    @property
    def marked(self) -> str:
        """The title, with what to know of its runs first of all."""
        marks = [word for word, n in (("stale", self.stale), ("merged", self.merged)) if n]
        return f"{self.title} ({', '.join(marks)})" if marks else self.title

    @cached_property
    def spent(self) -> dict[str, float]:
        """Epsilon spent by accountant: the largest over the runs that count."""
        names = sorted({name for run in self.counted for name in run.spent})
        return {name: max(run.spent.get(name, 0.0) for run in self.counted) for name in names}

    @cached_property
    def refused(self) -> dict[str, str]:
        """The accountants that do not apply to what the runs released, each with its reason."""
        return {name: why for run in self.runs for name, why in run.refused.items()}

    @cached_property
    def epsilon(self) -> float | None:
        """Epsilon spent by the ranking accountant; None when nothing finished."""
        return max((run.epsilon for run in self.counted if run.epsilon is not None), default=None)

    @property
    def cross_check(self) -> float | None:
        """Epsilon spent by the RDP accountant; infinite where nothing was promised."""
        return self.spent.get("rdp", math.inf if self.epsilon == math.inf else None)

    @cached_property
    def timed(self) -> tuple[Run, ...]:
        """The runs whose timings count: those on a quiet machine, or all where there are none."""
        return tuple(run for run in self.counted if not run.busy) or self.counted

    @property
    def busy(self) -> bool:
        """Whether every timing of this row was taken while other work ran on the machine."""
        return any(run.busy for run in self.timed)

    @cached_property
    def rate(self) -> float | None:
        """Examples per second: the median over the runs that are timed of each run's median."""
        return _median(run.rate for run in self.timed)

    @cached_property
    def peak_memory(self) -> float | None:
        """Peak memory in MiB, the largest over runs."""
        return max((run.peak_memory for run in self.counted if run.peak_memory is not None), default=None)

    @cached_property
    def train_seconds(self) -> float | None:
        """Seconds of training, the median over the runs that are timed."""
        return _median(run.train_seconds for run in self.timed)

    def seconds_to(self, accuracy: float) -> float | None:
        """Seconds of training until `accuracy` is first logged: the median over the runs that are timed, infinite
        where most never reach it; None without traces."""
        found = []
        for run in self.timed:
            known = [p for p in run.judged if p.accuracy is not None and p.seconds is not None]
            if known:
                there = (p.seconds for p in known if p.accuracy is not None and p.accuracy >= accuracy)
                found.append(next(there, math.inf))
        return _median(found)

    def shared(self, name: str) -> Any:
        """The first known value of `name` over the runs (they share it; a failed run may not know it)."""
        return next((v for v in (getattr(run, name) for run in self.runs) if v not in (None, "")), None)


def rows_of(runs: Sequence[Run]) -> list[Row]:
    """Group runs by (group, device). A run that never reached a device joins its group's first row."""
    groups: dict[tuple[Any, ...], dict[str, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        # Two settings may share a group's digits.
        same = (run.group, run.parameters, run.parts, run.batch, run.steps)
        groups[run.setting, same][run.device.fingerprint].append(run)
    rows = []
    for places in groups.values():
        homeless = places.pop("", [])
        places[min(places, default="")] += homeless
        for _, members in sorted(places.items()):
            device = max((r.device for r in members), key=lambda d: (d.fingerprint, d.kind, d.name))
            rows.append(Row(tuple(sorted(members, key=lambda r: (r.seed is None, r.seed or 0, r.order))), device))
    return _told_apart(rows)


def _told_apart(rows: list[Row]) -> list[Row]:
    """Give rows that share a label within a setting a variant: whatever differs between them."""
    twins: dict[tuple[Setting, str], list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        twins[row.setting, row.label].append(i)
    out = list(rows)
    for indices in (indices for indices in twins.values() if len(indices) > 1):
        traits = [
            {
                "batch": f"batch {row.first.batch}",
                "steps": f"{row.first.steps} steps",
                "dtype": row.first.dtype,
                "device": device_text(row.device),
                **{name: f"{name}={value}" for name, value in row.first.parameters},
            }
            for row in (rows[i] for i in indices)
        ]
        names = sorted({n for t in traits for n in t if len({u.get(n) for u in traits}) > 1})
        texts = [", ".join(t[n] for n in names if t.get(n)) for t in traits]
        for i, text in zip(indices, texts, strict=True):
            unique = text and texts.count(text) == 1
            out[i] = replace(rows[i], variant=text if unique else ", ".join(filter(None, (text, rows[i].first.group))))
    return out


def examples(runs: Iterable[Run]) -> int | None:
    """How many examples the accuracies of runs on one split are counted on: the fewest that one says, else the fewest
    on which they can be counts; None where they are not counts."""
    runs = [run for run in runs if run.accuracy is not None]
    reported = [run.examples for run in runs if run.examples]
    return min(reported) if reported else counted_on(run.accuracy for run in runs if run.accuracy is not None)


def cross_checked(row: Row) -> str:
    """Epsilon spent by the RDP accountant as text."""
    return epsilon(row.cross_check) if row.cross_check is not None or "rdp" not in row.refused else ABSENT


def statuses(row: Row) -> str:
    """How its runs ended: ``2 ok, 1 diverged``."""
    return by_status(row.counts)


def _median(values: Iterable[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return median(known) if known else None
