"""Where runs execute: each in its own process, several at once, killed when over budget, resumed when killed.

``import torch`` takes seconds, so it is paid once: a server process imports `harness.run` and forks one fresh
process a run (multiprocessing's "forkserver"). The server starts no thread and no CUDA context.

What holds when anything dies:

* A run's process holds the lock of its folder (``<id>/.lock``) for its life, so two launchers that share a
  results folder never do one cell twice. It dies with the launcher, also when that is killed with SIGKILL.
* A run that has no record is half done; the next launcher starts it again in the same folder, where it finds
  its checkpoint. A run that has one is over, and is tried again only in a new folder (``<id>.2``).
* A disk that is full or read-only is no property of a run: the run is left half done, and the launch ends with an
  error that says so. What is finished stays, and the next launch goes on.

The time budget of a cell is wall time of one session: a run that was stopped and resumes starts with a whole
budget.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import faulthandler
import importlib
import io
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any, Protocol

from harness import draw, measure, public, registry, screen, store
from harness.cell import Cell
from harness.private import opened

__all__ = [
    "Bar",
    "Job",
    "Lines",
    "Outcome",
    "Reporter",
    "Selection",
    "Summary",
    "describe",
    "duration",
    "run",
    "select",
    "slots",
]

TARGET = "harness.run:execute"
PRELOAD = ("harness.run",)
# vmap imports this on first use, which takes seconds too: worth it for several runs. It asks which GPUs there are,
# after which a forked process may not be able to use one: only for runs on a CPU.
PRELOAD_ON_CPU = (*PRELOAD, "torch._dynamo")

# Exit codes of a run's process: its folder is locked; it has a record meanwhile; it is another cell's.
_BUSY, _ALREADY, _OTHERS = 75, 76, 77
# Exit codes of a run's process that could not write, by reason: the launcher stops, and the run is half done.
_NO_PLACE = {
    errno.ENOSPC: 80,
    errno.EDQUOT: 81,
    errno.EROFS: 82,
    errno.EACCES: 83,
    errno.EPERM: 84,
    errno.EIO: 85,
}
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # what no cell can be the cause of, wherever it happened
_POLL = 0.25  # seconds between two looks at budgets and memory
_ELSEWHERE = 1.0  # seconds between two looks at a run of another launcher
_SERIAL = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
_OUTPUT = "output.txt"
_TRAINING = ("train.py", "train")  # file and function below which examples are looked at
_STACK = re.compile(r'\s*File "| {4}|Traceback |Thread 0x|Current thread|Extension modules')
_PR_SET_PDEATHSIG = 1


Codes = Mapping[str, Mapping[str, Any]]


# What is to be done ---------------------------------------------------------------------------------------


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
    broken: list[store.Broken] = field(default_factory=list)
    conflicts: list[store.Broken] = field(default_factory=list)


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
        elif record["status"] in store.FAILED:
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


def _conflict(
    cell: Cell, place: store.Folder, attempts: Iterable[store.Record], asked: Cell
) -> store.Broken | None:
    """What is, or will be, in the folders of a cell and is of another cell with its id; None where nothing is."""
    if asked.digest != cell.digest:
        other = describe(asked.canonical())
        return store.Broken(
            place.attempt(1),
            f"is the folder of two runs: {describe(cell.canonical())} has the same id as {other}; change a "
            "hyper-parameter of one, or run it into another folder with --results",
        )
    for record in attempts:
        if reason := store.stranger(record, cell):
            return store.Broken(Path(record["path"]), reason)
    newest = place.attempt(max(1, place.latest()))
    reason = draw.stranger(newest, cell)
    return store.Broken(newest, reason) if reason else None


def slots(cells: Iterable[Cell], jobs: int | None = None) -> int:
    """How many runs go on at once at most: `jobs`, else as many as have cores; on GPUs one a device."""
    if jobs is not None:
        return jobs
    devices: set[str] = set()
    threads: list[int] = []
    for cell in cells:
        if _is_cuda(cell):
            devices.add(_device(cell))
        else:
            threads.append(_threads(cell))
    on_cpu = max(1, measure.cores() // min(threads)) if threads else 0
    return max(1, on_cpu + len(devices))


def _is_cuda(cell: Cell) -> bool:
    return str(cell.device.get("device", "cpu")).startswith("cuda")


def _device(cell: Cell) -> str:
    name = str(cell.device.get("device", "cpu"))
    return "cuda:0" if name == "cuda" else name


def _threads(cell: Cell) -> int:
    return int(cell.device.get("threads") or 1)


# What is said meanwhile -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """The end of one run. `elsewhere`: another launcher did it."""

    job: Job
    record: store.Record
    elsewhere: bool = False


@dataclass(frozen=True)
class Progress:
    """Runs finished and to do in all, and how far the running ones are, in runs; seconds since the start.

    `before` is how much of them earlier sessions had done.
    """

    finished: int
    total: int
    partly: float
    seconds: float
    running: Sequence[str] = ()
    before: float = 0.0

    @property
    def done(self) -> float:
        """Runs done, counting the parts of those that are running."""
        return min(self.finished + self.partly, self.total)

    @property
    def pace(self) -> str:
        """Rate and time left, as far as they are known yet."""
        gained = self.done - self.before
        if gained < 0.02 or self.seconds <= 0:
            return ""
        left = self.seconds * (self.total - self.done) / gained
        rate = gained / self.seconds * 60
        return f"{rate:.1f} runs/min" + (f", {duration(left)} left" if self.done < self.total else "")


class Reporter(Protocol):
    """Tells the user how it goes."""

    def say(self, text: str) -> None:
        """One line."""
        ...

    def finished(self, outcome: Outcome, progress: Progress) -> None:
        """A run is over."""
        ...

    def tick(self, progress: Progress) -> None:
        """Called every quarter of a second."""
        ...

    def close(self) -> None:
        """Nothing more comes."""
        ...


class Lines:
    """Plain lines, for logs: one a finished run, and one a minute while none finishes."""

    def __init__(self, write: Callable[[str], None] = lambda text: print(text, flush=True)) -> None:
        self._write = write
        self._quiet_since = time.monotonic()

    def say(self, text: str) -> None:
        """Print the line."""
        self._quiet_since = time.monotonic()
        self._write(screen.plain(text))

    def finished(self, outcome: Outcome, progress: Progress) -> None:
        """Print the run's line with its place in the order, the rate and the time left."""
        pace = f"  | {progress.pace}" if progress.pace else ""
        width = len(str(progress.total))
        self.say(f"[{progress.finished:>{width}}/{progress.total}] {result_line(outcome)}{pace}")

    def tick(self, progress: Progress) -> None:
        """Once a minute of silence, say what is running."""
        if time.monotonic() - self._quiet_since >= 60:
            self.say(
                f"  {progress.done:.1f} of {progress.total} runs, {progress.pace or 'no rate yet'}; "
                f"running: {'; '.join(progress.running)}"
            )

    def close(self) -> None:
        """Nothing is open."""


