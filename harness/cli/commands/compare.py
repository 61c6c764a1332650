"""Compare two methods, or two results folders, paired by seed.

epsbench compare dp-sgd dp-adam                       two methods, on every task and epsilon they share
epsbench compare dp-sgd dp-adam --suite core --by task
epsbench compare before/results after/results --threshold 0.01    fails where a cell lost over a point
epsbench compare before after --metric examples_per_second --threshold 0.05
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from harness.cli.arguments import options
from harness.cli.errors import FAILED, OK, UserError
from harness.cli.selecting import results_in
from harness.cli.words import print_broken

if TYPE_CHECKING:
    from harness.records import store

PLACE = 70


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A", help="a method's label, title or group; or a results folder")
    parser.add_argument("b", metavar="B", help="what is compared with it, of the same kind")
    parser.add_argument(
        "--metric", default="accuracy", choices=("accuracy", "examples_per_second", "peak_memory_mib"),
        help="what is compared (default: accuracy); the last two as ratios, within one device",
    )  # fmt: skip
    parser.add_argument(
        "--by", default="setting", choices=("setting", "method", "task", "epsilon", "suite", "all"),
        help="what a line is; more than a setting is the mean over settings, seed by seed",
    )  # fmt: skip
    parser.add_argument(
        "--threshold", type=float, default=0.0, metavar="X",
        help="a loss that is borne, as a fraction: 0.01 is one point of accuracy, or 1 %% of speed or memory",
    )  # fmt: skip
    parser.add_argument("--suite", metavar="NAME", help="only the records of this suite")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the comparison as JSON")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write it as a page of Markdown")
    options(parser, "--results")


def run(options: argparse.Namespace) -> int:
    """Print a comparison, and write it where asked; the exit code, of failure where a cell lost too much."""
    from harness.report.compare import folders, methods
    from harness.report.model.pairs import CompareError

    places = [Path(one) for one in (options.a, options.b)]
    there = [place.is_dir() for place in places]
    if there[0] != there[1]:
        place, other = (options.a, options.b) if there[0] else (options.b, options.a)
        raise UserError(f"{place} is a folder and {other} is not; name two methods or two results folders.")
    how = {"metric": options.metric, "by": options.by, "threshold": options.threshold}
    try:
        if all(there):
            before, after = (_compared(*results_in(place, options.suite)) for place in places)
            made = folders(before, after, options.a, options.b, **how)
        else:
            records = _compared(options.results, options.suite)
            made = methods(records, options.a, options.b, **how)
    except CompareError as error:
        raise UserError(str(error)) from error
    print(made.terminal())
    for file, text in ((options.json, json.dumps(made.json(), indent=1) + "\n"), (options.markdown, made.markdown())):
        if file is not None:
            file.write_text(text, encoding="utf-8")
    return FAILED if made.regressions else OK


def _compared(results: Path, suite: str | None) -> list[store.Record]:
    """The record of each cell that counts; says which files could not be used."""
    from harness.records import store

    records = store.load(results, suite)
    print_broken(records.broken)
    if not records:
        where = results / suite if suite else results
        raise UserError(f"{where}: holds no records to compare; epsbench run SUITE makes some.")
    return store.current(records)
