"""Measures a full-batch private step for a last layer at ImageNet's size, and a lower bound on its cost.

The step is the ordinary one (`harness.running.train.step`) of the method `one-step-last-layer` with its default engine,
on synthetic features that are mapped from a file, so that the batch of all examples is never held in memory.
"""

from __future__ import annotations

import argparse
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from harness import models, registry
from harness.dp.engines.rows import product
from harness.dp.engines.taped.bookkeeping import BookKeeping
from harness.dp.loss import Batch
from harness.dp.method import Method
from harness.dp.random import Stream
from harness.provenance.measure import cpu_name
from harness.records import tables
from harness.running.train import Streams, start, step

ROWS, WIDTH, CLASSES = 1_281_167, 1280, 1000  # ImageNet's training set, and a head on 1,280 features
SIZES = (10_000, 100_000, ROWS)
BLOCK = 16_384  # rows written, and multiplied for the floor, at once


def write_features(file: Path, rows: int, width: int) -> None:
    """Random features of norm 1, float32 [rows, width], the same ones every time."""
    rng = torch.Generator().manual_seed(0)
    with open(file, "wb") as out:
        for first in range(0, rows, BLOCK):
            block = torch.randn(min(BLOCK, rows - first), width, generator=rng)
            out.write(F.normalize(block).numpy().data)


def mapped(file: Path, rows: int, width: int) -> Tensor:
    """The features in a file, [rows, width]: pages are read when they are touched, and are not this process's own."""
    return torch.from_file(str(file), shared=False, size=rows * width, dtype=torch.float32).view(rows, width)


@contextlib.contextmanager
def anonymous_memory(every: float = 0.01) -> Iterator[list[float]]:
    """Samples of this process's memory that no file backs, in MiB: pages of a mapped file are left out."""
    samples, stop = [0.0], threading.Event()

    def sample() -> None:
        while not stop.wait(every):
            lines = Path("/proc/self/status").read_text().splitlines()
            samples.append(next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon:")))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        stop.set()
        thread.join()


@dataclass(frozen=True)
class Cost:
    """One step on `rows` examples: seconds on the clock and of all cores together, peak anonymous memory in MiB, and
    the engine's microbatch. On a machine that is shared, the cores' seconds are the ones to compare."""

    rows: int
    seconds: float
    worked: float
    memory: float
    microbatch: int


def one_step(method: Method, x: Tensor, y: Tensor, classes: int) -> Cost:
    """A step from zero weights on all of `x` [B, D], `y` [B]."""
    model = models.build("linear-head", (x.shape[1],), classes, seed=0)
    begun = start(method, model, 1)
    streams = Streams(Stream(1, "noise", 0), Stream(1, "path", 0))
    with anonymous_memory() as samples:
        before, worked = time.perf_counter(), time.process_time()
        done = step(method, model, begun.w, Batch(x, y), begun.parts, 1.0, len(x), streams)
        seconds, worked = time.perf_counter() - before, time.process_time() - worked
    clipped, non_finite = int(done.observed.clipped), int(done.observed.non_finite)
    if clipped or non_finite or not done.w.flat.isfinite().all():
        raise RuntimeError(f"{clipped} gradients were clipped, and {non_finite} were not finite")
    return Cost(len(x), seconds, worked, max(samples), done.observed.microbatch)


@dataclass(frozen=True)
class Floor:
    """What the machine does at most: `products` multiply-adds and `bytes` read, in a second of one core."""

    products: float
    bytes: float

    def seconds(self, rows: int, width: int, classes: int) -> tuple[float, float]:
        """Of one core, for the two products (outputs; sum of gradients), and to read the features once for each."""
        return 2 * rows * width * classes / self.products, 2 * rows * width * 4 / self.bytes


def floor(width: int, classes: int, repeats: int = 5) -> Floor:
    """The best of some repetitions: of products of the step's shapes, by either library, and of reading a gibibyte."""
    x, w, d = torch.randn(BLOCK, width), torch.randn(classes, width), torch.randn(BLOCK, classes)
    long = torch.ones(1 << 28)
    ways: list[Callable[[], object]] = [lambda: F.linear(x, w), lambda: product(x, w), lambda: d.T @ x]
    best = min(_seconds(way) for way in ways for _ in range(repeats))
    read = min(_seconds(lambda: long.sum()) for _ in range(repeats))
    return Floor(BLOCK * width * classes / best, 4 * len(long) / read)


def _seconds(work: Callable[[], object]) -> float:
    before = time.process_time()
    work()
    return time.process_time() - before


HEADINGS = (
    "examples", "seconds", "examples/s", "core seconds", "for products", "for reading", "times the floor",
    "features (GB)", "anonymous memory (MiB)", "microbatch",
)  # fmt: skip


def report(costs: list[Cost], limits: Floor, width: int, classes: int) -> str:
    """A Markdown table, a line for each size."""
    rows = []
    for cost in costs:
        products, reading = limits.seconds(cost.rows, width, classes)
        rows.append(
            (
                f"{cost.rows:,}", f"{cost.seconds:.2f}", f"{cost.rows / cost.seconds:,.0f}", f"{cost.worked:.2f}",
                f"{products:.2f}", f"{reading:.2f}", f"{cost.worked / max(products, reading):.2f}",
                f"{cost.rows * width * 4 / 1e9:.2f}", f"{cost.memory:,.0f}", f"{cost.microbatch:,}",
            )
        )  # fmt: skip
    return "\n".join(tables.markdown(HEADINGS, rows, "---:"))


def main() -> None:
    """Write the features into a folder, measure, delete them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scratch", type=Path, help="a folder with room for the features: 5 kB an example")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="numbers of examples")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--microbatch", type=int, help="examples taken at once; the engine's own choice by default")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    method: Method = registry.load(registry.resolve("method", "one-step-last-layer"))(classes=CLASSES)
    method = replace(method, engine=BookKeeping(options.microbatch))
    file = options.scratch / "features.f32"
    try:
        write_features(file, max(options.sizes), WIDTH)
        labels = torch.randint(CLASSES, (max(options.sizes),), generator=torch.Generator().manual_seed(1))
        limits = floor(WIDTH, CLASSES)
        x = mapped(file, max(options.sizes), WIDTH)
        one_step(method, x[:1000], labels[:1000], CLASSES)  # pays for what is compiled and looked up once
        costs = [one_step(method, x[:n], labels[:n], CLASSES) for n in options.sizes]
    finally:
        file.unlink(missing_ok=True)
    speed = f"{2 * limits.products / 1e9:.0f} GFLOP/s and {limits.bytes / 1e9:.1f} GB/s a core"
    print(f"{cpu_name()}, {options.threads} threads; {speed}\n")
    print(report(costs, limits, WIDTH, CLASSES))


if __name__ == "__main__":
    main()
