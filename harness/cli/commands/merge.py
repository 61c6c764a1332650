"""Add the records of other results folders. Nothing is overwritten.

epsbench merge ../other-machine/results
epsbench merge a/results b/results --results all
epsbench merge core.zip             a bundle of epsbench pack, which is checked first
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from harness.cli.arguments import options
from harness.cli.codes import codes_of_records
from harness.cli.errors import FAILED, OK
from harness.cli.selecting import add_files
from harness.records.files import Broken

PLACE = 90


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "sources", nargs="+", metavar="DIR|BUNDLE", type=Path,
        help="folders that hold <suite>/<id>/record.json, or bundles",
    )  # fmt: skip
    options(parser, "--results", "--method")


def run(options: argparse.Namespace) -> int:
    """Add records from elsewhere; the exit code, of failure where some conflict or are refused."""
    from harness.verify.exchange import bundle

    add_files(options.method)
    result = bundle.merge(options.sources, options.results)
    print(f"{len(result.added)} records added to {options.results}, {len(result.same)} were there already")
    for title, ones in (("conflict", result.conflicts), ("refused", result.refused)):
        for one in ones:
            print(f"  {title}: {one}")
    if result.added:
        _print_ineligible(result.added, options.results)
    return FAILED if result.conflicts or result.refused else OK


def _print_ineligible(added: Sequence[str], results: Path) -> None:
    """Which of the records that were added cannot be ranked, and why."""
    from harness.records import store
    from harness.verify.exchange import bundle

    suites = sorted({where.partition("/")[0] for where in added})
    records = [record for suite in suites for record in store.load(results, suite)]
    new = {str(results / where / "record.json") for where in added}
    reasons = dict(bundle.ineligible(records, codes_of_records(r for r in records if r["path"] in new)))
    found: dict[str, list[str]] = {}
    for where in sorted(added):
        if where in reasons:
            found.setdefault(reasons[where], []).append(where)
    if found:
        print(f"{sum(map(len, found.values()))} of them cannot be ranked as they are:")
    for why, places in sorted(found.items()):
        more = f" and {len(places) - 5} more" if len(places) > 5 else ""
        print(f"  {Broken(Path(why), ', '.join(places[:5]))}{more}")
