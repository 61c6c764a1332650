"""Writes tables, numbers and counts as text for a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from harness.records.files import Broken

if TYPE_CHECKING:
    from harness.records import store


def table(rows: Sequence[Sequence[str]], header: Sequence[str] = (), indent: str = "") -> str:
    """Columns aligned by their widest entry; the last is not padded. An entry of several lines becomes one."""
    lines = [[" ".join(text.splitlines()) for text in line] for line in ([header, *rows] if header else rows)]
    if not lines:
        return ""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        (indent + "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True))).rstrip()
        for line in lines
    )


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


def first_line(record: store.Record) -> str:
    """The first line of why a record is as it is."""
    return (str(record.get("reason") or "no reason given").splitlines() or [""])[0][:200]


def print_conflicts(conflicts: Sequence[Broken]) -> None:
    """Print which folders hold a run of another cell than the one that is asked for."""
    for one in conflicts:
        print(f"  ! conflict: {one}")


def print_broken(broken: Sequence[Broken]) -> None:
    """Print what could not be used."""
    for one in broken:
        print(f"  ! quarantined: {one}")
