"""The benchmark: what it refuses, what it calls wrong, where it goes on, and what it makes of records."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness import cli
from harness.bench import plan, session, table
from harness.bench.race import interleave, race, turns
from harness.bench.trial import trial
from harness.provenance.measure import Clock
from harness.suite import SuiteError
from tests.support import ROOT

TINY = """
kind = "throughput"
[bench]
question = "Does it work?"
engines = ["ghost", "loop"]
rounds = 2
seconds = 600
[[workload]]
name = "small"
title = "MLP"
model = "mlp?hidden=4"
shape = [1, 3, 3]
batches = [4, 6]
default = 4
target = 1.5
[[workload]]
name = "tokens"
title = "transformer"
model = "transformer?vocabulary=7&width=4&heads=2&layers=1&feedforward=4"
shape = [3]
tokens = 7
batches = [4]
default = 4
"""
ENGINES = '''
from dataclasses import dataclass

import torch
from harness.dp.engines.loop import Loop

@dataclass(frozen=True)
class Scaled(Loop):
    """Adds up more than it should, or nothing that is a number."""
    factor: float = 0.5
    only: torch.dtype | None = None

    def bounded(self, loss, clip, model, w, *rest):
        found = super().bounded(loss, clip, model, w, *rest)
        if self.only in (None, w.flat.dtype):
            found.releases["grad"].value.flat.mul_(self.factor)
        return found

def Halved(): return Scaled()
def NotANumber(): return Scaled(factor=float("nan"))
def Coarse(): return Scaled(factor=1.1, only=torch.float32)

class Picky(Loop):
    def accepts(self, loss, clip, model): return "it is Tuesday"

class Broken(Loop):
    def bounded(self, *args): raise RuntimeError("cannot read /some/where/else/file.cpp\\nmuch more")
'''


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bench_fakes.py").write_text(ENGINES)
    monkeypatch.syspath_prepend(tmp_path)


def tiny(name: str = "small") -> plan.Workload:
    return next(one for one in plan.parse(TINY).workloads if one.name == name)


def record(name: str = "w1", batch: int = 128, **seconds: float) -> dict[str, Any]:
    """A record as a bench writes it: plain takes 2 ms, what is not named otherwise failed."""
    rows: list[dict[str, Any]] = []
    for engine in ("plain", "plain-channels-last", "bookkeeping", "vmap", "loop", "opacus-hooks"):
        value = {"plain": 0.002, **seconds}.get(engine.replace("-", "_"))
        row: dict[str, Any] = {"name": engine, "status": "failed", "reason": "RuntimeError: no"}
        if value is not None:
            spread = {"median": value, "q1": 0.9 * value, "q3": 1.1 * value, "calls": 9}
            row = {"name": engine, "status": "ok", "seconds": spread, "interleaved": True, "first_seconds": 0.5}
            row |= {"error": 1e-16, "memory_mib": 10.0 if engine == "plain" else 12.0}
        rows.append(row)
    workload = {"name": name, "title": "MLP", "model": "mlp", "shape": [1, 3, 3], "target": 1.1, "default": 128}
    return {
        "schema": session.SCHEMA, "workload": workload, "batch": batch, "engines": rows, "session": "s",
        "device": {"name": "a CPU", "kind": "cpu", "threads": 2}, "environment": {"torch": "2.15"},
        "outside": {"median": 0.0003}, "took": 1.0,
    }  # fmt: skip


def write(folder: Path, *records: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    for one in records:
        path = folder / f"{one['workload']['name']}-b{one['batch']}.json"
        path.write_text(json.dumps(one))
    return folder


# What to time ---------------------------------------------------------------------------------------------


def test_all_that_is_wrong_with_a_file_is_said_at_once() -> None:
    wrong = TINY.replace('"ghost"', '"gost"').replace("mlp?hidden=4", "mpl").replace("default = 4", "default = 5", 1)
    wrong = wrong.replace('name = "tokens"', 'name = "small"').replace('kind = "throughput"', "[train]")
    misshapen = TINY.replace("target", "targget").replace("[3]", "[]")
    for text, expected in (
        (wrong, ('kind = "throughput"', 'no table "train"', "mine.toml:5: no engine", 'Did you mean "ghost"?')),
        (wrong, ('Did you mean "mlp"?', "default = 5: is not one of its batches, 4, 6", "two workloads are called")),
        (misshapen, ("mine.toml:15:", 'no key "targget"', "is an empty list")),
    ):
        with pytest.raises(SuiteError) as caught:
            plan.parse(text, "mine.toml")
        assert all(part in str(caught.value) for part in expected), str(caught.value)


def test_the_suite_of_the_repository_is_no_training_suite(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert cli.main(["check", "suites/throughput.toml"]) == 0 and cli.main(["ls", "suites"]) == 0
    assert "cannot be read" not in capsys.readouterr().out
    assert cli.main(["plan", "suites/throughput.toml"]) == 2
    assert "epsbench bench" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--workloads", "smal"], ["--engines", "gost"], ["--batches", "5"], ["--report"]]
)
def test_requests_that_cannot_be_met(arguments: list[str], tmp_path: Path) -> None:
    suite = tmp_path / "tiny.toml"
    suite.write_text(TINY)
    with pytest.raises(SystemExit) as caught:
        cli.main(["bench", "--suite", str(suite), "--out", str(tmp_path / "none"), *arguments])
    assert caught.value.code == 2


# Engines --------------------------------------------------------------------------------------------------


def tried(name: str, workload: str = "small") -> dict[str, Any]:
    return trial(name, tiny(workload), 4, "cpu", 1, 0.01)


@pytest.mark.usefixtures("fakes")
def test_a_wrong_engine_gets_no_time() -> None:
    assert tried("bench_fakes:Halved") == {"status": "wrong", "error": pytest.approx(0.5)}
    assert tried("bench_fakes:NotANumber")["status"] == "wrong"
    assert tried("bench_fakes:Picky") == {"status": "refused", "reason": "it is Tuesday"}
    assert tried("bench_fakes:Broken") == {"status": "failed", "reason": "RuntimeError: cannot read file.cpp"}
    assert tried("bench_fakes:Missing")["status"] == tried("nobody.has:This")["status"] == "absent"
    for name in ("plain", "vmap", "loop"):
        found = tried(name, "tokens")
        assert found["status"] == "ok" and found["first_seconds"] > 0, found
        assert found.get("error", 0.0) < 1e-12


@pytest.mark.usefixtures("fakes")
def test_an_engine_that_is_wrong_in_float32_alone_is_found_beside_the_loop() -> None:
    assert tried("bench_fakes:Coarse")["status"] == "ok"
    names = ["plain", "bench_fakes:Coarse", "vmap", "loop"]
    found = race(names, tiny(), 4, "cpu", 1, 2, 0.1)
    rows = found["rows"]
    assert rows["bench_fakes:Coarse"]["status"] == "wrong" and "seconds" not in rows["bench_fakes:Coarse"]
    assert rows["vmap"]["error_float32"] < 1e-5 and rows["vmap"]["seconds"]["calls"] >= 1
    assert found["outside"]["median"] > 0


def test_slow_engines_join_fewer_rounds_and_failing_ones_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.bench.race.TURN", 0.0)  # then a turn is two calls, of which the second counts
    assert turns({"a": 0.5, "b": 0.05, "c": 50.0}, 20, 15.0) == {"a": 5, "b": 20, "c": 1}  # of two calls each
    order: list[str] = []

    def call(name: str, fails: bool = False) -> Callable[[], None]:
        def one() -> None:
            order.append(name)
            if fails and order.count(name) == 2:
                raise ValueError("enough")

        return one

    rows: dict[str, Any] = {}
    calls = {"a": call("a"), "b": call("b"), "c": call("c", fails=True)}
    times = interleave(calls, {"a": 6, "b": 2, "c": 6}, Clock(), rows)
    assert {name: len(values) for name, values in times.items()} == {"a": 6, "b": 2}
    assert rows == {"c": {"status": "failed", "reason": "ValueError: enough"}}
    gaps = [i for i, name in enumerate(order) if name == "b"]
    assert gaps[2] - gaps[1] > 2  # spread over the rounds


# Sessions -------------------------------------------------------------------------------------------------


def test_a_bench_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def measured(workload: plan.Workload, batch: int, settings: session.Settings) -> dict[str, Any]:
        if done == ["small"]:
            done.append("stopped")
            raise KeyboardInterrupt
        done.append(workload.name)
        return {"engines": [], "took": 0.0}

    monkeypatch.setattr(session, "bench", measured)
    monkeypatch.setattr(session.codehash, "code_hash", lambda files: "the same")
    settings = session.Settings(("loop",), 1, 1.0, "cpu", 1, False, tmp_path / "out")
    items = [(tiny(), 4), (tiny("tokens"), 4)]
    with pytest.raises(KeyboardInterrupt):
        session.run(items, settings)
    assert len(session.run(items, settings)) == 2 and done == ["small", "stopped", "tokens"]
    session.run(items, settings)  # the last one was through: this is another
    assert done[3:] == ["small", "tokens"]
    (tmp_path / "out" / session.MARK).write_text("20260101T000000Z-of-other-settings\n")
    session.run(items, settings)
    assert done[5:] == ["small", "tokens"]


@pytest.mark.usefixtures("fakes")
def test_from_the_command_to_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suite, out = tmp_path / "tiny.toml", tmp_path / "out"
    suite.write_text(TINY)
    command = ["--suite", str(suite), "--out", str(out), "--threads", "1", "--workloads", "small"]
    assert cli.main(["bench", *command, "--engines", "vmap", "bench_fakes:Halved", "loop"]) == 1
    printed = capsys.readouterr().out
    assert "wrong: error 5e-01" in printed
    written = json.loads((out / "small-b4.json").read_text())
    rows = {row["name"]: row for row in written["engines"]}
    assert rows["bench_fakes:Halved"].keys() == {"name", "status", "error"}
    assert rows["vmap"]["seconds"]["calls"] >= 1 and rows["vmap"]["memory_mib"] >= 0
    assert {"device", "environment", "load", "peers", "code", "outside", "parameters"} <= written.keys()
    assert str(tmp_path) not in json.dumps(written)
    before = {name: (out / name).read_bytes() for name in ("table.md", "figure.svg")}
    assert cli.main(["bench", *command, "--report"]) == 1 and capsys.readouterr().out == printed
    assert before == {name: (out / name).read_bytes() for name in before}


# What is made of records ----------------------------------------------------------------------------------


def test_the_exit_code_says_whether_an_engine_got_slower(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suite = tmp_path / "tiny.toml"
    suite.write_text(TINY)
    now = write(tmp_path / "now", record("w1", bookkeeping=0.0024, loop=0.1))
    then = write(tmp_path / "then", record("w1", bookkeeping=0.0021, loop=0.1), record("w2", loop=0.1))
    report = ["--suite", str(suite), "--out", str(now), "--report", "--compare"]
    assert cli.main(["bench", *report, str(then)]) == 1
    assert "w1 batch 128 bookkeeping: was 1.05, now 1.20: now/then 1.14  WORSE" in capsys.readouterr().out
    assert cli.main(["bench", *report, str(then / "w1-b128.json"), "--threshold", "1.2"]) == 0
    gone = write(tmp_path / "gone", record("w1", bookkeeping=0.0024, loop=0.1, vmap=0.01))
    assert cli.main(["bench", *report, str(gone)]) == 1  # vmap has no time any more
    with pytest.raises(SystemExit):
        cli.main(["bench", *report, str(write(tmp_path / "other", record("w3", loop=0.1)))])


def test_the_table_says_what_the_records_say() -> None:
    one = record(plain_channels_last=0.0016, bookkeeping=0.0022, vmap=0.008, loop=0.1)
    wrong = record("w2", vmap=0.003)
    wrong["engines"][5] = {"name": "opacus-hooks", "status": "wrong", "error": 0.15}
    lines = table.markdown([one, wrong]).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    row = dict(zip(cells[0], cells[2], strict=True))
    assert row["fastest plain"] == "channels-last 0.80" and row["plain ms"] == "2.00"
    assert (row["engine"], row["ratio"], row["to fastest plain"]) == ("bookkeeping", "**1.10** (0.99 to 1.21)", "1.38")
    assert (row["best other"], row["loop"], row["faster than the loop"]) == ("vmap 4.00", "50.0", "45.5×")
    assert (row["memory"], row["target"], row["outside the engine"]) == ("1.20", "≤ 1.10", "0.30 ms, 15.0%")
    failed = dict(zip(cells[0], cells[3], strict=True))
    assert (failed["ratio"], failed["first call"], failed["best other"]) == ("failed", "–", "vmap 1.50")
    other = dict(zip(cells[4], cells[7], strict=True))
    assert other["opacus-hooks"] == "wrong: error 1e-01" and other["bookkeeping"] == "failed"
    assert lines[-1].endswith("loop on w2-b128: RuntimeError: no")


def test_the_figure_is_the_same_for_the_same_records() -> None:
    records = [record(bookkeeping=0.0022, loop=0.1), record("w2", vmap=0.003)]
    first = table.draw(records)
    assert first == table.draw(copy.deepcopy(records))
    assert "<dc:date>" not in first and "50 ▸" in first
