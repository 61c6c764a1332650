"""Writes the board as data for the page's script: one JSON value with the tables and their rows.

A row is a list in the order of `FIELDS`, so that ten thousand rows stay a few megabytes. Numbers are as they were
measured (fractions, seconds, MiB); an infinite one is the text ``inf``, an unknown one null. What a reader sees of them
is settled in one place, ``board.js``; intervals come as the text that all files have.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from harness.report.model.checked import Checked, of_row
from harness.report.model.fields import Fields, listing, natural, scalar
from harness.report.model.rows import Row, statuses
from harness.report.model.statistics import Interval
from harness.report.model.tables import Board, RankedTable, TableRow, heading, statement
from harness.report.model.words import ABSENT, bounds, device_text, epsilon, half, percent

REACH = 0.99
"""A run has reached dp-sgd's accuracy at this share of dp-sgd's mean."""

FIELDS = (
    "table", "role", "rank", "tied", "why", "title", "method", "family", "public", "device", "status",
    "accuracy", "difference", "planned", "spent", "rdp", "claimed", "claim", "audited", "checked", "tuned", "rate",
    "reference", "baseline", "memory", "seconds", "reach", "busy", "seeds", "runs", "stale", "merged",
    "failures", "href", "more",
)  # fmt: skip


@dataclass(frozen=True)
class Heading:
    """A column of the leaderboard. `kind` says how a cell is written; `more` columns show on demand."""

    key: str
    title: str
    help: str
    kind: str
    more: bool = False


COLUMNS = (
    Heading("suite", "Suite", "The suite that asked for the runs", "text"),
    Heading("task", "Task", "Data set and model", "text"),
    Heading("target", "ε target", "The epsilon that the noise was calibrated to", "epsilon"),
    Heading("accuracy", "Accuracy, %", "Mean over seeds with half of its 95 % t-interval", "accuracy"),
    Heading("difference", "Δ dp-sgd", "Paired difference to dp-sgd on common seeds, points", "difference"),
    Heading("planned", "ε planned", "Epsilon of the plan before training, by PLD", "epsilon", True),
    Heading("spent", "ε spent", "Epsilon spent by the PLD accountant, which ranks; the largest over runs", "epsilon"),
    Heading("rdp", "ε RDP", "Epsilon spent by the RDP accountant, a cross-check: an upper bound", "epsilon", True),
    Heading("claimed", "ε claimed", "Epsilon claimed under assumptions, which never ranks", "claimed"),
    Heading("audited", "ε audited ≥", "Lower bound found by an audit of this method at this epsilon", "audited"),
    Heading("checked", "Checked", "Whether the method passes the conformance checks, by epsbench check", "checked"),
    Heading("tuned", "ε with tuning", "Epsilon that also pays for the search of hyper-parameters", "epsilon"),
    Heading(
        "rate", "Examples/s", "Examples per second in training, median over runs; of two stages the first", "count"
    ),
    Heading(
        "reference", "vs non-private", "Examples per second relative to non-private, same task and device", "ratio"
    ),
    Heading("baseline", "vs dp-sgd", "Examples per second relative to dp-sgd, same task and device", "ratio"),
    Heading("memory", "Peak MiB", "Peak memory, MiB, the largest over runs", "count"),
    Heading("seconds", "Train s", "Seconds of training on the device, the median over runs", "count", True),
    Heading(
        "reach", "s to dp-sgd", "Seconds of training until 99 % of dp-sgd's mean accuracy is first logged", "count"
    ),
    Heading("family", "Family", "What the method changes", "text", True),
    Heading("public", "Public data", "Public data that the method or the model has seen", "text", True),
    Heading("device", "Device", "Where it ran", "text", True),
    Heading("seeds", "Seeds", "Seeds that were run or tried", "text", True),
    Heading("runs", "Runs", "How the runs ended; failures are rows with their reason", "text"),
)


@dataclass(frozen=True)
class Audit:
    """What an audit found: a lower bound on epsilon, for a method at the epsilon it claims."""

    method: str
    target: float
    claimed: float
    lower: float
    confidence: float | None
    instrument: str
    task: str


def audits(found: Iterable[Mapping[str, Any]]) -> list[Audit]:
    """The audits that can be read: ``method``, ``epsilon_claimed`` and ``epsilon_audited`` are needed."""
    out = []
    for f in map(Fields, found):
        claimed, lower, target = map(f.number, ("epsilon_claimed", "epsilon_audited", "epsilon_target"))
        if isinstance(f.any("method"), str) and claimed is not None and lower is not None:
            words = [
                scalar(one or "") for one in (f.any("method"), f.any("instrument"), f.any("task.name") or f.any("task"))
            ]
            target = claimed if target is None else target
            out.append(Audit(words[0], target, claimed, lower, f.number("confidence"), *words[1:]))
    return sorted(out, key=lambda a: (a.method, a.target, -a.lower, a.instrument, a.task))


def audit_of(row: Row, known: Sequence[Audit]) -> Audit | None:
    """The audit of the row's method at its epsilon: of its own task before others, and the largest lower bound.

    None for a row of two stages: what was audited is one of them alone.
    """
    if row.first.stages:
        return None
    fits = [
        a for a in known if a.method == row.first.method and math.isclose(a.target, row.setting.epsilon, rel_tol=1e-3)
    ]
    return min(fits, key=lambda a: (a.task not in (row.setting.task, row.first.dataset), -a.lower), default=None)


def exceeds(row: Row, audit: Audit) -> bool:
    """Whether the lower bound is above a promise: the audited claim, what the row spent, or its claim under
    assumptions."""
    promises = (audit.claimed, row.epsilon, row.shared("claimed"))
    return any(p is not None and audit.lower > p for p in promises)


class Content:
    """What the pages of a suite are made of, and where each row and each method has its page, by names of their own.

    `audits` are those that `audits` reads, `checked` are the checks by method, `sources` is what `sources.describe`
    says of the methods. `prefix` is the way from the suite's folder `here` to the results.
    """

    def __init__(
        self,
        board: Board,
        *,
        audits: Sequence[Audit] = (),
        checked: Mapping[str, Checked] | None = None,
        sources: Mapping[str, Any] | None = None,
        results: Path = Path("results"),
        here: Path = Path("reports/x"),
    ) -> None:
        self.board, self.audits, self.checked, self.sources = board, audits, checked or {}, sources
        self.prefix = quote(Path(os.path.relpath(results, here)).as_posix())
        groups = [row.first.group for row in board.rows]
        names = sorted({row.first.method for row in board.rows})
        self._rows = dict(zip(map(id, board.rows), _addresses("runs", groups), strict=True))
        self.methods = dict(zip(names, _addresses("methods", names), strict=True))

    @property
    def below(self) -> tuple[str, ...]:
        """Where the pages below the suite's are."""
        return (*self._rows.values(), *self.methods.values())

    def href(self, row: Row | None) -> str:
        """The page of a row, from the suite's folder."""
        return self._rows[id(row)] if row else ""

    def record(self, path: str, name: str) -> str:
        """From a page below the suite's folder to a file of the run whose record is at `path`; empty if unknown."""
        folder = path.rpartition("/")[0]
        return f"../{self.prefix}/{quote(f'{folder}/{name}'.encode('utf-8', 'replace'))}" if folder else ""


