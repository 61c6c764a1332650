"""Makes the page of each row, with its runs, the card of each method, and the page over all suites."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import quote, urlencode

from harness.records.store import COMPUTED
from harness.report.model import words
from harness.report.model.checked import mark, of_row
from harness.report.model.fields import natural, scalar, visible
from harness.report.model.rows import BASELINE, REDUCED_SUITE, Row, statuses
from harness.report.model.runs import Run, StageFacts
from harness.report.model.tables import RankedTable, TableRow, heading, place, statement, timing
from harness.report.page import drawings
from harness.report.page.html import MARK, columns, environment, paragraphs
from harness.report.page.payload import FIELDS, REACH, Content, audit_of, dumps, exceeds, merged, target
from harness.report.text import difference

SLOTS = ("sampler", "loss", "engine", "clip", "noise", "optimizer", "path")
"""The parts in the order in which a step meets them."""
SPEED = ("Examples/s", "Examples/s of stage 1")
"""Of runs of one stage, and of two."""
DATA = '<script type="application/json" id="data">'


def run_pages(content: Content) -> dict[str, str]:
    """File name -> page of every row."""
    found: dict[int, tuple[TableRow, RankedTable]] = {}
    for table in content.board.tables:
        for entry in (*table.references, *table.entries):
            found.setdefault(id(entry.row), (entry, table))
    template = environment().get_template("run.html")
    return {
        content.href(row): template.render(
            suite=content.board.suite,
            row=row,
            run=row.first,
            where=", ".join([heading(table), *statement(table)]),
            filter="#?" + urlencode({"task": table.setting.task, "epsilon": words.epsilon(table.setting.epsilon)}),
            card=content.methods[row.first.method],
            numbers=_numbers(entry, table, content),
            drawings=drawings.of_row(row),
            stages=stage_lines(row),
            stage_heads=HEADS,
            details=_details(row),
            runs=[_run(run, content) for run in row.runs],
        )
        for row, entry, table in ((e.row, e, t) for e, t in found.values())
    }


def _numbers(entry: TableRow, table: RankedTable, content: Content) -> list[tuple[str, str]]:
    row, run = entry.row, entry.row.first
    audit, check = audit_of(row, content.audits), of_row(content.checked, row)
    goal = target(table)
    reach = None if goal is None else row.seconds_to(goal)
    accuracy = row.accuracy
    n = f" %, n = {accuracy.n}" if accuracy else ""
    audited = ""
    if audit is not None:
        sure = "" if audit.confidence is None else f" at {100 * audit.confidence:g} %"
        above = ": ABOVE THE CLAIM" if exceeds(row, audit) else ""
        how = ", ".join(filter(None, (audit.instrument, audit.task)))
        audited = f"at least {words.epsilon(audit.lower)}{sure} ({how}){above}"
    claim = row.shared("claim") or ""
    claimed = words.epsilon(row.shared("claimed")) if row.shared("claimed") is not None else "off" if claim else ""
    pairs = [
        ("Accuracy", words.interval(accuracy) + n),
        ("Rank", place(entry) + (f" ({entry.place.why})" if entry.place.why else "")),
        ("Δ dp-sgd, points", difference(entry)),
        ("ε planned", words.by_accountant(run.planned, run.refused)),
        ("ε spent", words.by_accountant(row.spent, row.refused) or words.epsilon(row.epsilon)),
        ("Accountants", words.refusals(row.refused)),
        ("ε claimed", f"{claimed} ({claim or 'no assumptions given'})" if claimed else ""),
        ("ε audited", audited),
        ("Conformance", f"{check.text}: {check.words}"),
        ("ε with tuning", words.epsilon(row.shared("tuned")) if row.shared("tuned") is not None else ""),
        (SPEED[bool(run.stages)], timing(entry, "rate", words.count(row.rate))),
        ("relative to non-private", timing(entry, "reference", words.ratio(entry.to_reference))),
        ("relative to dp-sgd", timing(entry, "baseline", words.ratio(entry.to_baseline))),
        ("Peak memory", f"{words.count(row.peak_memory)} MiB" if row.peak_memory else ""),
        ("Training" + ", both stages" * bool(run.stages),
         timing(entry, "seconds", f"{words.count(row.train_seconds)} s") if row.train_seconds else ""),
        (f"to {100 * REACH:g} % of dp-sgd's accuracy",
         "" if reach is None else timing(entry, "reach", "never" if math.isinf(reach) else f"{words.count(reach)} s")),
        (words.BUSY, "timed while other work ran on the machine: not to be compared" if entry.doubted else ""),
        ("Runs", ", ".join(
            [statuses(row), *(f"{n} {word}" for n, word in ((row.stale, "stale"), (row.merged, "merged")) if n)]
        )),
    ]  # fmt: skip
    return [(name, text) for name, text in pairs if text and text != "–"]


def _details(row: Row) -> list[tuple[str, str]]:
    """What was asked of the row's runs, as (name, text). Of two stages each has a line."""
    run = row.first
    only = [
        ("Parameters", ", ".join(f"{k} = {v}" for k, v in run.parameters)),
        *((name.capitalize(), part) for name, part in run.parts),
        ("Schedule", f"batch {run.batch}, {run.steps} steps" if run.batch and run.steps else ""),
        ("Engine chosen", row.shared("engine") or ""),
    ]
    stages = [(f"Stage {i}", f"{one.method}({one.parameters}): {one.parts}") for i, one in enumerate(run.stages, 1)]
    jobs = sorted({r.jobs for r in row.counted if r.jobs})
    pairs = [
        ("Method", ", then ".join(stage.method for stage in run.stages) or run.method),
        ("Family", run.family),
        *(stages or only),
        ("Numerics", run.dtype),
        ("Noise", f"multiplier {run.sigma:.6g}" if run.sigma is not None else ""),
        ("Sampling", row.shared("sampling") or ""),
        ("Public data", row.shared("public_data") or ""),
        ("Device", words.device_text(row.device)),
        ("Runs at a time", ", ".join(map(str, jobs))),
        ("Group", run.group),
    ]
    return [(name, text) for name, text in pairs if text]


