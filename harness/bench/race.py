"""Times engines in turn in one process, so that what slows the machine down affects all of them alike."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping

import torch

from harness.bench import engines, steps
from harness.bench.fresh import Answer
from harness.bench.plan import Workload
from harness.bench.trial import first_line
from harness.provenance import measure

LARGEST_DRIFT = 2e-2  # of a float32 sum over the whole batch: kinks alone make right engines differ by 5e-3
ORACLE = "loop"
ROUNDS_OUTSIDE = 30
TURN = 0.05  # seconds that a turn takes at least


def race(
    names: list[str], workload: Workload, batch: int, device: str, threads: int, rounds: int, seconds: float
) -> Answer:
    """Quartiles of seconds per call for each name, and of what a private step costs outside its engine.

    Each warms up by one call, in which its clipped sum of the whole batch in float32 is compared with the loop's,
    where that is among them. About `seconds` in all.
    """
    torch.set_num_threads(threads)
    model, examples = steps.build(workload, batch, torch.float32, device)
    clock = measure.Clock(device)
    begun = clock.now()
    rows: dict[str, Answer] = {name: {} for name in names}
    calls: dict[str, steps.Step] = {}
    costs: dict[str, float] = {}
    truth = None
    for name in sorted(names, key=lambda name: name != ORACLE):
        taken: list[float] = []
        try:
            engine = None if name in steps.BASELINES else engines.make(name)
            call = steps.stepper(name, engine, model, examples)
            total = call()
            with clock.timed(taken):
                call()
        except Exception as why:  # whatever a peer raises is its result
            rows[name] = {"status": "failed", "reason": first_line(why)}
            continue
        truth = total if name == ORACLE else truth
        if total is not None and truth is not None:
            drift = steps.distance(total, truth)
            rows[name]["error_float32"] = drift
            if not drift <= LARGEST_DRIFT:
                rows[name]["status"] = "wrong"
                continue
        calls[name], costs[name] = call, taken[0]
    left = max(seconds - clock.since(begun), seconds / 2)
    shares = turns(costs, rounds, left)
    for name, values in interleave(calls, shares, clock, rows).items():
        rows[name]["seconds"] = {**measure.quartiles(values), "calls": len(values)}
    found: Answer = {"rows": rows, "parameters": sum(p.numel() for p in model.parameters())}
    first = next((name for name in names if name in calls and name not in steps.BASELINES), None)
    if first is not None:
        rest = steps.outside(engines.make(first), model, examples)
        times = interleave({"outside": rest}, {"outside": ROUNDS_OUTSIDE}, clock, {}).get("outside", [])
        found["outside"] = measure.quartiles(times[2:])
    return found


def turns(costs: Mapping[str, float], rounds: int, seconds: float) -> dict[str, int]:
    """How many turns each gets: an equal share of the time, at least one turn, and at most `rounds`."""
    return {
        name: max(1, min(rounds, math.floor(seconds / len(costs) / max(2 * cost, TURN))))
        for name, cost in costs.items()
    }


def interleave(
    calls: Mapping[str, Callable[[], object]], shares: Mapping[str, int], clock: measure.Clock, rows: dict[str, Answer]
) -> dict[str, list[float]]:
    """Seconds of each call, one turn of each in a round, those with fewer turns in evenly spread rounds.

    A turn is several calls, as in training; the first only brings its data back into the caches, perhaps its pages
    back into memory, and does not count.

    The order is drawn anew each round, so that no engine always comes after the same other. One that raises takes no
    part in later rounds, and its entry in `rows` says why.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    order, most = list(calls), max(shares.values(), default=0)
    draw = random.Random(0)
    for number in range(most):
        draw.shuffle(order)
        for name in list(order):
            if number * shares[name] // most == (number + 1) * shares[name] // most:
                continue
            turn: list[float] = []
            try:
                while len(turn) < 2 or sum(turn) < TURN:
                    with clock.timed(turn):
                        calls[name]()
                times[name] += turn[1:]
            except Exception as why:
                rows[name] = {"status": "failed", "reason": first_line(why)}
                order.remove(name)
    return {name: values for name, values in times.items() if name in order}
