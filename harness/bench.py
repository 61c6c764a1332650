"""What a private step costs: engines side by side in one process, and the share of the step outside its engine.

Times are interleaved round-robin after a warm-up and given as ratios of medians: this machine's noise hits every engine
alike. Every engine's clipped sum is compared with the naive loop's in float64 before it is timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness import measure, models
from harness.dp.clip import Flat, Unclipped
from harness.dp.engines.engine import Engine, PerExample
from harness.dp.engines.ghost import Ghost
from harness.dp.engines.loop import Loop
from harness.dp.engines.plain import Plain
from harness.dp.engines.vmap import Vmap
from harness.dp.loss import Batch, CrossEntropy
from harness.dp.method import Method
from harness.dp.noise import NoNoise
from harness.dp.optimizer import SGD
from harness.dp.release import Bounded, Relation
from harness.dp.sampler import generator
from harness.train import Streams, bill, start, step


@dataclass(frozen=True)
class Workload:
    """A model and a batch."""

    name: str
    model: str
    shape: tuple[int, ...]
    batch: int = 128

    def build(self, dtype: torch.dtype, device: str) -> tuple[nn.Module, Batch]:
        """The model and one batch of random inputs."""
        rng = torch.Generator().manual_seed(0)
        x = torch.randn(self.batch, *self.shape, generator=rng).to(device, dtype)
        y = torch.randint(10, (self.batch,), generator=rng).to(device)
        return models.build(self.model, self.shape, 10, seed=0).to(device, dtype), Batch(x, y)


WORKLOADS = (
    Workload("MLP 784-256-256-10", "mlp", (1, 28, 28)),
    Workload("tanh CNN, 26 k parameters", "tanh-cnn-28", (1, 28, 28)),
    Workload("tanh CNN, 550 k parameters", "tanh-cnn-32", (3, 32, 32)),
)
ENGINES: dict[str, PerExample] = {"vmap": Vmap(), "ghost": Ghost(), "loop": Loop()}
PRIVATE = {name: Method(engine=engine, optimizer=SGD(0.1, 0.9)) for name, engine in ENGINES.items()}
PLAIN = Method(engine=Plain(), clip=Unclipped(), noise=NoNoise(), optimizer=SGD(0.1, 0.9))


def error(workload: Workload, engine: PerExample, device: str) -> float:
    """Relative distance of an engine's clipped sum from the naive loop's, in float64, on 16 examples."""
    model, batch = workload.build(torch.float64, device)
    few = Batch(batch.x[:16], batch.y[:16])
    w = start(PLAIN, model).w
    clip, relation = Flat(0.1), Relation.ADD_OR_REMOVE
    sums = [
        e.bounded(CrossEntropy(), clip, model, w, few, None, 1.0, relation).releases["grad"].value
        for e in (engine, Loop())
    ]
    return float((sums[0] - sums[1]).norm() / sums[1].norm())


def stepper(method: Method, model: nn.Module, batch: Batch) -> Callable[[], None]:
    """One whole logical step of `method`: engine, noise, optimizer, ledger."""
    device = batch.x.device
    progress = start(method, model)

    def one() -> None:
        rng = Streams(generator(1, progress.step, device), generator(2, progress.step, device))
        done = step(method, model, progress.w, batch, progress.parts, 1.0, len(batch), rng)
        progress.w, progress.parts, progress.step = done.w, done.parts, progress.step + 1
        progress.ledger.add(bill(method, done.sigmas, 50_000, len(batch), progress.step))

    return one


def interleave(
    runs: dict[str, Callable[[], None]], rounds: int, device: str, slow: Sequence[str] = ()
) -> dict[str, Any]:
    """Quartiles of seconds per call, one call of each per round; those in `slow` join only every fifth round."""
    clock = measure.Clock(device)
    for _ in range(2):
        for name, call in runs.items():
            if name not in slow:
                call()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for r in range(rounds):
        for name, call in runs.items():
            if name not in slow or r % 5 == 0:
                with clock.timed(times[name]):
                    call()
    return {name: measure.quartiles(values) for name, values in times.items()}


def bench(workload: Workload, rounds: int, device: str) -> dict[str, Any]:
    """One workload: seconds, ratios to the plain step, errors, and the private step's overhead outside its engine."""
    model, batch = workload.build(torch.float32, device)
    runs = {"plain": stepper(PLAIN, model, batch)}
    runs |= {name: stepper(method, model, batch) for name, method in PRIVATE.items()}
    slow = ("loop",)
    seconds = interleave(runs, rounds, device, slow)
    outside = interleave(
        {"overhead": outside_engine(PRIVATE["ghost"], model, batch)}, max(20, rounds), device
    )["overhead"]
    plain = seconds["plain"]["median"]
    return {
        "workload": workload.name, "batch": workload.batch, "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": seconds, "ratio": {name: q["median"] / plain for name, q in seconds.items()},
        "error": {name: error(workload, engine, device) for name, engine in ENGINES.items() if name != "loop"},
        "overhead_seconds": outside, "overhead": outside["median"] / plain,
    }  # fmt: skip