class Bar:
    """A progress bar over all runs, with a line for each that is finished above it."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as RichProgress
        from rich.table import Column

        narrow = Column(no_wrap=True, overflow="ellipsis", ratio=1)
        self._bar = RichProgress(
            TextColumn("runs", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=20),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[pace]}", table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[running]}", markup=False, style="dim", table_column=narrow),
            expand=True,
            console=Console(file=screen.raw(sys.stdout)),
        )
        self._task = self._bar.add_task("runs", total=None, pace="", running="")
        self._bar.start()

    def say(self, text: str) -> None:
        """Print above the bar."""
        self._bar.console.print(screen.plain(text), markup=False, highlight=False)

    def finished(self, outcome: Outcome, progress: Progress) -> None:
        """Print the run's line above the bar."""
        self.say(result_line(outcome))
        self.tick(progress)

    def tick(self, progress: Progress) -> None:
        """Move the bar."""
        self._bar.update(
            self._task,
            total=progress.total,
            completed=progress.done,
            pace=progress.pace,
            running=screen.plain(progress.running[0]) if progress.running else "",
        )

    def close(self) -> None:
        """Take the bar away."""
        self._bar.stop()


def describe(cell: Mapping[str, Any]) -> str:
    """A cell in a few words: method, task, epsilon, seed."""
    method, task, privacy = (cell.get(key) or {} for key in ("method", "task", "privacy"))
    epsilon = privacy.get("epsilon")
    names = (method.get("label") or method.get("name") or "?", task.get("name", "?"))
    name, place = (" ".join(str(one).splitlines()) for one in names)
    return (
        f"{name}  {place}  eps={'inf' if epsilon is None else format(epsilon, 'g')}"
        f"  seed={cell.get('seed', '?')}"
    )


