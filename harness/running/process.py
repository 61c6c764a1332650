"""A run's process, seen from the launcher: the server that forks it, its end by force, and what it died of."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from harness.running.child import OUTPUT, SERIAL
from harness.running.jobs import Job

_STACK = re.compile(r'\s*File "| {4}|Traceback |Thread 0x|Current thread|Extension modules')


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
    """How many processes the kernel has killed for want of memory; None where it does not tell."""
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
