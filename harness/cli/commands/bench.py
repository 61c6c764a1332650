"""``bench``: what a private step costs, engines side by side."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from harness.cli.command import Command


def arguments(parser: argparse.ArgumentParser) -> None:
    """What it takes."""
    add = parser.add_argument
    add("--workloads", nargs="+", metavar="NAME", help="as in the suite: w1 ... (default: all)")
    add("--batches", nargs="+", metavar="N|all", help="batches of the suite (default: each workload's own)")
    add(
        "--engines",
        nargs="+",
        metavar="NAME",
        help="engines to time, the most important first (default: the suite's)",
    )
    add("--device", type=_device, default="cpu", metavar="cpu|cuda:N", help="where to time (default: cpu)")
    add("--threads", type=_count, help="CPU threads (default: all cores)")
    add("--rounds", type=_count, help="the most timed calls of an engine (default: the suite's)")
    add("--seconds", type=_count, help="about what one workload and batch takes (default: the suite's)")
    add("--compiled", action="store_true", help="time the plain step under torch.compile too")
    add("--fresh", action="store_true", help="begin anew where an earlier bench was stopped")
    add("--report", action="store_true", help="measure nothing; table and figure from the records there are")
    add("--compare", type=Path, metavar="FILE|FOLDER", help="records of an earlier bench to compare with")
    add("--threshold", type=float, default=1.1, help="slower by more than this factor is worse (default: 1.1)")
    add(
        "--explain",
        action="store_true",
        help="print the engine's choice for each parameter, and its estimates",
    )
    add("--out", type=Path, metavar="FOLDER", help="default: results/throughput/<fingerprint of the device>")
    add("--suite", type=Path, default=Path("suites/throughput.toml"), metavar="FILE", help="what to time")


def _count(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 1_000_000:
        raise argparse.ArgumentTypeError(f"{text!r} should be a whole number, 1 or more")
    return int(text)


def _device(text: str) -> str:
    import torch

    if not re.fullmatch(r"cpu|cuda:\d+", text):
        raise argparse.ArgumentTypeError(f'"{text}" should be cpu or cuda:N, as in cuda:0')
    if text != "cpu" and int(text[5:]) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"{text}: PyTorch sees {torch.cuda.device_count()} CUDA devices here")
    return text


def bench(options: argparse.Namespace) -> int:
    """Measure what is asked for; the exit code: 1 where an engine is wrong, or slower than --compare allows."""
    from harness.bench import command

    return command.run(options)


COMMAND = Command(
    "bench",
    120,
    "Time engines side by side, each compared with the naive loop first, and the share of a step outside them.",
    """
    epsbench bench                                    every workload at its own batch, every engine: under 20 minutes
    epsbench bench --workloads w1 w3 --batches all    these two, at each of their batches
    epsbench bench --engines bookkeeping loop         these engines; my_module:MyEngine names one of yours
    epsbench bench --report                           table and figure again, from the records there are
    epsbench bench --compare results/throughput/F     and exit code 1 where an engine got slower than there
    epsbench bench --explain --workloads w4           the engine's way to each parameter's norm
    """,
    arguments,
    bench,
)
