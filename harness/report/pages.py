"""The pages below a suite's: one for each row, with its runs; a card for each method. And the page over all suites."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from . import drawings
from .html import MARK, Places, columns, environment, paragraphs
from .read import Run, natural, scalar, visible
from .rows import REACH, Audit, audit_of, dumps, exceeds, merged, target
from .tables import (
    BASELINE,
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
    statement,
    statuses,
)
from .text import difference

SLOTS = ("sampler", "loss", "engine", "clip", "noise", "optimizer", "path")
"""The parts in the order in which a step meets them."""
DATA = '<script type="application/json" id="data">'


def run_pages(board: Board, places: Places, known: Sequence[Audit] = ()) -> dict[str, str]:
    """File name -> page of every row."""
    found: dict[int, tuple[Entry, Table]] = {}
    for table in board.tables:
        for entry in (*table.references, *table.entries):
            found.setdefault(id(entry.row), (entry, table))
    template = environment().get_template("run.html")
    return {
        places.rows[id(row)]: template.render(
            suite=board.suite,
            row=row,
            run=row.first,
            where=", ".join([heading(table), *statement(table)]),
            filter="#?" + urlencode({"task": table.setting.task, "epsilon": epsilon(table.setting.epsilon)}),
            card=places.methods[row.first.method],
            numbers=_numbers(entry, table, audit_of(row, known)),
            drawings=drawings.of_row(row),
            details=_details(row),
            runs=[_run(run, board, places) for run in row.runs],
        )
        for row, entry, table in ((e.row, e, t) for e, t in found.values())
    }


def _numbers(entry: Entry, table: Table, audit: Audit | None) -> list[tuple[str, str]]:
    row, run = entry.row, entry.row.first
    goal = target(table)
    reach = None if goal is None else row.seconds_to(goal)
    accuracy = row.accuracy
    n = f" %, n = {accuracy.n}" if accuracy else ""
    audited = ""
    if audit is not None:
        sure = "" if audit.confidence is None else f" at {100 * audit.confidence:g} %"
        above = ": ABOVE THE CLAIM" if exceeds(row, audit) else ""
        how = ", ".join(filter(None, (audit.instrument, audit.task)))
        audited = f"at least {epsilon(audit.lower)}{sure} ({how}){above}"
    claim = row.shared("claim") or ""
    claimed = epsilon(row.shared("claimed")) if row.shared("claimed") is not None else "off" if claim else ""
    pairs = [
        ("Accuracy", interval(accuracy) + n),
        ("Rank", place(entry) + (f" ({entry.place.why})" if entry.place.why else "")),
        ("Δ dp-sgd, points", difference(entry)),
        ("ε planned", ", ".join(f"{k} {epsilon(v)}" for k, v in sorted(run.planned.items()))),
        ("ε spent", ", ".join(f"{k} {epsilon(v)}" for k, v in sorted(row.spent.items())) or epsilon(row.epsilon)),
        ("ε claimed", f"{claimed} ({claim or 'no assumptions given'})" if claimed else ""),
        ("ε audited", audited),
        ("ε with tuning", epsilon(row.shared("tuned")) if row.shared("tuned") is not None else ""),
        ("Examples/s", count(row.rate)),
        ("relative to non-private", ratio(entry.to_reference)),
        ("relative to dp-sgd", ratio(entry.to_baseline)),
        ("Peak memory", f"{count(row.peak_memory)} MiB" if row.peak_memory else ""),
        ("Training", f"{count(row.train_seconds)} s" if row.train_seconds else ""),
        (f"to {100 * REACH:g} % of dp-sgd's accuracy",
         "" if reach is None else "never" if math.isinf(reach) else f"{count(reach)} s"),
        ("Runs", statuses(row) + (f", {row.stale} stale" if row.stale else "")),
    ]  # fmt: skip
    return [(name, text) for name, text in pairs if text and text != "–"]


def _details(row: Row) -> list[tuple[str, str]]:
    """What was asked of the row's runs, as (name, text)."""
    run = row.first
    jobs = sorted({r.jobs for r in row.counted if r.jobs})
    pairs = [
        ("Method", run.method),
        ("Family", run.family),
        ("Parameters", ", ".join(f"{k} = {v}" for k, v in run.parameters)),
        *((name.capitalize(), part) for name, part in run.parts),
        ("Schedule", f"batch {run.batch}, {run.steps} steps" if run.batch and run.steps else ""),
        ("Numerics", run.dtype),
        ("Noise", f"multiplier {run.sigma:.6g}" if run.sigma is not None else ""),
        ("Sampling", row.shared("sampling") or ""),
        ("Public data", row.shared("public_data") or ""),
        ("Device", _device(row.device)),
        ("Engine chosen", row.shared("engine") or ""),
        ("Runs at a time", ", ".join(map(str, jobs))),
        ("Group", run.group),
    ]
    return [(name, text) for name, text in pairs if text]


