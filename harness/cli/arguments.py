"""Arguments that several commands take."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path
from typing import Any

from harness.records.public import SWITCH


def _results_folder(text: str) -> Path:
    """The results folder that is named; not that of a suite or of a run in one, where every command would go wrong."""
    from harness.records import store

    folder = Path(text)
    inside = store.suite_of(folder.absolute().parent if (folder / store.RECORD).is_file() else folder)
    if inside:
        results, suite = inside
        raise argparse.ArgumentTypeError(
            f"{text}: is inside a results folder, in its suite {suite}; write --results {shlex.quote(str(results))}"
        )
    return folder


def positive(text: str) -> int:
    """A whole number, 1 or more."""
    if not re.fullmatch(r"0*[1-9][0-9]{0,5}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number; write 1 or more")
    return int(text)


def device(text: str) -> str:
    """A device as PyTorch names it."""
    if not re.fullmatch(r"cpu|cuda(:[0-9]+)?", text):
        raise argparse.ArgumentTypeError(f'there is no device "{text}"; write "cpu" or "cuda:0"')
    return text


OPTIONS: dict[str, dict[str, Any]] = {
    "--only": {
        "nargs": "+", "action": "extend", "metavar": "GLOB",
        "help": "an id's first digits, a method or its label, a task or data set, eps=3, seed=0; of one kind "
                "any may hold, of different kinds all must",
    },
    "--device": {"type": device, "metavar": "cpu|cuda:N", "help": "run here whatever device the suite names"},
    "--reduced": {
        "action": "store_true",
        "help": "the reduced profile of the suite, its table [reduced]; its results are in a suite NAME-reduced",
    },
    "--results": {
        "type": _results_folder, "default": Path("results"), "metavar": "DIR",
        "help": "where the records are (default: results)",
    },
    "--reports": {
        "type": Path, "default": Path("reports"), "metavar": "DIR", "help": "where the reports go (default: reports)",
    },
    SWITCH: {
        "action": "store_true", "dest": "private",
        "help": "include what is private (losses, clipped shares, times, memory, ...): for benchmarks on public data",
    },
    "--method": {
        "action": "append", "default": [], "metavar": "FILE",
        "help": "a Python file with methods, models or data of your own; may be repeated",
    },
}  # fmt: skip


def options(parser: argparse.ArgumentParser, *names: str) -> None:
    """Add some of `OPTIONS`."""
    for name in names:
        parser.add_argument(name, **OPTIONS[name])


def suite_option(parser: argparse.ArgumentParser, nargs: str | None = None) -> None:
    """The suite that a command is for."""
    parser.add_argument("suite", nargs=nargs, metavar="SUITE", help="a TOML file, or its name under suites/")


def suite_options(parser: argparse.ArgumentParser) -> None:
    """What ``plan`` and ``run`` take: a suite, which of its cells, where."""
    suite_option(parser)
    options(parser, "--only", "--device", "--reduced", "--results", "--method")
