"""Writes tables, numbers and counts as text for a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from harness.records import tables
from harness.records.files import Broken

if TYPE_CHECKING:
    from harness.records import store


def table(rows: Sequence[Sequence[str]], header: Sequence[str] = (), indent: str = "") -> str:
    """Columns aligned by their widest entry; the last is not padded. An entry of several lines becomes one."""
    lines = [[" ".join(text.splitlines()) for text in line] for line in ([header, *rows] if header else rows)]
    columns = range(len(lines[0]) if lines else 0)
    return "\n".join((indent + line).rstrip() for line in tables.aligned(lines, columns))


def number(value: float | None, digits: int = 4) -> str:
    """A number of so many significant digits; "-" where there is none."""
    return "-" if value is None else f"{value:.{digits}g}"


def epsilon(value: float | None) -> str:
    """A target epsilon; "inf" where there is no privacy."""
    return "inf" if value is None else f"{value:.4g}"


def counts(words: Iterable[str]) -> str:
    """ "ok 3, diverged 1" in order of frequency."""
    found = sorted(Counter(words).items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{word} {n}" for word, n in found)


def print_failed(records: Iterable[store.Record]) -> None:
    """Print which runs failed, and why."""
    from harness.running import progress

    for one in records:
        reason = str(one.get("reason") or "no reason given").splitlines()
        print(f"  {one['id']}  {progress.describe(one['cell'])}: {one['status']}, {reason[0][:200] if reason else ''}")


def print_broken(broken: Iterable[Broken], why: str = "quarantined") -> None:
    """Print what could not be used; a conflict is a folder that holds a run of another cell than is asked for."""
    for one in broken:
        print(f"  ! {why}: {one}")
