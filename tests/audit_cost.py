"""What audits cost a step, side by side in one process: ``python -m tests.audit_cost [w1 w2 ...]``, on an idle machine.

For each workload of ``suites/throughput.toml`` the median time of a step without audits, of one that asks whether an
audit is due, and of one that is audited, in turn; and what that comes to over `EVERY` steps, one of them audited.
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from harness.bench.plan import load
from harness.bench.steps import PrivateStep, build
from harness.dp import BookKeeping
from harness.dp.engines import audit
from harness.dp.engines.engine import Used

SECONDS = 10.0
SUITE = Path("suites/throughput.toml")


@dataclass(frozen=True)
class Unaudited(BookKeeping):
    """Book-keeping that asks nothing."""

    def inspect(self, used: Used) -> None:
        pass


def medians(name: str) -> list[float]:
    """Seconds of a step: unaudited, not due, audited."""
    workload = next(one for one in load(SUITE).workloads if one.name == name)
    model, batch = build(workload, workload.default, torch.float32, "cpu")
    steps = [PrivateStep(engine, model, batch) for engine in (Unaudited(), BookKeeping(), BookKeeping())]
    times: list[list[float]] = [[], [], []]
    for step in steps * 2:
        step()
    seen = audit._seen[model]["BookKeeping"]
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(times[0]) < 5:
        for number, step in enumerate(steps):
            # The 101st batch is not audited, the first one is.
            seen.batches = 100 if number < 2 else 0
            begun = time.perf_counter()
            step()
            times[number].append(time.perf_counter() - begun)
    return [statistics.median(one) for one in times]


def main() -> None:
    """Print a row for each workload."""
    names = sys.argv[1:] or [one.name for one in load(SUITE).workloads]
    print("| workload | step, ms | asking | an audit | of all steps |\n|---|---|---|---|---|")
    for name in names:
        bare, asked, audited = medians(name)
        asking, one = (asked - bare) / bare, (audited - asked) / bare
        cost = asking + one / audit.EVERY
        print(f"| {name} | {1e3 * bare:.3g} | {asking:.1%} | {one:.1%} | {cost:.2%} |", flush=True)


if __name__ == "__main__":
    main()
