"""A results folder as large as one likes, to measure the report with: ``python -m tests.report_scale 10000 DIR``.

Every record is valid and has a trace; failures, searches, claims and stale runs are among them.
"""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

from harness import report
from harness.records import store
from harness.records.files import dumps
from tests.support.report import hash_, record

SEEDS = 4
_EPSILONS = (0.5, 1.0, 2.0, 3.0, 5.0, 8.0)


def records(n: int, suite: str = "scale") -> list[dict[str, Any]]:
    """`n` records in rows of `SEEDS` seeds: methods on tasks and epsilons, every method a handful of times."""
    out: list[dict[str, Any]] = []
    rows = -(-n // SEEDS)
    methods = max(4, round((rows / len(_EPSILONS)) ** 0.5 / 2))
    tasks = -(-rows // (methods * len(_EPSILONS)))
    for t in range(tasks):
        for epsilon in _EPSILONS:
            for m in range(methods):
                name = "dp-sgd" if m == 0 else f"method-{m}"
                for seed in range(SEEDS):
                    if len(out) == n:
                        return out
                    out.append(_one(suite, name, f"task-{t}/net", epsilon, seed, m))
    return out


def _one(suite: str, method: str, task: str, epsilon: float, seed: int, m: int) -> dict[str, Any]:
    rng = random.Random(f"{method} {task} {epsilon} {seed}")
    luck = rng.gauss(0, 0.01)
    failed = rng.random() < 0.01
    top = 0.9 - 0.1 / epsilon + 0.002 * (m % 7) + luck
    one = record(
        method, round(top, 4), seed, epsilon, task=task, rate=round(5000 * (0.5 + rng.random()), 1),
        status="diverged" if failed else "ok", reason="the loss is not finite" if failed else None,
    )  # fmt: skip
    one["suite"] = suite
    one["id"] = f"{hash_(f'{suite} {method} {task} {epsilon} {seed}'):012x}"
    one["card"]["family"] = ("engine", "clipping", "path")[m % 3]
    one["stale"] = rng.random() < 0.02
    one["trace"] = [
        {
            "step": 16 * (i + 1), "seconds": round(0.8 * (i + 1), 3), "loss": round(2 / (i + 1), 5),
            "accuracy": round(top * (1 - 0.5 / (i + 1)), 4), "epsilon": round(epsilon * ((i + 1) / 20) ** 0.5, 6),
            "clipped_fraction": round(0.9 - 0.02 * i, 4),
        }
        for i in range(20)
    ]  # fmt: skip
    return one


def write(n: int, results: Path, suite: str = "scale") -> None:
    """Write `n` records with their traces into `results`."""
    for one in records(n, suite):
        folder = results / suite / one["id"]
        folder.mkdir(parents=True, exist_ok=True)
        trace = one.pop("trace")
        for key in ("path", "stale"):
            one.pop(key)
        (folder / "record.json").write_text(dumps(one), encoding="utf-8")
        (folder / "trace.jsonl").write_text("".join(json.dumps(p) + "\n" for p in trace), encoding="utf-8")


def build(results: Path, reports: Path, suite: str = "scale") -> report.Report:
    """The report of what `write` wrote."""
    found = store.current(store.load(results, suite))
    made = report.build(suite, "How long does a report take?", found, reports, results=results, private=True)
    report.overview(reports)
    return made


if __name__ == "__main__":
    number, place = int(sys.argv[1]), Path(sys.argv[2])
    if not (place / "results").exists():
        write(number, place / "results")
    for _ in range(2):
        wall, busy = time.perf_counter(), time.process_time()
        done = build(place / "results", place / "reports")
        wall, busy = time.perf_counter() - wall, time.process_time() - busy
        print(f"{number} records: {'written' if done.written else 'unchanged'} in {wall:.1f} s, {busy:.1f} s of CPU")