def _addresses(folder: str, texts: Iterable[str]) -> Iterator[str]:
    """A page for each text; one that is named as another already gets a number."""
    taken: Counter[str] = Counter()
    for text in texts:
        name = re.sub(r"[^A-Za-z0-9_-]+", "-", text).strip("-").lower()[:80] or "x"
        taken[name] += 1
        yield f"{folder}/{name if taken[name] == 1 else f'{name}.{taken[name]}'}.html"


def payload(content: Content) -> dict[str, Any]:
    """Everything the leaderboard's script needs of one suite."""
    board = content.board
    return {
        "fields": list(FIELDS),
        "question": board.question,
        "left_out": board.left_out,
        "tables": [_table(board, table) for table in board.tables],
        "rows": [_row(i, entry, table, content) for i, table in enumerate(board.tables) for entry in table.every],
    }


def merged(payloads: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The payloads of several suites as one; a suite's links lead into its folder."""
    tables: list[Any] = []
    rows: list[list[Any]] = []
    href = FIELDS.index("href")
    for suite in sorted(payloads, key=natural):
        first = len(tables)
        tables += payloads[suite]["tables"]
        for row in payloads[suite]["rows"]:
            row = [row[0] + first, *row[1:]]
            row[href] = f"{quote(suite)}/{row[href]}" if row[href] else ""
            rows.append(row)
    return {"fields": list(FIELDS), "tables": tables, "rows": rows}


def dumps(value: Any) -> str:
    """`value` as JSON for an element of a page: ASCII, and nothing in it can end the element."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def target(table: RankedTable) -> float | None:
    """The accuracy that "time to dp-sgd" is the time to, None where dp-sgd did not finish."""
    mean = table.baseline.accuracy if table.baseline else None
    return None if mean is None else REACH * mean.mean


def _table(board: Board, table: RankedTable) -> dict[str, Any]:
    baseline = f"baseline: {table.baseline.title}" if table.baseline else "no baseline"
    return {
        "suite": board.suite,
        "name": table.name,
        "task": table.setting.task,
        "target": _number(table.setting.epsilon),
        "epsilon": epsilon(table.setting.epsilon),
        "heading": heading(table),
        "statement": " · ".join([*statement(table), baseline]),
        "search": int(table.search),
        "notes": [*table.unranked, *table.notes],
    }


def _row(index: int, entry: TableRow, table: RankedTable, content: Content) -> list[Any]:
    row, place, run = entry.row, entry.place, entry.row.first
    role = "reference" if entry.reference else "search" if table.search else "baseline" if entry.baseline else ""
    audit, goal = audit_of(row, content.audits), target(table)
    values: dict[str, Any] = {
        "table": index,
        "role": role,
        "rank": None if entry.reference else place.rank,
        "tied": int(place.tied),
        "why": place.why,
        "title": row.title,
        "method": run.method,
        "family": run.family,
        "public": row.shared("public_data") or "",
        "device": device_text(row.device),
        "status": list(row.counts),
        "accuracy": _interval(row.accuracy),
        "difference": None if entry.baseline else _interval(place.difference, signed=True),
        "planned": _by(run.planned.get("pld"), "pld" in run.refused),
        "spent": _number(row.epsilon),
        "rdp": _by(row.cross_check, "rdp" in row.refused),
        "claimed": _number(row.shared("claimed")),
        "claim": row.shared("claim") or "",
        "audited": audit and [audit.lower, audit.confidence, audit.instrument, audit.task, int(exceeds(row, audit))],
        "checked": list(of_row(content.checked, row)),
        "tuned": _number(row.shared("tuned")),
        "rate": _number(row.rate),
        "reference": _number(entry.to_reference),
        "baseline": _number(entry.to_baseline),
        "memory": _number(row.peak_memory),
        "seconds": _number(row.train_seconds),
        "reach": None if goal is None else _number(row.seconds_to(goal)),
        "busy": sorted(entry.doubted),
        "seeds": listing(row.seeds),
        "runs": statuses(row),
        "stale": row.stale,
        "merged": row.merged,
        "failures": [list(f) for f in row.failures],
        "href": content.href(row),
        "more": " ".join([*(f"{k}={v}" for k, v in run.parameters), *(r.id for r in row.runs)]),
    }
    return [values[name] for name in FIELDS]


def _number(value: float | None) -> float | str | None:
    if value is None or math.isnan(value):
        return None
    return "inf" if math.isinf(value) else float(f"{value:.9g}")


def _by(value: float | None, refused: bool) -> float | str | None:
    """Epsilon by an accountant, or that it does not apply."""
    return ABSENT if value is None and refused else _number(value)


def _interval(value: Interval | None, signed: bool = False) -> list[Any] | None:
    """Mean and ends to sort and draw by, the number of seeds, and what is read: the mean, and its interval."""
    if value is None:
        return None
    around = bounds(value, signed) if signed else half(value)
    return [*map(_number, (value.mean, value.low, value.high)), value.n, percent(value.mean, signed), around]
