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
    parser      the parser of them all
"""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Sequence

from harness.cli.errors import FAILED, INTERRUPTED, OK, USER_ERROR, UserError, hint, message_of
from harness.cli.parser import build_parser, known
from harness.records import screen

__all__ = ["FAILED", "INTERRUPTED", "OK", "USER_ERROR", "UserError", "main"]

OWN_FILE = "What is in a file of your own, methods, models and data sets, is found by --method FILE."


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
