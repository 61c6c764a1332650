"""The board as one self-contained HTML page: no request leaves it, and nothing in a record can become markup.

Jinja escapes every value; the page's policy (`Content-Security-Policy`) lets only its own script run, by its
hash, and forbids every fetch, so a file opened from a mail attachment is as harmless as a printed page.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from .figures import SERIES, accuracy_data, inline, throughput_data
from .read import Run, listing, natural
from .statistics import RULE, Interval
from .tables import (
    REDUCED_SUITE,
    Board,
    Entry,
    Row,
    Table,
    _device,
    bounds,
    count,
    epsilon,
    heading,
    interval,
    percent,
    place,
    ratio,
    small,
    statement,
    statuses,
)
from .text import VERDICTS, measure, measured, outcome, sigma

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Column:
    """A column of a leaderboard table: `more` columns show on demand, or where rows differ in them."""

    key: str
    title: str
    help: str
    number: bool = True
    more: bool = False

    @property
    def heading(self) -> str:
        """The title, which may break only after "vs"."""
        return self.title.replace(" ", "\u00a0").replace("-", "\u2011").replace("vs\u00a0", "vs ")


@dataclass(frozen=True)
class Cell:
    """A cell: its text, what it sorts by (digits, empty last), a note, whether it leads to the runs."""

    text: str
    by: str = ""
    note: str = ""
    link: bool = False


COLUMNS = (
    Column("accuracy", "Accuracy, %", "Mean over seeds with its 95 % t-interval"),
    Column(
        "difference",
        "Δ baseline",
        "Paired difference to the baseline on common seeds, points, 95 % interval",
    ),
    Column("pld", "ε spent", "Epsilon spent by the PLD accountant, which ranks; the largest over runs"),
    Column("rdp", "ε RDP", "Epsilon spent by the RDP accountant, a cross-check: an upper bound, looser"),
    Column(
        "claimed",
        "ε claimed",
        "Epsilon claimed under assumptions that the ranking accountant does not make",
    ),
    Column("target", "ε target", "The epsilon that the noise was calibrated to", more=True),
    Column("delta", "δ", "Probability with which the guarantee may fail", more=True),
    Column("relation", "Relation", "Which datasets count as neighbours", number=False, more=True),
    Column(
        "sampling",
        "Sampling",
        "How batches were drawn, which the accountant relies on",
        number=False,
        more=True,
    ),
    Column("sigma", "σ", "Noise multiplier: noise over sensitivity", more=True),
    Column("rate", "Examples/s", "Examples per second in training, the median over runs"),
    Column(
        "reference",
        "vs non-private",
        "Examples per second relative to non-private, same task and device",
    ),
    Column("baseline", "vs dp-sgd", "Examples per second relative to dp-sgd, same task and device"),
    Column("memory", "Peak MiB", "Peak memory, MiB, the largest over runs"),
    Column("seconds", "Train s", "Seconds of training, the median over runs"),
    Column(
        "public", "Public data", "Public data that the method or the model has seen", number=False, more=True
    ),
    Column("device", "Device", "Where it ran", number=False, more=True),
    Column("seeds", "Seeds", "Seeds that were run or tried", number=False),
    Column("runs", "Runs", "How the runs ended; failures are rows with their reason", number=False),
)

RUN_COLUMNS = (
    Column("id", "Run", "The run's id", number=False),
    Column("method", "Method", "The method's label", number=False),
    Column("task", "Task", "Dataset and model", number=False),
    Column("target", "ε target", "The epsilon that the noise was calibrated to"),
    Column("seed", "Seed", "The run's seed"),
    Column("status", "Status", "How the run ended", number=False),
    Column("accuracy", "Accuracy, %", "Accuracy at the last step"),
    Column("spent", "ε spent", "Epsilon spent by the ranking accountant"),
    Column("rate", "Examples/s", "Examples per second in training"),
)


def page(
    board: Board,
    figures: Mapping[str, str],
    *,
    digest: str = "",
    here: Path = Path("."),
    results: Path = Path("."),
) -> str:
    """The whole page as text.

    `figures` holds the SVG texts by file name (those missing are left out); `digest` is kept in the head;
    record paths lie under `results` and links to them start from the folder `here`, where the page will be.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (HERE / "page.js").read_text("utf-8")
    prefix = quote(Path(os.path.relpath(results, here)).as_posix())
    names = _RunNames(board, prefix)
    return environment.get_template("page.html").render(
        board=board,
        digest=digest,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode(),
        style=(HERE / "page.css").read_text("utf-8"),
        rule=RULE,
        verdict_rule=VERDICTS,
        columns=COLUMNS,
        run_columns=RUN_COLUMNS,
        overviews=_overviews(board),
        tables=[_table(t, names) for t in board.tables],
        failed=[r for r in board.runs if r.status != "ok"],
        runs=[_run(r, board, names) for r in board.runs],
        verdicts=[_verdict(v, names) for v in board.published],
        figures=[_figure(*f, board) for f in _FIGURES if f[0] in figures],
        svg={
            name: inline(text, f"f{i}-", _FIGURE_LABELS[name])
            for i, (name, text) in enumerate(sorted(figures.items()))
        },
        choices=_choices(board),
    )