def result_line(outcome: Outcome) -> str:
    """One line on a finished run: what it was, accuracy, epsilon spent, throughput, time; or the reason."""
    record = outcome.record
    private, spent = public.diagnostics(record), record["privacy"].get("epsilon")
    parts = [f"{record['status']:<8}", describe(record["cell"])]
    accuracy = record["metrics"].get("accuracy")
    if accuracy is not None:
        parts.append(f"acc {100 * accuracy:.2f} %")
        parts.append(f"eps {'inf' if spent is None else format(spent, '.3f')}")
    rate = (private.get("examples_per_second") or {}).get("median")
    if rate is not None:
        parts.append(f"{rate:,.0f} ex/s")
    if private.get("wall_seconds") is not None:
        parts.append(duration(private["wall_seconds"]))
    if outcome.elsewhere:
        parts.append("(by another launcher)")
    if record["status"] != "ok" and record.get("reason"):
        parts.append(record["reason"].splitlines()[0][:200])
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """Seconds in words: "0.4 s", "12 s", "3 min 20 s", "2 h 05 min"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


# Running --------------------------------------------------------------------------------------------------


@dataclass
class Summary:
    """What a launch did: the ends of its runs, in order; `left` are those that were not finished.

    `conflicts` are folders in which a run of another cell was found meanwhile.
    """

    outcomes: list[Outcome] = field(default_factory=list)
    left: list[Job] = field(default_factory=list)
    interrupted: bool = False
    conflicts: list[store.Broken] = field(default_factory=list)

    @property
    def failed(self) -> list[Outcome]:
        """The runs that ended as crashed, oom or timeout."""
        return [o for o in self.outcomes if o.record["status"] in store.FAILED]


@dataclass
class _Running:
    """A run's process, and what the launcher knows of it."""

    job: Job
    process: Any
    since: float
    started: str
    ooms: int | None
    resident: float = 0.0
    over: tuple[str, str] | None = None  # status and reason with which the launcher killed it


def run(
    jobs: Sequence[Job],
    suite: str,
    *,
    at_once: int | None = None,
    codes: Codes | None = None,
    reporter: Reporter | None = None,
    watch: Callable[[Path, Mapping[str, Any]], None] | None = None,
    target: str = TARGET,
    preload: Sequence[str] | None = None,
) -> Summary:
    """Execute the jobs, each in a process of its own, and return how they ended, with a record for each.

    They are started in the order given. `at_once` limits how many run together (default: as cores and
    devices allow). `codes` (by id) is today's code: it is named in the records of runs that cannot say it
    themselves, and a checkpoint of other code is not continued. `watch` is told the folder and cell of each
    run that starts. `target` ("module:function") is called in the run's process as ``function(cell, folder,
    suite, at_once) -> record``, `preload` are modules that the server imports for all (default: what a run
    needs).

    Ctrl-C, SIGTERM and SIGHUP stop the runs and return with ``interrupted``. Raises `store.Unwritable`
    where nothing can be written; runs that had begun are then half done.
    """
    if not jobs:
        return Summary()
    if preload is None:
        alone = len(jobs) == 1 or any(_is_cuda(job.cell) for job in jobs)
        preload = PRELOAD if alone else PRELOAD_ON_CPU
    return _Launcher(jobs, suite, at_once, codes or {}, reporter or Lines(), watch, target, preload).run()


