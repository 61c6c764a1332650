"""`epsbench check`: checks a method, records it in ``results/checks/``, and shows it as lines and as tables."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from harness import registry
from harness.dp.method import describe
from harness.records import checks
from harness.records.tables import inserted, markdown
from harness.verify import conformance
from harness.verify.circumstances import Circumstances, code_of
from harness.verify.conformance import Check, Named

TABLES = ("times", "alarms")

# The record -----------------------------------------------------------------------------------------------


def examined(one: Named, repeat: int = 0) -> dict[str, Any]:
    """The record of a method's check; with `repeat`, of so many repetitions of the statistical checks alone."""
    entry = registry.resolve("method", one.name)
    seeds = {"count": repeat, "first": 1, "last": repeat} if repeat else None
    facts = {
        "schema": checks.SCHEMA, "kind": "check", "method": one.name, "label": one.name,
        "parameters": registry.bind(entry, {}), "parts": describe(one.method),
        "relation": one.method.sampler.relation.value, "repeat": seeds,
    }  # fmt: skip
    # The code before the checks: a file that is edited meanwhile is not what was checked.
    code = code_of(one.method, one.file, "harness.verify.conformance")
    load, circumstances, busy = _load(), Circumstances(code), _cpu()
    lines = (
        conformance.rehearsed(one.method, repeat) if repeat else conformance.examine(one.method, (one.name, one.file))
    )
    return facts | circumstances.facts() | {
        "id": checks.identity(facts), "lines": [_line(line) for line in lines],
        "cpu_seconds": round(_cpu() - busy, 3), "load_average": load,
    }  # fmt: skip


def _line(line: Check) -> dict[str, Any]:
    return line._asdict() | {"seconds": round(line.seconds, 4)}


def _cpu() -> float:
    """Seconds of all cores that this process and those it waited for have used."""
    return sum(os.times()[:4])


def _load() -> float | None:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def recorded(methods: Iterable[Named], folder: Path, repeat: int = 0) -> Iterator[tuple[dict[str, Any], bool]]:
    """Each method's check, made now, and whether a record that says the same was in `folder` already.

    The record is written once the caller has taken it and asks for the next.
    """
    known = checks.load(folder)
    for one in methods:
        made = examined(one, repeat)
        there = checks.kept(made, known) is not None
        yield made, there
        if not there:
            checks.write(folder, made)


# Lines ----------------------------------------------------------------------------------------------------


def summary(made: Mapping[str, Any]) -> str:
    """One line: how many checks apply, whether they hold, and how long it took."""
    lines, seconds = made["lines"], f"{made['wall_seconds']:.1f} s"
    apply, failed = sum(line["applies"] for line in lines), len(checks.failing(made))
    if repeat := made["repeat"]:
        alarms = sum(line["failures"] or 0 for line in lines)
        outcome = f"{alarms} ALARMS" if failed else "no alarm" if apply else "none applies"
        return (
            f"{made['method']}: {repeat['count']} repetitions of {apply} statistical checks, seeds"
            f" {repeat['first']} to {repeat['last']}, {outcome}, {seconds}"
        )
    outcome = f"{failed} FAILED" if failed else "all hold"
    return f"{made['method']}: {apply} of {len(lines)} checks apply, {outcome}, {seconds}"


def rows(made: Mapping[str, Any], failures_alone: bool = False) -> list[list[str]]:
    """Verdict, name and detail of each line, or of those that fail."""
    lines = checks.failing(made) if failures_alone else made["lines"]
    return [["ok" if line["ok"] else "FAILED", line["name"], line["detail"]] for line in lines]


# Tables ---------------------------------------------------------------------------------------------------


def tables(folder: Path) -> dict[str, str]:
    """Times and false alarms of the registered methods, as Markdown, from the checks in `folder` that count."""
    known = registry.index("method")
    found = checks.latest(one for one in checks.load(folder) if one["method"] in known)
    whole = [one for one in found if one["repeat"] is None]
    repeated = [one for one in found if one["repeat"] is not None]
    return {"times": _times(whole), "alarms": _alarms(repeated)}


def _times(found: list[dict[str, Any]]) -> str:
    titles = ["method", "checks that apply", "outcome", "s", "CPU s", "load", "most of it"]
    cells = []
    for one in found:
        most = sorted(one["lines"], key=lambda line: -line["seconds"])[:3]
        failed = [line["function"] for line in checks.failing(one)]
        load = one["load_average"]
        cells.append([
            one["method"], f"{sum(line['applies'] for line in one['lines'])} of {len(one['lines'])}",
            f"FAILED: {', '.join(failed)}" if failed else "all hold", f"{one['wall_seconds']:.1f}",
            f"{one['cpu_seconds']:.1f}", "–" if load is None else f"{load:.1f}",
            ", ".join(f"{line['function']} {line['seconds']:.1f}" for line in most),
        ])  # fmt: skip
    return _table(found, titles, cells)


def _alarms(found: list[dict[str, Any]]) -> str:
    statistical = [each.__name__ for each in conformance.STATISTICAL]
    cells = []
    for one in found:
        lines = {line["function"]: line for line in one["lines"]}
        alarms = [_failures(lines.get(name)) for name in statistical]
        cells.append([
            one["method"], str(one["repeat"]["count"]), f"{one['repeat']['first']} to {one['repeat']['last']}",
            *alarms, f"{one['wall_seconds']:.1f}",
        ])  # fmt: skip
    titles = ["method", "repetitions", "seeds", *statistical, "s"]
    return _table(found, titles, cells)


def _failures(line: Mapping[str, Any] | None) -> str:
    return "–" if line is None or not line["applies"] else str(line["failures"])


def _table(found: list[dict[str, Any]], titles: list[str], cells: list[list[str]]) -> str:
    """A Markdown table, and where its records were made."""
    if not found:
        return "There is no record of this yet."
    return "\n".join([*markdown(titles, cells), "", _made(found)])


def _made(found: list[dict[str, Any]]) -> str:
    """Where and of what the records are: devices, versions, commits, and how many are not of today's code."""
    devices = sorted({f"{one['device']['name']}, {_count(one['device']['threads'], 'thread')}" for one in found})
    versions = sorted({f"torch {one['environment'].get('torch')}" for one in found})
    days = sorted({one["started"][:10] for one in found})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    old = [one["method"] for one in found if one["stale"]]
    text = f"{_count(len(found), 'method')}, {'; '.join(devices)}; {', '.join(versions)}; {when}."
    return text + (f" Of other code than on the day that the table was made: {', '.join(old)}." if old else "")


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def write_tables(folder: Path, docs: Path | None) -> str:
    """The tables, and written into `docs` between their markers where it is given.

    Raises ValueError where the text lacks a marker; then nothing is written.
    """
    made = tables(folder)
    if docs is not None:
        text = docs.read_text(encoding="utf-8")
        for name in TABLES:
            text = inserted(text, made[name], name)
        docs.write_text(text, encoding="utf-8")
    return "\n\n".join(made[name] for name in TABLES)
