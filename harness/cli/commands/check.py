"""Check a suite for all errors at once, or what a method promises.

epsbench check suites/core.toml    all that is wrong with it, each with its line
epsbench check dp-sgd              sensitivity, ledger, microbatches, resuming, ...
epsbench check my.py               the same for each method of a file of yours
epsbench check methods/*.py        and of several files
epsbench check dp-sgd --repeat 20  the statistical checks alone, with fresh seeds: any false alarm?
epsbench check --tables            times and false alarms of what is recorded
"""

from __future__ import annotations

import argparse
from pathlib import Path

from harness.cli.arguments import options, positive
from harness.cli.errors import FAILED, OK, UserError
from harness.cli.selecting import add_files, find, load
from harness.cli.words import print_broken, table

PLACE = 20


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("subjects", metavar="SUITE|METHOD|METHOD.py", nargs="*")
    parser.add_argument("--repeat", type=positive, metavar="N", help="the statistical checks of a method, N times")
    parser.add_argument("--tables", action="store_true", help="then print the tables of all recorded checks")
    parser.add_argument("--docs", type=Path, metavar="FILE",
                       help="write them into that text too, which has the markers of docs/verification.md")  # fmt: skip
    options(parser, "--results", "--reduced", "--method")


def run(options: argparse.Namespace) -> int:
    """Check each subject, and print the tables where asked; the worst exit code."""
    if not options.subjects and not options.tables:
        raise UserError("name a suite, a method or a file of methods to check, or ask for --tables.")
    if options.docs and not options.tables:
        raise UserError(f"--docs {options.docs}: it is for --tables.")
    subjects = [s for s in options.subjects if Path(s).name != "__init__.py"] or options.subjects
    alone = len(subjects) == 1
    codes = [_checked(argparse.Namespace(**vars(options), subject=one, alone=alone)) for one in subjects]
    return max([*codes, _check_tables(options) if options.tables else OK])


def _check_tables(options: argparse.Namespace) -> int:
    from harness.records import checks
    from harness.verify import recorded

    print_broken(checks.load(options.results / checks.FOLDER).broken)
    try:
        print(recorded.write_tables(options.results / checks.FOLDER, options.docs))
    except (OSError, ValueError) as error:
        raise UserError(f"{options.docs}: {error}") from error
    return OK


def _check_suite(options: argparse.Namespace) -> int:
    if options.repeat:
        raise UserError(f"--repeat: {options.subject} is a suite; it is for methods.")
    from harness.suite import kind_of

    file = find(options.subject)
    kind = kind_of(file)
    if kind == "claims":
        from harness.verify.claims import command as claims

        what = f"{len(claims.load(file).claims)} claims for epsbench claims"
    elif kind == "throughput":
        from harness.bench import plan

        what = f"{len(plan.load(file).workloads)} workloads for epsbench bench"
    else:
        cells = load(options, thorough=True).cells()
        what = f"{len(cells)} runs of {len({c.group for c in cells})} settings"
    print(f"{file}: {what}; nothing is wrong.")
    return OK


def _checked(options: argparse.Namespace) -> int:
    if options.subject.endswith(".toml") or _is_suite(options.subject):
        return _check_suite(options)
    if options.reduced:
        raise UserError(f"--reduced: {options.subject} is a method; it is for suites.")
    add_files(options.method)
    if options.subject.endswith(".py"):
        add_files([options.subject])
    else:
        from harness import registry

        registry.resolve("method", options.subject)
    from harness.records import checks
    from harness.verify import conformance, recorded

    methods = conformance.named(options.subject)
    if not methods:
        raise UserError(f"{options.subject}: holds no method; mark a function that returns a Method with @method.")
    code = OK
    for made, there in recorded.recorded(methods, options.results / checks.FOLDER, options.repeat or 0):
        shown = recorded.rows(made, failures_alone=not (options.alone and len(methods) == 1))
        if shown:
            print(table(shown))
        print(recorded.summary(made) + (" (recorded before)" if there else ""), flush=True)
        code = FAILED if checks.failing(made) else code
    return code


def _is_suite(name: str) -> bool:
    """Whether a bare name is that of a suite under suites/ and of no method."""
    from harness import registry

    return (Path("suites") / f"{name}.toml").is_file() and name not in registry.index("method")
