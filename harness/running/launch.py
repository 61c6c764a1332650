"""Where runs execute: each in its own process, several at once, killed when over budget, resumed when killed.

``import torch`` takes seconds, so it is paid once: a server process imports `harness.running.run` and forks one fresh
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
import json
import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any

from harness.provenance import measure
from harness.records import draw, store
from harness.records.files import Broken, Unwritable, lock, locked, unlock
from harness.records.record import FAILED
from harness.running import child
from harness.running.child import OUTPUT, SERIAL
from harness.running.jobs import Codes, Job, device_of, fraction, is_cuda, slots, take_over_checkpoint, threads_of
from harness.running.progress import Lines, Outcome, Progress, Reporter, describe, duration

TARGET = "harness.running.run:execute"
PRELOAD = ("harness.running.run",)
# vmap imports this on first use, which takes seconds too: worth it for several runs. It asks which GPUs there are,
# after which a forked process may not be able to use one: only for runs on a CPU.
PRELOAD_ON_CPU = (*PRELOAD, "torch._dynamo")

_STACK = re.compile(r'\s*File "| {4}|Traceback |Thread 0x|Current thread|Extension modules')
_POLL = 0.25  # seconds between two looks at budgets and memory
_ELSEWHERE = 1.0  # seconds between two looks at a run of another launcher


@dataclass
class Summary:
    """What a launch did: the ends of its runs, in order; `left` are those that were not finished.

    `conflicts` are folders in which a run of another cell was found meanwhile.
    """

    outcomes: list[Outcome] = field(default_factory=list)
    left: list[Job] = field(default_factory=list)
    interrupted: bool = False
    conflicts: list[Broken] = field(default_factory=list)

    @property
    def failed(self) -> list[Outcome]:
        """The runs that ended as crashed, oom or timeout."""
        return [o for o in self.outcomes if o.record["status"] in FAILED]


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
    themselves, and a checkpoint of other code is not continued. `watch` is called with the folder and cell of
    each run that starts. `target` ("module:function") is called in the run's process as ``function(cell, folder,
    suite, at_once) -> record``, `preload` are modules that the server imports for all (default: what a run
    needs).

    Ctrl-C, SIGTERM and SIGHUP stop the runs and return with ``interrupted``. Raises `Unwritable`
    where nothing can be written; runs that had begun are then half done.
    """
    if not jobs:
        return Summary()
    if preload is None:
        alone = len(jobs) == 1 or any(is_cuda(job.cell) for job in jobs)
        preload = PRELOAD if alone else PRELOAD_ON_CPU
    return _Launcher(list(jobs), suite, at_once, codes or {}, reporter or Lines(), watch, target, server(preload)).run()


@dataclass
class Running:
    """A run's process, the task that it was given, and what the launcher knows of it."""

    job: Job
    process: Any
    task: Mapping[str, Any]
    since: float
    started: str
    ooms: int | None
    resident: float = 0.0
    over: tuple[str, str] | None = None  # status and reason with which the launcher killed it


