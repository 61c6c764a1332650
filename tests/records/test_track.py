"""MLflow as a projection: live equals rebuilt, every record once, and no server can harm a run."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow.entities import ViewType
from mlflow.tracking import MlflowClient

from harness.records import mlflow as track
from harness.records.description import milliseconds
from tests.support import ROOT
from tests.support.records import make_record

FIRST, SECOND = "aaaaaaaaaaaa", "bbbbbbbbbbbb"


def record_of(name: str, seed: int, status: str = "ok") -> dict[str, Any]:
    ok = status == "ok"
    facts = {
        "id": name, "group": "cccccccccccc", "reason": None if ok else "the loss is not finite at step 12",
        "cell": {
            "method": {"parameters": {"lr": 0.5, "clip": 1.0}, "parts": {"path": {"type": "EMA", "decay": 0.99}}},
            "privacy": {"epsilon": None}, "schedule": {"steps": 40}, "seed": seed,
        },
        "card": {"paper": "arXiv:1607.00133", "family": "baseline", "summary": "Clip, add noise, step."},
        "privacy": {"noise_multiplier": 1.5, "spent": {"pld": 2.9, "rdp": 3.1, "prv": None}},
        "metrics": {"accuracy": 0.91, "loss": 0.3} if ok else {},
        "diagnostics": {
            "examples_per_second": {"median": 900.0, "q1": 800.0, "q3": 950.0}, "wall_seconds": 4.0,
            "clipped_fraction": 0.7,
        },
        "device": {"name": "a processor"},
        "started": "2026-01-02T03:04:05Z", "finished": "2026-01-02T03:04:09Z",
    }  # fmt: skip
    return make_record(status=status, code="dddddddddddd", **facts)


def trace_line(step: int) -> str:
    point = {"step": step, "seconds": step / 10, "loss": 1 / step, "accuracy": 0.5, "epsilon": None}
    return json.dumps(point | {"examples_per_second": 900, "clipped_fraction": 0.6}) + "\n"


def write_run(results: Path, name: str, seed: int = 0, status: str = "ok", steps: int = 40) -> Path:
    run_dir = results / "core" / name
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "trace.jsonl").write_text("".join(trace_line(step) for step in range(10, steps + 1, 10)))
    (run_dir / "env.json").write_text("{}")
    record = record_of(name.partition(".")[0], seed, status)
    (run_dir / "record.json").write_text(json.dumps(record))
    return run_dir


def uri_of(root: Path) -> str:
    return f"sqlite:///{root / 'mlflow.db'}"


def content(uri: str, suite: str = "core") -> dict[str, Any]:
    """All that a store holds of a suite, by run: everything but run ids and the clock."""
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name(suite)
    if experiment is None:
        return {}
    runs = client.search_runs([experiment.experiment_id], run_view_type=ViewType.ACTIVE_ONLY)
    keys = [run.data.tags["epsbench.run"] for run in runs]
    assert len(keys) == len(set(keys)), "a record stands twice in the store"
    return {key: described(client, run) for key, run in zip(keys, runs, strict=True)}


def described(client: MlflowClient, run: Any) -> dict[str, Any]:
    history = {
        key: sorted((m.step, m.value) for m in client.get_metric_history(run.info.run_id, key))
        for key in run.data.metrics
    }
    artifacts = sorted(found.path for found in client.list_artifacts(run.info.run_id))
    return {
        "status": run.info.status,
        "params": run.data.params,
        "tags": run.data.tags,
        "metrics": history,
        "artifacts": artifacts,
    }


def until(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


@pytest.fixture(autouse=True)
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody's own settings, and a working directory of the test's own."""
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        monkeypatch.delenv(name)
    for name, value in track._ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)


@contextlib.contextmanager
def followed(uri: str, root: Path, said: list[str]) -> Iterator[track.Tracker]:
    tracker = track.Tracker(uri, say=said.append, root=root, interval=0.05, private=True)
    yield tracker
    tracker.close(120)


