"""List methods, data sets, models and suites.

epsbench ls
epsbench ls methods                 with paper, family, parameters and defaults
epsbench ls methods --method my.py  with those of a file of yours
epsbench ls parts                   what a suite may give a method in the place of its own
"""

from __future__ import annotations

import argparse
import shutil
import textwrap
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.cli.arguments import options
from harness.cli.errors import OK
from harness.cli.selecting import add_files
from harness.cli.words import table

PLACE = 10
KINDS = {"methods": "method", "datasets": "dataset", "models": "model"}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what", nargs="?", choices=(*KINDS, "suites", "parts"), metavar="methods|datasets|models|suites|parts"
    )
    options(parser, "--method")


def run(options: argparse.Namespace) -> int:
    """List what is asked for, or everything; the exit code."""
    from harness import registry

    add_files(options.method)
    if options.what == "parts":
        return _ls_parts()
    kinds = [options.what] if options.what else [*KINDS, "suites"]
    for kind in kinds:
        if len(kinds) > 1:
            print(kind)
        if kind == "suites":
            print(table(_suite_rows(), indent="  ") or "  none: no *.toml under suites/")
        else:
            _ls_entries(list(registry.index(KINDS[kind]).values()), detail=len(kinds) == 1)
            for broken in registry.broken(KINDS[kind]):
                print(f"  ! {broken}")
        if len(kinds) > 1:
            print()
    return OK


def _ls_parts() -> int:
    """The parts that a suite may give a method, slot by slot."""
    from harness.registry import parts

    for slot in parts.SLOTS:
        print(f'{slot}: with = {{ {slot} = "NAME?OPTION=VALUE" }} under [[method]]')
        _ls_entries(list(parts.entries(slot).values()), detail=True)
        print()
    return OK


def _ls_entries(entries: Sequence[Any], detail: bool) -> None:
    rows = [
        [f"{e.name}:{e.argument.upper()}" if e.argument else e.name,
         str(e.meta.get("family") or ""), str(e.meta.get("paper") or ""), e.summary]
        for e in entries
    ]  # fmt: skip
    used = [i for i in range(4) if any(row[i] for row in rows)]
    lines = table([[row[i] for i in used] for row in rows], indent="  ").splitlines()
    for entry, line in zip(entries, lines, strict=True):
        print(line)
        if detail and entry.parameters:
            shown = ", ".join(
                f"{name}: {p.type}" + ("" if p.required else f" = {p.default!r}")
                for name, p in entry.parameters.items()
            )
            width = max(60, shutil.get_terminal_size((110, 24)).columns)
            print(textwrap.fill(shown, width, initial_indent=" " * 6, subsequent_indent=" " * 6))


def _suite_rows() -> list[list[str]]:
    """The files under suites/, each with the question in its header."""
    headers = {"suite": "suite", "throughput": "bench", "claims": "claims"}
    rows = []
    for path in sorted(Path("suites").glob("*.toml")):
        try:
            tables = tomllib.loads(path.read_text("utf-8-sig"))
            header = tables[headers[tables.get("kind", "suite")]]
            rows.append([str(path), str(header["question"])])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            rows.append([str(path), f"cannot be read: epsbench check {path}"])
    return rows