def _run(run: Run, content: Content) -> dict[str, Any]:
    board, sources = content.board, content.sources
    reduced = bool(board.reduced) and board.suite.endswith(REDUCED_SUITE)
    installed = sources is None or sources["methods"].get(run.method, {}).get("installed", False)
    facts = [
        ("Accuracy", f"{words.percent(run.accuracy)} %" if run.accuracy is not None else ""),
        ("ε spent", words.epsilon(run.epsilon) if run.epsilon is not None else ""),
        ("Training", f"{words.count(run.train_seconds)} s" if run.train_seconds else ""),
        (SPEED[bool(run.stages)], words.count(run.rate) if run.rate else ""),
        ("Load average", _load(run)),
        ("Finished", run.finished),
        ("Origin", run.origin),
        ("Code", run.commit[:12] + (" with local changes" if run.dirty else "")),
        ("MLflow", "tags.\"epsbench.id\" = '{}'".format(run.id.replace("'", "\\'"))),
    ]
    files = [(name, content.record(run.path, name)) for name in ("record.json", "trace.jsonl", "env.json")]
    return {
        "run": run,
        "anchor": "run-" + (re.sub(r"[^A-Za-z0-9_-]+", "-", run.id).strip("-") or "x"),
        "title": (f"Seed {run.seed}, " if run.seed is not None else "") + run.id,
        "facts": [(name, text) for name, text in facts if text],
        "commands": "\n".join(
            (*words.recipe(run, board.file, reduced, installed), f"epsbench show {shlex.quote(run.id)}")
        ),
        "files": [(name, href) for name, href in files if href],
        "record": _record(run),
    }


def _load(run: Run) -> str:
    if run.load is None:
        return ""
    cores = f" on {run.cores} core{'s' * (run.cores != 1)} in use" if run.cores else ""
    return f"{run.load:.1f}{cores}" + (f" {words.BUSY}: other work ran on the machine" if run.busy else "")


def _record(run: Run) -> str:
    """The record on one line for each key, without what other places of the page or the repository hold."""
    try:
        record = json.loads(run.order)
    except ValueError:  # a number that JSON cannot say
        return ""
    hidden = ("trace", "environment", *COMPUTED)
    kept = {k: v for k, v in record.items() if k not in hidden}
    if isinstance(kept.get("code"), dict):
        kept["code"] = {k: v for k, v in kept["code"].items() if k != "files"}
    return "\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in kept.items())


# ------------------------------------------------------------ stages

UNKNOWN = "not recorded"
HEADS = (
    ("Stage", ""), ("Method", ""), ("Trains", ""), ("Data", ""), ("Batch", "num"), ("Steps", "num"), ("Epochs", "num"),
    ("Sampling", "prose"), ("Relation", "prose"), ("Sensitivity", "prose"), ("ε spent by its end", "num"),
    ("Examples/s", "num"), ("Training, s", "num"), ("Engine", ""),
)  # fmt: skip
"""The heads of the table, each with its style."""
_TRAINS = {"head": "the head", "all": "everything"}


def stage_lines(row: Row) -> list[list[str]]:
    """A line for each stage of the row's runs; [] where there is one stage.

    Speeds are medians over the runs that are timed, as in the row; epsilon is the largest over those that count.
    """
    return [_stage_line(row, number) for number in range(len(row.first.stages))]