class _Launcher:
    def __init__(
        self,
        jobs: Sequence[Job],
        suite: str,
        at_once: int | None,
        codes: Codes,
        reporter: Reporter,
        watch: Callable[[Path, Mapping[str, Any]], None] | None,
        target: str,
        preload: Sequence[str],
    ) -> None:
        self.queue = list(jobs)
        self.total = len(self.queue)
        self.suite = suite
        self.limit = at_once
        self.slots = min(slots([job.cell for job in jobs], at_once), self.total)
        self.codes = codes
        self.reporter = reporter
        self.watch = watch
        self.target = target
        self.context = _context(preload)
        self.running: list[_Running] = []
        self.elsewhere: list[Job] = []
        self.looked = 0.0
        self.before = 0.0
        self.summary = Summary()
        self.began = time.monotonic()

    def run(self) -> Summary:
        with _signals():
            try:
                while self.queue or self.running or self.elsewhere:
                    self.start_what_fits()
                    self.wait()
                    self.reap()
                    self.look_elsewhere()
                    self.reporter.tick(self.progress())
            except KeyboardInterrupt:
                self.summary.interrupted = True
            finally:
                self.kill_all()
                self.reporter.close()
        self.summary.left = [*(run.job for run in self.running), *self.elsewhere, *self.queue]
        return self.summary

    # starting

    def start_what_fits(self) -> None:
        """Start jobs in their order; one that finds no room does not hold up those for another device."""
        for job in list(self.queue):
            if len(self.running) >= self.slots:
                return
            if not self.fits(job):
                continue
            self.queue.remove(job)
            if store.locked(job.folder):
                self.leave_to_other(job)
            else:
                self.start(job)

    def fits(self, job: Job) -> bool:
        if _is_cuda(job.cell):
            return all(_device(run.job.cell) != _device(job.cell) for run in self.running)
        if self.limit is not None:
            return True
        used = sum(_threads(run.job.cell) for run in self.running if not _is_cuda(run.job.cell))
        return used == 0 or used + _threads(job.cell) <= measure.cores()

    def start(self, job: Job) -> None:
        _take_over_checkpoint(job, self.codes.get(job.cell.id))
        task = {
            "cell": job.cell.to_json(),
            "folder": str(job.folder.resolve()),
            "suite": self.suite,
            "jobs": self.slots,
            "target": self.target,
            "code": self.codes.get(job.cell.id),
        }
        self.before += _fraction(job)
        process = self.context.Process(target=_child, args=(json.dumps(task),), daemon=False)
        ooms = _kernel_ooms()
        process.start()
        self.running.append(_Running(job, process, time.monotonic(), _now(), ooms))
        if self.watch is not None:
            self.watch(job.folder, job.cell.canonical())

    def leave_to_other(self, job: Job) -> None:
        self.reporter.say(
            f"{describe(job.cell.canonical())}: is running elsewhere, its result will be awaited"
        )
        self.elsewhere.append(job)

    # watching

    def wait(self) -> None:
        if self.running:
            connection.wait([run.process.sentinel for run in self.running], timeout=_POLL)
        elif self.elsewhere:
            time.sleep(_POLL)
        for run in self.running:
            if run.over is None and run.process.exitcode is None:
                run.over = self.over_budget(run)
                if run.over is not None:
                    _kill(run.process)

    def over_budget(self, run: _Running) -> tuple[str, str] | None:
        budget = run.job.cell.budget
        seconds, memory = budget.get("seconds"), budget.get("memory_mib")
        if seconds is not None and time.monotonic() - run.since > seconds:
            return "timeout", (
                f"stopped after {duration(seconds)}, the suite's budget for one session of a run: --retry "
                "goes on from its checkpoint, a larger `seconds` under [budget] gives it more time at once"
            )
        run.resident = measure.resident_mib(run.process.pid) or run.resident
        if memory is not None and run.resident > memory and not _is_cuda(run.job.cell):
            return "oom", (
                f"stopped at {run.resident:.0f} MiB of resident memory, the suite's budget is "
                f"{memory:.0f} MiB: lower `microbatch`, or raise `memory_mib` under [budget]"
            )
        return None

    def reap(self) -> None:
        for run in [run for run in self.running if run.process.exitcode is not None]:
            self.running.remove(run)
            self.end(run)

    def end(self, run: _Running) -> None:
        path = run.job.folder / store.RECORD
        if run.process.exitcode == _BUSY:
            self.leave_to_other(run.job)
            return
        if run.process.exitcode == _OTHERS:
            self.conflict(run.job, draw.stranger(run.job.folder, run.job.cell))
            return
        for number, code in _NO_PLACE.items():
            if run.process.exitcode == code and not path.exists():
                raise store.Unwritable(run.job.folder, OSError(number, os.strerror(number)))
        if not path.exists():
            held = store.lock(run.job.folder)
            if held is None:  # another launcher has taken it over since it died
                self.leave_to_other(run.job)
                return
            try:
                if not path.exists():
                    self.write_failure(run)
                    _drop_empty(run.job.folder / _OUTPUT)
            finally:
                store.unlock(run.job.folder, held)
        self.add_read(run.job, elsewhere=run.process.exitcode == _ALREADY)

    def write_failure(self, run: _Running) -> None:
        status, reason = run.over or _cause_of_death(run)
        cell, code = run.job.cell, self.codes.get(run.job.cell.id)
        seconds = time.monotonic() - run.since
        store.write_record(
            run.job.folder,
            failure(
                cell,
                self.suite,
                status,
                reason,
                folder=run.job.folder,
                started=run.started,
                jobs=self.slots,
                seconds=seconds,
                code=code,
            ),
        )

    def add_read(self, job: Job, elsewhere: bool) -> None:
        """Take the record that is in the job's folder for its end, whoever wrote it, if it is of its cell."""
        record = store.read(job.folder / store.RECORD)
        if reason := store.stranger(record, job.cell):
            self.conflict(job, reason)
        else:
            self.summary.outcomes.append(Outcome(job, record, elsewhere))
            self.reporter.finished(self.summary.outcomes[-1], self.progress())

    def conflict(self, job: Job, reason: str) -> None:
        self.summary.conflicts.append(store.Broken(job.folder, reason))
        self.reporter.say(f"conflict: {self.summary.conflicts[-1]}")

    def look_elsewhere(self) -> None:
        """See whether the runs of other launchers are over; one that died without a record is run here."""
        if time.monotonic() - self.looked < _ELSEWHERE:
            return
        self.looked = time.monotonic()
        for job in list(self.elsewhere):
            if (job.folder / store.RECORD).exists():
                self.elsewhere.remove(job)
                self.add_read(job, elsewhere=True)
            elif not store.locked(job.folder):
                self.elsewhere.remove(job)
                self.queue.append(job)

    def progress(self) -> Progress:
        finished = len(self.summary.outcomes)
        partly = sum(_fraction(run.job) for run in self.running)
        running = [describe(run.job.cell.canonical()) for run in self.running]
        return Progress(finished, self.total, partly, time.monotonic() - self.began, running, self.before)

    def kill_all(self) -> None:
        for run in self.running:
            _kill(run.process)
        for run in list(self.running):
            run.process.join(10)
            # One that was quicker than the kill is over; the others are half done, whatever ended them.
            if (run.job.folder / store.RECORD).exists():
                self.running.remove(run)
                self.end(run)


