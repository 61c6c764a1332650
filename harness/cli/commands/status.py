"""Count what is done, failed, stale, running and missing.

epsbench status                     every suite that has results
epsbench status suites/core.toml    against what the suite asks for today
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from harness.cli.arguments import options, suite_option
from harness.cli.codes import codes_of_cells, codes_of_records
from harness.cli.errors import FAILED, OK
from harness.cli.selecting import add_files, again, load, need_suite, suite_file
from harness.cli.words import counts, print_broken, print_failed, table
from harness.records.files import locked
from harness.records.record import FAILED as FAILURES

if TYPE_CHECKING:
    from harness.records.cell import Cell
    from harness.running import jobs

PLACE = 50


def arguments(parser: argparse.ArgumentParser) -> None:
    suite_option(parser, "?")
    options(parser, "--reduced", "--results", "--method")


def run(options: argparse.Namespace) -> int:
    """Count the runs of one suite, or of all that have records; the exit code."""
    from harness.records import store
    from harness.running import jobs

    need_suite(options)
    if options.suite is None:
        add_files(options.method)
        return _status_of_all(options.results)
    there = (Path("suites") / f"{options.suite}.toml").is_file()
    if re.fullmatch("[a-z0-9-]+", options.suite) and not there and not options.reduced:
        file, options.reduced = suite_file(options.suite)
        if file is None and (options.results / options.suite).is_dir():
            print(f"{options.suite}: there is no such suite here, so only its records are counted")
            return _status_of_all(options.results, options.suite)
        options.suite = str(file or options.suite)
    suite = load(options)
    cells = suite.cells()
    selection = jobs.select(cells, options.results, suite.name, codes=codes_of_cells(cells))
    states = states_of(cells, selection)
    print(f"suite {suite.name}: {len(cells)} runs")
    advice = {
        "stale": f"{again(options, 'run')} --stale", "failed": f"{again(options, 'run')} --retry",
        "half done": again(options, "run"), "missing": again(options, "run"),
    }  # fmt: skip
    rows = []
    for state in ("done", "stale", "failed", "running", "half done", "missing", "conflict"):
        words = [word.partition(", ")[2] for word in states.values() if word.partition(", ")[0] == state]
        if words:
            rows.append([state, str(len(words)), counts(filter(None, words)), advice.get(state, "")])
    print(table(rows, indent="  "))
    print_failed(selection.failed)
    known = {cell.id for cell in cells}
    extra = {record["id"] for record in store.load(options.results, suite.name)} - known
    if extra:
        print(f"  {len(extra)} more have records but are not in the suite as it is today")
    print_broken(selection.broken)
    print_broken(selection.conflicts, "conflict")
    return FAILED if selection.failed or selection.conflicts else OK


def _status_of_all(results: Path, suite: str | None = None) -> int:
    from harness.records import store

    records = store.load(results, suite)
    codes = {id: code for id, code in codes_of_records(records).items() if isinstance(code, Mapping)}
    current = store.current(records, codes)
    suites: dict[str, list[store.Record]] = {}
    for record in current:
        suites.setdefault(record["suite"], []).append(record)
    old = {name: [r["id"] for r in ones if r.get("stale")] for name, ones in suites.items()}
    lost = {name: sum(r["id"] not in codes for r in ones) for name, ones in suites.items()}
    rows = [
        [name, str(len(ones)), counts(r["status"] for r in ones),
         f"{len(old[name])} stale" + (f", {lost[name]} whose code is unknown" if lost[name] else "")]
        for name, ones in suites.items()
    ]  # fmt: skip
    none = f"{results}: holds no records; epsbench run SUITE makes some"
    print(table(rows, ["suite", "runs", "", "code"]) if rows else none)
    for name, ids in old.items():
        if ids:
            more = f" and {len(ids) - 10} more; epsbench plan {name} lists all" if len(ids) > 10 else ""
            print(f"  stale in {name}: {', '.join(ids[:10])}{more}")
    print_broken(records.broken)
    return FAILED if any(record["status"] in FAILURES for record in current) else OK


def states_of(cells: Iterable[Cell], selection: jobs.Selection) -> dict[str, str]:
    """The state of each cell in words, by id."""
    states = dict.fromkeys((cell.id for cell in cells), "conflict")  # unless one of the following holds
    ended = {"done": selection.done, "stale": selection.stale, "failed": selection.failed}
    for state, records in ended.items():
        states |= {record["id"]: f"{state}, {record['status']}" for record in records}
    for job in selection.todo:
        if not job.folder.exists():
            states[job.cell.id] = "missing"
        else:
            states[job.cell.id] = "running" if locked(job.folder) else "half done"
    return states