# ------------------------------------------------------------ --- figures

_FIGURES = (
    ("accuracy-vs-epsilon.svg", "Accuracy against epsilon"),
    ("throughput.svg", "Throughput"),
)
_FIGURE_LABELS = {
    "accuracy-vs-epsilon.svg": "Accuracy against target epsilon for each method; the tables hold the numbers",
    "throughput.svg": "Examples per second for each method; the tables hold the numbers",
}


def _figure(name: str, title: str, board: Board) -> dict[str, str]:
    if name == "throughput.svg":
        bars = throughput_data(board)
        crowded = any(len(b.values) == SERIES for b in bars)
        relative = bool(bars) and all(b.relative for b in bars)
        what = "relative to non-private training on the same task and device" if relative else "as measured"
        caption = f"Examples per second, {what}; the median over runs and epsilons."
    else:
        panels = accuracy_data(board)
        crowded = any(len(p.series) == SERIES for p in panels)
        caption = "Mean over seeds; bands are 95 % t-intervals; the dashed line is training without privacy."
    if crowded:
        caption += f" At most {SERIES} series are drawn; the tables hold all."
    return {"name": name, "title": title, "caption": caption}


# ------------------------------------------------------------ --- leaderboard


class _RunNames:
    """Where each run's line is in the page (unique, whatever the ids are) and where its record file is."""

    def __init__(self, board: Board, prefix: str) -> None:
        self.prefix = prefix
        self._names: dict[int, str] = {}
        taken: Counter[str] = Counter()
        for run in board.runs:
            name = "run-" + (re.sub(r"[^A-Za-z0-9_-]+", "-", run.id).strip("-") or "x")
            taken[name] += 1
            self._names[id(run)] = name if taken[name] == 1 else f"{name}.{taken[name]}"

    def anchor(self, run: Run) -> str:
        return self._names[id(run)]

    def record(self, run: Run) -> str:
        """Link to the record file, or nothing where the record did not come from a file."""
        return f"{self.prefix}/{quote(run.path.encode('utf-8', 'replace'))}" if run.path else ""


def _by(value: float | None) -> str:
    return "" if value is None else repr(float(value))


def _table(table: Table, names: _RunNames) -> dict[str, Any]:
    scale = _Scale([e.place.difference for e in table.entries if not e.baseline])
    rows = [_row(e, place(e), table, names, scale) for e in table.entries]
    references = [_row(e, "ref", table, names, scale) for e in table.references]
    everything = rows + references
    same = []
    for column in COLUMNS:
        values = {r["cells"][column.key].text for r in everything}
        if column.more and len(values) == 1 and column.key in ("sampling", "public", "device"):
            same += [f"{column.title.lower()}: {v}" for v in values if v not in ("–", "none")]
    empty = {c.key for c in COLUMNS if all(r["cells"][c.key].text == "–" for r in everything)}
    return {
        "table": table,
        "heading": heading(table),
        "statement": [*statement(table), *same],
        "epsilon": epsilon(table.setting.epsilon),
        "baseline": table.baseline.title if table.baseline else "",
        "rows": rows,
        "references": references,
        "columns": [c for c in COLUMNS if c.key not in empty],
        "unranked": [(e.row.title, e.place.why) for e in table.entries if e.place.why],
    }


class _Scale:
    """Maps differences to 0..100 for the small interval plots of one table; zero is always on it."""

    def __init__(self, intervals: Iterable[Interval | None]) -> None:
        ends = [x for i in intervals if i for x in (i.low, i.high, i.mean) if x is not None]
        low, high = min([0.0, *ends]), max([0.0, *ends])
        self.known = high > low
        pad = 0.06 * (high - low)
        self.low, self.width = low - pad, (high - low) + 2 * pad

    def at(self, value: float) -> float:
        return round(100 * (value - self.low) / self.width, 2)

    def strip(self, value: Interval | None) -> dict[str, float]:
        """Where zero is and, if there is an interval, its ends and its mean."""
        if not self.known:
            return {}
        ends = {} if value is None else {"low": value.low, "high": value.high, "mean": value.mean}
        known = {name: self.at(x) for name, x in ends.items() if x is not None}
        return {"zero": self.at(0.0), **(known if len(known) == 3 else {})}