def _context(preload: Sequence[str]) -> Any:
    """A forkserver whose modules start no threads on import: forking a threaded process is unsafe."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    before = {name: os.environ.get(name) for name in _SERIAL}
    os.environ.update(_SERIAL)
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return context


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end a launch as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:  # nohup ignores SIGHUP, and means it
                signal.signal(number, stop)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _kill(process: Any) -> None:
    """End a run and whatever it started; checkpoints are written so that this never harms them."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # gone, or so young that it leads no group yet
        process.kill()


def _kernel_ooms() -> int | None:
    """How many processes the kernel has killed for want of memory; None where it does not tell."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), None)


def _cause_of_death(run: _Running) -> tuple[str, str]:
    """Status and reason of a process that ended without a record and that the launcher did not kill."""
    code = run.process.exitcode
    tail = _tail(run.job.folder / _OUTPUT)
    if code == -signal.SIGKILL:
        ooms = _kernel_ooms()
        memory = f"it was last seen with {run.resident:.0f} MiB of resident memory"
        if ooms is not None and run.ooms is not None and ooms > run.ooms:
            return "oom", (
                "killed by SIGKILL while the kernel reported processes killed for want of memory; "
                f"{memory}: lower `microbatch`, or run fewer at once with --jobs"
            )
        return "crashed", (
            f"killed by SIGKILL, which the launcher did not send; {memory}, and the kernel did "
            "not report that it ran out of memory"
        )
    if code < 0:
        with contextlib.suppress(ValueError):
            return "crashed", f"killed by {signal.Signals(-code).name}{tail}"
        return "crashed", f"killed by signal {-code}{tail}"
    return "crashed", f"ended with exit code {code} and without a record{tail}"


def _tail(path: Path) -> str:
    """The last lines that a run printed, without stacks: those are in the file, and name places here."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    told = [line.strip() for line in lines if line.strip() and not _STACK.match(line)]
    return (
        f"; its last output was: {' / '.join(told[-3:])[-500:]} (all of it is in {_OUTPUT})" if told else ""
    )


