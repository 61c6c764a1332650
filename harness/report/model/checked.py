"""What `epsbench check` found of a method, as the pages show it: a mark, a sentence, and the lines that fail."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from harness.report.model.fields import visible

if TYPE_CHECKING:
    from harness.report.model.rows import Row

_WORSE = {"good": 0, "warn": 1, "bad": 2}


class Mark(NamedTuple):
    """A word, its colour (``good``, ``warn`` or ``bad``), and the sentence behind it."""

    text: str
    kind: str
    words: str


@dataclass(frozen=True)
class Checked:
    """The check of a method that counts. `failures` are names and details; `stale`: its code has changed since."""

    method: str
    parts: Mapping[str, str]
    held: int
    apply: int
    failures: Sequence[tuple[str, str]]
    stale: bool
    date: str
    again: str = ""

    def mark(self, parts: Iterable[tuple[str, str]] = ()) -> Mark:
        """For a row whose method has these `parts` (slot and description). A failure stands, however old it is."""
        since = "; its code has changed since" if self.stale else ""
        words = f"{self.held} of {self.apply} checks that apply hold, {self.date}{since}"
        if self.failures:
            names = "; ".join(name for name, _ in self.failures)
            return Mark("FAILED", "bad", f"{words}. Failed: {names}")
        if self.stale:
            return Mark("check stale", "warn", words)
        other = [slot for slot, one in parts if self.parts.get(slot) not in (None, one.partition("(")[0])]
        if other:
            was = ", ".join(f"{slot} {self.parts[slot]}" for slot in other)
            return Mark(f"checked but for {', '.join(other)}", "warn", f"{words}, with {was}")
        return Mark("checked", "good", words)


def checks(found: Iterable[Mapping[str, Any]]) -> dict[str, Checked]:
    """Checks by method: `found` are records of `harness.records.checks.latest`, with ``"stale"``.

    An alarm in repetitions by today's code is a failure too.
    """
    found = list(found)
    whole = {one["method"]: _checked(one) for one in found if one["repeat"] is None}
    for one in found:
        if one["repeat"] is not None and one["method"] in whole:
            checked = whole[one["method"]]
            failed = [] if one["stale"] else _failures(one)
            whole[one["method"]] = replace(checked, failures=[*checked.failures, *failed], again=_again(one))
    return whole


def mark(known: Mapping[str, Checked], method: str, parts: Iterable[tuple[str, str]] = ()) -> Mark:
    """The mark of a row, or of a method."""
    if method not in known:
        return Mark("not checked", "warn", f"no check is recorded: epsbench check {method}")
    return known[method].mark(parts)


def of_row(known: Mapping[str, Checked], row: Row) -> Mark:
    """The mark of a row; of two stages the worst of those that touch the private data, and what each is."""
    run = row.first
    marks = {run.method: mark(known, run.method, run.parts)}
    for stage in run.stages[1:]:
        if not stage.public:
            marks[f"then {stage.method}"] = mark(known, stage.method)
    worst = max(marks.values(), key=lambda one: _WORSE[one.kind])
    if len(marks) == 1:
        return worst
    return worst._replace(words="; ".join(f"{name}: {one.text}, {one.words}" for name, one in marks.items()))


def _checked(one: Mapping[str, Any]) -> Checked:
    apply, failed = sum(line["applies"] for line in one["lines"]), _failures(one)
    kinds = {slot: part["type"] for slot, part in one["parts"].items() if isinstance(part, dict) and "type" in part}
    return Checked(one["method"], kinds, apply - len(failed), apply, failed, one["stale"], one["started"][:10])


def _failures(one: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(visible(line["name"]), visible(line["detail"])) for line in one["lines"] if not line["ok"]]


def _again(one: Mapping[str, Any]) -> str:
    applied = [line for line in one["lines"] if line["applies"]]
    alarms = sum(line["failures"] or 0 for line in applied)
    if not applied:
        return ""
    since = "; its code has changed since" if one["stale"] else ""
    return (
        f"{one['repeat']['count']} repetitions of {len(applied)} statistical checks with fresh seeds raised"
        f" {alarms or 'no'} alarm{'s' if alarms > 1 else ''}, {one['started'][:10]}{since}."
    )