def _run(run: Run, board: Board, places: Places) -> dict[str, Any]:
    suite = board.suite.removesuffix(REDUCED_SUITE) if board.reduced else board.suite
    profile = " --reduced" if board.reduced and suite != board.suite else ""
    facts = [
        ("Accuracy", f"{percent(run.accuracy)} %" if run.accuracy is not None else ""),
        ("ε spent", epsilon(run.epsilon) if run.epsilon is not None else ""),
        ("Training", f"{count(run.train_seconds)} s" if run.train_seconds else ""),
        ("Examples/s", count(run.rate) if run.rate else ""),
        ("Finished", run.finished),
        ("Code", run.commit[:12] + (" with local changes" if run.dirty else "")),
        ("MLflow", "tags.\"epsbench.id\" = '{}'".format(run.id.replace("'", "\\'"))),
    ]
    files = [(name, places.record(run.path, name)) for name in ("record.json", "trace.jsonl", "env.json")]
    return {
        "run": run,
        "anchor": "run-" + (re.sub(r"[^A-Za-z0-9_-]+", "-", run.id).strip("-") or "x"),
        "title": (f"Seed {run.seed}, " if run.seed is not None else "") + run.id,
        "facts": [(name, text) for name, text in facts if text],
        "commands": "\n".join((
            f"epsbench run suites/{shlex.quote(suite)}.toml{profile} --only {shlex.quote(run.id)}",
            f"epsbench show {shlex.quote(run.id)}",
        )),
        "files": [(name, href) for name, href in files if href],
        "record": _record(run),
    }  # fmt: skip


def _record(run: Run) -> str:
    """The record on one line for each key, without what other places of the page or the repository hold."""
    try:
        record = json.loads(run.order)
    except ValueError:  # a number that JSON cannot say
        return ""
    hidden = ("trace", "environment", "path", "stale")
    kept = {k: v for k, v in record.items() if k not in hidden}
    if isinstance(kept.get("code"), dict):
        kept["code"] = {k: v for k, v in kept["code"].items() if k != "files"}
    return "\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in kept.items())


# ------------------------------------------------------------ method cards