def _drop_empty(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_size == 0:
            path.unlink()


def _fraction(job: Job) -> float:
    """How far a run is, from the last line of its trace: 0 to 1."""
    trace = job.folder / "trace.jsonl"
    try:
        if not trace.is_file():
            return 0.0
        with trace.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            lines = file.read().splitlines()
    except OSError:
        return 0.0
    for line in reversed(lines):
        # Torn by a kill, half written just now, or damaged.
        with contextlib.suppress(ValueError, KeyError, TypeError, OverflowError, RecursionError):
            step = json.loads(line)["step"]
            if 0 <= step < math.inf:
                return min(1.0, float(step) / job.cell.schedule["steps"])
    return 0.0


def _take_over_checkpoint(job: Job, code: Mapping[str, Any] | None) -> None:
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
    except (OSError, store.StoreError):
        return  # nobody can say what that checkpoint is worth
    if record["status"] not in store.FAILED or store.stale(record, code) or store.stranger(record, job.cell):
        return
    held = None
    for _ in range(200):  # another launcher may be at it
        held = store.lock(before)
        if held is not None:
            break
        time.sleep(0.05)
    if held is None:
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
        raise store.Unwritable(job.folder, error) from error
    finally:
        shutil.rmtree(made, ignore_errors=True)
        store.unlock(before, held)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


# The record of a run that could not write its own ---------------------------------------------------------


def failure(
    cell: Cell,
    suite: str,
    status: str,
    reason: str,
    *,
    folder: Path,
    started: str,
    seconds: float,
    jobs: int,
    code: Mapping[str, Any] | None = None,
) -> store.Record:
    """A record with what is known of a failed run: its identity, its status and why, where and how long."""
    place = _place(folder)
    commit = {key: place.pop(key, None) for key in ("commit", "dirty")}
    place.pop("code", None)
    return {
        "schema": store.SCHEMA,
        "id": cell.id,
        "group": cell.group,
        "suite": suite,
        "status": status,
        "reason": reason,
        "cell": cell.canonical(),
        "card": _card(cell.method),
        "privacy": {
            **{key: cell.privacy[key] for key in ("relation", "unit", "delta")},
            "sampling": None,
            "sensitivity": {},
            "noise_multiplier": None,
            "planned": {},
            "spent": {},
            "accountant": None,
            "epsilon": None,
            "claimed": None,
            "ledger": [],
            "public_data": None,
        },
        "metrics": {},
        "measured": {"jobs": jobs},
        "diagnostics": {"wall_seconds": seconds},
        "weights_sha256": None,
        "code": {"hash": None, "files": {}, **(code or {}), **commit},
        "device": place.pop("device", None)
        or {
            "name": None,
            "kind": "cuda" if _is_cuda(cell) else "cpu",
            "spec": _device(cell),
            "threads": _threads(cell),
            "fingerprint": None,
        },
        "environment": place,
        "started": started,
        "finished": _now(),
    }


def _place(folder: Path) -> dict[str, Any]:
    """The env.json that the run wrote when it started; empty where it did not come so far, or where it is damaged."""
    file = folder / "env.json"
    try:
        found = json.loads(file.read_bytes()) if file.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(found, dict) or store.unreadable({"environment": found}):  # it goes into a record
        return {}
    kinds: dict[str, type | tuple[type, ...]] = {"device": dict, "commit": (str, type(None))}
    return found if all(isinstance(found[key], kind) for key, kind in kinds.items() if key in found) else {}


def _card(method: str) -> dict[str, Any]:
    try:
        entry = registry.resolve("method", method)
    except registry.RegistryError:  # a crash may be just this; the card is not worth a second one
        return {"paper": None, "family": None, "summary": None}
    return {"paper": entry.meta.get("paper"), "family": entry.meta.get("family"), "summary": entry.summary}


# The run's own process ------------------------------------------------------------------------------------


def _child(text: str) -> None:
    """Body of a run's process: lock, prepare, execute, write the record; exits with a code if it may not."""
    task = json.loads(text)
    os.setsid()  # Ctrl-C at the terminal is for the launcher, and what this run starts can be killed with it
    _die_with_launcher()
    folder = Path(task["folder"])
    try:
        _locked_child(task, folder)
    except (OSError, store.Unwritable) as error:
        if error.errno not in _NO_PLACE:
            raise
        _mute()
        sys.exit(_NO_PLACE[error.errno])


def _locked_child(task: Mapping[str, Any], folder: Path) -> None:
    held = store.lock(folder)
    if held is None:
        sys.exit(_BUSY)
    if (folder / store.RECORD).exists():
        store.unlock(folder, held)
        sys.exit(_ALREADY)
    if draw.stranger(folder, Cell.from_json(task["cell"])):
        store.unlock(folder, held)
        sys.exit(_OTHERS)
    store.sweep(folder)
    _redirect(folder / _OUTPUT)
    record = _execute(task, folder)
    store.write_record(folder, record)
    if record["status"] in store.FINAL:
        shutil.rmtree(folder / "checkpoint", ignore_errors=True)
    with contextlib.suppress(OSError):  # the record is there; what was printed matters no more
        sys.stdout.flush()
        sys.stderr.flush()
        _drop_empty(folder / _OUTPUT)
    store.unlock(folder, held)


def _execute(task: Mapping[str, Any], folder: Path) -> store.Record:
    """The record of the run; an exception becomes the status crashed or oom, its traceback error.txt.

    Raises OSError or `store.Unwritable` where the run could not write: that says nothing about the run.
    """
    started, since = _now(), time.monotonic()
    cell = Cell.from_json(task["cell"])
    try:
        for file in cell.method_files:
            registry.add_file(file)
        _limit_threads(_threads(cell))
        execute = _resolve(task["target"])
        _limit_threads(_threads(cell))
        _prepare(cell, folder, task["code"])
        record: store.Record = execute(cell, folder, task["suite"], task["jobs"])
        if task["code"]:  # as it was when this process's server loaded it; the files may have changed since
            record["code"] = {**record.get("code", {}), **task["code"]}
        store.encode(record, folder.name)  # so that one that cannot be written counts as a crash, here
        return record
    except Exception as error:  # a failed run is a row with a reason, whatever was raised
        if _unwritable(error, folder):
            traceback.print_exc()
            raise
        with opened(folder / "error.txt", "w", encoding="utf-8", errors="backslashreplace") as out:
            out.write(traceback.format_exc())
        status = "oom" if _is_out_of_memory(error) else "crashed"
        if status == "crashed":  # at the same step it would crash again, and corrected code starts anew
            shutil.rmtree(folder / "checkpoint", ignore_errors=True)
        return failure(
            cell,
            task["suite"],
            status,
            _reason(error, cell.private),
            folder=folder,
            started=started,
            seconds=time.monotonic() - since,
            jobs=task["jobs"],
            code=task["code"],
        )


def _resolve(target: str) -> Callable[..., store.Record]:
    module, _, function = target.partition(":")
    found: Callable[..., store.Record] = getattr(importlib.import_module(module), function)
    return found


def _limit_threads(threads: int) -> None:
    """For libraries still to be loaded by the environment, for torch by its own call."""
    for name in _SERIAL:
        os.environ[name] = str(threads)
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(threads)


def _prepare(cell: Cell, folder: Path, code: Mapping[str, Any] | None) -> None:
    """Forget what other code began, note where the run happens, and hold a GPU to the memory budget.

    The memory of a CPU run is watched from outside.
    """
    today = (code or {}).get("hash")
    if today is not None and _place(folder).get("code", today) != today:
        shutil.rmtree(folder / "checkpoint", ignore_errors=True)
        (folder / "trace.jsonl").unlink(missing_ok=True)
    device = measure.device_info(_device(cell), _threads(cell))
    place = {**measure.environment(), "device": device, "code": today}
    store.replace_file(folder / "env.json", store.dumps(place).encode())
    memory = cell.budget.get("memory_mib")
    if _is_cuda(cell) and memory is not None:
        import torch

        total = torch.cuda.get_device_properties(_device(cell)).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, memory * measure.MIB / total), _device(cell))