@dataclass
class _Launcher:
    queue: list[Job]
    suite: str
    limit: int | None
    codes: Codes
    reporter: Reporter
    watch: Callable[[Path, Mapping[str, Any]], None] | None
    target: str
    context: Any
    running: list[Running] = field(default_factory=list)
    elsewhere: list[Job] = field(default_factory=list)
    summary: Summary = field(default_factory=Summary)
    began: float = field(default_factory=time.monotonic)
    looked: float = 0.0
    before: float = 0.0

    def __post_init__(self) -> None:
        self.total = len(self.queue)
        self.slots = min(slots([job.cell for job in self.queue], self.limit), self.total)

    def run(self) -> Summary:
        with _signals():
            try:
                while self.queue or self.running or self.elsewhere:
                    self.start_what_fits()
                    self.wait()
                    for run in [run for run in self.running if run.process.exitcode is not None]:
                        self.running.remove(run)
                        self.end(run)
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
        """Start jobs in their order; a job that finds no room does not hold up those for another device."""
        for job in list(self.queue):
            if len(self.running) >= self.slots:
                return
            if not self.fits(job):
                continue
            self.queue.remove(job)
            if locked(job.folder):
                self.leave_to_other(job)
            else:
                self.start(job)

    def fits(self, job: Job) -> bool:
        if is_cuda(job.cell):
            return all(device_of(run.job.cell) != device_of(job.cell) for run in self.running)
        if self.limit is not None:
            return True
        used = sum(threads_of(run.job.cell) for run in self.running if not is_cuda(run.job.cell))
        return used == 0 or used + threads_of(job.cell) <= measure.cores()

    def start(self, job: Job) -> None:
        code = self.codes.get(job.cell.id)
        take_over_checkpoint(job, code)
        task = {
            "cell": job.cell.to_json(),
            "folder": str(job.folder.resolve()),
            "suite": self.suite,
            "jobs": self.slots,
            "target": self.target,
            "code": code,
        }
        self.before += fraction(job)
        process = self.context.Process(target=child.main, args=(json.dumps(task),), daemon=False)
        ooms = kernel_ooms()
        process.start()
        self.running.append(Running(job, process, task, time.monotonic(), child.now(), ooms))
        if self.watch is not None:
            self.watch(job.folder, job.cell.canonical())

    def leave_to_other(self, job: Job) -> None:
        self.reporter.say(f"{describe(job.cell.canonical())}: is running elsewhere, its result will be awaited")
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
                    kill(run.process)

    def over_budget(self, run: Running) -> tuple[str, str] | None:
        budget = run.job.cell.budget
        seconds, memory = budget.get("seconds"), budget.get("memory_mib")
        if seconds is not None and time.monotonic() - run.since > seconds:
            return "timeout", (
                f"stopped after {duration(seconds)}, the suite's budget for one session of a run: --retry "
                "goes on from its checkpoint, a larger `seconds` under [budget] gives it more time at once"
            )
        run.resident = measure.resident_mib(run.process.pid) or run.resident
        if memory is not None and run.resident > memory and not is_cuda(run.job.cell):
            return "oom", (
                f"stopped at {run.resident:.0f} MiB of resident memory, the suite's budget is "
                f"{memory:.0f} MiB: lower `microbatch`, or raise `memory_mib` under [budget]"
            )
        return None

    def end(self, run: Running) -> None:
        path = run.job.folder / store.RECORD
        if run.process.exitcode == child.BUSY:
            self.leave_to_other(run.job)
            return
        if run.process.exitcode == child.OTHERS:
            self.conflict(run.job, draw.stranger(run.job.folder, run.job.cell))
            return
        for number, code in child.NO_PLACE.items():
            if run.process.exitcode == code and not path.exists():
                raise Unwritable(run.job.folder, OSError(number, os.strerror(number)))
        if not path.exists():
            held = lock(run.job.folder)
            if held is None:  # another launcher has taken it over since it died
                self.leave_to_other(run.job)
                return
            try:
                if not path.exists():
                    status, reason = run.over or cause_of_death(run)
                    seconds = time.monotonic() - run.since
                    record = child.failure(run.task, run.job.folder, status, reason, run.started, seconds)
                    store.write_record(run.job.folder, record)
                    child.drop_empty(run.job.folder / OUTPUT)
            finally:
                unlock(run.job.folder, held)
        self.add_read(run.job, elsewhere=run.process.exitcode == child.ALREADY)

    def add_read(self, job: Job, elsewhere: bool) -> None:
        """Take the record that is in the job's folder for its end, whoever wrote it, if it is of its cell."""
        record = store.read(job.folder / store.RECORD)
        if reason := store.stranger(record, job.cell):
            self.conflict(job, reason)
        else:
            self.summary.outcomes.append(Outcome(job, record, elsewhere))
            self.reporter.finished(self.summary.outcomes[-1], self.progress())

    def conflict(self, job: Job, reason: str) -> None:
        self.summary.conflicts.append(Broken(job.folder, reason))
        self.reporter.say(f"conflict: {self.summary.conflicts[-1]}")

    def look_elsewhere(self) -> None:
        """See whether the runs of other launchers are over; a run that died without a record is run here."""
        if time.monotonic() - self.looked < _ELSEWHERE:
            return
        self.looked = time.monotonic()
        for job in list(self.elsewhere):
            if (job.folder / store.RECORD).exists():
                self.elsewhere.remove(job)
                self.add_read(job, elsewhere=True)
            elif not locked(job.folder):
                self.elsewhere.remove(job)
                self.queue.append(job)

    def progress(self) -> Progress:
        finished = len(self.summary.outcomes)
        partly = sum(fraction(run.job) for run in self.running)
        running = [describe(run.job.cell.canonical()) for run in self.running]
        return Progress(finished, self.total, partly, time.monotonic() - self.began, running, self.before)

    def kill_all(self) -> None:
        for run in self.running:
            kill(run.process)
        for run in list(self.running):
            run.process.join(10)
            # A run that was quicker than the kill is over; the others are half done, whatever ended them.
            if (run.job.folder / store.RECORD).exists():
                self.running.remove(run)
                self.end(run)


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


def server(preload: Sequence[str]) -> Any:
    """A forkserver whose modules start no threads on import: forking a threaded process is unsafe."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    before = {name: os.environ.get(name) for name in SERIAL}
    os.environ.update(SERIAL)
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return context


def kill(process: Any) -> None:
    """End a run and whatever it started; checkpoints are written so that this never harms them."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # gone, or so young that it leads no group yet
        process.kill()


def kernel_ooms() -> int | None:
    """How many processes the kernel has killed for want of memory; None where that is not known."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), None)


def cause_of_death(run: Running) -> tuple[str, str]:
    """Status and reason of a process that ended without a record and that the launcher did not kill."""
    code = run.process.exitcode
    tail = _tail(run.job.folder / OUTPUT)
    if code == -signal.SIGKILL:
        ooms = kernel_ooms()
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
    said = [line.strip() for line in lines if line.strip() and not _STACK.match(line)]
    return f"; its last output was: {' / '.join(said[-3:])[-500:]} (all of it is in {OUTPUT})" if said else ""
