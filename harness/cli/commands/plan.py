"""Show what a run would do: ids, noise, epsilon, what is done, time left.

epsbench plan suites/core.toml
epsbench plan suites/core.toml --only dp-sgd eps=3
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.cli.arguments import suite_options
from harness.cli.codes import codes_of_cells
from harness.cli.commands.status import states_of
from harness.cli.errors import OK
from harness.cli.selecting import chosen, need_device
from harness.cli.words import counts, epsilon, number, print_broken, table

if TYPE_CHECKING:
    from harness.records.cell import Cell

PLACE = 30
arguments = suite_options


def run(options: argparse.Namespace) -> int:
    """Print a line for each run, and the time that is left; the exit code."""
    from harness.running import jobs

    suite, cells = chosen(options)
    codes = codes_of_cells(cells)
    selection = jobs.select(cells, options.results, suite.name, codes=codes)
    states = states_of(cells, selection)
    prepared = _prepared(cells)
    accountants = list(dict.fromkeys(name for one in prepared.values() for name in one.get("planned") or {}))
    rows = []
    for cell in cells:
        one = prepared[cell.group]
        planned = one.get("planned") or {}
        rows.append([
            cell.id, cell.label, cell.task["name"], epsilon(cell.privacy["epsilon"]), str(cell.seed),
            _lengths(cell, "batch"), _lengths(cell, "steps"), number(one.get("noise_multiplier")),
            *(_planned(planned, name) for name in accountants),
            states[cell.id] + (f" ({one['reason']})" if "reason" in one else ""),
        ])  # fmt: skip
    names = ["id", "method", "task", "eps", "seed", "batch", "steps", "sigma", *accountants, "state"]
    print(table(rows, names))
    print_broken(selection.conflicts, "conflict")
    print(f"\n{len(cells)} runs of suite {suite.name}: {counts(states.values())}")
    at_once = jobs.slots(cells)
    print(_time_left([job.cell for job in selection.todo], options.results, at_once))
    return OK


def _lengths(cell: Cell, name: str) -> str:
    """The batch or the steps of a cell: of two stages both, in order."""
    both = [cell.schedule, *([cell.then["schedule"]] if cell.then else [])]
    return ", then ".join(str(schedule[name]) for schedule in both)


def _planned(planned: Mapping[str, float | None], accountant: str) -> str:
    """The planned epsilon by an accountant, in the words of a report; "-" where none was asked."""
    from harness.report.model import words

    value = planned.get(accountant)
    if value is None and accountant in planned:
        return words.ABSENT if any(one is not None for one in planned.values()) else words.epsilon(math.inf)
    return number(value)


def _prepared(cells: Iterable[Cell]) -> dict[str, dict[str, Any]]:
    """Noise multiplier and planned epsilon by group, or the reason why there are none."""
    from harness.running.plan import prepare

    found: dict[str, dict[str, Any]] = {}
    for cell in cells:
        if cell.group not in found:
            try:
                found[cell.group] = prepare(cell)
            except ValueError as error:  # no noise reaches the target: the run would end as skipped
                found[cell.group] = {"reason": f"would be skipped: {error}"}
    return found


def _time_left(todo: Sequence[Cell], results: Path, at_once: int) -> str:
    """The time for what is to be run, from the pace of finished runs of the same kind on this device."""
    from harness.provenance import measure
    from harness.records import public, store
    from harness.running import progress

    if not todo:
        return "nothing is left to run"
    pace: dict[tuple[str, ...], list[float]] = {}
    for record in store.load(results):
        wall, cell = public.diagnostics(record).get("wall_seconds"), record["cell"]
        if record["status"] == "ok" and wall:
            kind, steps = _kind_of(cell)
            pace.setdefault((*kind, str(record["device"].get("fingerprint"))), []).append(wall / steps)
    prints: dict[tuple[str, int], str] = {}
    total, unknown = 0.0, 0
    for cell in todo:
        place = (str(cell.device.get("device") or "cpu"), int(cell.device.get("threads") or 1))
        if place not in prints:
            need_device(place[0])
            prints[place] = measure.device_info(*place)["fingerprint"]
        kind, steps = _kind_of(cell.canonical())
        seconds = pace.get((*kind, prints[place]))
        if seconds:
            total += sorted(seconds)[len(seconds) // 2] * steps
        else:
            unknown += 1
    text = f"time for the {len(todo)} to run, {at_once} at once: "
    if unknown == len(todo):
        return text + "unknown, no run of these methods and tasks has finished on this device"
    text += progress.duration(total / at_once)
    return text + (f" and that of {unknown} runs of which none has finished on this device" if unknown else "")


def _kind_of(cell: Mapping[str, Any]) -> tuple[tuple[str, ...], int]:
    """What a cell's pace depends on, and its steps. A run of two stages is of another kind for each proportion."""
    method, steps, then = cell["method"]["name"], cell["schedule"]["steps"], cell.get("then") or {}
    second = (then.get("schedule") or {}).get("steps", 0)
    kind = (str(then.get("name")), str(then.get("trains")), f"{second / steps:.3g}") if then else ()
    return (method, cell["task"]["name"], *kind), steps + second
