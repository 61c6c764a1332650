"""``pack`` and ``merge``: records to another laboratory, and from one."""

from __future__ import annotations

import argparse
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path

from harness.cli.codes import codes_of_records
from harness.cli.errors import FAILED, OK
from harness.cli.selecting import add_files, find, results_in
from harness.public import LEFT_OUT


def pack(options: argparse.Namespace) -> int:
    """Write a bundle of records; the exit code, of failure where some were left out."""
    from harness import pack as bundle

    folder = Path(options.subject)
    if folder.is_dir():
        results, name = results_in(folder)
    else:
        results, name = options.results, options.subject
        if not re.fullmatch(r"[a-z0-9-]+", name) or not (results / name).is_dir():
            name = _name_in(find(options.subject))
    file = options.output or Path(f"{name or folder.absolute().name}.zip")
    made = bundle.pack(results, file, name, options.private)
    for one in made.left_out:
        print(f"  left out: {one}")
    print(f"{len(made.records)} records in {made.path}\nSHA-256 {made.sha256}")
    if not options.private:
        print(LEFT_OUT)
    return FAILED if made.left_out else OK


def _name_in(file: Path) -> str:
    """The name that a suite's file gives it; that of the file where it gives none."""
    try:
        return str(tomllib.loads(file.read_text("utf-8-sig"))["suite"]["name"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return file.stem


def merge(options: argparse.Namespace) -> int:
    """Add records from elsewhere; the exit code, of failure where some conflict or are refused."""
    from harness import pack as bundle

    add_files(options.method)
    result = bundle.merge(options.sources, options.results)
    print(f"{len(result.added)} records added to {options.results}, {len(result.same)} were there already")
    for title, ones in (("conflict", result.conflicts), ("refused", result.refused)):
        for one in ones:
            print(f"  {title}: {one}")
    if result.added:
        _say_ineligible(result.added, options.results)
    return FAILED if result.conflicts or result.refused else OK


def _say_ineligible(added: Sequence[str], results: Path) -> None:
    """Which of the records that were added cannot be ranked, and why."""
    from harness import pack as bundle
    from harness import store

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
        print(f"  {store.Broken(Path(why), ', '.join(places[:5]))}{more}")
