"""Which runs of a suite are to be made, where, and how many fit at once."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.provenance import measure
from harness.records import draw, store
from harness.records.cell import Cell
from harness.records.description import read_points
from harness.records.files import Broken, StoreError, Unwritable, lock, unlock
from harness.records.record import FAILED
from harness.running.progress import describe

Codes = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Job:
    """A cell and the folder of the attempt that is to be made."""

    cell: Cell
    folder: Path


@dataclass(frozen=True)
class Selection:
    """The cells of a suite by what there is to do: run them, or leave them as they are and why.

    `conflicts` are folders that hold a run of another cell under the id of one of these, which then cannot run here.
    """

    todo: list[Job] = field(default_factory=list)
    done: list[store.Record] = field(default_factory=list)
    stale: list[store.Record] = field(default_factory=list)
    failed: list[store.Record] = field(default_factory=list)
    broken: list[Broken] = field(default_factory=list)
    conflicts: list[Broken] = field(default_factory=list)


def select(
    cells: Iterable[Cell],
    results: Path,
    suite: str,
    *,
    codes: Codes | None = None,
    retry: bool = False,
    rerun_stale: bool = False,
    attempt: int = 1,
) -> Selection:
    """Sort the cells into what is to be run and what is there already.

    A cell without a record, or with an attempt that has none yet, is to be run; a quarantined record counts as none,
    and the next attempt goes beside it. Final records (ok, diverged, skipped, over_budget) are done, or stale where
    `codes` (by id) says that the code changed; failures are failed. `retry` runs the failed again, `rerun_stale` the
    stale. A first run is the attempt of the number `attempt`: which random numbers it draws depends on that.
    """
    records = store.load(results, suite)
    by_id = {record["id"]: record for record in store.current(records, codes)}
    attempts: dict[str, list[store.Record]] = {}
    for one in records:
        attempts.setdefault(one["id"], []).append(one)
    selection = Selection(broken=records.broken)
    asked: dict[str, Cell] = {}
    for cell in cells:
        record = by_id.get(cell.id)
        place = store.Folder(results, suite, cell.id)
        conflict = _conflict(cell, place, attempts.get(cell.id, ()), asked.setdefault(cell.id, cell))
        if conflict is not None:
            selection.conflicts.append(conflict)
            continue
        latest = place.latest()
        half_done = latest > 0 and place.unfinished() == place.attempt(latest)
        if record is None or half_done:
            again = True
        elif record["status"] in FAILED:
            again = retry
            selection.failed.append(record)
        elif record.get("stale"):
            again = rerun_stale
            selection.stale.append(record)
        else:
            again = False
            selection.done.append(record)
        if again:
            selection.todo.append(Job(cell, place.unfinished(attempt)))
    return selection


def _conflict(cell: Cell, place: store.Folder, attempts: Iterable[store.Record], asked: Cell) -> Broken | None:
    """What is, or will be, in the folders of a cell and is of another cell with its id; None where nothing is."""
    if asked.digest != cell.digest:
        return Broken(
            place.attempt(1),
            f"is the folder of two runs: {describe(cell.canonical())} has the same id as "
            f"{describe(asked.canonical())}; change a hyper-parameter of one, or run it into another folder with "
            "--results",
        )
    for record in attempts:
        if reason := store.stranger(record, cell):
            return Broken(Path(record["path"]), reason)
    newest = place.attempt(max(1, place.latest()))
    reason = draw.stranger(newest, cell)
    return Broken(newest, reason) if reason else None


def slots(cells: Sequence[Cell], jobs: int | None = None) -> int:
    """How many runs go on at once at most: `jobs`, else as many as have cores; on GPUs one a device."""
    if jobs is not None:
        return jobs
    devices = {device_of(cell) for cell in cells if is_cuda(cell)}
    threads = [threads_of(cell) for cell in cells if not is_cuda(cell)]
    on_cpu = max(1, measure.cores() // min(threads)) if threads else 0
    return max(1, on_cpu + len(devices))


def is_cuda(cell: Cell) -> bool:
    """Whether the cell runs on a GPU."""
    return str(cell.device.get("device", "cpu")).startswith("cuda")


def device_of(cell: Cell) -> str:
    """The device that the cell runs on: "cpu", "cuda:1"."""
    name = str(cell.device.get("device", "cpu"))
    return "cuda:0" if name == "cuda" else name


def threads_of(cell: Cell) -> int:
    """How many threads of the CPU the cell runs in."""
    return int(cell.device.get("threads") or 1)


def fraction(job: Job) -> float:
    """How far a run is, from the last line of its trace: 0 to 1."""
    try:
        points, _ = read_points(job.folder / "trace.jsonl")
    except OSError:
        return 0.0
    return min(1.0, max(0.0, points[-1].step / job.cell.schedule["steps"])) if points else 0.0


def take_over_checkpoint(job: Job, code: Mapping[str, Any] | None) -> None:
    """Give a new attempt the checkpoint of the one before, if that was killed and the code is the same."""
    match = job.folder.name.partition(".")
    number = int(match[2] or 1)
    if number == 1 or job.folder.exists():
        return
    before = job.folder.with_name(match[0] if number == 2 else f"{match[0]}.{number - 1}")
    if not (before / "checkpoint").is_dir():
        return
    try:
        record = store.read(before / store.RECORD)
    except (OSError, StoreError):
        # Without a readable record it is not known what that checkpoint is worth.
        return
    if record["status"] not in FAILED or store.stale(record, code) or store.stranger(record, job.cell):
        return
    # Another launcher may be at it.
    for _ in range(200):
        if (held := lock(before)) is not None:
            break
        time.sleep(0.05)
    else:
        return
    # The folder appears under its name in one step, complete: a kill in between leaves nothing that looks
    # half done, and the next launcher clears it away.
    made = job.folder.with_name(f".{job.folder.name}.taken")
    try:
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir()
        for name in ("trace.jsonl", "env.json"):
            with contextlib.suppress(FileNotFoundError):
                shutil.copyfile(before / name, made / name)
        if (before / "checkpoint").is_dir():  # not yet taken by another
            shutil.copytree(before / "checkpoint", made / "checkpoint")
        if not job.folder.exists() and (made / "checkpoint").is_dir():
            made.rename(job.folder)
            shutil.rmtree(before / "checkpoint", ignore_errors=True)
    except OSError as error:
        raise Unwritable(job.folder, error) from error
    finally:
        shutil.rmtree(made, ignore_errors=True)
        unlock(before, held)
