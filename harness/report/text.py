"""Writes the board as text: Markdown for repositories, CSV for spreadsheets and pandas, a table for the terminal."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

from harness.records import tables
from harness.report.model.fields import listing
from harness.report.model.published import PublishedValue
from harness.report.model.rows import BASELINE, cross_checked, statuses
from harness.report.model.statistics import RULE, Interval
from harness.report.model.tables import Board, RankedTable, TableRow, heading, place, statement, timing
from harness.report.model.words import count, epsilon, gap, interval, percent, ratio

# Markdown -------------------------------------------------------------------------------------------------


def escape(text: str) -> str:
    """`text` as one Markdown table cell in which nothing is markup."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~$#])", r"\\\1", " ".join(text.split()))


VERDICT_COLUMNS = (
    "method", "task", "ε", "metric", "published", "measured", "verdict", "source", "note", "what would change it",
)  # fmt: skip
VERDICTS = (
    "Agrees: the published value lies inside the 95 % interval of our measurement; a wide interval agrees easily, "
    "so read its width. Differences are measured minus published. Not comparable: we have no such measurement, or one "
    "that is no test of the published value, and the row says why."
)
LEGEND = "± is half of a 95 % t-interval over seeds; differences are paired by seed, their interval in brackets."


def markdown(board: Board) -> str:
    """The leaderboard as GitHub-flavoured Markdown."""
    name = escape(board.suite)
    published = ", [published.csv](published.csv)" if board.published else ""
    out = [
        f"# {name}", "", *([escape(board.question), ""] if board.question else []),
        *(f"- **{fact}**: {escape(text)}" for fact, text in board.facts), "",
        f"Full page: [index.html](index.html). Data: [leaderboard.csv](leaderboard.csv){published}.", "",
        f"{LEGEND} A record is `results/{name}/ID/record.json`; `epsbench show ID` prints it.", "",
        "![Accuracy against epsilon](accuracy-vs-epsilon.svg)", "", "![Throughput](throughput.svg)", "",
        *chain.from_iterable(map(markdown_table, board.tables)),
        "## How ranks are made", "", RULE, "",
    ]  # fmt: skip
    if board.published:
        out += ["## Published and measured", "", VERDICTS, ""]
        out += grid(VERDICT_COLUMNS, map(verdict_cells, board.published))
    if board.tuning:
        out += ["## How hyper-parameters were chosen", ""]
        out += [*(f"- **{escape(name)}**: {escape(text)}" for name, text in board.tuning), ""]
    return "\n".join(out)


def markdown_table(table: RankedTable) -> list[str]:
    search = " (validation split: a hyper-parameter search, not a result)" if table.search else ""
    out = [f"## {escape(heading(table))}{search}", "", escape(" · ".join(statement(table))), ""]
    lines = [[escape(cell) for cell in cells(entry).values()] for entry in table.every]
    for line in lines:
        if line[0].rstrip("=") == "1":
            line[1] = f"**{line[1]}**"
    out += [*tables.markdown([escape(title) for title in titles(table, TITLES)], lines), ""]
    failures = [
        f"- {escape(e.row.title)}: {n} × {escape(status)}: {escape(reason)}"
        for e in table.every
        for status, reason, n in e.row.failures
    ]
    return [*out, *failures, *(f"- {escape(note)}" for note in (*table.unranked, *table.notes)), ""]


TITLES = {
    "rank": "rank", "method": "method", "accuracy": "accuracy, %", "difference": "Δ {}, points", "spent": "ε spent",
    "rdp": "ε RDP", "claimed": "ε claimed", "sigma": "σ", "rate": "examples/s", "reference": "vs non-private",
    "baseline": "vs dp-sgd", "memory": "peak MiB", "seconds": "train s", "seeds": "seeds", "runs": "runs",
    "records": "records",
}  # fmt: skip
"""The columns of a table of rows, each with its title; that of the difference names the baseline."""


def titles(table: RankedTable, columns: Iterable[str]) -> list[str]:
    """The titles of some of `TITLES`."""
    return [TITLES[name].format(table.baseline.title if table.baseline else BASELINE) for name in columns]