def cards(
    board: Board, places: Places, sources: Mapping[str, Any] | None = None, known: Sequence[Audit] = ()
) -> dict[str, str]:
    """File name -> card of every method. `sources` is what `sources.describe` says of them."""
    sources = sources or {}
    template = environment().get_template("method.html")
    lines: dict[str, list[dict[str, str]]] = defaultdict(list)
    rows: dict[str, list[Row]] = defaultdict(list)
    for row in board.rows:
        rows[row.first.method].append(row)
    for table in board.tables:
        for entry in table.entries:
            lines[entry.row.first.method].append(_line(entry, table, places))
    plain = {row.first.method: dict(row.first.parts) for row in board.rows if row.first.method == BASELINE}
    out = {}
    for name, href in places.methods.items():
        said = sources.get("methods", {}).get(name, {})
        run = min((r.first for r in rows[name]), key=lambda r: (r.changed, not r.parts))
        paper = said.get("paper") or run.paper
        tally = Counter(line["outcome"] for line in lines[name])
        out[href] = template.render(
            suite=board.suite,
            name=name,
            about=[
                t
                for text in (said.get("summary") or run.summary, said.get("module", ""))
                for t in paragraphs(text)
            ],
            facts=[p for p in (("Family", run.family), ("Paper", paper)) if p[1]],
            filter="#?" + urlencode({"method": name}),
            parts=_parts(run, plain.get(BASELINE, {}), sources.get("parts", {})),
            parameters=_parameters(said.get("parameters", {}), rows[name]),
            audits=[_audit(a) for a in known if a.method == name],
            lines=lines[name],
            summary=", ".join(f"{n} {word}" for word, n in sorted(tally.items())),
            paper=paper,
            bibtex=bibtex(name, paper, said.get("module", "")),
        )
    return out


def _parts(run: Run, plain: Mapping[str, str], docs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The seven parts in the order of a step; those that DP-SGD has too are not its own."""
    parts = dict(run.parts)
    out = []
    for slot in [*(s for s in SLOTS if s in parts), *(s for s in parts if s not in SLOTS)]:
        kind, _, inner = parts[slot].partition("(")
        own = bool(plain) and plain.get(slot, "").partition("(")[0] != kind
        out.append({
            "slot": slot, "type": kind, "fields": inner.removesuffix(")"), "own": own,
            "docs": docs.get(kind, []) if own or slot in ("clip", "noise", "sampler") else [],
        })  # fmt: skip
    return out


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


def _audit(audit: Audit) -> dict[str, Any]:
    return {
        "task": audit.task or "–", "claimed": epsilon(audit.claimed), "lower": epsilon(audit.lower),
        "above": audit.lower > audit.claimed, "instrument": audit.instrument,
        "confidence": "–" if audit.confidence is None else f"{100 * audit.confidence:g} %",
    }  # fmt: skip


def _line(entry: Entry, table: Table, places: Places) -> dict[str, str]:
    row, gap = entry.row, entry.place.difference
    if entry.baseline:
        outcome, mark = "baseline", ""
    elif gap is None or gap.low is None or gap.high is None:
        outcome, mark = "unknown" if row.accuracy else "no finished run", "warn"
    elif gap.low > 0:
        outcome, mark = "wins", "good"
    elif gap.high < 0:
        outcome, mark = "loses", "bad"
    else:
        outcome, mark = "undecided", ""
    split = " (validation split)" if table.search else ""
    return {
        "setting": heading(table) + split, "title": row.title, "href": places.rows[id(row)], "rank": place(entry),
        "accuracy": interval(row.accuracy), "difference": "" if gap is None or entry.baseline
        else f"{percent(gap.mean, signed=True)} {bounds(gap, signed=True)}", "outcome": outcome, "mark": mark,
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


def overview(reports: Path) -> str | None:
    """The page over all suites in `reports`, from the data that their pages hold; None where there is none."""
    suites, payloads = [], {}
    for page in sorted(reports.glob("*/index.html"), key=lambda p: natural(p.parent.name)):
        found = _held(page)
        if found is not None:
            name = page.parent.name
            payloads[name] = found
            tasks = sorted({scalar(t["task"]) for t in found["tables"]}, key=natural)
            suites.append({
                "name": name, "href": f"{quote(name)}/index.html", "question": found.get("question", ""),
                "tasks": ", ".join(tasks), "settings": len(found["tables"]), "rows": len(found["rows"]),
            })  # fmt: skip
    if not payloads:
        return None
    data = merged(payloads)
    return environment().get_template("index.html").render(
        suites=suites, columns=columns(data), data=dumps(data), digest=""
    )  # fmt: skip


def _held(page: Path) -> dict[str, Any] | None:
    """The data of a suite's page, None where it holds none of this version."""
    from .rows import FIELDS

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
