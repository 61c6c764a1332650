"""Makes ranked tables of runs: rows (one method variant on one device), a table for each setting, and the whole board.

Everything here is a value computed from the records; `text`, `html` and `figures` only choose how to show it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import Any

from harness.report.model.fields import RecordLike, listing, natural, scalar, visible
from harness.report.model.published import PublishedValue, verdicts
from harness.report.model.rows import BASELINE, REDUCED_SUITE, REFERENCE, Row, examples, rows_of
from harness.report.model.runs import CROWDED, Run, Setting, read
from harness.report.model.statistics import Entrant, Standing, rank
from harness.report.model.words import BUSY, by_status, dates, device_text, epsilon, joined, small, tally


@dataclass(frozen=True)
class TableRow:
    """A row in a table: its place, and its speed relative to others on the same device (None is unknown).

    `reference` says that it stands beside the ranked rows, without privacy. `doubted` names the timings that a busy
    machine has touched, this row's or the other's: of rate, seconds, reach, reference, baseline.
    """

    row: Row
    place: Standing
    baseline: bool
    reference: bool
    to_reference: float | None
    to_baseline: float | None
    doubted: frozenset[str] = frozenset()


@dataclass(frozen=True)
class RankedTable:
    """One setting on one kind of device: the ranked rows, and the infinite-epsilon rows beside them."""

    name: str
    setting: Setting
    kind: str
    entries: tuple[TableRow, ...]
    references: tuple[TableRow, ...]
    baseline: Row | None
    alternatives: int

    @property
    def every(self) -> tuple[TableRow, ...]:
        """The ranked rows, then those beside them."""
        return (*self.entries, *self.references)

    @property
    def search(self) -> bool:
        """Whether this is a hyper-parameter search: accuracy on training data held out, not a result."""
        return self.setting.split == "validation"

    @property
    def unranked(self) -> list[str]:
        """Which rows have no rank, and why, one sentence each."""
        return [f"{e.row.title} is unranked: {e.place.why}." for e in self.entries if e.place.why]

    @property
    def notes(self) -> list[str]:
        """What a reader must know about this table beyond the ranking rule."""
        notes = []
        runs = [run for e in self.every for run in e.row.counted]
        if self.baseline is None:
            notes.append(f"No finished {BASELINE} run here: rows are ordered by mean accuracy.")
        elif self.alternatives > 1:
            notes.append(f"{self.alternatives} {BASELINE} rows: paired with the first, {self.baseline.title}.")
        claims = {(e.row.title, e.row.shared("claimed"), e.row.shared("claim")) for e in self.entries}
        for title, claimed, claim in sorted((c for c in claims if c[1] is not None), key=str):
            why = claim or "no assumptions given"
            notes.append(f"{title} claims ε = {epsilon(claimed)}, which does not rank ({why}).")
        jobs = sorted({run.jobs for run in runs if run.jobs})
        if len(jobs) > 1:
            notes.append(f"Throughput was measured with {jobs[0]} to {jobs[-1]} runs at a time: compare with care.")
        elif jobs and jobs[0] > 1:
            notes.append(f"Throughput was measured with {jobs[0]} runs at a time on the device.")
        if busy := sum(r.busy for r in runs):
            notes.append(
                f"{BUSY} Other work ran on the machine during {busy} of {len(runs)} runs: the load average was at "
                f"least {CROWDED:g} times the cores in use. A row is timed by its other runs; where it has none its "
                "timings are marked: do not compare them."
            )
        if any(e.row.first.stages for e in self.every):
            notes.append("Examples/s of runs of two stages are those of the first stage, seconds are of both.")
        if any(e.row.stale for e in self.every):
            notes.append("Rows marked stale hold runs made by other code than today's.")
        merged = [run for e in self.every for run in e.row.runs if run.origin]
        if merged:
            sources = "; ".join(dict.fromkeys(run.origin.partition(";")[0] for run in merged))
            notes.append(
                f"Rows marked merged hold runs made elsewhere ({sources}): their accuracy and times are their sender's "
                "word. Each run's page says whether its privacy was computed again here."
            )
        return notes


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
    tables: tuple[RankedTable, ...]
    published: tuple[PublishedValue, ...]
    tuning: tuple[tuple[str, str], ...]
    file: str = ""
    left_out: str = ""

    @property
    def results(self) -> tuple[RankedTable, ...]:
        """The tables that are results, not hyper-parameter searches."""
        return tuple(t for t in self.tables if not t.search)

    @cached_property
    def facts(self) -> list[tuple[str, str]]:
        """What was run, as (name, text) pairs."""
        runs = self.runs
        seeds = sorted({r.seed for r in runs if r.seed is not None})
        epsilons = ", ".join(epsilon(e) for e in sorted({r.setting.epsilon for r in runs}))
        deltas = ", ".join(small(d) for d in sorted({r.setting.delta for r in runs if r.setting.delta is not None}))
        devices = sorted({device_text(r.device) for r in runs} - {""}, key=natural)
        code = sorted({r.commit[:12] + (" with local changes" if r.dirty else "") for r in runs if r.commit})
        facts = {
            "Profile": f"reduced: {self.reduced}" if self.reduced else "",
            "Tasks": joined(r.setting.task for r in runs),
            "Methods": joined(r.method for r in runs),
            "Privacy": f"ε = {epsilons}" + (f" at δ = {deltas}" if deltas else "") if epsilons else "",
            "Noise calibrated by": joined(r.calibrated for r in runs if math.isfinite(r.setting.epsilon)),
            "Seeds": f"{len(seeds)} ({listing(seeds)})" if seeds else "",
            "Runs": f"{len(runs)} ({by_status(tally(runs))})" if runs else "none yet",
            "Left out": self.left_out,
            "Quarantined records": "; ".join(self.quarantine),
            "Device": "; ".join(devices),
            "Dates": dates(runs),
            "Code": ", ".join(code),
            "Torch": joined(r.torch for r in runs),
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
    rows = rows_of(runs)
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
        published=tuple(v for claim in published for v in verdicts(claim, rows, bool(why))),
        tuning=tuple((visible(str(k)), scalar(v)) for k, v in (tuning or {}).items()),
        file=visible(file),
        left_out=visible(left_out),
    )


def _tables(rows: Sequence[Row]) -> list[RankedTable]:
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
        _table(i, s, k, by_setting[s, k], references[_place(s, k)] if math.isfinite(s.epsilon) else [], speeds)
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
) -> RankedTable:
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

    def entries(rows: Sequence[Row], reference: bool) -> list[TableRow]:
        order, places = rank([Entrant(row.scores, paired(row), _barred(row), judged_on) for row in rows])
        return [entry(rows[i], places[i], reference) for i in order]

    def entry(row: Row, place: Standing, reference: bool) -> TableRow:
        doubted = {"rate", "seconds", "reach", "reference", "baseline"} if row.busy else set()
        ratios = {}
        for name, method in (("reference", REFERENCE), ("baseline", BASELINE)):
            rate, busy = speeds.get(_speed_key(row, method), (None, False))
            ratios[name] = row.rate / rate if row.rate is not None and rate is not None else None
            doubted |= {name} if busy else set()
        own = baseline is not None and row.first.group == baseline.first.group
        return TableRow(row, place, own, reference, ratios["reference"], ratios["baseline"], frozenset(doubted))

    entered, beside = tuple(entries(members, False)), tuple(entries(references, True))
    return RankedTable(f"table-{index}", setting, kind, entered, beside, baseline, alternatives)


def _barred(row: Row) -> str:
    if n := row.counts.get("diverged", 0):
        return f"{n} of {len(row.runs)} runs diverged"
    n = sum(run.believed for run in row.counted)
    return f"the privacy of {n} of {len(row.counted)} runs is their sender's word" if n else ""


def _baseline(rows: Sequence[Row]) -> tuple[Row | None, int]:
    """The row to pair with, and among how many: `BASELINE` by its plain label, else the first by name."""
    named = [row for row in rows if row.first.method == BASELINE and row.scores]
    ordered = sorted(named, key=lambda r: (r.label != BASELINE, natural(r.title), r.first.group, r.device.fingerprint))
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
    chosen = {key: labels[key[-1] if key[-1] in labels else min(labels, key=natural)] for key, labels in found.items()}
    return {key: quietest((row.rate, row.busy) for row in there) for key, there in chosen.items()}


def quietest(timings: Iterable[tuple[float | None, bool]]) -> tuple[float, bool]:
    """The median of timings, and whether they are of a busy machine: those of a quiet one where there are any."""
    known = list(timings)
    quiet = [value for value, busy in known if not busy and value is not None]
    return median(quiet or [value for value, _ in known if value is not None]), not quiet


def timing(entry: TableRow, name: str, text: str) -> str:
    """The text of a timing, marked where a busy machine has touched it."""
    return text + BUSY if name in entry.doubted and text != "–" else text


def place(entry: TableRow) -> str:
    """``1``, ``1=`` where the rank is shared, ``–`` where there is none."""
    if entry.place.rank is None:
        return "–"
    return f"{entry.place.rank}{'=' if entry.place.tied else ''}"


def heading(table: RankedTable) -> str:
    """``mnist-5k/tanh-cnn, ε = 3``."""
    return f"{table.setting.task}, ε = {epsilon(table.setting.epsilon)}"


def statement(table: RankedTable) -> list[str]:
    """What holds for every row of `table`: delta, relation, unit, split, kind of device."""
    s = table.setting
    delta = "" if s.delta is None else f"δ = {small(s.delta)}"
    split = "validation split" if table.search else f"{s.split} split"
    return [t for t in (delta, s.relation, f"unit: {s.unit}" if s.unit else "", split, table.kind) if t]
