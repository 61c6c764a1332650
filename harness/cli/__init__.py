"""The command ``epsbench``.

Only the command that is asked for imports what it needs: ``ls`` and ``--help`` answer without torch. What a user can
get wrong is a :class:`UserError` (or an error of the package that found it) and is printed as one message: what is
wrong, where, what to write instead.

Modules, each of which uses only those above it::

    errors      exit codes, and what a user reads
    words       tables, numbers and counts as text
    codes       today's code of cells and of records
    selecting   what a request names: suites, cells, files, devices, folders
    arguments   what several commands take
    commands/   the commands, a file each
"""

from __future__ import annotations

import argparse
import functools
import io
import os
import re
import sys
import textwrap
from collections.abc import Sequence
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from harness import __version__
from harness.cli import commands
from harness.cli.errors import CODES, FAILED, INTERRUPTED, OK, USER_ERROR, UserError, hint, message_of
from harness.records import screen

__all__ = ["FAILED", "INTERRUPTED", "OK", "USER_ERROR", "UserError", "main"]

OWN_FILE = "What is in a file of your own, methods, models and data sets, is found by --method FILE."

TEXT = argparse.RawDescriptionHelpFormatter


@functools.cache
def known() -> dict[str, Any]:
    """The modules of the commands by name, in their order."""
    found = {one.name: import_module(f"{commands.__name__}.{one.name}") for one in iter_modules(commands.__path__)}
    return dict(sorted(found.items(), key=lambda item: item[1].PLACE))


def build_parser() -> argparse.ArgumentParser:
    """The parser of every command; `run` of what it parses is the function that carries the command out."""
    parser = argparse.ArgumentParser(
        prog="epsbench",
        formatter_class=TEXT,
        description="Train differentially private methods under one suite, record every run, compare them.",
        epilog=f"""\
a first look:
  epsbench ls                                what there is: methods, data sets, models, suites
  epsbench plan suites/smoke.toml            what would run, with which noise, for how long
  epsbench run suites/smoke.toml --report    run it and write its leaderboard
  epsbench show 3f2a                         all about the run whose id begins so

epsbench COMMAND --help says more, with examples.
{CODES}
""",
    )
    parser.add_argument("--version", action="version", version=f"epsbench {__version__}")
    verbs = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, module in known().items():
        summary, _, examples = module.__doc__.partition("\n\n")
        title = summary.split(". ")[0].rstrip(".")
        epilog = f"examples:\n{textwrap.indent(examples.rstrip(), '  ')}\n\n{CODES}"
        made = verbs.add_parser(name, help=title, description=summary, formatter_class=TEXT, epilog=epilog)
        made.set_defaults(run=module.run, error=made.error, parser=parser)
        module.arguments(made)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a character that the terminal cannot show is escaped
            stream.reconfigure(errors="backslashreplace")
    with screen.clean():
        return _main(arguments)


def _main(arguments: Sequence[str] | None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if given and not given[0].startswith("-") and given[0] not in known():
            raise UserError(f'there is no command "{given[0]}"; there are {", ".join(known())}.'
                            + hint(given[0], known()))  # fmt: skip
        options = build_parser().parse_args(given)
        options.command = ["epsbench", *given]
        code: int = options.run(options)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of the pipe is gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except Exception as error:
        message = message_of(error)
        if message is None:
            raise
        print(message, file=sys.stderr)
        if re.search("no (method|model|dataset) is called", message) and "--method" not in given:
            print(OWN_FILE, file=sys.stderr)
        return USER_ERROR
