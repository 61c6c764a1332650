"""Pack records into one file that another laboratory can merge.

epsbench pack core                  the records of a suite, as core.zip
epsbench pack results -o all.zip    those of a folder
epsbench pack core --with-private-diagnostics    with speeds and losses: of public data
"""

from __future__ import annotations

import argparse
import re
import tomllib
from pathlib import Path

from harness.cli.arguments import options
from harness.cli.errors import FAILED, OK
from harness.cli.selecting import find, results_in
from harness.records.public import LEFT_OUT, SWITCH

PLACE = 80


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("subject", metavar="SUITE|DIR", help="a suite's name or TOML file, or a results folder")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="where to write it (default: NAME.zip)")
    options(parser, "--results", SWITCH)


def run(options: argparse.Namespace) -> int:
    """Write a bundle of records; the exit code, of failure where some were left out."""
    from harness.verify.exchange import bundle

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