def outside_engine(method: Method, model: nn.Module, batch: Batch) -> Callable[[], None]:
    """A step whose engine hands back a release made beforehand: what is left is noise, optimizer and ledger."""
    p = start(method, model)
    ready = method.engine.bounded(
        method.loss, method.clip, model, p.w, batch, None, 1.0, Relation.ADD_OR_REMOVE
    )

    @dataclass(frozen=True)
    class Ready(Engine):
        def bounded(self, *args: Any) -> Bounded:
            return ready

    return stepper(dataclasses.replace(method, engine=Ready()), model, batch)


def main(arguments: Sequence[str] = ()) -> int:
    """`epsbench bench`: print the table, and write it as JSON where asked. Exit code 1 if an engine is wrong."""
    parser = argparse.ArgumentParser(prog="epsbench bench", description=__doc__)
    parser.add_argument("--device", default="cpu", help="cpu or cuda:N")
    parser.add_argument(
        "--threads", type=int, default=measure.cores(), help="CPU threads (default: all cores)"
    )
    parser.add_argument("--rounds", type=int, default=15, help="timed calls of each engine")
    parser.add_argument("--out", type=Path, help="write the measurements to this JSON file")
    options = parser.parse_args(list(arguments))
    torch.set_num_threads(options.threads)
    begun = time.time()
    rows = [bench(workload, options.rounds, options.device) for workload in WORKLOADS]
    device = measure.device_info(options.device, options.threads)
    sys.stdout.write(table(rows, device))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        whole = {
            "device": device,
            "environment": measure.environment(),
            "seconds": time.time() - begun,
            "rows": rows,
        }
        options.out.write_text(json.dumps(whole, indent=1, sort_keys=True) + "\n")
    wrong = [row["workload"] for row in rows if max(row["error"].values()) > 1e-5]
    return 1 if wrong else 0


def table(rows: list[dict[str, Any]], device: dict[str, Any]) -> str:
    """The measurements as Markdown."""
    names = ["plain", *ENGINES]
    lines = [
        f"Whole steps, in units of the plain non-private step: {device['name']}, {device['threads']} threads.",
        "",
        "| workload | batch | plain ms | "
        + " | ".join(names[1:])
        + " | largest error | outside the engine |",
        "|---" * (len(names) + 4) + "|",
    ]
    for row in rows:
        ratios = " | ".join(f"{row['ratio'][name]:.2f}" for name in names[1:])
        lines.append(
            f"| {row['workload']} | {row['batch']} | {row['seconds']['plain']['median'] * 1e3:.2f} | {ratios} |"
            f" {max(row['error'].values()):.0e} | {row['overhead']:.1%} |"
        )
    return "\n".join(lines) + "\n"
