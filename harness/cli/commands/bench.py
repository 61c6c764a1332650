"""Time engines side by side, each compared with the naive loop first, and the share of a step outside them.

epsbench bench                                    every workload at its own batch, every engine: under 20 minutes
epsbench bench --workloads w1 w3 --batches all    these two, at each of their batches
epsbench bench --engines bookkeeping loop         these engines; my_module:MyEngine names one of yours
epsbench bench --report                           table and figure again, from the records there are
epsbench bench --compare results/throughput/F     and exit code 1 where an engine got slower than there
epsbench bench --explain --workloads w4           the engine's way to each parameter's norm
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.cli import words
from harness.cli.arguments import device, positive
from harness.cli.errors import FAILED, OK, hint
from harness.cli.selecting import need_device

PLACE = 120


def arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--workloads", nargs="+", metavar="NAME", help="as in the suite: w1 ... (default: all)")
    add("--batches", nargs="+", metavar="N|all", help="batches of the suite (default: each workload's own)")
    add("--engines", nargs="+", metavar="NAME", help="engines to time, the most important first (default: the suite's)")
    add("--device", type=device, default="cpu", metavar="cpu|cuda:N", help="where to time (default: cpu)")
    add("--threads", type=positive, help="CPU threads (default: all cores)")
    add("--rounds", type=positive, help="the most timed calls of an engine (default: the suite's)")
    add("--seconds", type=positive, help="about what one workload and batch takes (default: the suite's)")
    add("--compiled", action="store_true", help="time the plain step under torch.compile too")
    add("--fresh", action="store_true", help="begin anew where an earlier bench was stopped")
    add("--report", action="store_true", help="measure nothing; table and figure from the records there are")
    add("--compare", type=Path, metavar="FILE|FOLDER", help="records of an earlier bench to compare with")
    add("--threshold", type=float, default=1.1, help="slower by more than this factor is worse (default: 1.1)")
    add("--explain", action="store_true", help="print the engine's choice for each parameter, and its estimates")
    add("--out", type=Path, metavar="FOLDER", help="default: results/throughput/<fingerprint of the device>")
    add("--suite", type=Path, default=Path("suites/throughput.toml"), metavar="FILE", help="what to time")


def run(options: argparse.Namespace) -> int:
    """Measure what is asked for, print the table, and write it with its figure beside the records; the exit code."""
    from harness.bench import engines, plan, session, table
    from harness.provenance import measure

    need_device(options.device)
    chosen = plan.load(options.suite)
    threads = options.threads or measure.cores()
    items = _items(options, chosen)
    for name in options.engines or ():
        if reason := engines.unknown(name):
            options.error(reason + hint(name, engines.names()))
    if options.explain:
        from harness.bench.steps import explained

        for workload, batch in items:
            print(f"{workload.name} {workload.title}, batch {batch}")
            print(words.table(explained(workload, batch, options.device)), end="\n\n")
        return OK
    if options.device == "cpu" and threads > measure.cores():
        options.error(f"--threads {threads}: this process may use {measure.cores()} cores")
    fingerprint = measure.device_info(options.device, threads)["fingerprint"]
    out = options.out or Path("results/throughput") / fingerprint
    try:
        then = session.read(options.compare) if options.compare else []
        if options.report:
            asked = {(workload.name, batch) for workload, batch in items}
            narrowed = options.workloads or options.batches
            records = [r for r in session.read(out) if not narrowed or (r["workload"]["name"], r["batch"]) in asked]
        else:
            settings = session.Settings(
                tuple(dict.fromkeys(options.engines or chosen.bench.engines)),
                options.rounds or chosen.bench.rounds, options.seconds or chosen.bench.seconds,
                options.device, threads, options.compiled, out,
            )  # fmt: skip
            records = session.run(items, settings, options.fresh)
        text = table.markdown(records)
        print(text, end="")
        _write(out, session.read(out))
        lines, worse = table.compare(records, then, options.threshold) if then else ([], False)
    except ValueError as error:
        options.error(str(error))
    print("\n".join(["", *lines]) if lines else "", end="\n" if lines else "")
    return FAILED if worse or _wrong(records) else OK


def _items(options: Any, chosen: Any) -> list[tuple[Any, int]]:
    """Workloads and batches to measure."""
    known = {workload.name: workload for workload in chosen.workloads}
    for name in options.workloads or ():
        if name not in known:
            options.error(f"{chosen.file} has no workload {name!r}; it has {', '.join(known)}.{hint(name, known)}")
    items = []
    for workload in [known[name] for name in dict.fromkeys(options.workloads or known)]:
        wanted = [str(workload.default)] if options.batches is None else options.batches
        items += [(workload, batch) for batch in workload.batches if str(batch) in wanted or "all" in wanted]
    if not items:
        options.error(f"--batches {' '.join(options.batches)}: none of these workloads has such a batch")
    return items


def _write(out: Path, records: Sequence[Any]) -> None:
    """Table and figure of all records of a folder, beside them."""
    from harness.bench import table
    from harness.records.files import replace_file

    replace_file(out / "table.md", table.markdown(records).encode())
    replace_file(out / "figure.svg", table.draw(records).encode())
    print(f"wrote {out}/table.md and {out}/figure.svg", file=sys.stderr)


def _wrong(records: Sequence[Any]) -> bool:
    """Whether the plain step failed, or an engine that is no peer's is wrong."""
    from harness.bench.engines import peers
    from harness.bench.table import BASE, median

    theirs = peers()
    wrong = (r["name"] not in theirs for one in records for r in one["engines"] if r["status"] == "wrong")
    return any(wrong) or any(median(one, BASE) is None for one in records)