def _stage_line(row: Row, number: int) -> list[str]:
    asked = row.first.stages[number]
    timed, counted = ([run.stages[number] for run in runs if run.stages] for runs in (row.timed, row.counted))
    known = next((one for one in counted if one.sampling), asked)
    without = math.inf if math.isinf(row.setting.epsilon) else None  # privacy that nobody asked for
    spent = max((one.epsilon for one in counted if one.epsilon is not None), default=without)
    return [
        str(number + 1), asked.method, _TRAINS.get(asked.trains, UNKNOWN),
        (asked.data or UNKNOWN) + (" (public)" if asked.public else ""), _known(asked.batch), _known(asked.steps),
        UNKNOWN if asked.epochs is None else f"{asked.epochs:.3g}", known.sampling or UNKNOWN,
        "none: public data" if asked.public else asked.relation or UNKNOWN, _sensitivity(known),
        UNKNOWN if spent is None else words.epsilon(spent), _middle([one.rate for one in timed], row.busy),
        _middle([one.seconds for one in timed], row.busy), known.engine or UNKNOWN,
    ]  # fmt: skip


def _known(value: int | None) -> str:
    return UNKNOWN if value is None else str(value)


def _middle(values: Sequence[float | None], busy: bool) -> str:
    known = [value for value in values if value is not None]
    return words.count(median(known)) + words.BUSY * busy if known else UNKNOWN


def _sensitivity(stage: StageFacts) -> str:
    if stage.public:
        return "none: public data"
    bounds = ", ".join(f"{k} {'∞' if math.isinf(v) else format(v, '.4g')}" for k, v in stage.sensitivity.items())
    return (bounds or UNKNOWN) + (f" ({stage.note})" if stage.note else "")


# ------------------------------------------------------------ method cards


def cards(content: Content) -> dict[str, str]:
    """File name -> card of every method."""
    board, checked, sources = content.board, content.checked, content.sources or {}
    template = environment().get_template("method.html")
    lines: dict[str, list[dict[str, str]]] = defaultdict(list)
    rows: dict[str, list[Row]] = defaultdict(list)
    for row in board.rows:
        rows[row.first.method].append(row)
    for table in board.tables:
        for entry in table.entries:
            lines[entry.row.first.method].append(_line(entry, table, content))
    plain = {row.first.method: dict(row.first.parts) for row in board.rows if row.first.method == BASELINE}
    out = {}
    for name, href in content.methods.items():
        described = sources.get("methods", {}).get(name, {})
        run = min((r.first for r in rows[name]), key=lambda r: (bool(r.changes), not r.parts))
        paper = described.get("paper") or run.paper
        tally = Counter(line["outcome"] for line in lines[name])
        out[href] = template.render(
            suite=board.suite,
            name=name,
            about=[*paragraphs(described.get("summary") or run.summary), *paragraphs(described.get("module", ""))],
            facts=[p for p in (("Family", run.family), ("Paper", paper)) if p[1]],
            filter="#?" + urlencode({"method": name}),
            parts=_parts(run, plain.get(BASELINE, {}), sources.get("parts", {}), rows[name]),
            changes=_changes(rows[name]),
            parameters=_parameters(described.get("parameters", {}), rows[name]),
            check=checked.get(name),
            mark=mark(checked, name),
            audits=[a for a in content.audits if a.method == name],
            lines=lines[name],
            summary=", ".join(f"{n} {word}" for word, n in sorted(tally.items())),
            paper=paper,
            bibtex=bibtex(name, paper, described.get("module", "")),
        )
    return out