def cells(entry: TableRow) -> dict[str, str]:
    """What a table shows of a row, by the columns of `TITLES`."""
    row = entry.row
    return {
        "rank": "reference" if entry.reference else place(entry),
        "method": row.marked,
        "accuracy": interval(row.accuracy),
        "difference": difference(entry),
        "spent": epsilon(row.epsilon),
        "rdp": cross_checked(row),
        "claimed": epsilon(row.shared("claimed")),
        "sigma": measure("noise_multiplier", row.shared("sigma")),
        "rate": timing(entry, "rate", count(row.rate)),
        "reference": timing(entry, "reference", ratio(entry.to_reference)),
        "baseline": timing(entry, "baseline", ratio(entry.to_baseline)),
        "memory": count(row.peak_memory),
        "seconds": timing(entry, "seconds", count(row.train_seconds)),
        "seeds": listing(row.seeds),
        "runs": statuses(row),
        "records": " ".join(run.id for run in row.runs),
    }


def grid(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table of plain texts, and an empty one."""
    return [*tables.markdown(titles, ([escape(cell) for cell in row] for row in rows)), ""]


def difference(entry: TableRow) -> str:
    """The paired difference to the baseline with its interval, in percentage points."""
    return "baseline" if entry.baseline else gap(entry.place.difference)


def measure(metric: str, value: float | None, signed: bool = False) -> str:
    """A value of `metric` with its unit: percent for an accuracy, plain otherwise."""
    if value is None:
        return "–"
    if metric == "accuracy":
        return percent(value, signed) + ("" if signed else " %")
    return f"{value:+.4g}" if signed else f"{value:.4g}"


def measured(verdict: PublishedValue) -> str:
    """The measured mean with its interval and number of seeds."""
    m: Interval | None = verdict.measured
    if m is None:
        return "–"
    span = "" if m.low is None else f" [{measure(verdict.metric, m.low)}, {measure(verdict.metric, m.high)}]"
    return f"{measure(verdict.metric, m.mean)}{span}, n = {m.n}"


def outcome(verdict: PublishedValue) -> str:
    """The verdict; by how much the two differ (measured minus published), or why they cannot be compared."""
    if verdict.verdict == "not comparable":
        return f"not comparable, because {' and '.join(verdict.because)}"
    if verdict.difference is None or verdict.verdict == "agrees":
        return verdict.verdict
    unit = " points" if verdict.metric == "accuracy" else ""
    return f"{verdict.verdict}: {measure(verdict.metric, verdict.difference, signed=True)}{unit}"


def verdict_cells(verdict: PublishedValue) -> list[str]:
    """One line of the table of published values, as text."""
    return [
        verdict.row.title if verdict.row else verdict.method, verdict.task, epsilon(verdict.epsilon),
        verdict.metric, measure(verdict.metric, verdict.value), measured(verdict), outcome(verdict),
        verdict.source, verdict.note, verdict.would_change,
    ]  # fmt: skip


# CSV ------------------------------------------------------------------------------------------------------

Field = str | float | int | None


def guarded(value: Field) -> Field:
    """Text that a spreadsheet would run as a formula gets a leading apostrophe; numbers stay numbers."""
    if isinstance(value, str) and value.lstrip()[:1] in tuple("=+-@＝＋－＠"):
        return "'" + value
    return value


def table_csv(board: Board) -> str:
    """Every row of every table with full precision: fractions, epsilons (``inf``), empty where unknown."""
    return csv_text([csv_row(table, entry) for table in board.tables for entry in table.every])


def csv_text(rows: Sequence[Mapping[str, Field]], names: Iterable[str] = ()) -> str:
    """Rows as CSV under their `names`, by default those of the first."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(names or (rows[0] if rows else ()))
    writer.writerows(map(guarded, row.values()) for row in rows)
    return out.getvalue()


def csv_row(table: RankedTable, entry: TableRow) -> dict[str, Field]:
    """All that is known of a row, by column."""
    row, run, s, reference = entry.row, entry.row.first, table.setting, entry.reference
    empty = Interval(math.nan, None, None, 0)
    accuracy, difference = row.accuracy or empty, entry.place.difference or empty
    known = bool(row.accuracy)
    return {
        "task": s.task, "dataset": run.dataset, "model": run.model, "split": s.split,
        "target_epsilon": s.epsilon, "delta": s.delta, "relation": s.relation, "unit": s.unit,
        "device_kind": table.kind, "device": row.device.name,
        "device_fingerprint": row.device.fingerprint,
        "role": "reference" if reference else "ranked" if entry.place.rank else "unranked",
        "rank": None if reference else entry.place.rank,
        "rank_shared": None if reference else int(entry.place.tied),
        "unranked_because": "" if reference else entry.place.why,
        "method": run.method, "label": row.title, "family": run.family, "paper": run.paper,
        "parameters": ", ".join(f"{k}={v}" for k, v in run.parameters),
        "batch": run.batch, "steps": run.steps, "dtype": run.dtype,
        "accuracy_mean": accuracy.mean if known else None, "accuracy_low": accuracy.low,
        "accuracy_high": accuracy.high, "accuracy_n": accuracy.n,
        "baseline": table.baseline.title if table.baseline else "",
        "difference_mean": difference.mean if difference.n else None, "difference_low": difference.low,
        "difference_high": difference.high, "difference_n": difference.n,
        "epsilon_planned_pld": run.planned.get("pld"), "epsilon_planned_rdp": run.planned.get("rdp"),
        "epsilon_spent": row.epsilon, "epsilon_spent_pld": row.spent.get("pld"),
        "epsilon_spent_rdp": row.cross_check,
        "epsilon_claimed": row.shared("claimed"),
        "claim_assumes": row.shared("claim"), "sampling": row.shared("sampling"),
        "noise_multiplier": row.shared("sigma"), "public_data": row.shared("public_data"),
        "examples_per_second": row.rate, "rate_to_non_private": entry.to_reference,
        "rate_to_dp_sgd": entry.to_baseline, "peak_memory_mib": row.peak_memory,
        "train_seconds": row.train_seconds, "seeds": listing(row.seeds), "runs": statuses(row),
        "failures": "; ".join(f"{status}: {reason}" for status, reason, _ in row.failures),
        "stale_runs": row.stale, "merged_runs": row.merged, "busy_runs": sum(r.busy for r in row.counted),
        "group": run.group, "ids": " ".join(r.id for r in row.runs),
    }  # fmt: skip


PUBLISHED = (
    "method", "label", "task", "measured_task", "epsilon", "metric", "published", "measured_mean", "measured_low",
    "measured_high", "measured_n", "difference", "verdict", "because", "would_change", "source", "note", "ids",
)  # fmt: skip


def published_csv(board: Board) -> str:
    """Every published value beside its measurement, with full precision; empty where unknown."""
    return csv_text([published_row(v) for v in board.published], PUBLISHED)


def published_row(v: PublishedValue) -> dict[str, Field]:
    """All that is known of a published value, by column."""
    m, row = v.measured or Interval(math.nan, None, None, 0), v.row
    fields = (
        v.method, row.title if row else "", v.task, row.setting.task if row else "", v.epsilon, v.metric, v.value,
        m.mean if m.n else None, m.low, m.high, m.n, v.difference, v.verdict, " and ".join(v.because), v.would_change,
        v.source, v.note, " ".join(r.id for r in row.runs) if row else "",
    )  # fmt: skip
    return dict(zip(PUBLISHED, fields, strict=True))


# Terminal -------------------------------------------------------------------------------------------------


def top_rows(board: Board, n: int = 5) -> str:
    """The first `n` rows of every result table (of every search where there is no result), for a terminal."""
    titles = ["rank", "method", "accuracy %", "vs dp-sgd, points", "ε spent", "examples/s", "vs non-priv", "runs"]
    blocks = []
    for table in board.results or board.tables:
        lines = [titles, *map(_line, (*table.entries[:n], *table.references[:1]))]
        more = len(table.entries) - n
        title = f"{heading(table)}  ({', '.join(statement(table))})"
        blocks.append("\n".join([title, *aligned(lines), *([f"  … {more} more"] if more > 0 else [])]))
    if board.published:
        verdicts = [v.verdict for v in board.published]
        tally = ", ".join(f"{verdicts.count(v)} {v}" for v in sorted(set(verdicts)))
        blocks.append(f"published values: {tally}")
    if board.tables:
        blocks.append(LEGEND)
    return "\n\n".join(blocks) or "no records yet"


def _line(entry: TableRow) -> list[str]:
    shown = cells(entry)
    shown["rank"] = "ref" if entry.reference else shown["rank"]
    shown["method"] = shown["method"] if len(shown["method"]) <= 44 else shown["method"][:43] + "…"
    names = ("rank", "method", "accuracy", "difference", "spent", "rate", "reference", "runs")
    return [shown[name] for name in names]


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table for a terminal; the first two columns and the last are text."""
    return ["  " + line for line in tables.aligned(lines, {0, 1, len(lines[0]) - 1})]