def _row(entry: Entry, rank: str, table: Table, names: _RunNames, scale: _Scale) -> dict[str, Any]:
    row, run = entry.row, entry.row.first
    return {
        "entry": entry,
        "row": row,
        "run": run,
        "rank": rank,
        "by": "" if rank == "ref" else _by(entry.place.rank),
        "best": rank != "ref" and entry.place.rank == 1,
        "anchor": names.anchor(run),
        "cells": _cells(entry, table),
        "strip": scale.strip(None if entry.baseline or rank == "ref" else entry.place.difference),
        "details": _details(row),
        "paper": _link(run.paper),
        "device": _device(row.device),
        "statuses": " ".join(row.counts),
        "public": row.shared("public_data") or "",
        "ids": [(r, names.anchor(r)) for r in row.runs],
    }


def _cells(entry: Entry, table: Table) -> dict[str, Cell]:
    row, gap = entry.row, entry.place.difference
    accuracy = row.accuracy
    n = f"n = {accuracy.n}" if accuracy else ""
    claimed: float | None = row.shared("claimed")
    noise: float | None = row.shared("sigma")
    return {
        "accuracy": Cell(interval(accuracy), _by(accuracy.mean if accuracy else None), n, link=True),
        "difference": Cell(
            "baseline" if entry.baseline else "–" if gap is None else percent(gap.mean, signed=True),
            _by(gap.mean if gap else None),
            "" if entry.baseline else _pairs_note(gap, entry),
        ),
        "pld": Cell(epsilon(row.epsilon), _by(row.epsilon), link=True),
        "rdp": Cell(epsilon(row.cross_check), _by(row.cross_check)),
        "claimed": Cell(epsilon(claimed), _by(claimed)),
        "target": Cell(epsilon(row.setting.epsilon), _by(row.setting.epsilon)),
        "delta": Cell(small(row.setting.delta), _by(row.setting.delta)),
        "relation": Cell(row.setting.relation or "–"),
        "sampling": Cell(row.shared("sampling") or "–"),
        "sigma": Cell(sigma(noise), _by(noise)),
        "rate": Cell(count(row.rate), _by(row.rate), link=True),
        "reference": Cell(ratio(entry.to_reference), _by(entry.to_reference)),
        "baseline": Cell(ratio(entry.to_baseline), _by(entry.to_baseline)),
        "memory": Cell(count(row.peak_memory), _by(row.peak_memory)),
        "seconds": Cell(count(row.train_seconds), _by(row.train_seconds)),
        "public": Cell(row.shared("public_data") or "–"),
        "device": Cell(_device(row.device) or "–"),
        "seeds": Cell(listing(row.seeds) or "–"),
        "runs": Cell(statuses(row), link=True),
    }


def _pairs_note(gap: Interval | None, entry: Entry) -> str:
    if gap is None:
        return ""
    return bounds(gap, signed=True) or "one common seed"


def _details(row: Row) -> list[tuple[str, str]]:
    """What stands behind the method's name, as (name, text)."""
    run = row.first
    planned = ", ".join(f"{name} {epsilon(value)}" for name, value in sorted(run.planned.items()))
    jobs = sorted({r.jobs for r in row.counted if r.jobs})
    pairs = [
        ("About", run.summary),
        ("Family", run.family),
        ("Parameters", ", ".join(f"{k} = {v}" for k, v in run.parameters)),
        *((name.capitalize(), part) for name, part in run.parts),
        ("Schedule", f"batch {run.batch}, {run.steps} steps" if run.batch and run.steps else ""),
        ("Numerics", run.dtype),
        ("Noise", f"multiplier {run.sigma:.6g}" if run.sigma is not None else ""),
        ("Sampling", row.shared("sampling") or ""),
        ("ε planned", planned),
        ("ε claimed", f"{epsilon(row.shared('claimed'))} ({row.shared('claim') or 'no assumptions given'})"
         if row.shared("claimed") is not None else ""),
        ("Public data", row.shared("public_data") or ""),
        ("Device", _device(row.device)),
        ("Runs at a time", ", ".join(map(str, jobs))),
        ("Group", run.group),
    ]  # fmt: skip
    return [(name, text) for name, text in pairs if text]