def test_live_then_final_then_the_same_rebuilt(tmp_path: Path) -> None:
    results, live, anew = tmp_path / "results", tmp_path / "live", tmp_path / "anew"
    said: list[str] = []
    run_dir = results / "core" / FIRST
    run_dir.mkdir(parents=True)
    trace = run_dir / "trace.jsonl"
    with followed(uri_of(live), live, said) as tracker:
        tracker.watch(run_dir, record_of(FIRST, 0)["cell"])
        trace.write_text(trace_line(10) + trace_line(20)[:25])  # the second line is still being written
        until(lambda: "loss" in content(uri_of(live)).get(FIRST, {}).get("metrics", {}))
        halfway = content(uri_of(live))[FIRST]
        assert halfway["status"] == "RUNNING"
        assert halfway["metrics"]["loss"] == [(10, 0.1)]
        assert halfway["params"]["method.lr"] == "0.5"
        write_run(results, FIRST)
        tracker.watch(write_run(results, SECOND, seed=1, status="diverged"), {})
    assert said == []

    first, second = (content(uri_of(live))[name] for name in (FIRST, SECOND))
    assert (first["status"], second["status"]) == ("FINISHED", "FAILED")
    assert [step for step, _ in first["metrics"]["loss"]] == [10, 20, 30, 40]
    assert first["metrics"]["final/accuracy"] == [(40, 0.91)]
    assert first["metrics"]["final/examples_per_second"] == [(40, 900.0)]
    assert "epsilon" not in first["metrics"] and "final/epsilon_prv" not in first["metrics"]  # both infinite
    assert first["params"]["privacy.epsilon"] == "inf"
    assert first["params"]["parts.path"] == "EMA(decay=0.99)"
    assert first["tags"]["epsbench.status"] == "ok" and second["tags"]["epsbench.reason"]
    assert first["artifacts"] == ["env.json", "record.json"]

    assert track.rebuild(results, uri_of(anew), root=anew, private=True) == 2
    assert content(uri_of(anew)) == content(uri_of(live))


def test_what_is_private_stays_behind_and_so_does_the_clock(tmp_path: Path) -> None:
    """Nobody hears of a run before it is over, and all times of it are the beginning of its day."""
    results, uri = tmp_path / "results", uri_of(tmp_path)
    half = results / "core" / SECOND
    half.mkdir(parents=True)
    (half / "trace.jsonl").write_text(trace_line(10))
    tracker = track.Tracker(uri, root=tmp_path, interval=0.05)
    tracker.watch(write_run(results, FIRST), {})
    tracker.watch(half, {})
    assert tracker.close(120) == 0
    (name,) = found = content(uri)
    assert name == FIRST and found[name]["metrics"]["accuracy"] == [(step, 0.5) for step in (10, 20, 30, 40)]
    private = {"loss", *(f"final/{key}" for key in ("clipped_fraction", "examples_per_second", "wall_seconds"))}
    assert not found[name]["metrics"].keys() & private and "final/loss" in found[name]["metrics"]  # on the test data
    client = MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name("core").experiment_id])
    stamps = [m.timestamp for key in run.data.metrics for m in client.get_metric_history(run.info.run_id, key)]
    day = milliseconds("2026-01-02T00:00:00+00:00", 0)
    assert {run.info.start_time, run.info.end_time, *stamps} == {day}
    record = json.loads(Path(client.download_artifacts(run.info.run_id, "record.json", str(tmp_path))).read_text())
    assert record["diagnostics"] == {} and "wall_seconds" not in record["measured"]

    assert track.pending(results, uri, root=tmp_path) == []
    assert track.rebuild(results, uri, root=tmp_path, private=True) == 1  # the other way round too
    assert private < content(uri)[FIRST]["metrics"].keys()


def test_rebuild_adds_each_record_once_and_pending_knows(tmp_path: Path) -> None:
    results = tmp_path / "results"
    write_run(results, FIRST)
    again = write_run(results, f"{FIRST}.2", status="diverged")  # a second attempt is a record of its own
    damaged = results / "core" / SECOND / "record.json"
    damaged.parent.mkdir()
    damaged.write_text('{"schema": 1, ')
    assert [path.name for path in track.pending(results)] == [FIRST, f"{FIRST}.2"]
    assert track.rebuild(results, suites=["elsewhere"]) == 0
    assert track.rebuild(results) == 2
    before = content(uri_of(tmp_path))
    assert track.pending(results) == []
    assert track.rebuild(results) == 0
    assert content(uri_of(tmp_path)) == before
    assert sorted(before) == [FIRST, f"{FIRST}.2"]

    record = json.loads((again / "record.json").read_text()) | {"reason": "another"}
    (again / "record.json").write_text(json.dumps(record))
    assert track.pending(results, suites=["core"]) == [again]
    assert track.rebuild(results) == 1
    assert content(uri_of(tmp_path))[again.name]["tags"]["epsbench.reason"] == "another"

    (tmp_path / "mlflow.db").unlink()
    assert len(track.pending(results)) == 2, "the index speaks of a store that is gone"


