"""results/: written once whatever happens, strict JSON, merged without loss."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import pytest

from harness.records import store
from harness.records.files import AlreadyWritten, StoreError, dumps, lock, locked, unlock
from harness.records.record import SCHEMA
from tests.support.records import make_cell, make_record, merge, put


def _race(folder: str, accuracy: float, start: float, won: str) -> None:
    """One of many writers of the same record."""
    record = make_record(metrics={"accuracy": accuracy})
    time.sleep(max(0.0, start - time.time()))
    try:
        store.write_record(Path(folder), record)
    except AlreadyWritten:
        return
    (Path(won) / str(accuracy)).touch()


def test_of_many_writers_exactly_one_wins(tmp_path: Path) -> None:
    won, folder = tmp_path / "won", tmp_path / "core" / make_cell().id
    won.mkdir()
    context = multiprocessing.get_context("fork")
    start = time.time() + 0.3
    writers = [context.Process(target=_race, args=(str(folder), 0.1 * n, start, str(won))) for n in range(1, 7)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(20)
    winners = list(won.iterdir())
    assert [writer.exitcode for writer in writers] == [0] * len(writers)
    assert len(winners) == 1
    assert store.read(folder / "record.json")["metrics"]["accuracy"] == float(winners[0].name)
    assert [path.name for path in folder.iterdir()] == ["record.json"]  # no temporary file is left


def test_records_are_strict_json_and_sorted(tmp_path: Path) -> None:
    record = make_record(metrics={"loss": math.nan}, environment={"a": math.inf, "list": (1, -math.inf)})
    text = put(tmp_path, record).read_text()
    again = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert again["metrics"]["loss"] is None and again["environment"] == {"a": None, "list": [1, None]}
    assert list(again) == sorted(again)
    assert dumps(again) == text


@pytest.mark.parametrize(
    ("change", "said"),
    [({"schema": SCHEMA + 1}, "update epsbench"), ({"status": "fine"}, "not one of"), ({"metrics": None}, "metrics"),
     ({"id": "0" * 12}, "not that of its folder")],
)  # fmt: skip
def test_what_is_not_a_record_is_not_written(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    folder = tmp_path / "core" / make_cell().id
    with pytest.raises(StoreError, match=said):
        store.write_record(folder, make_record() | change)
    assert not (folder / "record.json").exists()


def test_bad_files_are_set_apart_and_do_not_hide_good_ones(tmp_path: Path) -> None:
    put(tmp_path, make_record(0))
    bad = {
        "aaaaaaaaaaaa": "{", "bbbbbbbbbbbb": "[]", "cccccccccccc": '{"schema": 1, "x": NaN}',
        "dddddddddddd": "[" * 100_000, "eeeeeeeeeeee": json.dumps(make_record(1)), "not-an-id":
        json.dumps(make_record(2)),
    }  # fmt: skip
    for name, text in bad.items():
        (tmp_path / "core" / name).mkdir()
        (tmp_path / "core" / name / "record.json").write_text(text)
    (tmp_path / "core" / "ffffffffffff").mkdir()  # a run that is not over
    found = store.load(tmp_path)
    assert [record["id"] for record in found] == [make_cell(0).id]
    assert {one.path.parent.name for one in found.broken} == set(bad)
    assert all(one.reason for one in found.broken)
    assert store.load(tmp_path / "nothing") == []


def test_thousands_of_records_load(tmp_path: Path) -> None:
    record = make_record(ledger=[[{"type": "Poisson", "q": 0.1, "z": 1.1}, 10]] * 20)
    text = dumps(record)
    for n in range(2000):
        folder = tmp_path / "core" / f"{n:012x}"
        folder.mkdir(parents=True)
        (folder / "record.json").write_text(text.replace(record["id"], f"{n:012x}"))
    assert len(store.load(tmp_path)) == 2000


def test_which_record_counts(tmp_path: Path) -> None:
    id, today = make_cell().id, {make_cell().id: {"hash": "c" * 12}}

    def counts(*attempts: tuple[str, str]) -> tuple[int, bool]:
        results = tmp_path / str(len(list(tmp_path.iterdir())))
        for number, (status, code) in enumerate(attempts, 1):
            put(results, make_record(status=status, code=code * 12), number)
        (one,) = store.current(store.load(results), today)
        return store.attempt_of(one), one["stale"]

    assert store.current(store.load(tmp_path / "none")) == []
    assert counts(("ok", "c")) == (1, False)
    assert counts(("crashed", "c"), ("ok", "c")) == (2, False)
    assert counts(("ok", "c"), ("crashed", "c")) == (1, False)
    assert counts(("ok", "c"), ("ok", "a")) == (1, False)
    assert counts(("ok", "a"), ("crashed", "c")) == (1, True)
    assert counts(("ok", "c"), ("diverged", "c")) == (2, False)  # the newest, not the most flattering
    assert counts(*[("timeout", "c")] * 11) == (11, False)  # 11 comes after 2, as numbers do
    place = store.Folder(tmp_path / "1", "core", id)
    assert place.unfinished() == place.attempt(3)
    place.attempt(3).mkdir()
    assert place.unfinished() == place.attempt(3)  # begun, and not over


def test_merge_adds_and_never_overwrites(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for seed in (0, 1):
        put(here, make_record(seed))
    put(there, make_record(1))  # the same bytes
    path = put(there, make_record(2))
    (path.parent / "trace.jsonl").write_text('{"step": 1}\n')
    put(there, make_record(2, code="d" * 12), attempt=2)
    put(there, make_record(0, metrics={"accuracy": 0.1}))
    forged = make_record(3)
    forged["cell"]["schedule"]["steps"] = 1
    put(there, forged)
    kept = (here / "core" / make_cell(0).id / "record.json").read_bytes()

    result = merge([there], here)
    two = make_cell(2).id
    assert sorted(result.added) == [f"core/{two}", f"core/{two}.2"]
    assert result.same == [f"core/{make_cell(1).id}"]
    assert [one.path.parent.name for one in result.conflicts] == [make_cell(0).id]
    assert [one.path.parent.name for one in result.refused] == [make_cell(3).id]
    assert "not that of its cell" in result.refused[0].reason
    assert (here / "core" / make_cell(0).id / "record.json").read_bytes() == kept
    assert (here / "core" / two / "trace.jsonl").exists()
    assert not (here / "core" / make_cell(3).id).exists()
    again = merge([there], here)
    assert not again.added and len(again.same) == 3
    for wrong in (here, tmp_path / "missing", tmp_path):
        with pytest.raises(StoreError, match=str(wrong)):
            merge([wrong], here)


def test_a_merged_record_supersedes_a_half_done_run_but_not_a_running_one(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    put(there, make_record(0))
    folder = here / "core" / make_cell(0).id
    (folder / "checkpoint").mkdir(parents=True)
    (folder / "trace.jsonl").write_text("old\n")
    held = lock(folder)
    assert held is not None and locked(folder)
    assert "is running now" in merge([there], here).conflicts[0].reason
    unlock(folder, held)
    assert not locked(folder)
    assert merge([there], here).added == [f"core/{make_cell(0).id}"]
    assert sorted(path.name for path in folder.iterdir()) == ["origin.json", "record.json"]


def _hold(folder: str, ready: Any) -> None:
    held = lock(Path(folder))
    ready.set()
    time.sleep(60)
    assert held is not None


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    holder = context.Process(target=_hold, args=(str(tmp_path / "run"), ready))
    holder.start()
    assert ready.wait(20)
    assert lock(tmp_path / "run") is None
    assert holder.pid is not None
    os.kill(holder.pid, 9)
    holder.join(20)
    held = lock(tmp_path / "run")
    assert held is not None
    unlock(tmp_path / "run", held)
    assert list((tmp_path / "run").iterdir()) == []
