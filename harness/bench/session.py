"""Measures what a plan asks for: one JSON file for each workload and batch, written in one step.

A bench that was stopped goes on where it was: the file `session.tmp` beside the records is there until all is done.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from harness.bench import engines, steps
from harness.bench.fresh import Answer, Gone, call
from harness.bench.plan import Workload
from harness.bench.race import race
from harness.bench.table import Record
from harness.bench.trial import trial
from harness.provenance import code as codehash
from harness.provenance import measure
from harness.records.files import dumps, replace_file

SCHEMA = 1
MARK = "session.tmp"
ALONE = 0.125  # an engine whose call takes more than this share of the time left is timed by itself, not in turn
BASELINE_LIMIT = 300.0  # seconds
ROOT = Path(__file__).parent.parent
CODE = ("dp/**/*.py", "peers/*.py", "models/*.py", "bench/steps.py", "bench/trial.py", "bench/race.py")


@dataclass(frozen=True)
class Settings:
    """How to time, and where to."""

    engines: tuple[str, ...]
    rounds: int
    seconds: float
    device: str
    threads: int
    compiled: bool
    out: Path


def run(items: Sequence[tuple[Workload, int]], settings: Settings, fresh: bool = False) -> list[Record]:
    """Measure every workload at its batch, and write its record; those that this session wrote are kept.

    A session goes on until it has been through: `fresh` begins a new one.
    """
    device = measure.device_info(settings.device, settings.threads)
    code = codehash.code_hash(file for pattern in CODE for file in ROOT.glob(pattern))
    about = [code, device, list(settings.engines), settings.rounds, settings.seconds, settings.compiled]
    session = _resumed(settings.out / MARK, dumps(about), fresh)
    paths = [settings.out / f"{workload.name}-b{batch}.json" for workload, batch in items]
    records = [_written(path, session) for path in paths]
    missing = records.count(None)
    end = time.monotonic() + settings.seconds * missing
    for number, ((workload, batch), path) in enumerate(zip(items, paths, strict=True)):
        if records[number] is not None:
            say(f"{path.stem}: measured already")
            continue
        # The time that one takes too long is taken from those after it, so that the whole takes as long as asked.
        seconds = max((end - time.monotonic()) / missing, settings.seconds / 3)
        record = {
            "schema": SCHEMA, "session": session, "workload": workload.model_dump(mode="json"), "batch": batch,
            "rounds": settings.rounds, "seconds": round(seconds, 1), "device": device,
            "environment": measure.environment(), "peers": engines.versions(), "code": code,
            "load": list(os.getloadavg()), **bench(workload, batch, replace(settings, seconds=seconds)),
        }  # fmt: skip
        replace_file(path, dumps(record).encode())
        say(f"{path.stem}: {record['took']:.0f} s")
        records[number], missing = record, missing - 1
    (settings.out / MARK).unlink(missing_ok=True)
    return [record for record in records if record is not None]


def bench(workload: Workload, batch: int, settings: Settings) -> Record:
    """Try every engine in a process of its own, then time those that are right side by side in another."""
    begun = time.monotonic()
    model = steps.models.build(workload.model, workload.shape, workload.classes, seed=0)
    bases = list(steps.baselines(model, settings.compiled))
    common = {"workload": workload, "batch": batch, "device": settings.device, "threads": settings.threads}
    rows: dict[str, Answer] = {}
    limit = max(45.0, settings.seconds / 2)  # of one trial; a baseline is waited for, compiling and all
    for name in (*bases, *settings.engines):
        try:
            rows[name] = call(
                trial,
                {**common, "name": name, "seconds": settings.seconds / 50},
                BASELINE_LIMIT if name in bases else limit,
            )
        except Gone as why:
            rows[name] = {"status": "failed", "reason": str(why)}
        say(f"  {name}: {rows[name]['status']} {rows[name].get('reason', '')}".rstrip())
    left = max(settings.seconds - (time.monotonic() - begun), settings.seconds / 4)
    good = [name for name, row in rows.items() if row["status"] == "ok"]
    slow = [name for name in good if rows[name]["alone_seconds"]["q1"] > ALONE * left]
    raced: Answer = {"rows": {}}
    if names := [name for name in good if name not in slow]:
        request = {**common, "names": names, "rounds": settings.rounds, "seconds": left}
        try:
            raced = call(race, request, 3 * settings.seconds + 300)
        except Gone as why:
            raced = {"rows": {}, "failed": str(why)}
    for name in good:
        row = rows[name] = {**rows[name], **raced["rows"].get(name, {})}
        alone = row.pop("alone_seconds")
        row["interleaved"] = "seconds" in row
        if "seconds" not in row and row["status"] == "ok":
            row["seconds"] = alone
    return {
        "engines": [{"name": name, **row} for name, row in rows.items()],
        "parameters": sum(p.numel() for p in model.parameters()),
        "outside": raced.get("outside"), "failed": raced.get("failed"),
        "took": round(time.monotonic() - begun, 1),
    }  # fmt: skip


def read(folder: Path) -> list[Record]:
    """The records of a folder, or the one in a file, in natural order. Raises ValueError where there is none."""
    files = [folder] if folder.is_file() else list(folder.glob("*-b*.json"))
    records = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    if not records or not all(isinstance(one, dict) and one.get("schema") == SCHEMA for one in records):
        raise ValueError(f"{folder}: no records of a bench here; epsbench bench makes some")
    return sorted(records, key=lambda one: (len(one["workload"]["name"]), one["workload"]["name"], one["batch"]))


def say(text: str) -> None:
    """Print progress, apart from the table."""
    print(text, file=sys.stderr, flush=True)


def _resumed(mark: Path, about: str, fresh: bool) -> str:
    """The id of the session that was stopped here, if it was to measure the same; otherwise of a new one."""
    digest = hashlib.sha256(about.encode()).hexdigest()[:12]
    if not fresh and mark.is_file():
        stopped = mark.read_text(encoding="utf-8").strip()
        if stopped.endswith(f"-{digest}"):
            return stopped
    session = f"{secrets.token_hex(6)}-{digest}"
    mark.parent.mkdir(parents=True, exist_ok=True)
    replace_file(mark, f"{session}\n".encode())
    return session


def _written(path: Path, session: str) -> Record | None:
    """The record at `path`, if this session wrote it."""
    if not path.is_file():
        return None
    record: Record = json.loads(path.read_text(encoding="utf-8"))
    return record if record.get("session") == session else None