def test_pending_imports_no_mlflow(tmp_path: Path) -> None:
    write_run(tmp_path / "results", FIRST)
    code = "import sys; from pathlib import Path; from harness.records import mlflow as track; "
    code += "print(len(track.pending(Path('results')))); track.Tracker().close(); print('mlflow' in sys.modules)"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert done.stdout.split() == ["1", "False"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results"]


def test_a_killed_and_resumed_run_stays_one_run(tmp_path: Path) -> None:
    results, uri = tmp_path / "results", uri_of(tmp_path)
    said: list[str] = []
    run_dir = results / "core" / FIRST
    run_dir.mkdir(parents=True)
    cell = record_of(FIRST, 0)["cell"]
    (run_dir / "trace.jsonl").write_text(trace_line(10) + trace_line(20) + '{"step": 30, "sec')
    with followed(uri, tmp_path, said) as tracker:
        tracker.watch(run_dir, cell)
        until(lambda: len(content(uri).get(FIRST, {}).get("metrics", {}).get("loss", [])) == 2)
    assert content(uri)[FIRST]["status"] == "KILLED"

    # resumed from a checkpoint at step 10: the torn line is appended to, and step 20 comes again
    with (run_dir / "trace.jsonl").open("a") as trace:
        trace.write(trace_line(20))
    with followed(uri, tmp_path, said) as tracker:
        tracker.watch(run_dir, cell)
        until(lambda: content(uri)[FIRST]["status"] == "RUNNING")
        time.sleep(0.2)  # it has read on; now what came after the checkpoint is cut off and written again
        (run_dir / "trace.jsonl").write_text("".join(trace_line(step) for step in (10, 20, 30, 40)))
        (run_dir / "record.json").write_text(json.dumps(record_of(FIRST, 0)))
    run = content(uri)[FIRST]
    assert run["status"] == "FINISHED"
    assert [step for step, _ in run["metrics"]["loss"]] == [10, 20, 30, 40]
    assert said == []
    assert track.pending(results, uri, root=tmp_path, private=True) == []


def test_the_record_wins_over_what_was_announced(tmp_path: Path) -> None:
    uri = uri_of(tmp_path)
    run_dir = tmp_path / "results" / "core" / FIRST
    run_dir.mkdir(parents=True)
    with followed(uri, tmp_path, []) as tracker:
        announced = record_of(FIRST, 7)["cell"]
        announced["method"]["parameters"]["lr"] = 9.0
        tracker.watch(run_dir, announced)
        until(lambda: FIRST in content(uri))
        write_run(tmp_path / "results", FIRST)
    assert content(uri)[FIRST]["params"]["method.lr"] == "0.5"
    assert content(uri)[FIRST]["params"]["seed"] == "0"


@pytest.mark.parametrize("server", ["dead", "silent", "broken"])
def test_a_bad_server_is_said_once_and_holds_nothing_up(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    run_dir = write_run(tmp_path / "results", FIRST)
    said: list[str] = []
    with listening(server) as port:
        tracker = track.Tracker(f"http://user:secret@127.0.0.1:{port}", say=said.append, interval=0.05, private=True)
        tracker.watch(run_dir, {})
        until(lambda: tracker.off)
        tracker.watch(write_run(tmp_path / "results", SECOND), {})
        began = time.monotonic()
        tracker.close(30)
        assert time.monotonic() - began < 30, "it waited"
        assert len(said) == 1 and "off for this session" in said[0] and "track --rebuild" in said[0]
        assert "secret" not in said[0] and "\n" not in said[0]
        assert len(track.pending(tmp_path / "results", tracker.uri)) == 2
        with pytest.raises(track.TrackingError, match="tracking store"):
            track.rebuild(tmp_path / "results", tracker.uri)


@contextlib.contextmanager
def listening(server: str) -> Iterator[int]:
    """A port on this machine behind which nobody is, or somebody mute, or somebody who talks nonsense."""
    if server == "dead":
        yield 9
        return
    with socket.create_server(("127.0.0.1", 0)) as listener:
        held: list[socket.socket] = []

        def serve() -> None:
            with contextlib.suppress(OSError):  # the listener was closed: the test is over
                while True:
                    connection, _ = listener.accept()
                    held.append(connection)
                    if server == "broken":
                        connection.recv(65536)
                        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello")

        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        for connection in held:
            connection.close()


def test_close_says_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = threading.Event()
    monkeypatch.setattr(track._Projection, "project", lambda self, finished: slow.wait(30))
    said: list[str] = []
    tracker = track.Tracker(uri_of(tmp_path), say=said.append, root=tmp_path, interval=0.05)
    tracker.watch(write_run(tmp_path / "results", FIRST), {})
    assert tracker.close(0.2) == 1
    assert len(said) == 1 and "1 finished" in said[0] and "track --rebuild" in said[0]
    slow.set()
    assert tracker._thread is not None
    tracker._thread.join(60)


def test_the_store_is_the_users_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert track.resolve_uri() == uri_of(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/theirs.db")
    assert track.resolve_uri("http://localhost:5000") == "http://localhost:5000"
    write_run(tmp_path / "results", FIRST)
    tracker = track.Tracker()
    tracker.watch(tmp_path / "results" / "core" / FIRST, {})
    assert tracker.close(120) == 0
    assert list(content(f"sqlite:///{tmp_path}/theirs.db")) == [FIRST]
    assert not (tmp_path / "mlflow.db").exists()
