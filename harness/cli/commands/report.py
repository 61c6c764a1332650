"""Write leaderboards from records: HTML, Markdown, CSV and figures.

epsbench report                     every suite that has results
epsbench report suites/core.toml
epsbench report suites/core.toml --with-private-diagnostics    with speeds and losses: of public data
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.cli.arguments import options, suite_option
from harness.cli.codes import codes_of_cells
from harness.cli.errors import OK, UserError
from harness.cli.selecting import again, load, need_suite, suite_file
from harness.cli.words import print_broken
from harness.records.files import Broken
from harness.records.public import LEFT_OUT, SWITCH

if TYPE_CHECKING:
    from harness.records import store
    from harness.suite import Suite

PLACE = 100


def arguments(parser: argparse.ArgumentParser) -> None:
    suite_option(parser, "?")
    options(parser, "--reduced", "--results", "--reports", SWITCH, "--method")


def run(options: argparse.Namespace) -> int:
    """Write the report of one suite, or of all that have records; the exit code."""
    from harness.records import store

    need_suite(options)
    if options.suite is not None:
        write_report(options, load(options))
        return OK
    records = store.load(options.results)
    names = list(dict.fromkeys(record["suite"] for record in records))
    if not names:
        print_broken(records.broken)
        raise UserError(f"{options.results}: holds no records to report; epsbench run SUITE makes some.")
    for name in names:
        file, options.reduced = suite_file(name)
        if file:
            options.suite = str(file)
            write_report(options, load(options))
        else:
            print(f"{name}: there is no suites/{name}.toml, so its records are shown without question and"
                  " published values")  # fmt: skip
            records = store.load(options.results, name)
            _build(options, name, "", store.current(records), records.broken)
    return OK


def write_report(options: argparse.Namespace, suite: Suite, codes: Mapping[str, Mapping[str, Any]] = {}) -> None:
    """Write the report of what the suite asks for today; `codes` (by id) are worked out where they are missing."""
    from harness.records import store
    from harness.suite import SuiteError

    found, left_out = store.load(options.results, suite.name), ""
    records: list[store.Record] = found
    try:
        cells = suite.cells()
    except SuiteError as error:  # data that is not here is no reason to hide what was measured elsewhere
        print(f"{suite.file}: taken as it is, without looking for stale records, because:\n{error}")
        cells = []
    if cells:
        wanted = {cell.id for cell in cells}
        today = {**codes, **codes_of_cells(cell for cell in cells if cell.id not in codes)}
        extra = {record["id"] for record in records} - wanted
        if extra:
            print(f"{len(extra)} runs have records but are not in the suite as it is today; they are left out")
            ids, of = sorted(extra), "1 record of a run" if len(extra) == 1 else f"{len(extra)} records of runs"
            left_out = f"{of} that the suite does not ask for today: {', '.join(ids[:10])}"
            left_out += f" and {len(ids) - 10} more" if len(ids) > 10 else ""
        records = store.current([record for record in records if record["id"] in wanted], today)
    else:
        records = store.current(records)
    if not records and not left_out:
        print_broken(found.broken)
        raise UserError(f"{options.results / suite.name}: holds no records to report; {again(options, 'run')}")
    # A path below the working directory is given from there.
    file, here = Path(suite.file), Path.cwd()
    _build(
        options, suite.name, suite.question, records, found.broken, reduced=suite.reduced, left_out=left_out,
        published=[row.model_dump() for row in suite.published],
        tuning=suite.tuning.model_dump(exclude_unset=True) if suite.tuning else None,
        file=str(file.relative_to(here) if file.is_relative_to(here) else file),
    )  # fmt: skip


def _build(
    options: argparse.Namespace, name: str, question: str, records: Sequence[store.Record],
    quarantine: Sequence[Broken], **more: Any,
) -> None:  # fmt: skip
    from harness.records import audits, checks
    from harness.report import build, overview, sources

    print_broken(quarantine)
    more["quarantine"] = [(str(one.path), one.reason) for one in quarantine]
    methods = [one["cell"]["method"] for one in records]
    more["sources"] = sources.describe(methods)
    more["audits"] = audits.latest(audits.load(options.results / audits.FOLDER))
    found = checks.load(options.results / checks.FOLDER)
    print_broken(found.broken)
    named = {one["name"] for one in methods}
    more["checks"] = checks.latest(one for one in found if one["method"] in named)

    placed = [{**one, "path": str(Path(one["path"]).relative_to(options.results))} for one in records]
    made = build(name, question, placed, options.reports, results=options.results, private=options.private, **more)
    overview(options.reports, options.results)
    print(f"\n{made.top.rstrip()}\n\nleaderboard: {made.index}")
    if not options.private:
        print(LEFT_OUT)