def _overviews(board: Board) -> list[dict[str, Any]]:
    """Accuracy of every method at every epsilon, one grid for each task, split and kind of device."""
    groups: dict[tuple[str, str, str, str], list[Table]] = defaultdict(list)
    for table in board.results or board.tables:
        groups[table.setting.task, table.setting.digest, table.setting.split, table.kind].append(table)
    out = []
    kinds = {kind for *_, kind in groups}
    for (task, _, split, kind), tables in groups.items():
        grid: dict[str, dict[int, Entry]] = defaultdict(dict)
        references: dict[str, Entry] = {}
        for i, table in enumerate(tables):
            for entry in table.entries:
                grid[entry.row.title][i] = entry
            references |= {e.row.title: e for e in table.references}
        if len(grid) > 60:
            continue
        lines = [
            (title, [cells.get(i) for i in range(len(tables))])
            for title, cells in sorted(grid.items(), key=lambda g: natural(g[0]))
        ]
        lines.sort(key=lambda line: -sum(e.row.accuracy.mean for e in line[1] if e and e.row.accuracy))
        out.append({
            "task": task,
            "title": ", ".join([task, f"{split} split", *([kind] if len(kinds) > 1 else [])]),
            "tables": tables,
            "epsilons": [epsilon(t.setting.epsilon) for t in tables],
            "lines": [(title, [_glance(e) for e in entries]) for title, entries in lines],
            "references": [(t, _glance(e)) for t, e in sorted(references.items())],
        })  # fmt: skip
    return out


def _glance(entry: Entry | None) -> dict[str, Any]:
    if entry is None:
        return {"text": "", "half": "", "best": False}
    a = entry.row.accuracy
    if a is None:
        return {
            "text": next((s for s in entry.row.counts if s != "ok"), "–").replace("_", " "),
            "half": "",
            "best": False,
        }
    return {
        "text": percent(a.mean),
        "half": "" if a.half is None else f"± {percent(a.half)}",
        "best": entry.place.rank == 1,
    }


# ------------------------------------------------------------ --- runs and claims


def _run(run: Run, board: Board, names: _RunNames) -> dict[str, Any]:
    suite = shlex.quote(
        f"suites/{board.suite.removesuffix(REDUCED_SUITE) if board.reduced else board.suite}.toml"
    )
    profile = " --reduced" if board.reduced else ""
    cells = {
        "id": Cell(run.id),
        "method": Cell(run.label),
        "task": Cell(run.setting.task, note="" if run.setting.split == "test" else run.setting.split),
        "target": Cell(epsilon(run.setting.epsilon), _by(run.setting.epsilon)),
        "seed": Cell("–" if run.seed is None else str(run.seed), _by(run.seed)),
        "status": Cell(run.status.replace("_", " "), note=run.reason),
        "accuracy": Cell(percent(run.accuracy), _by(run.accuracy)),
        "spent": Cell(epsilon(run.epsilon), _by(run.epsilon)),
        "rate": Cell(count(run.rate), _by(run.rate)),
    }
    return {
        "run": run,
        "anchor": names.anchor(run),
        "record": names.record(run),
        "cells": cells,
        "epsilon": epsilon(run.setting.epsilon),
        "device": _device(run.device),
        "commands": "\n".join((
            f"epsbench show {shlex.quote(run.id)}",
            f"epsbench run {suite}{profile} --only {shlex.quote(run.id)}",
            "tags.\"epsbench.id\" = '{}'".format(run.id.replace("'", "\\'")),
        )),
    }  # fmt: skip


def _verdict(verdict: Any, names: _RunNames) -> dict[str, Any]:
    return {
        "verdict": verdict,
        "epsilon": epsilon(verdict.epsilon),
        "published": measure(verdict.metric, verdict.value),
        "measured": measured(verdict),
        "outcome": outcome(verdict),
        "source": _link(verdict.source),
        "anchor": names.anchor(verdict.row.first) if verdict.row else "",
    }


def _link(text: str) -> dict[str, str]:
    """`text` with the address it stands for, if it is a paper or a web address."""
    if found := re.match(r"arxiv:\s*([\w.\-/]+)", text, re.I):
        return {"text": text, "href": f"https://arxiv.org/abs/{found[1]}"}
    if found := re.match(r"doi:\s*(10\.\S+)", text, re.I):
        return {"text": text, "href": f"https://doi.org/{quote(found[1])}"}
    return {"text": text, "href": text if re.match(r"https?://[^\s\"'<>]+$", text) else ""}


def _choices(board: Board) -> list[dict[str, Any]]:
    """The filters: name, label and the values that occur (a filter with one value is not shown)."""
    runs = board.runs
    found: list[tuple[str, str, Iterable[str]]] = [
        ("task", "Task", (r.setting.task for r in runs)),
        ("epsilon", "ε", (epsilon(e) for e in sorted({t.setting.epsilon for t in board.tables}))),
        ("method", "Method", (r.method for r in runs)),
        ("family", "Family", (r.family for r in runs)),
        ("device", "Device", (_device(r.device) for r in runs)),
        ("public", "Public data", (r.public_data for r in runs)),
        ("status", "Status", (r.status for r in runs)),
    ]
    out = []
    for key, label, values in found:
        known = list(dict.fromkeys(v for v in values if v))
        if key != "epsilon":
            known.sort(key=natural)
        if len(known) > 1:
            out.append({"key": key, "label": label, "values": known})
    return out
