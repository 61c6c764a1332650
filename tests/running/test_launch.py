"""Runs in processes of their own: every end is a record, nothing is lost, nothing is done twice.

The runs here are fakes (no torch): what they do is in their label.
"""

from __future__ import annotations

import dataclasses
import json
import random
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from harness.records import store
from harness.records.files import lock, unlock
from harness.running import jobs, progress
from tests.support.launching import STEPS, Place, make_cell


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_until(true: Any, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def test_every_end_is_a_record_with_a_reason(place: Place) -> None:
    ends = {
        "quick": ("ok", ""),
        "diverges": ("diverged", "not finite"),
        "crash": ("crashed", "ValueError: no such thing (at fakes.py:"),
        "memory": ("oom", "too large"),
        "allocator": ("oom", "DefaultCPUAllocator"),
        "grows": ("oom", "budget is 200 MiB"),
        "forever": ("timeout", "budget for one session"),
        "segfault": ("crashed", "SIGSEGV; its last output was: last words"),
        "killed": ("crashed", "SIGKILL, which the launcher did not send"),
        "exits": ("crashed", "exit code 3"),
        "nonsense": ("crashed", "is missing"),
    }
    cells = {
        label: make_cell(label, seconds=2.0 if label == "forever" else None,
                         memory=200 if label == "grows" else None)
        for label in ends
    }  # fmt: skip
    output = place.launch(list(cells.values()), jobs=4)
    assert f"over {len(ends)} 0" in output, output
    for label, (status, reason) in ends.items():
        record = place.record(cells[label])
        assert (record["status"], reason in (record["reason"] or "")) == (status, True), record["reason"]
        assert record["cell"] == cells[label].canonical()
        assert (record["metrics"] == {}) == (status not in ("ok", "diverged"))
        assert f"{status:<8}  {label}  t  eps=3  seed=0" in output
    assert place.record(cells["quick"])["threads"] == "1"
    assert place.record(cells["quick"])["group_leader"]
    assert place.record(cells["crash"])["code"]["hash"] == "c" * 12
    folder = store.Folder(place.results, "core", cells["crash"].id).attempt(1)
    assert "Traceback" in (folder / "error.txt").read_text()
    assert json.loads((folder / "env.json").read_text())["device"]["kind"] == "cpu"
    assert not list(place.results.rglob(".lock")) and not list(place.results.rglob("*.tmp"))
    assert all(path.stat().st_size for path in place.results.rglob("output.txt"))
    sleepers = subprocess.run(["pgrep", "-f", "sleep 61.5"], capture_output=True, text=True, check=False)
    assert sleepers.stdout == ""  # what the run had started went with it


def test_finished_runs_are_kept_and_only_what_is_asked_for_runs_again(place: Place) -> None:
    good, bad, crashed = make_cell("quick"), make_cell("diverges"), make_cell("crash")
    late = make_cell("forever", seconds=0.6)
    cells = [good, bad, crashed, late]
    place.launch(cells)
    before = {path: path.read_bytes() for path in place.results.rglob("record.json")}

    assert "over 0 0" in place.launch(cells)
    assert "over 0 0" in place.launch(cells, code="d" * 12)  # stale is said, and left as it is
    assert len(place.records()) == 4

    cells[3] = dataclasses.replace(late, budget={"seconds": 20.0}, label="quick")  # the budget is not its identity
    assert "over 2 0" in place.launch(cells, retry=True)
    assert place.record(crashed, 2)["status"] == "crashed"
    assert place.record(late, 2)["status"] == "ok"
    assert not (store.Folder(place.results, "core", late.id).attempt(1) / "checkpoint").exists()

    assert "over 2 0" in place.launch([good, bad], stale=True, code="d" * 12)
    assert place.record(good, 2)["status"] == "ok"
    assert all(path.read_bytes() == data for path, data in before.items())  # nothing was overwritten


def test_a_retry_goes_on_from_the_checkpoint_of_a_run_that_was_cut_short(place: Place) -> None:
    cell = make_cell("stalls", seconds=5.0)
    place.launch([cell])
    assert place.record(cell)["status"] == "timeout"
    place.launch([dataclasses.replace(cell, budget={})], retry=True)
    assert place.record(cell, 2)["status"] == "ok"
    words = Counter(word for _, _, word in place.journal())
    assert words == {"begins": 2, "finished": 2} | {f"step {n}": 1 for n in range(STEPS)}
    trace = store.Folder(place.results, "core", cell.id).attempt(2) / "trace.jsonl"
    assert json.loads(trace.read_text().splitlines()[0]) == {"step": 1}


def test_other_code_does_not_continue_a_checkpoint(place: Place) -> None:
    cell = make_cell("steps")
    launcher = place.start([cell])
    wait_until(lambda: any(word == "step 5" for _, _, word in place.journal()))
    launcher.kill()
    launcher.wait()
    wait_until(lambda: all(gone(pid) for _, pid, _ in place.journal()))
    place.launch([cell], code="d" * 12)
    assert Counter(word for _, _, word in place.journal())["step 0"] == 2


@pytest.mark.parametrize("seed", range(2))
def test_kill_9_loses_nothing_and_repeats_nothing(place: Place, seed: int) -> None:
    """The launcher is killed at random moments, again and again; what it did must be as if it had not been."""
    choice = random.Random(seed)
    cells = [make_cell("steps", seed=n) for n in range(5)]
    kept: dict[str, bytes] = {}
    kills = 0
    launcher = None
    for more in (0, *(choice.randrange(1, 60) for _ in range(40))):
        launcher = place.start(cells, jobs=2)
        target = len(place.journal()) + more
        wait_until(lambda p=launcher, n=target: p.poll() is not None or len(place.journal()) >= n, 60)
        time.sleep(choice.uniform(0, 0.05 if more else 0.5))
        if launcher.poll() is None:
            launcher.kill()
            launcher.wait()
            kills += 1
            wait_until(lambda: all(gone(pid) for _, pid, _ in place.journal()))  # runs die with their launcher
        now = {str(path): path.read_bytes() for path in place.results.rglob("record.json")}
        assert kept.items() <= now.items()
        kept = now
        if launcher.returncode == 0:
            break
    assert launcher is not None and launcher.returncode == 0 and kills > 1
    assert sorted(place.records()) == sorted(cell.id for cell in cells)
    finished = Counter(name for name, _, word in place.journal() if word == "finished")
    # A run killed between its last step and its record ends again, from its last checkpoint.
    assert set(finished) == {cell.id for cell in cells}
    assert sum(finished.values()) <= len(cells) + kills
    steps = Counter((name, word) for name, _, word in place.journal() if word.startswith("step"))
    assert len(steps) == STEPS * len(cells)
    assert sum(steps.values()) - len(steps) <= 2 * kills  # at most the step under way in each of two runs
    assert "over 0 0" in place.launch(cells)


def test_two_launchers_share_the_work(place: Place) -> None:
    cells = [make_cell("steps", seed=n) for n in range(4)]
    launchers = [place.start(cells, jobs=2) for _ in range(2)]
    outputs = [launcher.communicate(timeout=120)[0] for launcher in launchers]
    begun = Counter(name for name, _, word in place.journal() if word == "begins")
    assert begun == {cell.id: 1 for cell in cells}, outputs
    assert len(place.records()) == len(cells)
    assert all("over " in output for output in outputs)


def test_a_run_elsewhere_is_awaited_and_taken_over_when_it_dies(place: Place) -> None:
    cell = make_cell("steps")
    folder = store.Folder(place.results, "core", cell.id).attempt(1)
    held = lock(folder)
    assert held is not None
    launcher = place.start([cell])
    assert launcher.stdout is not None
    assert any("is running elsewhere" in line for line in launcher.stdout)
    assert launcher.poll() is None and not place.journal()
    unlock(folder, held)
    output, _ = launcher.communicate(timeout=60)
    assert "over 1 0" in output
    assert place.record(cell)["status"] == "ok"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_stops_and_the_next_launch_goes_on(place: Place, number: signal.Signals) -> None:
    cells = [make_cell("steps", seed=n) for n in range(3)]
    launcher = place.start(cells, jobs=1)
    wait_until(lambda: any(word == "step 9" for _, _, word in place.journal()))
    launcher.send_signal(number)
    output, _ = launcher.communicate(timeout=60)
    assert "interrupted" in output and "Traceback" not in output
    assert all(gone(pid) for _, pid, _ in place.journal())
    place.launch(cells)
    steps = Counter((name, word) for name, _, word in place.journal() if word.startswith("step"))
    assert len(steps) == STEPS * len(cells) and sum(steps.values()) <= len(steps) + 1


def test_no_more_run_at_once_than_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs.measure, "cores", lambda: 8)
    cpu, wide = make_cell("quick"), make_cell("quick").on("cpu", threads=3)
    gpus = [make_cell("quick").on(name) for name in ("cuda", "cuda:0", "cuda:1")]
    assert jobs.slots([cpu]) == 8
    assert jobs.slots([wide]) == 2
    assert jobs.slots([make_cell("quick").on("cpu", threads=99)]) == 1
    assert jobs.slots(gpus) == 2
    assert jobs.slots([cpu], 3) == 3


def test_progress_tells_rate_and_time_left() -> None:
    half = progress.Progress(finished=2, total=6, partly=1.0, seconds=30.0)
    assert half.pace == "6.0 runs/min, 30 s left"
    assert progress.Progress(0, 6, 0.0, 30.0).pace == ""
    assert progress.Progress(0, 1, 0.75, 30.0, before=0.5).pace == "0.5 runs/min, 30 s left"
    assert [progress.duration(s) for s in (0.44, 12, 200, 7500)] == ["0.4 s", "12 s", "3 min 20 s", "2 h 05 min"]
