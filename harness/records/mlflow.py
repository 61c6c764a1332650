"""MLflow as a projection of `results/`: live while runs train, complete when they end, rebuildable.

The records and traces are the truth, and what goes out is what may be published of them (`harness.records.public`), or
all where that is asked for. This module only reads them, and nothing it does can harm a run: the
work is done in one daemon thread of the launching process, MLflow is imported there and nowhere else, and the
first error of a tracking server ends tracking for the session with one line.

One MLflow experiment per suite, one MLflow run per record. A run carries the tag `epsbench.run` (the name of
its folder) from its first moment, and `epsbench.record` (a digest of record.json) once all of the record is
in it: that tag is written last, so a run without it is unfinished, whatever else it holds.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from harness.records import description, store
from harness.records.description import Point, read_points
from harness.records.files import StoreError, dumps, replace_file

Say = Callable[[str], None]

REMEDY = "`epsbench track --rebuild` adds what is missing"

# MLflow retries an unreachable server for minutes by default. What the user has set stands.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
}
_BATCH = 900  # metrics in one call; MLflow's limit is 1000 things


class TrackingError(RuntimeError):
    """The tracking store cannot be reached or refuses; the message is one line."""


def resolve_uri(uri: str | None = None, root: Path | None = None) -> str:
    """`uri`, else MLFLOW_TRACKING_URI, else the sqlite file mlflow.db in `root` (the working directory)."""
    found = uri or os.environ.get("MLFLOW_TRACKING_URI")
    if found and not found.startswith("sqlite:"):
        return found
    path = found.removeprefix("sqlite:///") if found else "mlflow.db"
    return f"sqlite:///{((root or Path.cwd()) / path).resolve()}"


def _shown(uri: str) -> str:
    """The URI without a password."""
    return re.sub(r"//[^/@]*@", "//", uri)


def _database(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


class _Index:
    """Which records a store is known to hold, in `.epsbench/tracked/`: answers without importing MLflow.

    A hint, never the truth: it is ignored where the sqlite file it speaks of is gone or is another one, and
    `rebuild` asks the store itself.
    """

    def __init__(self, uri: str, root: Path | None) -> None:
        self.uri = uri
        name = hashlib.sha256(uri.encode()).hexdigest()[:16]
        self.path = (root or Path.cwd()) / ".epsbench" / "tracked" / f"{name}.json"
        self.records: dict[str, str] = {}
        try:
            held = json.loads(self.path.read_text(encoding="utf-8"))
            if held["store"] == self._store():
                self.records = {str(key): str(digest) for key, digest in held["records"].items()}
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            self.records = {}  # absent or damaged: then everything is asked of the store again

    def _store(self) -> str | int | None:
        database = _database(self.uri)
        if database is None:
            return _shown(self.uri)
        return database.stat().st_ino if database.exists() else None

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        held = {"uri": _shown(self.uri), "store": self._store(), "records": self.records}
        replace_file(self.path, dumps(held).encode())


class _Projection:
    """An MLflow tracking store, asked as little as possible: one search per suite, then it is remembered."""

    def __init__(self, uri: str, root: Path | None, say: Say) -> None:
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from mlflow import entities  # seconds: only here, so that only those who track wait for it
        from mlflow.tracking import MlflowClient

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.ERROR)
        self._entities = entities
        self._client = MlflowClient(tracking_uri=uri)
        self._local = _database(uri)
        self._say = say
        self._artifacts = True
        self._experiments: dict[str, str] = {}
        # By "<suite>/<id>": run ids, each with the digest of the record that the run holds in full, or None.
        self._runs: dict[str, dict[str, str | None]] = {}
        if self._local:
            self._local.parent.mkdir(parents=True, exist_ok=True)

    def runs(self, run_dir: Path) -> dict[str, str | None]:
        """The runs that the store has for this directory, newest first."""
        self._experiment(run_dir.parent.name)
        return self._runs.setdefault(description.key_of(run_dir), {})

    def _experiment(self, suite: str) -> str:
        if suite not in self._experiments:
            found = self._client.get_experiment_by_name(suite)
            if found is None:
                place = (self._local.parent / "mlartifacts" / suite).as_uri() if self._local else None
                self._experiments[suite] = self._client.create_experiment(suite, artifact_location=place)
            else:
                if found.lifecycle_stage == "deleted":
                    self._client.restore_experiment(found.experiment_id)
                self._experiments[suite] = found.experiment_id
                self._load(suite, found.experiment_id)
        return self._experiments[suite]

    def _load(self, suite: str, experiment_id: str) -> None:
        token: str | None = None
        while True:
            page = self._client.search_runs([experiment_id], max_results=1000, page_token=token)
            for run in page:
                found = run.data.tags
                if "epsbench.run" in found:
                    known = self._runs.setdefault(f"{suite}/{found['epsbench.run']}", {})
                    known[run.info.run_id] = found.get("epsbench.record")
            token = page.token
            if not token:
                return

    def create(self, run_dir: Path, cell: Mapping[str, Any], start: int) -> str:
        """A new, running, empty run."""
        known, named = self.runs(run_dir), description.identity(run_dir, cell)
        made = self._client.create_run(
            self._experiment(run_dir.parent.name),
            start_time=start,
            tags=named | {"epsbench.status": "running"},
            run_name=named["mlflow.runName"],
        )
        run: str = made.info.run_id
        known[run] = None
        self._log(run, params=description.parameters(cell))
        return run

    def resume(self, run: str) -> set[int]:
        """Opens an unfinished run again; returns the steps that are in it."""
        held = self._client.get_run(run)
        if held.info.status != "RUNNING":
            self._client.update_run(run, status="RUNNING")
        live = [key for key in held.data.metrics if not key.startswith("final/")]
        return {point.step for key in live for point in self._client.get_metric_history(run, key)}

    def log_points(self, run: str, points: Sequence[Point], start: float) -> None:
        """Trace points; `start` is when training began, in seconds since 1970."""
        metric = self._entities.Metric
        self._log(
            run,
            metrics=[
                metric(description.cleaned(key), value, int((start + point.seconds) * 1000), point.step)
                for point in points
                for key, value in point.values.items()
            ],
        )

    def _finish(self, run: str, finished: description.Finished) -> None:
        """What the record adds to the trace. The tag `epsbench.record` comes last; superseded runs go."""
        record = finished.record
        end = description.milliseconds(record["finished"] or record["started"], time.time())
        step = record["cell"]["schedule"]["steps"]
        metric = self._entities.Metric
        metrics = [metric(key, value, end, step) for key, value in description.final_metrics(record).items()]
        self._log(run, metrics=metrics, tags=description.tags(finished))
        self._attach(run, store.RECORD, finished.data)
        with contextlib.suppress(FileNotFoundError):
            self._attach(run, "env.json", (finished.run_dir / "env.json").read_bytes())
        done = record["status"] in ("ok", "skipped")
        self._client.set_terminated(run, "FINISHED" if done else "FAILED", end)
        self._client.set_tag(run, "epsbench.record", finished.digest)
        self.runs(finished.run_dir)[run] = finished.digest
        self.keep_only(run, finished.run_dir)

    def complete(self, run: str, finished: description.Finished) -> None:
        """Ends a run that was logged live, its trace being in already."""
        if self._client.get_run(run).data.params == description.parameters(finished.record["cell"]):
            self._finish(run, finished)
        else:
            # It was opened with other parameters, and MLflow lets none be changed.
            self.project(finished)

    def keep_only(self, run: str | None, run_dir: Path) -> None:
        """Deletes (as MLflow deletes: restorable) all other runs of this directory."""
        known = self.runs(run_dir)
        for other in [one for one in known if one != run]:
            self._client.delete_run(other)
            del known[other]

    def abandon(self, run: str) -> None:
        """Marks a run whose training was interrupted; it can be resumed."""
        self._client.set_tag(run, "epsbench.status", "interrupted")
        self._client.set_terminated(run, "KILLED")

    def project(self, finished: description.Finished) -> bool:
        """Brings one record into the store from its files alone. False where it is there already."""
        known = self.runs(finished.run_dir)
        if there := next((run for run, digest in known.items() if digest == finished.digest), None):
            self.keep_only(there, finished.run_dir)
            return False
        self.keep_only(None, finished.run_dir)
        start = description.milliseconds(finished.record["started"], time.time())
        run = self.create(finished.run_dir, finished.record["cell"], start)
        self.log_points(run, _new(finished.points(), set()), start / 1000)
        self._finish(run, finished)
        return True

    def _attach(self, run: str, name: str, data: bytes) -> None:
        if not self._artifacts:
            return
        try:
            self._client.log_text(run, data.decode(errors="replace"), name)
        except Exception as error:
            if self._local:
                raise
            self._artifacts = False  # a server whose artifact store is out of reach still takes numbers
            self._say(f"MLflow keeps no artifacts here ({_line(error)}); metrics, parameters and tags go on.")

    def _log(
        self,
        run: str,
        metrics: Sequence[Any] = (),
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        rows = [self._entities.Param(key, value) for key, value in (params or {}).items()]
        marks = [self._entities.RunTag(key, value) for key, value in (tags or {}).items()]
        while metrics or rows or marks:
            self._client.log_batch(run, metrics=metrics[:_BATCH], params=rows[:50], tags=marks[:50])
            metrics, rows, marks = metrics[_BATCH:], rows[50:], marks[50:]


def _new(points: Iterable[Point], steps: set[int]) -> list[Point]:
    """The points of steps that are not in `steps` yet, and are then: a resumed run logs some steps again."""
    fresh = []
    for point in points:
        if point.step not in steps:
            steps.add(point.step)
            fresh.append(point)
    return fresh


def _line(error: BaseException) -> str:
    """An error in one short line."""
    text = " ".join(str(error).split())
    return _shown(f"{type(error).__name__}: {text}" if text else type(error).__name__)[:240]


@dataclass
class _Watch:
    """A run that is followed while it trains."""

    run_dir: Path
    cell: Mapping[str, Any]
    offset: int = 0
    steps: set[int] = field(default_factory=set)
    start: float | None = None
    opened: float = field(default_factory=time.time)
    run: str | None = None


class Tracker:
    """Follows runs while they train and brings them into MLflow; made once, in the launching process.

    Without what is `private` a run comes in when it is over: how fast it comes along is private too, and so is how far,
    if it fails.

    `watch` returns at once and `close` in bounded time, whatever the store does. Nothing is imported or
    contacted before the first `watch`. `say` gets at most a few lines in all: tracking is off and why, or
    what is left at the end.
    """

    def __init__(
        self,
        uri: str | None = None,
        *,
        say: Say | None = None,
        root: Path | None = None,
        interval: float = 1.0,
        private: bool = False,
    ) -> None:
        self.uri = resolve_uri(uri, root)
        self._private = private
        self._root = root
        self._say = say or partial(print, file=sys.stderr)
        self._interval = interval
        self._lock = threading.Lock()
        self._watches: dict[Path, _Watch] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.off = False

    def watch(self, run_dir: Path, cell: Mapping[str, Any] | None = None) -> None:
        """Follows the run in `run_dir` (results/<suite>/<id>) until its record.json is there and is tracked.

        `cell` is what the record's "cell" will be. Of a directory that already holds a record, the record is projected,
        and `cell` is not needed.
        """
        if self.off or self._stop.is_set():
            return
        run_dir = Path(run_dir).resolve()
        with self._lock:
            self._watches.setdefault(run_dir, _Watch(run_dir, cell or {}))
            if self._thread is None:
                self._thread = threading.Thread(target=self._follow, name="epsbench-track", daemon=True)
                self._thread.start()

    def close(self, timeout: float = 30.0) -> int:
        """Brings in what is finished within `timeout` seconds; says and returns how many are left."""
        self._stop.set()
        if self._thread is None or self.off:
            return 0
        self._thread.join(timeout)
        left = sum((watch.run_dir / store.RECORD).exists() for watch in self._list())
        if left and not self.off:
            self._say(f"MLflow: {left} finished runs are not in {_shown(self.uri)} yet; {REMEDY}.")
        return left

    def _list(self) -> list[_Watch]:
        with self._lock:
            return list(self._watches.values())

    def _follow(self) -> None:
        try:
            into, index = _Projection(self.uri, self._root, self._say), _Index(self.uri, self._root)
            while True:
                last_time = self._stop.is_set()
                done = [watch for watch in self._list() if self._advance(into, index, watch, last_time)]
                if done:
                    index.save()
                with self._lock:
                    for watch in done:
                        del self._watches[watch.run_dir]
                if last_time:
                    return
                self._stop.wait(self._interval)
        except Exception as error:  # whatever it is, the runs go on: tracking is a projection
            self.off = True
            self._say(f"MLflow tracking is off for this session: {_line(error)}. The runs go on; {REMEDY}.")

    def _advance(self, into: _Projection, index: _Index, watch: _Watch, last_time: bool) -> bool:
        """One look at one run; True when there is nothing more to do for it."""
        recorded = (watch.run_dir / store.RECORD).exists()  # asked first, so that the trace is whole
        try:
            finished = description.Finished.read(watch.run_dir, self._private) if recorded else None
        except StoreError as error:
            self._say(f"MLflow leaves out a record: {_line(error)}")
            return True
        if finished and watch.run is None:
            into.project(finished)
        elif self._private:
            self._live(into, watch, whole=finished is not None)
            if finished and watch.run:
                into.complete(watch.run, finished)
            elif last_time and watch.run:
                into.abandon(watch.run)
        if finished:
            index.records[description.key_of(finished.run_dir)] = finished.digest
        return finished is not None

    def _live(self, into: _Projection, watch: _Watch, whole: bool) -> None:
        """Logs what is new in the trace; `whole` reads it from its start, so that nothing is missing."""
        if watch.run is None:
            unfinished = [run for run, digest in into.runs(watch.run_dir).items() if digest is None]
            if unfinished:
                watch.run, watch.steps = unfinished[0], into.resume(unfinished[0])
            else:
                watch.run = into.create(watch.run_dir, watch.cell, int(watch.opened * 1000))
        points, watch.offset = read_points(watch.run_dir / "trace.jsonl", 0 if whole else watch.offset)
        if fresh := _new(points, watch.steps):
            if watch.start is None:
                watch.start = time.time() - fresh[-1].seconds  # its last point was written just now
            into.log_points(watch.run, fresh, watch.start)


def pending(
    results_dir: Path,
    uri: str | None = None,
    suites: Iterable[str] | None = None,
    *,
    root: Path | None = None,
    private: bool = False,
) -> list[Path]:
    """The run directories whose record is not known to be tracked as it is to go out; imports no MLflow, contacts
    nobody."""
    known = _Index(resolve_uri(uri, root), root).records
    found = description.Finished.load(Path(results_dir).resolve(), suites, private)
    return [
        finished.run_dir for finished in found if known.get(description.key_of(finished.run_dir)) != finished.digest
    ]


def rebuild(
    results_dir: Path,
    uri: str | None = None,
    suites: Iterable[str] | None = None,
    *,
    root: Path | None = None,
    say: Say | None = None,
    private: bool = False,
) -> int:
    """Makes the projection anew: afterwards every record under `results_dir` is in the store exactly once.

    Returns how many were added. Asks the store, not the index, so that it can be run at any time and again;
    unfinished runs of a record, and runs of an earlier record with the same id, are replaced. Raises
    `TrackingError`.
    """
    found = resolve_uri(uri, root)
    added = 0
    try:
        into, index = _Projection(found, root, say or partial(print, file=sys.stderr)), _Index(found, root)
        for finished in description.Finished.load(Path(results_dir).resolve(), suites, private):
            added += into.project(finished)
            index.records[description.key_of(finished.run_dir)] = finished.digest
        index.save()
    except Exception as error:
        raise TrackingError(f"the tracking store {_shown(found)} failed: {_line(error)}") from error
    return added
