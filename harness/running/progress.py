"""What is said while runs go on: to a log in lines, to a terminal above a bar."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harness.records import public, screen, store

if TYPE_CHECKING:
    from harness.running.jobs import Job


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
        """Called every quarter of a second: once a minute of silence, say what is running."""
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


Reporter = Lines | Bar


def describe(cell: Mapping[str, Any]) -> str:
    """A cell in a few words: method, task, epsilon, seed."""
    method, epsilon = cell["method"], cell["privacy"]["epsilon"]
    name, place = (" ".join(one.splitlines()) for one in (method["label"] or method["name"], cell["task"]["name"]))
    return f"{name}  {place}  eps={'inf' if epsilon is None else format(epsilon, 'g')}  seed={cell['seed']}"


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
