"""Times a step of Logit-DP: the engine `Pairs` against one backward pass for every pair.

    python -m harness.bench.pairs pairs.json

Every measurement has a process of its own. Direct passes are extrapolated from a sample of pairs. Seconds are those
of the processor, so that other work on the machine counts little; those of the clock are in the file. Memory is the
peak of a step above what the process held before it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from harness.bench.fresh import Answer, Gone, call
from harness.dp.clip import Flat
from harness.dp.engines.engine import trainable
from harness.dp.engines.pairs import Pairs
from harness.dp.engines.weights import held
from harness.dp.loss import Batch
from harness.dp.loss.contrast import InfoNCE, unit
from harness.dp.release import Relation
from harness.dp.tree import Tree
from harness.models.catalog import build
from harness.provenance import measure
from harness.records import tables

SIZES = (32, 128, 256, 512)
WIDTHS = (8, 32, 128)
MODEL = "encoder?channels=16,32,64&width={width}"
IMAGE = (1, 28, 28)
SAMPLE = 200  # pairs that the direct way is timed on
LIMIT = 600.0  # seconds for a measurement


def trial(way: str, size: int, width: int, threads: int) -> Answer:
    """Time and peak memory of one step for `size` pairs: by "pairs", "direct" or "plain" (one backward pass)."""
    torch.set_num_threads(threads)
    model = build(MODEL.format(width=width), IMAGE, 10, 0)
    w, loss = Tree.of(trainable(model)), InfoNCE()
    x = torch.randn(size, 2, *IMAGE, generator=torch.Generator().manual_seed(0))
    batch = Batch(x, torch.zeros(size))

    def pairs(batch: Batch = batch) -> None:
        Pairs().bounded(loss, Flat(1.0), model, w, batch, None, 1.0, Relation.ADD_OR_REMOVE)

    def direct() -> None:
        for i, j in torch.randint(size, (min(SAMPLE, size * size), 2)).tolist():
            one_pair(model, w, torch.stack([x[i, 0], x[j, 1]]))

    def plain() -> None:
        with held(model, w.views) as own:
            torch.autograd.grad(loss.of(model, batch).sum(), list(own.values()))

    pairs(Batch(x[:2], batch.y[:2]))  # plans the model, and pays for what a process pays once
    before = measure.resident_mib(os.getpid()) or 0.0
    measure.reset_peak_memory()
    ways: dict[str, Callable[[], None]] = {"pairs": pairs, "direct": direct, "plain": plain}
    cpu, clock = time.process_time(), time.perf_counter()
    ways[way]()
    cpu, clock = time.process_time() - cpu, time.perf_counter() - clock
    whole = size * size / min(SAMPLE, size * size) if way == "direct" else 1.0
    return {
        "way": way, "size": size, "width": width, "threads": threads, "parameters": w.flat.numel(),
        "cpu_seconds": cpu * whole, "clock_seconds": clock * whole, "extrapolated": whole > 1,
        "peak_mib": measure.peak_memory_mib(), "before_mib": before,
    }  # fmt: skip


def one_pair(model: torch.nn.Module, w: Tree, views: Tensor) -> Tensor:
    """The clipped gradient of one similarity, by its own forward and backward pass over two views."""
    with held(model, w.views) as own:
        units = unit(model(views))
        g = torch.cat([t.reshape(-1) for t in torch.autograd.grad(units[0] @ units[1], list(own.values()))])
    return g * (1 / g.norm()).clamp(max=1)


def table(found: list[Answer]) -> str:
    """The measurements as a Markdown table."""
    by = {(one["size"], one["width"], one["way"]): one for one in found}
    header = ["n", "width", "parameters", "Pairs, s", "memory, MiB", "one backward pass, s", "every pair, s", "ratio"]
    rows = []
    for size, width in dict.fromkeys((one["size"], one["width"]) for one in found):
        pairs, plain, direct = (by.get((size, width, way)) for way in ("pairs", "plain", "direct"))
        if pairs is None or plain is None or direct is None:
            continue
        ours, once, every = (one["cpu_seconds"] for one in (pairs, plain, direct))
        rows.append([
            str(size), str(width), f"{pairs['parameters']:,}", f"{ours:.3g}",
            f"{pairs['peak_mib'] - pairs['before_mib']:.0f}", f"{once:.2g}",
            ("≈ " if direct["extrapolated"] else "") + f"{every:.3g}", f"{every / ours:.3g}",
        ])  # fmt: skip
    return "\n".join(tables.markdown(header, rows, "--:"))


def main() -> None:
    """Measure every size and width, print the table and write the measurements as JSON."""
    parser = argparse.ArgumentParser(description="Time Pairs against a backward pass for every pair.")
    parser.add_argument("out", type=Path, help="where the measurements go, as JSON")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="examples in a batch")
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS, help="of the embedding")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    found: list[Answer] = []
    for size, width, way in itertools.product(options.sizes, options.widths, ("pairs", "plain", "direct")):
        request = {"way": way, "size": size, "width": width, "threads": options.threads}
        try:
            found.append(call(trial, request, LIMIT))
        except Gone as why:
            print(f"{request}: {why}")
        options.out.write_text(json.dumps({"cpu": measure.cpu_name(), "measurements": found}, indent=1) + "\n")
    print(f"{measure.cpu_name()}, {options.threads} thread(s); ≈ extrapolated from {SAMPLE} pairs\n")
    print(table(found))


if __name__ == "__main__":
    main()