def _is_out_of_memory(error: BaseException) -> bool:
    """Python's own, torch's on a GPU, and the plain RuntimeError of torch's allocator on a CPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def _unwritable(error: Exception, folder: Path) -> bool:
    """Whether there is no room to write, or no leave to write in the run's folder."""
    if isinstance(error, store.Unwritable):
        return True
    if not isinstance(error, OSError):
        return False
    inside = isinstance(error.filename, str | os.PathLike) and Path(error.filename).is_relative_to(folder)
    return error.errno in _FULL or (inside and error.errno in _NO_PLACE)


def _reason(error: BaseException, private: bool) -> str:
    """What to say of a crash, and where it was.

    What an exception says that was raised over examples of private data may be their labels, their norms or the size of
    a batch. A record is passed on, so it names the exception alone; error.txt, which stays here, has all of it.
    """
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1]
    where = f"at {Path(last.filename).name}:{last.lineno}"
    if private and any((Path(frame.filename).name, frame.name) == _TRAINING for frame in frames):
        hidden = "what it says may tell of private data, and is in error.txt"
        return f"{type(error).__name__} in training ({where}; {hidden})"
    text = "".join(traceback.format_exception_only(error)).strip()
    text = text.encode(errors="backslashreplace").decode()  # names of files need not be UTF-8
    return f"{text[-800:]} ({where}; the traceback is in error.txt)"


def _redirect(path: Path) -> None:
    """Send what the run prints to a file: the terminal belongs to the launcher's progress."""
    sys.stdout.flush()
    sys.stderr.flush()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # the file is UTF-8 whatever the terminal was
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    with opened(path, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.enable()


def _mute() -> None:
    """Drop what is still to be printed: where there is no room for it, it would raise once more at the exit."""
    descriptor = os.open(os.devnull, os.O_WRONLY)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def _die_with_launcher() -> None:
    """The kernel ends this process with the server that forked it, a thread ends it with the launcher."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def follow() -> None:
        connection.wait([parent.sentinel])
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=follow, name="die-with-launcher", daemon=True).start()
