"""Suites: a TOML file, checked as a whole, to the cells that are to be run.

:func:`load` reads and checks a file without importing torch or any method: names, options and their types
come from the registry's index. :meth:`Suite.cells` then builds the methods and asks for the data's digests, and
gives one :class:`Cell` for each run. All that is wrong is reported at once, each problem with its line and what to
write instead: where reading finds something, what is sound is built all the same to see what else there is.

What a cell *is* (method, data, model, privacy, schedule, numerics, seed) makes its id; where and how fast it
runs (device, threads, engine, microbatch, budgets, paths) does not, nor does how it is shown (labels, names of
tasks).

Rooms, in the order in which a file goes through them::

    toml/       lines and problems; reading, also for the files of claims and of throughput
    tables      keys and their types
    files       Python files of the user's
    tasks       [[task]]
    stages      what a [[method]] is given: parts, a schedule, a second stage
    methods     [[method]], variants, labels
    published   [[published]]
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
from harness.records.cell import Cell, canonical_json
from harness.registry import Registry
from harness.suite.expand import Suite
from harness.suite.files import Files
from harness.suite.reading import SuiteReader
from harness.suite.tables import (
    Budget,
    Device,
    Many,
    Positive,
    Privacy,
    Published,
    Size,
    Table,
    Task,
    Text,
    Tuning,
)
from harness.suite.toml.lines import Lines
from harness.suite.toml.problems import Problem, SuiteError
from harness.suite.toml.reader import Reader, document, source
from harness.suite.values import Variant

__all__ = [
    "Budget",
    "Cell",
    "Device",
    "Many",
    "Positive",
    "Privacy",
    "Problem",
    "Published",
    "Reader",
    "Size",
    "Suite",
    "SuiteError",
    "Table",
    "Task",
    "Text",
    "Tuning",
    "Variant",
    "canonical_json",
    "document",
    "load",
    "parse",
    "source",
]


def load(
    path: str | Path,
    files: Iterable[str | Path] = (),
    *,
    names: Registry | None = None,
    reduced: bool = False,
    thorough: bool = False,
) -> Suite:
    """Read and check a suite, or its reduced profile; ``files`` are Python files with methods, models
    and data sets of the user.

    ``names`` is the registry to look names up in, by default the installation's. With ``thorough``
    files of data that are not here are a problem even where all is known of the data, and every model is built and
    tried. Raises :class:`SuiteError` with every problem,
    whatever the file holds.
    """
    own = Files.admit(files, names or registry.installed())
    return _read(source(path, own.problems), str(path), own, reduced, thorough)


def parse(text: str, file: str = "suite.toml", *, names: Registry | None = None, reduced: bool = False) -> Suite:
    """Check the text of a suite; ``file`` is the name that errors give. Raises :class:`SuiteError`."""
    return _read(text, file, Files.admit((), names or registry.installed()), reduced, False)


def _read(text: str, file: str, own: Files, reduced: bool, thorough: bool) -> Suite:
    data = document(text, file, own.problems)
    return SuiteReader(file, data, Lines(text), own).suite(reduced, thorough)
