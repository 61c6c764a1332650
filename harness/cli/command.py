"""What a file in `harness.cli.commands` declares as its ``COMMAND``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple


class Command(NamedTuple):
    """A command: `summary` in one sentence, `examples` one a line, `arguments` adds what it takes to its parser.

    `run` gives the exit code. It finds ``error``, which ends with a message about the arguments, among its options.
    `place` orders the list of commands: first those that are used first.
    """

    name: str
    place: int
    summary: str
    examples: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
