"""Run what is missing of a suite: finished runs are kept, half-done go on.

epsbench run suites/core.toml --report
epsbench run suites/core.toml --report --with-private-diagnostics    with speeds and losses: on public data
epsbench run suites/core.toml --only dp-sgd dp-adam eps=3    these two methods, at epsilon 3
epsbench run suites/core.toml --only 3f2a                    the run whose id begins so
epsbench run suites/smoke.toml --method my.py                with methods of a file of yours
epsbench run suites/core.toml --retry                        crashed, oom and timeout once more
epsbench run suites/fashion.toml --device cuda:0             the suite's runs, on a GPU
epsbench run suites/fashion.toml --reduced                   its reduced profile, in minutes
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from harness.cli.arguments import options, positive, suite_options
from harness.cli.codes import codes_of_cells
from harness.cli.commands.report import write_report
from harness.cli.errors import FAILED, INTERRUPTED, OK
from harness.cli.selecting import again, chosen, need_device
from harness.cli.words import counts, print_broken, print_failed
from harness.records.public import SWITCH

if TYPE_CHECKING:
    from harness.records.cell import Cell
    from harness.running import jobs, launch, progress
    from harness.suite import Suite

PLACE = 40


def arguments(parser: argparse.ArgumentParser) -> None:
    suite_options(parser)
    parser.add_argument("--jobs", type=positive, metavar="N",
                     help="runs at once (default: cores / threads of a run; one for each GPU)")  # fmt: skip
    parser.add_argument("--retry", action="store_true", help="run again what crashed, ran out of memory or of time")
    parser.add_argument("--stale", action="store_true", help="run again what was made by other code than today's")
    parser.add_argument(
        "--attempt", type=positive, default=1, metavar="N",
        help="the attempt that a first run counts as (default: 1): each draws other noise and batches, and a run is "
             "repeated to the bit as the attempt that it was",
    )  # fmt: skip
    parser.add_argument("--report", action="store_true", help="write the leaderboard at the end and print its top")
    parser.add_argument("--no-track", action="store_true", help="do not send anything to MLflow")
    options(parser, "--reports", SWITCH)


def run(options: argparse.Namespace) -> int:
    """Run what is missing; the exit code."""
    from harness.running import jobs, launch, progress

    suite, cells = chosen(options)
    codes = codes_of_cells(cells)
    selection = jobs.select(
        cells, options.results, suite.name, codes=codes, retry=options.retry, rerun_stale=options.stale,
        attempt=options.attempt,
    )  # fmt: skip
    for spec in dict.fromkeys(str(job.cell.device.get("device") or "cpu") for job in selection.todo):
        need_device(spec)
    suite.try_models([job.cell for job in selection.todo])
    at_once = jobs.slots([job.cell for job in selection.todo], options.jobs)
    _print_selection(options, suite, cells, selection, at_once)
    on_terminal = sys.stdout.isatty() and bool(selection.todo)
    reporter: progress.Reporter = progress.Bar() if on_terminal else progress.Lines()
    tracker = None if options.no_track else _tracker(options, suite.name, selection, reporter)
    watch = tracker.watch if tracker else None
    summary = launch.run(selection.todo, suite.name, at_once=options.jobs, codes=codes, reporter=reporter, watch=watch)
    if tracker:
        tracker.close(5.0 if summary.interrupted else 60.0)
    if summary.interrupted:
        half = sum(job.folder.exists() for job in summary.left)
        print(
            f"\nstopped: {len(summary.outcomes)} runs finished, {half} half done, "
            f"{len(summary.left) - half} not begun. Nothing is lost; go on with\n"
            f"  {shlex.join(options.command)}"
        )
        return INTERRUPTED
    return _end(options, suite, cells, codes, summary)


def _print_selection(
    options: argparse.Namespace, suite: Suite, cells: Sequence[Cell], selection: jobs.Selection, at_once: int
) -> None:
    from harness.provenance import measure

    stale, failed, todo = len(selection.stale), len(selection.failed), len(selection.todo)
    parts = [
        f"{len(selection.done)} are done",
        f"{stale} are stale and {'run again' if options.stale else 'kept (--stale runs them again)'}" if stale else "",
        f"{failed} failed {'and run again' if options.retry else '(--retry runs them again)'}" if failed else "",
        f"{todo} to run, {min(at_once, todo)} at once" if todo else "nothing to run",
    ]
    print(f"suite {suite.name}: {len(cells)} runs; {'; '.join(filter(None, parts))}", flush=True)
    if selection.stale and not options.stale:
        for record in selection.stale[:10]:
            print(f"  stale: {record['id']}, made by code {record['code'].get('hash')}")
        if len(selection.stale) > 10:
            print(f"  and {len(selection.stale) - 10} more: {again(options, 'plan')}")
    print_broken(selection.broken)
    print_broken(selection.conflicts, "conflict")
    threads = max((int(job.cell.device.get("threads") or 1) for job in selection.todo), default=1)
    if options.jobs and options.jobs * threads > measure.cores():
        print(f"  {options.jobs} runs of {threads} threads share {measure.cores()} cores: their throughput will suffer")


def _tracker(options: argparse.Namespace, suite: str, selection: jobs.Selection, reporter: progress.Reporter) -> Any:
    """What follows runs into MLflow; None where nothing is new, so that MLflow is not even imported."""
    from harness.records import mlflow as track

    pending = track.pending(options.results, suites=[suite], private=options.private)
    if not selection.todo and not pending:
        return None
    tracker = track.Tracker(say=reporter.say, private=options.private)
    for folder in pending:
        tracker.watch(folder)
    return tracker


def _end(
    options: argparse.Namespace,
    suite: Suite,
    cells: Sequence[Cell],
    codes: Mapping[str, Mapping[str, Any]],
    summary: launch.Summary,
) -> int:
    """Say how it stands now, write the report where asked, and give the exit code."""
    from harness.running import jobs

    now = jobs.select(cells, options.results, suite.name, codes=codes)
    if summary.outcomes:
        ends = counts(outcome.record["status"] for outcome in summary.outcomes)
        place = options.results / suite.name
        print(f"{len(summary.outcomes)} runs finished: {ends}; records are in {place}")
    print_failed(now.failed)
    if options.report:
        write_report(options, suite, codes)
    return FAILED if now.failed or now.conflicts or summary.conflicts else OK
