"""The parser of every command: of those that lie in `harness.cli.commands`."""

from __future__ import annotations

import argparse
import functools
import textwrap
from importlib import import_module
from pkgutil import iter_modules

from harness import __version__
from harness.cli import commands
from harness.cli.command import Command
from harness.cli.errors import CODES


@functools.cache
def known() -> dict[str, Command]:
    """The commands by name, in their order."""
    modules = (import_module(f"{commands.__name__}.{one.name}") for one in iter_modules(commands.__path__))
    return {one.name: one for one in sorted((module.COMMAND for module in modules), key=lambda one: one.place)}


def build_parser() -> argparse.ArgumentParser:
    """The parser of every command; `verb` of what it parses is the function that carries the command out."""
    parser = argparse.ArgumentParser(
        prog="epsbench",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train differentially private methods under one suite, record every run, compare them.",
        epilog=textwrap.dedent(f"""\
            a first look:
              epsbench ls                                what there is: methods, data sets, models, suites
              epsbench plan suites/smoke.toml            what would run, with which noise, for how long
              epsbench run suites/smoke.toml --report    run it and write its leaderboard
              epsbench show 3f2a                         all about the run whose id begins so

            epsbench COMMAND --help tells more, with examples.
            {CODES}
            """),
    )
    parser.add_argument("--version", action="version", version=f"epsbench {__version__}")
    verbs = parser.add_subparsers(metavar="COMMAND", required=True)
    for one in known().values():
        made = verbs.add_parser(
            one.name,
            help=one.summary.split(". ")[0].rstrip("."),
            description=one.summary,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            epilog=f"examples:\n{textwrap.indent(textwrap.dedent(one.examples).strip(), '  ')}\n\n{CODES}",
        )
        made.set_defaults(verb=one.run, error=made.error)
        one.arguments(made)
    return parser
