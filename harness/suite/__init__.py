"""Suites: from a TOML file to the cells that are to be run, checked in two phases.

:func:`load` reads: names, options and their types come from the registry's index, so that neither torch nor any method
is imported. :meth:`Suite.cells` then builds the methods, asks for the data's digests and gives one :class:`Cell` for
each run. Each phase reports all of its errors at once, each with its line and what to write instead. Nothing is built
of a suite that could not be read.

What a cell *is* (method, data, model, privacy, schedule, numerics, seed) makes its id; where and how fast it
runs (device, threads, engine, microbatch, budgets, paths) does not, nor does how it is shown (labels, names of
tasks).

Modules, in the order in which a file goes through them::

    toml/       lines, problems and typed tables, also for the files of claims and of throughput
    tables      keys and their types
    files       Python files of the user's
    tasks       [[task]]
    methods     [[method]], variants, labels
    reading     all tables of a suite, and its reduced profile
    values      what a suite is once it is read

    build       methods with their parts
    lengths     data, and steps
    trial       models, built and tried
    expand      cells
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from harness import registry
from harness.registry import Registry
from harness.suite.expand import Suite
from harness.suite.files import Files
from harness.suite.reading import SuiteReader
from harness.suite.toml.problems import SuiteError
from harness.suite.toml.reader import kind_of, source

__all__ = ["Suite", "SuiteError", "kind_of", "load", "parse"]


def load(
    path: str | Path,
    files: Iterable[str | Path] = (),
    *,
    names: Registry | None = None,
    reduced: bool = False,
    thorough: bool = False,
) -> Suite:
    """Read a suite, or its reduced profile; ``files`` are Python files with methods, models and data sets of the user.

    ``names`` is the registry to look names up in, by default the installation's. With ``thorough``
    :meth:`Suite.cells` also reports files of data that are not here, where all is known of the data without them, and
    builds and tries every model. Raises :class:`SuiteError` with every problem, whatever the file holds.
    """
    own = Files.admit(files, names or registry.installed())
    return SuiteReader(source(path, own.problems), str(path), own).suite(reduced, thorough)


def parse(text: str, file: str = "suite.toml", *, reduced: bool = False) -> Suite:
    """Read the text of a suite; ``file`` is the name that errors give. Raises :class:`SuiteError`."""
    return SuiteReader(text, file, Files.admit((), registry.installed())).suite(reduced, thorough=False)
