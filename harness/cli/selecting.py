"""Finds what a request names: suites and their cells, files of methods, devices, results folders."""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import re
import shlex
import tomllib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from harness.cli.errors import UserError, hint
from harness.cli.words import epsilon

if TYPE_CHECKING:
    from harness.records.cell import Cell
    from harness.suite import Suite


def add_files(files: Iterable[str]) -> None:
    """Register the methods, models and data sets of a user's files."""
    from harness import registry

    for file in files:
        registry.add_file(file)


def find(text: str) -> Path:
    """The file of a suite that is named by path, or by its name under suites/."""
    path = Path(text)
    if path.is_file():
        return path
    known = sorted(Path("suites").glob("*.toml"))
    for candidate in known:
        if candidate.stem == text:
            return candidate
    near = hint(path.stem, [one.stem for one in known])
    there = ", ".join(map(str, known)) or "none under suites/"
    raise UserError(f"{text}: no such suite; there are {there}.{near}")


def load(options: argparse.Namespace, thorough: bool = False) -> Suite:
    """The suite that is named; `thorough` as in :func:`harness.suite.load`."""
    from harness import suite

    named = find(getattr(options, "suite", None) or options.subject)
    kind = suite.kind_of(named)
    if kind == "claims":
        raise UserError(f"{named}: holds claims and trains nothing; epsbench claims --suite {named} recomputes it.")
    if kind == "throughput":
        raise UserError(f"{named}: times engines and trains nothing; epsbench bench --suite {named} runs it.")
    return suite.load(named, options.method, reduced=options.reduced, thorough=thorough)


def again(options: argparse.Namespace, verb: str) -> str:
    """The command that does something else with the same suite."""
    words = ["epsbench", verb, str(options.suite), *(["--reduced"] if options.reduced else [])]
    words += [word for file in options.method for word in ("--method", file)]
    words += [] if options.results == Path("results") else ["--results", str(options.results)]
    return shlex.join(words)


def need_suite(options: argparse.Namespace) -> None:
    """Raise UserError where --reduced has no suite to be the profile of."""
    if options.reduced and options.suite is None:
        raise UserError("--reduced: the profile of which suite? Name it.")


def chosen(options: argparse.Namespace) -> tuple[Suite, list[Cell]]:
    """The suite and those of its cells that are asked for, on the device that is asked for."""
    suite = load(options)
    cells = suite.cells()
    if options.device is not None:
        cells = [cell.on(options.device) for cell in cells]
    return suite, _only(cells, options.only or []) if options.only else cells


def _only(cells: Sequence[Cell], patterns: Sequence[str]) -> list[Cell]:
    """The cells that match: any pattern of one kind, and every kind. Raises UserError where nothing does."""
    kinds: dict[str, set[str]] = {}
    for pattern in patterns:
        kind, ids = _match(cells, pattern)
        kinds[kind] = kinds.get(kind, set()) | ids
    kept = [cell for cell in cells if all(cell.id in ids for ids in kinds.values())]
    if not kept:
        raise UserError(
            f"--only {shlex.join(patterns)}: each matches some run, but no run matches all of them; patterns "
            "of one kind are alternatives, those of different kinds must all hold."
        )
    return kept


def _match(cells: Sequence[Cell], pattern: str) -> tuple[str, set[str]]:
    """The kind of a pattern and the ids of the cells it matches."""

    def fits(value: object) -> bool:
        return str(value) == pattern or fnmatch.fnmatchcase(str(value), pattern)

    setting = re.fullmatch(r"(eps|seed)=(.+)", pattern)
    if setting:
        key, wanted = setting.groups()
        values = {c.id: epsilon(c.privacy["epsilon"]) if key == "eps" else str(c.seed) for c in cells}
        with contextlib.suppress(ValueError):
            wanted = epsilon(float(wanted)) if key == "eps" else wanted
        found = {id for id, value in values.items() if value == wanted}
        if not found:
            there = ", ".join(dict.fromkeys(values.values()))
            raise UserError(f"--only {pattern}: the suite has {key} {there}; write {key}=VALUE with one of these.")
        return key, found
    tests: dict[str, Callable[[Cell], bool]] = {
        "method": lambda c: fits(c.method) or fits(c.label),
        "task": lambda c: fits(c.task["name"]) or fits(c.task["dataset"]),
        "id": lambda c: bool(re.fullmatch("[0-9a-f]{3,12}", pattern)) and c.id.startswith(pattern),
    }
    for kind, test in tests.items():
        found = {cell.id for cell in cells if test(cell)}
        if found:
            return kind, found
    methods = dict.fromkeys(name for c in cells for name in (c.method, c.label))
    tasks = dict.fromkeys(c.task["name"] for c in cells)
    raise UserError(
        f"--only {pattern}: matches no run. Methods: {', '.join(methods)}. Tasks: {', '.join(tasks)}. Also "
        f"an id's first digits (3 or more), eps=3, seed=0.{hint(pattern, [*methods, *tasks])}"
    )


def need_device(spec: str) -> None:
    """Raise UserError where this machine lacks the device."""
    if not spec.startswith("cuda"):
        return
    import torch

    number, count = int(spec.partition(":")[2] or 0), torch.cuda.device_count()
    if number >= count:
        raise UserError(f"{spec}: this machine has {count} CUDA devices; write --device cpu"
                        + (f" or --device cuda:{count - 1}." if count else "."))  # fmt: skip


def suite_file(name: str) -> tuple[Path | None, bool]:
    """The file of a suite by the name in its records, and whether they are of its reduced profile.

    It is the one under suites/ or in the working directory that is called so, or whose suite is.
    """
    files = [Path("suites") / f"{name}.toml", *sorted(Path("suites").glob("*.toml")), *sorted(Path().glob("*.toml"))]
    if files[0].is_file():
        return files[0], False
    for full, reduced in ((name, False), (name.removesuffix("-reduced"), True)):
        for file in files[1:]:
            with contextlib.suppress(OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
                tables = tomllib.loads(file.read_text("utf-8-sig"))
                called = tables["suite"].get("name", file.stem)
                if called == full and (not reduced or (full != name and "reduced" in tables)):
                    return file, reduced
    return None, False


def results_in(folder: Path, suite: str | None = None) -> tuple[Path, str | None]:
    """The results folder and the suite that a folder is: one of suites, or a suite's own inside it."""
    from harness.records import store

    return store.suite_of(folder) or (folder, suite)
