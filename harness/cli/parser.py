"""The parser of every command, made of the files in `harness.cli.commands`."""

from __future__ import annotations

import argparse
import functools
import textwrap
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from harness import __version__
from harness.cli import commands
from harness.cli.errors import CODES

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