def _parts(run: Run, plain: Mapping[str, str], docs: Mapping[str, Any], rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The seven parts in the order of a step; those that DP-SGD has too are not its own.

    They are those of `run`, which has the method's default parts where any of its rows has. ``changed`` says for a part
    that it is not one of these, or that some rows have another.
    """
    some = {slot for row in rows for slot, _ in row.first.changes}
    every = {slot for slot, _ in run.changes}
    parts = dict(run.parts)
    out = []
    for slot in [*(s for s in SLOTS if s in parts), *(s for s in parts if s not in SLOTS)]:
        kind, _, inner = parts[slot].partition("(")
        own = bool(plain) and plain.get(slot, "").partition("(")[0] != kind
        out.append({
            "slot": slot, "type": kind, "fields": inner.removesuffix(")"), "own": own,
            "changed": "not its default" if slot in every else "not in every row" if slot in some else "",
            "docs": docs.get(kind, []) if own or slot in ("clip", "noise", "sampler") else [],
        })  # fmt: skip
    return out


def _changes(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The parts that the suite gave the method in the place of its own, each with the rows that have it."""
    found: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for row in rows:
        for change in row.first.changes:
            found[change][row.title] += 1
    return [
        {"slot": slot, "spec": spec, "rows": "; ".join(f"{t} ({n} setting{'s' * (n > 1)})" for t, n in titles.items())}
        for (slot, spec), titles in sorted(found.items())
    ]


def _parameters(schema: Mapping[str, Sequence[str]], rows: Sequence[Row]) -> list[dict[str, str]]:
    used: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        for name, value in row.first.parameters:
            used[name].add(value)
    return [
        {
            "name": name, "type": schema[name][0] if name in schema else "",
            "default": schema[name][1] if name in schema else "–",
            "used": ", ".join(sorted(used[name], key=natural)),
        }
        for name in dict.fromkeys([*schema, *sorted(used)])
    ]  # fmt: skip


def _line(entry: TableRow, table: RankedTable, content: Content) -> dict[str, str]:
    row, paired = entry.row, entry.place.difference
    if entry.baseline:
        outcome, mark = "baseline", ""
    elif paired is None or paired.low is None or paired.high is None:
        outcome, mark = "unknown" if row.accuracy else "no finished run", "warn"
    elif paired.low > 0:
        outcome, mark = "wins", "good"
    elif paired.high < 0:
        outcome, mark = "loses", "bad"
    else:
        outcome, mark = "undecided", ""
    split = " (validation split)" if table.search else ""
    return {
        "setting": heading(table) + split, "title": row.title,
        "changes": ", ".join(f"{slot} = {spec}" for slot, spec in row.first.changes),
        "href": content.href(row), "rank": place(entry),
        "accuracy": words.interval(row.accuracy),
        "difference": "" if entry.baseline else words.gap(paired).replace("–", ""),
        "outcome": outcome, "mark": mark,
    }  # fmt: skip


def bibtex(name: str, paper: str, note: str = "") -> str:
    """A BibTeX entry made of the paper's id alone: title and authors are where the id leads. Empty without an id."""
    key = re.sub(r"[^A-Za-z0-9-]+", "-", name).strip("-") or "method"
    note = re.sub(r"[{}\\]", "", visible(note.split("\n")[0]))
    more = f",\n  note = {{{note}}}" if note else ""
    if found := re.match(r"arxiv:\s*([\w.\-/]+)", paper, re.I):
        return (
            f"@misc{{{key},\n  eprint = {{{found[1]}}},\n  archivePrefix = {{arXiv}},\n"
            f"  url = {{https://arxiv.org/abs/{found[1]}}}{more}\n}}"
        )
    if found := re.match(r"doi:\s*(10\.[^\s{}\\]+)", paper, re.I):
        return f"@misc{{{key},\n  doi = {{{found[1]}}}{more}\n}}"
    return ""


# ------------------------------------------------------------ all suites


def overview(reports: Path, results: Path | None = None) -> str | None:
    """The page over all suites in `reports`, from the data that their pages hold; None where there is none.

    A suite whose page holds none, or that has records in `results` and no page, is listed with the reason.
    """
    suites: list[dict[str, Any]] = []
    payloads = {}
    found: Mapping[str, Any] | None
    pages = {page.parent.name: page for page in reports.glob("*/index.html")}
    measured = {record.parts[-3] for record in results.glob("*/*/record.json")} if results else set()
    for name in sorted(pages.keys() | measured, key=natural):
        found = _held(pages[name]) if name in pages else None
        if found is None:
            page = name in pages
            why = "its report is of another version of epsbench" if page else "it has records and no report"
            if name in measured or MARK in pages[name].read_text("utf-8", errors="replace")[:2000]:
                suites.append({
                    "name": name, "href": f"{quote(name)}/index.html" if page else "", "question": "", "tasks": "",
                    "settings": "–", "rows": "–",
                    "why": f"Not in the list: {why}; epsbench report {name} writes one.",
                })  # fmt: skip
        else:
            payloads[name] = found
            tasks = sorted({scalar(t["task"]) for t in found["tables"]}, key=natural)
            suites.append({
                "name": name, "href": f"{quote(name)}/index.html", "question": found.get("question", ""),
                "tasks": ", ".join(tasks), "settings": len(found["tables"]), "rows": len(found["rows"]),
                "why": found.get("left_out", "") if not found["rows"] else "",
            })  # fmt: skip
    if not payloads:
        return None
    data = merged(payloads)
    return environment().get_template("index.html").render(
        suites=suites, columns=columns(data), data=dumps(data), digest=""
    )  # fmt: skip


def _held(page: Path) -> dict[str, Any] | None:
    """The data of a suite's page, None where it holds none of this version."""
    text = page.read_text("utf-8", errors="replace")
    if MARK not in text[:2000] or DATA not in text:
        return None
    try:
        held = json.loads(text.rpartition(DATA)[2].partition("</script>")[0])
    except ValueError:
        return None
    if not isinstance(held, dict) or held.get("fields") != list(FIELDS):
        return None
    return held
