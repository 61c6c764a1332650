"""Launchers in processes of their own, and runs that do on purpose what a test is about."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.records import store
from harness.records.cell import Cell
from tests.support import ROOT
from tests.support.records import TASK

STEPS = 30


# The run's side. A step is noted in the journal before it is checkpointed, so repeated steps show.
FAKE = """
import json, os, signal, sys, time
from pathlib import Path

sys.path.insert(0, ROOT)
from tests.support.records import record_of

STEPS = 30

def note(folder, word):
    descriptor = os.open(folder.parents[2] / "journal", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, f"{folder.name} {os.getpid()} {word}\\n".encode())
    os.close(descriptor)

def record(cell, suite, **more):
    return record_of(cell, suite, **more)

def execute(cell, folder, suite, jobs):
    note(folder, "begins")
    return globals()[cell.label.split()[0]](cell, folder, suite)

def steps(cell, folder, suite):
    at = folder / "checkpoint" / "step"
    at.parent.mkdir(exist_ok=True)
    done = int(at.read_text()) if at.exists() else 0
    for step in range(done, STEPS):
        note(folder, f"step {step}")
        with (folder / "trace.jsonl").open("a") as trace:
            trace.write(json.dumps({"step": step + 1}) + "\\n")
        time.sleep(0.02)
        at.with_suffix(".new").write_text(str(step + 1))
        at.with_suffix(".new").replace(at)
    note(folder, "finished")
    return record(cell, suite)

def stalls(cell, folder, suite):
    if not (folder / "checkpoint").exists():
        global STEPS
        STEPS = 10
        steps(cell, folder, suite)
        time.sleep(60)
    return steps(cell, folder, suite)

def quick(cell, folder, suite):
    return record(cell, suite, threads=os.environ["OMP_NUM_THREADS"], group_leader=os.getpgid(0) == os.getpid())

def crash(cell, folder, suite):
    (folder / "checkpoint").mkdir()
    raise ValueError("no such thing")

def memory(cell, folder, suite):
    raise MemoryError("too large")

def allocator(cell, folder, suite):
    raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

def grows(cell, folder, suite):
    block = bytearray(400 * 2**20)
    time.sleep(60)

def forever(cell, folder, suite):
    (folder / "checkpoint").mkdir(exist_ok=True)
    (folder / "checkpoint" / "x").touch()
    os.spawnlp(os.P_NOWAIT, "sleep", "sleep", "61.5")
    time.sleep(60)

def segfault(cell, folder, suite):
    print("last words")
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGSEGV)

def killed(cell, folder, suite):
    os.kill(os.getpid(), signal.SIGKILL)

def exits(cell, folder, suite):
    sys.exit(3)

def diverges(cell, folder, suite):
    return record(cell, suite, status="diverged", reason="loss is not finite", metrics={"loss": float("nan")})

def nonsense(cell, folder, suite):
    return {"schema": 1}
"""


# The launcher's side, as a program of its own that can be killed.
PROGRAM = """
import json, sys
from pathlib import Path
from harness.running import launch; from harness.records import store
from harness.records.cell import Cell
from harness.running import jobs

if __name__ == "__main__":
    options = json.loads(sys.argv[1])
    sys.path.insert(0, options["fakes"])
    cells = [Cell.from_json(text) for text in options["cells"]]
    codes = {cell.id: {"hash": options["code"]} for cell in cells}
    results = Path(options["results"])
    chosen = jobs.select(cells, results, "core", codes=codes, retry=options["retry"], rerun_stale=options["stale"])
    print(json.dumps({key: [r["id"] for r in getattr(chosen, key)] for key in ("done", "stale", "failed")}), flush=True)
    end = launch.run(chosen.todo, "core", at_once=options["jobs"], codes=codes, target="fakes:execute", preload=())
    print("interrupted" if end.interrupted else "over", len(end.outcomes), len(end.left), flush=True)
"""


def make_cell(label: str, seed: int = 0, seconds: float | None = None, memory: float | None = None) -> Cell:
    return Cell(
        suite="core", method="dp-sgd", label=label, parameters={"label": label}, parts={},
        task={**TASK, "name": "t"},
        privacy={"epsilon": 3.0, "delta": 1e-5, "relation": "add-or-remove", "unit": "example", "accountant": "pld"},
        schedule={"batch": 1, "steps": STEPS}, numerics={"dtype": "float32", "tf32": False}, seed=seed,
        device={"device": "cpu", "threads": 1, "engine": None, "microbatch": None},
        budget={"seconds": seconds, "memory_mib": memory},
    )  # fmt: skip


class Place:
    """A results folder, the fake runs, and launchers on them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.results = folder / "results"
        (folder / "fakes.py").write_text(FAKE.replace("ROOT", repr(str(ROOT))))
        (folder / "program.py").write_text(PROGRAM)

    def start(self, cells: Sequence[Cell], **options: Any) -> subprocess.Popen[str]:
        given = {"jobs": None, "retry": False, "stale": False, "code": "c" * 12} | options
        given |= {"fakes": str(self.folder), "results": str(self.results), "cells": [c.to_json() for c in cells]}
        return subprocess.Popen(
            [sys.executable, str(self.folder / "program.py"), json.dumps(given)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=self.folder,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            # a test run in the background ignores SIGINT, and would hand that on
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip

    def launch(self, cells: Sequence[Cell], **options: Any) -> str:
        output, _ = self.start(cells, **options).communicate(timeout=120)
        return output

    def records(self) -> dict[str, store.Record]:
        """By folder name."""
        found = store.load(self.results)
        assert not found.broken
        return {Path(record["path"]).parent.name: record for record in found}

    def record(self, cell: Cell, attempt: int = 1) -> store.Record:
        return store.read(store.Folder(self.results, "core", cell.id).attempt(attempt) / "record.json")

    def journal(self) -> list[tuple[str, int, str]]:
        """Folder name, process and word of each entry."""
        path = self.folder / "journal"
        lines = path.read_text().splitlines() if path.exists() else []
        return [(name, int(pid), word) for name, pid, word in (line.split(" ", 2) for line in lines)]
