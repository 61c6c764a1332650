"""The command ``epsbench``: ls, check, plan, run, status, show, compare, pack, merge, report, track, bench,
claims, audit.

Only the verb that is asked for imports what it needs: ``ls`` and ``--help`` answer without torch. What a
user can get wrong is a :class:`UserError` (or an error of the room that found it) and is printed as one
message: what is wrong, where, what to write instead.

Rooms, each of which uses only those above it::

    errors      exit codes, and what a user is told
    words       tables, numbers and counts as text
    codes       today's code of cells and of records
    selecting   what a request names: suites, cells, files, devices, folders
    listing     ls
    checking    check
    standing    status
    planning    plan
    reporting   report and track
    running     run
    showing     show
    comparing   compare
    packing     pack and merge
    arguments   what several commands take
    parser      the commands and their arguments
"""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Sequence

from harness import screen
from harness.cli.errors import FAILED, INTERRUPTED, OK, USER_ERROR, UserError, hint, message_of
from harness.cli.parser import VERBS, build_parser

__all__ = ["FAILED", "INTERRUPTED", "OK", "USER_ERROR", "UserError", "main"]

OWN_FILE = "What is in a file of your own, methods, models and data sets, is found by --method FILE."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what a terminal cannot show ends no command
            stream.reconfigure(errors="backslashreplace")
    with screen.clean():
        return _main(arguments)


def _main(arguments: Sequence[str] | None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if given and not given[0].startswith("-") and given[0] not in VERBS:
            raise UserError(f'there is no command "{given[0]}"; there are {", ".join(VERBS)}.'
                            + hint(given[0], VERBS))  # fmt: skip
        if given[:1] == ["bench"]:
            return _bench(given[1:])
        if given[:1] == ["claims"]:
            return _claims(given[1:])
        if given[:1] == ["audit"]:
            return _audit(given[1:])
        if given[:1] == ["faults"]:
            return _faults(given[1:])
        options = build_parser().parse_args(given)
        options.command = ["epsbench", *given]
        code: int = options.verb(options)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe has seen enough; nothing more can be said to it
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


def _bench(arguments: Sequence[str]) -> int:
    from harness import bench

    return bench.main(arguments)


def _claims(arguments: Sequence[str]) -> int:
    from harness.verify import claims

    return claims.main(arguments)


def _audit(arguments: Sequence[str]) -> int:
    from harness.verify import audit

    return audit.main(arguments)


def _faults(arguments: Sequence[str]) -> int:
    from harness.verify import faults

    return faults.main(arguments)
