"""The commands and their arguments, each taught by example."""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import __version__
from harness.cli import checking, comparing, listing, packing, planning, reporting, running, showing, standing
from harness.cli.arguments import (
    method_option,
    private_option,
    reduced_option,
    reports_option,
    results_option,
    suite_options,
)
from harness.cli.errors import CODES, OK

VERBS = (
    "ls",
    "check",
    "plan",
    "run",
    "status",
    "show",
    "compare",
    "pack",
    "merge",
    "report",
    "track",
    "bench",
    "claims",
    "audit",
    "faults",
)


def build_parser() -> argparse.ArgumentParser:
    """The parser of every command; `verb` of what it parses is the function that carries the command out."""
    parser = argparse.ArgumentParser(
        prog="epsbench",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train differentially private methods under one suite, record every run, compare them.",
        epilog=textwrap.dedent(f"""\
            a first look:
              epsbench ls                                what there is: methods, data sets, models, suites
              epsbench plan suites/smoke.toml            what would run, with which noise, for how long
              epsbench run suites/smoke.toml --report    run it and write its leaderboard
              epsbench show 3f2a                         all about the run whose id begins so

            epsbench COMMAND --help tells more, with examples.
            {CODES}
            """),
    )
    parser.add_argument("--version", action="version", version=f"epsbench {__version__}")
    verbs = parser.add_subparsers(metavar="COMMAND", required=True)

    def verb(name: str, function: Callable[[argparse.Namespace], int], text: str, examples: str) -> Any:
        made = verbs.add_parser(
            name,
            help=text.split(". ")[0].rstrip("."),
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            epilog=f"examples:\n{textwrap.indent(textwrap.dedent(examples).strip(), '  ')}\n\n{CODES}",
        )
        made.set_defaults(verb=function)
        return made

    ls = verb("ls", listing.ls, "List methods, data sets, models and suites.", """
        epsbench ls
        epsbench ls methods                 with paper, family, parameters and defaults
        epsbench ls methods --method my.py  with those of a file of yours
        epsbench ls parts                   what a suite may give a method in the place of its own
        """)  # fmt: skip
    ls.add_argument(
        "what",
        nargs="?",
        choices=(*listing.KINDS, "suites", "parts"),
        metavar="methods|datasets|models|suites|parts",
    )
    method_option(ls)

    check = verb("check", checking.check, "Check a suite for all errors at once, or what a method promises.", """
        epsbench check suites/core.toml    all that is wrong with it, each with its line
        epsbench check dp-sgd              sensitivity, ledger, microbatches, resuming, ...
        epsbench check my.py               the same for each method of a file of yours
        epsbench check methods/*.py        and of several files
        epsbench check dp-sgd --repeat 20  the statistical checks alone, with fresh seeds: any false alarm?
        epsbench check --tables            times and false alarms of what is recorded
        """)  # fmt: skip
    check.add_argument("subjects", metavar="SUITE|METHOD|METHOD.py", nargs="*")
    check.add_argument("--repeat", type=int, metavar="N", help="the statistical checks of a method, N times")
    check.add_argument("--tables", action="store_true", help="then print the tables of all recorded checks")
    check.add_argument("--docs", type=Path, metavar="FILE",
                       help="write them into that text too, which has the markers of docs/verification.md")  # fmt: skip
    results_option(check)
    reduced_option(check)
    method_option(check)

    plan = verb("plan", planning.plan, "Show what a run would do: ids, noise, epsilon, what is done, time left.", """
        epsbench plan suites/core.toml
        epsbench plan suites/core.toml --only dp-sgd eps=3
        """)  # fmt: skip
    suite_options(plan)

    run = verb("run", running.run, "Run what is missing of a suite: finished runs are kept, half-done go on.", """
        epsbench run suites/core.toml --report
        epsbench run suites/core.toml --report --with-private-diagnostics    with speeds and losses: on public data
        epsbench run suites/core.toml --only dp-sgd dp-adam eps=3    these two methods, at epsilon 3
        epsbench run suites/core.toml --only 3f2a                    the run whose id begins so
        epsbench run suites/smoke.toml --method my.py                with methods of a file of yours
        epsbench run suites/core.toml --retry                        crashed, oom and timeout once more
        epsbench run suites/fashion.toml --device cuda:0             the suite's runs, on a GPU
        epsbench run suites/fashion.toml --reduced                   its reduced profile, in minutes
        """)  # fmt: skip
    suite_options(run)
    run.add_argument("--jobs", type=_positive, metavar="N",
                     help="runs at once (default: cores / threads of a run; one for each GPU)")  # fmt: skip
    run.add_argument(
        "--retry", action="store_true", help="run again what crashed, ran out of memory or of time"
    )
    run.add_argument(
        "--stale", action="store_true", help="run again what was made by other code than today's"
    )
    run.add_argument(
        "--attempt", type=_positive, default=1, metavar="N",
        help="the attempt that a first run counts as (default: 1): each draws other noise and batches, and a run is "
             "repeated to the bit as the attempt that it was",
    )  # fmt: skip
    run.add_argument(
        "--report", action="store_true", help="write the leaderboard at the end and print its top"
    )
    run.add_argument("--no-track", action="store_true", help="do not send anything to MLflow")
    reports_option(run)
    private_option(run)

    status = verb("status", standing.status, "Count what is done, failed, stale, running and missing.", """
        epsbench status                     every suite that has results
        epsbench status suites/core.toml    against what the suite asks for today
        """)  # fmt: skip
    status.add_argument("suite", nargs="?", metavar="SUITE", help="a TOML file, or its name under suites/")
    reduced_option(status)
    results_option(status)
    method_option(status)

    show = verb("show", showing.show, "Show one record, and the command that makes it again.", """
        epsbench show 3f2a
        epsbench show 3f2a --json | jq .privacy
        """)  # fmt: skip
    show.add_argument(
        "id", metavar="ID", help="the first digits of a run's id; id.2 names its second attempt"
    )
    show.add_argument("--json", action="store_true", help="print the record as it is")
    results_option(show)

    compare = verb("compare", comparing.compare, "Compare two methods, or two results folders, paired by seed.", """
        epsbench compare dp-sgd dp-adam                       two methods, on every task and epsilon they share
        epsbench compare dp-sgd dp-adam --suite core --by task
        epsbench compare before/results after/results --threshold 0.01    fails where a cell lost over a point
        epsbench compare before after --metric examples_per_second --threshold 0.05
        """)  # fmt: skip
    compare.add_argument("a", metavar="A", help="a method's label, title or group; or a results folder")
    compare.add_argument("b", metavar="B", help="what is compared with it, of the same kind")
    compare.add_argument(
        "--metric", default="accuracy", choices=("accuracy", "examples_per_second", "peak_memory_mib"),
        help="what is compared (default: accuracy); the last two as ratios, within one device",
    )  # fmt: skip
    compare.add_argument(
        "--by", default="setting", choices=("setting", "method", "task", "epsilon", "suite", "all"),
        help="what a line is; more than a setting is the mean over settings, seed by seed",
    )  # fmt: skip
    compare.add_argument(
        "--threshold", type=float, default=0.0, metavar="X",
        help="a loss that is borne, as a fraction: 0.01 is one point of accuracy, or 1 %% of speed or memory",
    )  # fmt: skip
    compare.add_argument("--suite", metavar="NAME", help="only the records of this suite")
    compare.add_argument("--json", type=Path, metavar="FILE", help="write the comparison as JSON")
    compare.add_argument("--markdown", type=Path, metavar="FILE", help="write it as a page of Markdown")
    results_option(compare)

    pack = verb("pack", packing.pack, "Pack records into one file that another laboratory can merge.", """
        epsbench pack core                  the records of a suite, as core.zip
        epsbench pack results -o all.zip    those of a folder
        epsbench pack core --with-private-diagnostics    with speeds and losses: of public data
        """)  # fmt: skip
    pack.add_argument("subject", metavar="SUITE|DIR", help="a suite's name or TOML file, or a results folder")
    pack.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="where to write it (default: NAME.zip)"
    )
    results_option(pack)
    private_option(pack)

    merge = verb("merge", packing.merge, "Add the records of other results folders. Nothing is overwritten.", """
        epsbench merge ../other-machine/results
        epsbench merge a/results b/results --results all
        epsbench merge core.zip             a bundle of epsbench pack, which is checked first
        """)  # fmt: skip
    merge.add_argument(
        "sources", nargs="+", metavar="DIR|BUNDLE", type=Path,
        help="folders that hold <suite>/<id>/record.json, or bundles",
    )  # fmt: skip
    results_option(merge)
    method_option(merge)

    report = verb("report", reporting.report, "Write leaderboards from records: HTML, Markdown, CSV and figures.", """
        epsbench report                     every suite that has results
        epsbench report suites/core.toml
        epsbench report suites/core.toml --with-private-diagnostics    with speeds and losses: of public data
        """)  # fmt: skip
    report.add_argument("suite", nargs="?", metavar="SUITE", help="a TOML file, or its name under suites/")
    reduced_option(report)
    results_option(report)
    reports_option(report)
    private_option(report)
    method_option(report)

    track = verb("track", reporting.track, "Bring the records that MLflow lacks into MLflow.", """
        epsbench track                       what is not known to be there
        epsbench track --rebuild             compare with the store itself, and add or replace what differs
        MLFLOW_TRACKING_URI=http://host:5000 epsbench track
        """)  # fmt: skip
    track.add_argument(
        "--rebuild", action="store_true", help="ask the store itself, not the list of what was sent"
    )
    track.add_argument(
        "--uri", help="the tracking store (default: $MLFLOW_TRACKING_URI, else sqlite:///mlflow.db)"
    )
    results_option(track)
    private_option(track)

    verb("bench", lambda options: OK, "Time engines side by side, and the share of a step outside them.", """
        epsbench bench
        epsbench bench --help
        """)  # fmt: skip
    verb("claims", lambda options: OK, "Recompute published privacy numbers from their settings.", """
        epsbench claims
        epsbench claims modelmix-cifar10
        """)  # fmt: skip
    verb("audit", lambda options: OK, "Bound a method's epsilon from below, by attacking it; record it.", """
        epsbench audit dp-sgd
        epsbench audit dp-sgd dp-adam --epsilon 1 8
        epsbench audit dp-sgd --membership            who was in the training data?
        epsbench audit dp-sgd --support               do the floats of its noise give an example away?
        """)  # fmt: skip
    verb("faults", lambda options: OK, "Plant faults that public code had; say which instrument catches each.", """
        epsbench faults
        """)  # fmt: skip
    return parser


def _positive(text: str) -> int:
    if not re.fullmatch(r"0*[1-9][0-9]{0,4}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number; write 1 or more")
    return int(text)
