"""Runs -> rows (one method variant on one device) -> ranked tables (one setting each) -> the whole board.

Everything here is a value computed from the records; `text`, `html` and `figures` only choose how to show it.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import median
from typing import Any

from .read import (
    CROWDED,
    STATUSES,
    Device,
    RecordLike,
    Run,
    Setting,
    listing,
    natural,
    number,
    read,
    scalar,
    visible,
)
from .statistics import Entrant, Interval, Place, counted_on, mean_interval, rank, rounding

BASELINE = "dp-sgd"
REFERENCE = "non-private"
ABSENT = "does not apply"
"""What stands in the place of an epsilon by an accountant that has no number for what was released."""
BUSY = "†"
"""Marks a timing that was taken on a busy machine."""
# How the names of a suite's reduced profile, and of its tasks, end.
REDUCED_SUITE, REDUCED_TASK = "-reduced", " (reduced)"


@dataclass(frozen=True)
class Row:
    """Runs that are equal but for the seed, on one device. `variant` tells rows of one label apart."""

    runs: tuple[Run, ...]
    device: Device
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
        return {
            run.seed: run.accuracy
            for run in self.counted
            if run.seed is not None and run.accuracy is not None
        }

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


@dataclass(frozen=True)
class Entry:
    """A row in a table: its place, and its speed relative to others on the same device (None is unknown).

    `doubted` names the timings that a busy machine has touched, this row's or the other's: of rate, seconds, reach,
    reference, baseline.
    """

    row: Row
    place: Place
    baseline: bool
    to_reference: float | None
    to_baseline: float | None
    doubted: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Table:
    """One setting on one kind of device: the ranked rows, and the infinite-epsilon rows beside them."""

    name: str
    setting: Setting
    kind: str
    entries: tuple[Entry, ...]
    references: tuple[Entry, ...]
    baseline: Row | None
    alternatives: int

    @property
    def search(self) -> bool:
        """Whether this is a hyper-parameter search: accuracy on training data held out, not a result."""
        return self.setting.split == "validation"

    @property
    def notes(self) -> list[str]:
        """What a reader must know about this table beyond the ranking rule."""
        notes = []
        if self.baseline is None:
            notes.append(f"No finished {BASELINE} run here: rows are ordered by mean accuracy.")
        elif self.alternatives > 1:
            notes.append(
                f"{self.alternatives} {BASELINE} rows: paired with the first, {self.baseline.title}."
            )
        claims = {(e.row.title, e.row.shared("claimed"), e.row.shared("claim")) for e in self.entries}
        for title, claimed, claim in sorted((c for c in claims if c[1] is not None), key=str):
            why = claim or "no assumptions given"
            notes.append(f"{title} claims ε = {epsilon(claimed)}, which does not rank ({why}).")
        jobs = sorted({r.jobs for e in (*self.entries, *self.references) for r in e.row.counted if r.jobs})
        if len(jobs) > 1:
            notes.append(
                f"Throughput was measured with {jobs[0]} to {jobs[-1]} runs at a time: compare with care."
            )
        elif jobs and jobs[0] > 1:
            notes.append(f"Throughput was measured with {jobs[0]} runs at a time on the device.")
        runs = [r for e in (*self.entries, *self.references) for r in e.row.counted]
        if busy := sum(r.busy for r in runs):
            notes.append(
                f"{BUSY} Other work ran on the machine during {busy} of {len(runs)} runs: the load average was at "
                f"least {CROWDED:g} times the cores in use. A row is timed by its other runs; where it has none its "
                "timings are marked: do not compare them."
            )
        if any(e.row.first.stages for e in (*self.entries, *self.references)):
            notes.append(
                "Examples/s of runs of two stages are those of the first stage, seconds are of both."
            )
        if any(e.row.stale for e in (*self.entries, *self.references)):
            notes.append("Rows marked stale hold runs made by other code than today's.")
        merged = [run for e in (*self.entries, *self.references) for run in e.row.runs if run.origin]
        if merged:
            sources = "; ".join(dict.fromkeys(run.origin.partition(";")[0] for run in merged))
            notes.append(
                f"Rows marked merged hold runs made elsewhere ({sources}): their accuracy and times are their sender's "
                "word. Each run's page says whether its privacy was computed again here."
            )
        return notes


@dataclass(frozen=True)
class Verdict:
    """One published value beside what was measured. `row` is None when nothing here measures it.

    `verdict` is ``agrees`` (the value lies in the 95 % interval of the measurement), ``differs`` or
    ``not comparable``, and then `because` says why. `difference` is measured minus published, None where nothing was
    measured.
    """

    method: str
    task: str
    epsilon: float
    metric: str
    value: float | None
    source: str
    note: str
    row: Row | None
    measured: Interval | None
    verdict: str
    difference: float | None
    because: tuple[str, ...] = ()
    remedies: tuple[str, ...] = ()

    @property
    def would_change(self) -> str:
        """What would make the verdict another one."""
        m = self.measured
        if (
            self.verdict == "not comparable"
            or m is None
            or self.value is None
            or m.low is None
            or m.high is None
        ):
            return "; ".join(dict.fromkeys(self.remedies))
        if self.verdict == "agrees":
            room = min(self.value - m.low, m.high - self.value)
            return (
                f"an end of our interval moving by {_amount(self.metric, room)} or more, as more seeds may do"
            )
        gap = max(m.low - self.value, self.value - m.high)
        return f"an interval of ours that reaches {_amount(self.metric, gap)} further"


@dataclass(frozen=True)
class Board:
    """Everything a report shows. `reduced` says why these are runs of a suite's reduced profile, empty if not; `file`
    is the suite's, empty if unknown; `left_out` names records of the suite that are not shown, and says why.

    `quarantine` names the files that hold no valid record, each with the reason; nothing else is taken from them.
    """

    suite: str
    question: str
    reduced: str
    quarantine: tuple[str, ...]
    runs: tuple[Run, ...]
    rows: tuple[Row, ...]
    tables: tuple[Table, ...]
    published: tuple[Verdict, ...]
    tuning: tuple[tuple[str, str], ...]
    file: str = ""
    left_out: str = ""

    @property
    def results(self) -> tuple[Table, ...]:
        """The tables that are results, not hyper-parameter searches."""
        return tuple(t for t in self.tables if not t.search)

    @cached_property
    def facts(self) -> list[tuple[str, str]]:
        """What was run, as (name, text) pairs."""
        runs = self.runs
        seeds = sorted({r.seed for r in runs if r.seed is not None})
        epsilons = ", ".join(epsilon(e) for e in sorted({r.setting.epsilon for r in runs}))
        deltas = ", ".join(
            small(d) for d in sorted({r.setting.delta for r in runs if r.setting.delta is not None})
        )
        status = tally(runs)
        devices = sorted({_device(r.device) for r in runs} - {""}, key=natural)
        code = sorted({r.commit[:12] + (" with local changes" if r.dirty else "") for r in runs if r.commit})
        facts = {
            "Profile": f"reduced: {self.reduced}" if self.reduced else "",
            "Tasks": _join(r.setting.task for r in runs),
            "Methods": _join(r.method for r in runs),
            "Privacy": f"ε = {epsilons}" + (f" at δ = {deltas}" if deltas else "") if epsilons else "",
            "Noise calibrated by": _join(r.calibrated for r in runs if math.isfinite(r.setting.epsilon)),
            "Seeds": f"{len(seeds)} ({listing(seeds)})" if seeds else "",
            "Runs": f"{len(runs)} ({', '.join(f'{n} {s}' for s, n in status.items())})"
            if runs
            else "none yet",
            "Left out": self.left_out,
            "Quarantined records": "; ".join(self.quarantine),
            "Device": "; ".join(devices),
            "Dates": dates(runs),
            "Code": ", ".join(code),
            "Torch": _join(r.torch for r in runs),
        }
        return [(name, text) for name, text in facts.items() if text]


def board(
    suite: str,
    question: str,
    records: Iterable[RecordLike],
    published: Iterable[Mapping[str, Any]] = (),
    tuning: Mapping[str, Any] | None = None,
    reduced: str | None = None,
    quarantine: Iterable[tuple[str, str]] = (),
    file: str = "",
    left_out: str = "",
) -> Board:
    """Everything the report shows, computed from `records`; see `harness.report.build` for the arguments."""
    runs = read(records)
    rows = _rows(runs)
    if reduced is None and suite.endswith(REDUCED_SUITE):  # of records alone, without their suite
        reduced = "other data, models or lengths than the suite asks for"
    why = visible(reduced or "")
    return Board(
        suite=visible(suite),
        question=visible(question),
        reduced=why,
        quarantine=tuple(visible(f"{path}: {reason}") for path, reason in quarantine),
        runs=tuple(runs),
        rows=tuple(rows),
        tables=tuple(_tables(rows)),
        published=tuple(v for claim in published for v in _verdicts(claim, rows, bool(why))),
        tuning=tuple((visible(str(k)), scalar(v)) for k, v in (tuning or {}).items()),
        file=visible(file),
        left_out=visible(left_out),
    )


# ------------------------------------------------------------ --- rows and tables


def _rows(runs: Sequence[Run]) -> list[Row]:
    """Group runs by (group, device). A run that never reached a device joins its group's first row."""
    groups: dict[tuple[Any, ...], dict[str, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        same = (
            run.group,
            run.parameters,
            run.parts,
            run.batch,
            run.steps,
        )  # two settings may share a group's digits
        groups[run.setting, same][run.device.fingerprint].append(run)
    rows = []
    for places in groups.values():
        homeless = places.pop("", [])
        if not places:
            places[""] = []
        first = min(places)
        for fingerprint in sorted(places):
            members = places[fingerprint] + (homeless if fingerprint == first else [])
            device = max((r.device for r in members), key=lambda d: (d.fingerprint, d.kind, d.name))
            rows.append(
                Row(tuple(sorted(members, key=lambda r: (r.seed is None, r.seed or 0, r.order))), device)
            )
    return _told_apart(rows)


def _told_apart(rows: list[Row]) -> list[Row]:
    """Give rows that share a label within a setting a variant: whatever differs between them."""
    twins: dict[tuple[Setting, str], list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        twins[row.setting, row.label].append(i)
    out = list(rows)
    for indices in twins.values():
        if len(indices) < 2:
            continue
        traits = [
            {
                "batch": f"batch {row.first.batch}",
                "steps": f"{row.first.steps} steps",
                "dtype": row.first.dtype,
                "device": _device(row.device),
                **{name: f"{name}={value}" for name, value in row.first.parameters},
            }
            for row in (rows[i] for i in indices)
        ]
        names = sorted({n for t in traits for n in t if len({u.get(n) for u in traits}) > 1})
        texts = [", ".join(t[n] for n in names if t.get(n)) for t in traits]
        for i, text in zip(indices, texts, strict=True):
            unique = text and texts.count(text) == 1
            out[i] = replace(
                rows[i], variant=text if unique else ", ".join(filter(None, (text, rows[i].first.group)))
            )
    return out


def _tables(rows: Sequence[Row]) -> list[Table]:
    kinds: dict[Setting, set[str]] = defaultdict(set)
    for row in rows:
        if row.device.kind:
            kinds[row.setting].add(row.device.kind)
    by_setting: dict[tuple[Setting, str], list[Row]] = defaultdict(list)
    for row in rows:  # a row that never reached a device stands with the others of its setting
        by_setting[row.setting, row.device.kind or min(kinds[row.setting], default="")].append(row)

    finite = {_place(s, kind) for s, kind in by_setting if math.isfinite(s.epsilon)}
    references: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for (setting, kind), members in by_setting.items():
        if math.isinf(setting.epsilon):
            references[_place(setting, kind)] += members
    ordered = sorted(by_setting, key=_table_order)
    shown = [(s, k) for s, k in ordered if math.isfinite(s.epsilon) or _place(s, k) not in finite]
    speeds = _speeds(rows)
    return [
        _table(
            i, s, k, by_setting[s, k], references[_place(s, k)] if math.isfinite(s.epsilon) else [], speeds
        )
        for i, (s, k) in enumerate(shown, 1)
    ]


def _place(setting: Setting, kind: str) -> tuple[str, ...]:
    """Where an infinite-epsilon row may be compared: it promises nothing, so delta and relation are out."""
    return setting.task, setting.digest, setting.split, kind


def _table_order(key: tuple[Setting, str]) -> tuple[Any, ...]:
    s, kind = key
    return (
        s.split == "validation", natural(s.task), s.digest, s.split, kind, s.epsilon,
        -1.0 if s.delta is None else s.delta, s.relation, s.unit,
    )  # fmt: skip


def _table(
    index: int,
    setting: Setting,
    kind: str,
    members: Sequence[Row],
    references: Sequence[Row],
    speeds: Mapping[tuple[str, ...], tuple[float, bool]],
) -> Table:
    baseline, alternatives = _baseline(members)
    twins = [row for row in members if baseline and row.first.group == baseline.first.group]

    judged_on = examples([run for row in members for run in row.counted])

    def paired(row: Row) -> dict[int, float] | None:
        """The baseline's scores, those of the row's own device before those of another one of the kind."""
        own = (twin for twin in twins if twin.device.fingerprint == row.device.fingerprint)
        scores: dict[int, float] = {}
        for twin in (*twins, *own):
            scores |= twin.scores
        return scores or None

    def speed(row: Row, method: str) -> tuple[float | None, bool]:
        return speeds.get(_speed_key(row, method), (None, False))

    def entries(rows: Sequence[Row]) -> list[Entry]:
        order, places = rank([Entrant(row.scores, paired(row), _barred(row), judged_on) for row in rows])
        return [
            Entry(
                row=rows[i],
                place=places[i],
                baseline=baseline is not None and rows[i].first.group == baseline.first.group,
                to_reference=_ratio(rows[i].rate, speed(rows[i], REFERENCE)[0]),
                to_baseline=_ratio(rows[i].rate, speed(rows[i], BASELINE)[0]),
                doubted=frozenset(
                    [name for name in ("rate", "seconds", "reach") if rows[i].busy]
                    + ["reference"] * (rows[i].busy or speed(rows[i], REFERENCE)[1])
                    + ["baseline"] * (rows[i].busy or speed(rows[i], BASELINE)[1])
                ),
            )
            for i in order
        ]

    return Table(
        f"table-{index}",
        setting,
        kind,
        tuple(entries(members)),
        tuple(entries(references)),
        baseline,
        alternatives,
    )


def _barred(row: Row) -> str:
    if n := row.counts.get("diverged", 0):
        return f"{n} of {len(row.runs)} runs diverged"
    n = sum(run.believed for run in row.counted)
    return f"the privacy of {n} of {len(row.counted)} runs is their sender's word" if n else ""


def _baseline(rows: Sequence[Row]) -> tuple[Row | None, int]:
    """The row to pair with, and among how many: `BASELINE` by its plain label, else the first by name."""
    named = [row for row in rows if row.first.method == BASELINE and row.scores]
    ordered = sorted(
        named, key=lambda r: (r.label != BASELINE, natural(r.title), r.first.group, r.device.fingerprint)
    )
    return (ordered[0] if ordered else None), len({row.first.group for row in named})


def _speed_key(row: Row, method: str) -> tuple[str, ...]:
    return row.setting.task, row.setting.split, row.device.fingerprint, method


def _speeds(rows: Sequence[Row]) -> dict[tuple[str, ...], tuple[float, bool]]:
    """Examples per second of the methods that others are compared with, by task and device; and whether the machine was
    busy, which it was for all of them, since rows on a quiet one come first."""
    found: dict[tuple[str, ...], dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row.first.method in (BASELINE, REFERENCE) and row.rate:
            found[_speed_key(row, row.first.method)][row.label].append(row)
    chosen = {
        key: labels[key[-1] if key[-1] in labels else min(labels, key=natural)]
        for key, labels in found.items()
    }
    return {key: quietest((row.rate, row.busy) for row in there) for key, there in chosen.items()}


def quietest(timings: Iterable[tuple[float | None, bool]]) -> tuple[float, bool]:
    """The median of timings, and whether they are of a busy machine: those of a quiet one where there are any."""
    known = list(timings)
    quiet = [value for value, busy in known if not busy and value is not None]
    return median(quiet or [value for value, _ in known if value is not None]), not quiet


# ------------------------------------------------------------ --- published values


def _verdicts(claim: Mapping[str, Any], rows: Sequence[Row], reduced: bool) -> list[Verdict]:
    """Compare one published value with every row that measures it (variants and devices are told apart)."""

    def text(name: str) -> str:
        value = claim.get(name)
        return "" if value is None else scalar(value)

    method, task, metric = text("method"), text("task"), text("metric") or "accuracy"
    target, value = _epsilon_value(claim.get("epsilon")), number(claim.get("value"))
    if metric == "accuracy" and value is not None and value > 1:
        value /= 100  # papers print percent
    known = Verdict(
        method, task, target, metric, value, text("source"), text("note"), None, None, "not comparable", None
    )
    there = [row for row in rows if task in _names(row)]
    plain = [r for r in there if r.first.method == method and not r.first.changed]  # with its own parts
    there = [r for r in there if r.label == method] or plain
    here = [row for row in there if row.setting.split == "test" and _same_target(row.setting.epsilon, target)]
    out = []
    for row in here:
        measured = mean_interval(
            (v for v in (_metric(run, metric) for run in row.counted) if v is not None),
            rounding(row.examples) if metric == "accuracy" else 0.0,
        )
        if measured is None or value is None or not math.isfinite(measured.mean):
            continue
        why = _obstacles(row, metric, measured, text("accountant"), reduced)
        verdict = "not comparable" if why else "agrees" if measured.contains(value) else "differs"
        out.append(
            replace(
                known,
                row=row,
                measured=measured,
                verdict=verdict,
                difference=measured.mean - value,
                because=tuple(reason for reason, _ in why),
                remedies=tuple(remedy for _, remedy in why),
            )
        )
    reason, remedy = _absent(known, there, here, reduced)
    return out or [replace(known, because=(reason,), remedies=(remedy,))]


def _names(row: Row) -> tuple[str, str, str]:
    """What a published value may call a row's task."""
    return row.setting.task, row.setting.task.removesuffix(REDUCED_TASK), row.first.dataset


def _same_target(a: float, b: float) -> bool:
    return a == b or math.isclose(a, b, rel_tol=1e-9)


def _obstacles(
    row: Row, metric: str, measured: Interval, accountant: str, reduced: bool
) -> list[tuple[str, str]]:
    """Why a measurement cannot be held against a published value, each with what would help; `accountant` is the one
    of the published epsilon."""
    why = []
    if reduced or row.setting.task.endswith(REDUCED_TASK):
        why.append(_REDUCED)
    others = {run.calibrated for run in row.counted if run.calibrated} - {accountant}
    if accountant and others and math.isfinite(row.setting.epsilon):
        why.append(
            (f"its epsilon is by {accountant}, ours by {', '.join(sorted(others))}",
             f"runs calibrated by {accountant}")
        )  # fmt: skip
    if stale := sum(run.stale for run in row.counted):
        why.append(
            (f"{stale} of {len(row.counted)} runs were made by other code than today's", "running it again")
        )
    if metric in ("examples_per_second", "train_seconds") and (busy := sum(run.busy for run in row.counted)):
        why.append(
            (f"{busy} of {len(row.counted)} runs were timed on a busy machine", "running it on a quiet one")
        )
    if measured.low is None:
        why.append(("one seed gives no interval", "more seeds"))
    return why


_REDUCED = ("this is a reduced profile", "running the whole suite")


def _absent(claim: Verdict, there: Sequence[Row], here: Sequence[Row], reduced: bool) -> tuple[str, str]:
    """Why nothing stands beside a published value, and what would help: `there` are its rows, `here` those at its
    epsilon."""
    if claim.value is None:
        return "no value is given", "a published value"
    if reduced:
        return _REDUCED
    if not there:
        return f"nothing here runs {claim.method} on {claim.task}", f"runs of {claim.method} on {claim.task}"
    at = f"at ε = {epsilon(claim.epsilon)}"
    if here:
        ended = ", ".join(f"{n} {status}" for status, n in tally(r for row in here for r in row.runs).items())
        name = claim.metric.replace("_", " ")
        return f"no run gave its {name} ({ended})", f"runs that give its {name}"
    tested = sorted({row.setting.epsilon for row in there if row.setting.split == "test"})
    if not tested:
        return "only a validation split was evaluated", f"runs {at} on the test split"
    return f"no run {at}, only at {', '.join(map(epsilon, tested))}", f"runs {at}"


def _amount(metric: str, value: float) -> str:
    return f"{100 * value:.2f} points" if metric == "accuracy" else f"{value:.4g}"


def _epsilon_value(value: Any) -> float:
    if isinstance(value, str) and value.strip().lstrip("+").lower() not in ("inf", "infinity", "∞"):
        try:
            value = float(value)
        except ValueError:
            return math.nan
    x = number(value)
    return math.inf if x is None else x


def _metric(run: Run, name: str) -> float | None:
    measured = {
        "epsilon": run.epsilon,
        "examples_per_second": run.rate,
        "peak_memory_mib": run.peak_memory,
        "train_seconds": run.train_seconds,
        "noise_multiplier": run.sigma,
    }
    return run.metrics.get(name, measured.get(name))


# ------------------------------------------------------------ --- how values read


def epsilon(value: float | None) -> str:
    """Epsilon as text: ``∞`` when infinite, ``–`` when unknown."""
    if value is None or math.isnan(value):
        return "–"
    return "∞" if math.isinf(value) else f"{value:.4g}"


def small(value: float | None) -> str:
    """A small number as it is written by hand: ``1e-5``."""
    return "–" if value is None else re.sub(r"e([+-])0+(?=\d)", r"e\1", f"{value:g}").replace("e+", "e")


def percent(value: float | None, signed: bool = False) -> str:
    """A fraction as percent with two decimals, with a true minus sign."""
    if value is None:
        return "–"
    return (f"{100 * value:+.2f}" if signed else f"{100 * value:.2f}").replace("-", "−")


def count(value: float | None) -> str:
    """A quantity with three or more significant figures and thousands separators."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def ratio(value: float | None) -> str:
    """A ratio such as ``0.41×``."""
    return "–" if value is None else f"{value:.2f}×"


def examples(runs: Iterable[Run]) -> int | None:
    """How many examples the accuracies of runs on one split are counted on: the fewest that one says, else the fewest
    on which they can be counts; None where they are none."""
    runs = [run for run in runs if run.accuracy is not None]
    told = [run.examples for run in runs if run.examples]
    return min(told) if told else counted_on(run.accuracy for run in runs if run.accuracy is not None)


def interval(value: Interval | None, signed: bool = False) -> str:
    """``93.10 ± 0.41`` (percent), or only the mean where there is no interval."""
    if value is None:
        return "–"
    return f"{percent(value.mean, signed)} {half(value)}".rstrip()


def half(value: Interval | None) -> str:
    """``± 0.41`` (percent), empty without an interval."""
    return "" if value is None or value.half is None else f"± {percent(value.half)}"


def bounds(value: Interval | None, signed: bool = False) -> str:
    """``[92.69, 93.51]`` in percent, empty without an interval."""
    if value is None or value.low is None or value.high is None:
        return ""
    return f"[{percent(value.low, signed)}, {percent(value.high, signed)}]"


def gap(value: Interval | None) -> str:
    """A difference, ``+0.41 [+0.10, +0.72]`` (points), or only the mean where there is no interval."""
    return (
        "–" if value is None else f"{percent(value.mean, signed=True)} {bounds(value, signed=True)}".strip()
    )


def by_accountant(values: Mapping[str, float], refused: Mapping[str, str]) -> str:
    """Epsilon by every accountant: ``gdp does not apply, pld 2, rdp 2.1``; empty where nothing is known."""
    texts = dict.fromkeys(refused, ABSENT) | {name: epsilon(value) for name, value in values.items()}
    return ", ".join(f"{name} {texts[name]}" for name in sorted(texts))


def refusals(refused: Mapping[str, str]) -> str:
    """Why accountants do not apply, empty where all do: ``gdp does not apply: only plain Gaussians are exact``."""
    return "; ".join(f"{name} {ABSENT}: {why}" for name, why in sorted(refused.items()) if why)


def cross_checked(row: Row) -> str:
    """Epsilon spent by the RDP accountant as text."""
    return epsilon(row.cross_check) if row.cross_check is not None or "rdp" not in row.refused else ABSENT


def timing(entry: Entry, name: str, text: str) -> str:
    """The text of a timing, marked where a busy machine has touched it."""
    return text + BUSY if name in entry.doubted and text != "–" else text


def place(entry: Entry) -> str:
    """``1``, ``1=`` where the rank is shared, ``–`` where there is none."""
    if entry.place.rank is None:
        return "–"
    return f"{entry.place.rank}{'=' if entry.place.tied else ''}"


def tally(runs: Iterable[Run]) -> dict[str, int]:
    """Number of runs by status, in the order of `STATUSES`, unknown ones last."""
    counts = Counter(run.status for run in runs)
    known = {s: counts[s] for s in STATUSES if s in counts}
    return known | {s: counts[s] for s in sorted(counts) if s not in known}


def statuses(row: Row) -> str:
    """``3 ok``, ``2 ok, 1 diverged``."""
    return ", ".join(f"{n} {status}" for status, n in row.counts.items())


def heading(table: Table) -> str:
    """``mnist-5k/tanh-cnn, ε = 3``."""
    return f"{table.setting.task}, ε = {epsilon(table.setting.epsilon)}"


def statement(table: Table) -> list[str]:
    """What holds for every row of `table`: delta, relation, unit, split, kind of device."""
    s = table.setting
    delta = "" if s.delta is None else f"δ = {small(s.delta)}"
    split = "validation split" if table.search else f"{s.split} split"
    return [t for t in (delta, s.relation, f"unit: {s.unit}" if s.unit else "", split, table.kind) if t]


def dates(runs: Sequence[Run]) -> str:
    """First and last day of the runs, UTC."""
    days = sorted({t[:10] for r in runs for t in (r.started, r.finished) if re.match(r"\d{4}-\d\d-\d\d", t)})
    return "" if not days else days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"


def _device(device: Device) -> str:
    threads = f", {device.threads} thread{'s' if device.threads != 1 else ''}" if device.threads else ""
    name = device.name or device.kind
    return name + threads if name else ""


def _join(values: Iterable[str]) -> str:
    return ", ".join(sorted(set(values) - {""}, key=natural))


def _median(values: Iterable[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return median(known) if known else None


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None
