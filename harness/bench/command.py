"""`epsbench bench`: what a private step costs, engines side by side, each compared with the naive loop first."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.provenance import measure


def run(options: argparse.Namespace) -> int:
    """Measure what is asked for, print the table, and write it with its figure beside the records."""
    from harness.bench import plan, session, table
    from harness.bench.compare import compare

    chosen = plan.load(options.suite)
    threads = options.threads or measure.cores()
    items = _items(options, chosen)
    names = _engines(options, chosen)
    if options.explain:
        from harness.bench.explain import explained

        print("\n".join(explained(workload, batch, options.device) for workload, batch in items), end="")
        return 0
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
                tuple(names), options.rounds or chosen.bench.rounds, options.seconds or chosen.bench.seconds,
                options.device, threads, options.compiled, out,
            )  # fmt: skip
            records = session.run(items, settings, options.fresh)
        text = table.markdown(records)
        print(text, end="")
        _write(out, session.read(out))
        lines, worse = compare(records, then, options.threshold) if then else ([], False)
    except ValueError as error:
        options.error(str(error))
    print("\n".join(["", *lines]) if lines else "", end="\n" if lines else "")
    return 1 if worse or _wrong(records) else 0


def _items(options: Any, chosen: Any) -> list[tuple[Any, int]]:
    """Workloads and batches to measure."""
    from harness.registry import did_you_mean

    known = {workload.name: workload for workload in chosen.workloads}
    for name in options.workloads or ():
        if name not in known:
            near = did_you_mean(name, known)
            options.error(
                f"{chosen.file} has no workload {name!r}; it has {', '.join(known)}."
                + (f' Did you mean "{near}"?' if near else "")
            )
    items = []
    for workload in [known[name] for name in dict.fromkeys(options.workloads or known)]:
        wanted = [str(workload.default)] if options.batches is None else options.batches
        items += [(workload, batch) for batch in workload.batches if str(batch) in wanted or "all" in wanted]
    if not items:
        options.error(f"--batches {' '.join(options.batches)}: none of these workloads has such a batch")
    return items


def _engines(options: Any, chosen: Any) -> list[str]:
    from harness.bench import engines
    from harness.registry import did_you_mean

    for name in options.engines or ():
        if reason := engines.unknown(name):
            near = did_you_mean(name, engines.names())
            options.error(reason + (f' Did you mean "{near}"?' if near else ""))
    return list(dict.fromkeys(options.engines or chosen.bench.engines))


def _write(out: Path, records: Sequence[Any]) -> None:
    """Table and figure of all records of a folder, beside them."""
    from harness.bench import figure, table
    from harness.records.files import replace_file

    replace_file(out / "table.md", table.markdown(records).encode())
    replace_file(out / "figure.svg", figure.draw(records).encode())
    print(f"wrote {out}/table.md and {out}/figure.svg", file=sys.stderr)


def _wrong(records: Sequence[Any]) -> bool:
    """Whether the plain step failed, or an engine that is no peer's is wrong."""
    from harness.bench.engines import peers
    from harness.bench.table import BASE, median

    theirs = peers()
    wrong = (r["name"] not in theirs for one in records for r in one["engines"] if r["status"] == "wrong")
    return any(wrong) or any(median(one, BASE) is None for one in records)
