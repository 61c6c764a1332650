"""Show one record, and the command that makes it again.

epsbench show 3f2a
epsbench show 3f2a --json | jq .privacy
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.cli.arguments import options
from harness.cli.errors import OK, UserError
from harness.cli.selecting import suite_file
from harness.cli.words import epsilon, number, table
from harness.records.files import dumps

if TYPE_CHECKING:
    from harness.records import store

PLACE = 60
PRIVATE = "private, not for publication"
# What of `measured` and of `diagnostics` has a line of its own.
ROWS = frozenset({"jobs", "sessions", "examples_per_second", "train_seconds", "wall_seconds", "peak_memory_mib"})


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", metavar="ID", help="the first digits of a run's id; id.2 names its second attempt")
    parser.add_argument("--json", action="store_true", help="print the record as it is")
    options(parser, "--results")


def run(options: argparse.Namespace) -> int:
    """Print one record; the exit code."""
    from harness import registry
    from harness.records import origin, public, store
    from harness.records.field import Private
    from harness.records.record import Diagnostics, Measured
    from harness.records.schema import names
    from harness.records.stages import stage_facts
    from harness.report.model import runs as read
    from harness.report.model import words
    from harness.running import progress

    record, others = _one_record(options.results, options.id)
    if options.json:
        print(dumps(store.written(record)), end="")
        return OK
    cell, privacy, measured = record["cell"], record["privacy"], record["measured"]
    private = public.diagnostics(record)
    code, device = record["code"], record["device"]
    target, task, pairs = cell["privacy"], cell["task"], _pairs
    rows = [["id", f"{record['id']}, group {record['group']}, suite {record['suite']}"]]

    def row(name: str, *parts: Any) -> None:
        rows.append([name, "; ".join(str(part) for part in parts if part not in (None, "")) or "-"])

    row("status", record["status"], record.get("reason"))
    row("record", record["path"])
    for line in origin.words(record.get("origin")):
        row("origin", line)
    method, given = cell["method"], cell["method"].get("with") or {}
    own = {name: value for name, value in (method.get("parameters") or {}).items() if name not in given}
    stages = stage_facts(record)
    if not stages:
        row("method", f"{method['name']}({pairs(own, 6)})")
    if given:  # a parameter of the same name was for the part that this one replaces
        row("with", *(f"{slot}: {spec}" for slot, spec in given.items()))
    if not stages:
        row("parts", *(f"{slot} {_part(part)}" for slot, part in (method.get("parts") or {}).items()))
    for nth, stage in enumerate(stages, 1):
        rows += _stage_rows(nth, stage, given if nth == 1 else {})
    row("card", *(record.get("card") or {}).values())
    row("task", task["name"], f"data {task.get('digest')}", f"evaluated on {task.get('evaluate')}")
    schedule = "of each stage" if stages else pairs(cell["schedule"], 8)
    row("schedule", schedule, cell["numerics"].get("dtype"), f"seed {cell['seed']}")
    if target.get("epsilon") is None:
        row("target", "no privacy")
    else:
        row("target", f"epsilon {epsilon(target['epsilon'])}, delta {target['delta']}", target["relation"])
    row(
        "mechanism",
        "" if stages else privacy.get("sampling"),
        f"noise multiplier {number(privacy.get('noise_multiplier'), 6)}",
        "sampling and sensitivity of each stage" if stages else f"sensitivity {pairs(privacy.get('sensitivity'))}",
        f"public data: {privacy.get('public_data') or '-'}",
    )
    seen = read.read([record])[0]
    spent = words.by_accountant(seen.spent, seen.refused) or words.epsilon(seen.epsilon)
    row("planned", words.by_accountant(seen.planned, seen.refused))
    row("spent", spent, privacy.get("accountant") and f"{privacy['accountant']} ranks")
    if seen.refused:
        row("", words.refusals(seen.refused))
    claim = privacy.get("claimed") or {}
    row("claimed", pairs({"epsilon": claim.get("epsilon")} if claim else None), claim.get("source"))
    rows += [["", line] for line in _assumptions(claim)]
    row("metrics", pairs(record["metrics"]), "after the last stage" if stages and record["metrics"] else None)
    speed = "of each stage" if stages else _speed(private.get("examples_per_second") or {})
    row("speed", speed, f"{measured.get('jobs')} at once")
    if private.get("wall_seconds") is not None:
        row("time", progress.duration(private["wall_seconds"]), f"{measured.get('sessions') or 1} session(s)")
    row("memory", f"{number(private.get('peak_memory_mib'), 5)} MiB at the peak")
    row("device", device.get("name"), device.get("spec"), f"{device.get('threads')} threads")
    used = [name for name in names(Measured, Private) if name in measured and name not in ROWS]
    row("used", pairs({name: measured[name] for name in used}))
    if not stages:
        rest = [name for name in names(Diagnostics) if name in private and name not in ROWS]
        row("diagnostics", pairs({name: private[name] for name in rest}), PRIVATE)
    row("code", code.get("hash"), f"commit {code.get('commit')}" + (" with changes" if code.get("dirty") else ""))
    row("weights", record.get("weights_sha256"))
    row("ran", f"{record.get('started')} to {record.get('finished')}")
    print(progress.describe(cell))
    print(table(rows, indent="  "))
    for other in others:
        print(f"  another attempt: {other['path']}: {other['status']}")
    print("\nto make it again:")
    file, reduced = suite_file(record["suite"])
    entry = registry.index("method").get(method["name"])
    for line in words.recipe(seen, str(file or ""), reduced, entry is not None and bool(entry.module)):
        print(f"  {line}")
    return OK


def _stage_rows(nth: int, stage: Mapping[str, Any], given: Mapping[str, Any]) -> list[list[str]]:
    """The lines of one stage of `stage_facts`; what its record lacks is shown as not recorded."""
    own = {name: value for name, value in (stage["parameters"] or {}).items() if name not in given}
    public = stage["public"]
    unknown = "not recorded" if stage["non_finite"] is None else "-"  # an older record, or a stage not begun

    def known(name: str, shown: Callable[[Any], str] = str) -> str:
        value = stage[name]
        return unknown if value is None or value == {} else shown(value)

    lines = [
        [f"{stage['method']}({_pairs(own, 6)})", f"trains {known('trains')}",
         f"on {stage['data']}, {'public' if public else 'private'} data"],
        [f"{slot} {_part(part)}" for slot, part in (stage["parts"] or {}).items()],
        [f"batch {known('batch')}, {known('steps')} steps, {known('epochs', number)} epochs"],
        [f"sampling {known('sampling')}", "" if public else f"relation {known('relation')}",
         f"sensitivity {'none, the data are public' if public else known('sensitivity', _pairs)}",
         stage["sensitivity_note"]],
        [f"spent by its end {known('spent', _pairs)}", stage["accountant"] and f"{stage['accountant']} ranks"],
        [f"speed {known('examples_per_second', _speed)}",
         f"training {known('train_seconds', lambda one: number(one) + ' s')}",
         f"engine {known('engine')}"],
        [*(f"{name} {known(name, lambda one: _shown(one, 4))}"
           for name in ("train_loss", "clipped_fraction", "non_finite")), PRIVATE],
    ]  # fmt: skip
    texts = ["; ".join(str(part) for part in line if part not in (None, "")) for line in lines]
    return [["" if i else f"stage {nth}", text] for i, text in enumerate(texts) if text]


def _speed(rate: Mapping[str, Any]) -> str:
    median, low, high = (number(rate.get(key), 5) for key in ("median", "q1", "q3"))
    return f"{median} examples/s, quartiles {low} to {high}"


def _pairs(values: Mapping[str, Any] | None, digits: int = 4) -> str:
    return ", ".join(f"{k} {_shown(v, digits)}" for k, v in (values or {}).items()) or "-"


def _part(part: Any) -> str:
    """A part of a method as it would be written, with the fields that are set: ``SGD(lr=0.5)``."""
    if not isinstance(part, dict):
        return str(part)
    inner = ((name, _part(value)) for name, value in part.items() if name != "type" and value is not None)
    return f"{part.get('type', '')}({', '.join(f'{name}={value}' for name, value in inner)})"


def _assumptions(claim: Mapping[str, Any]) -> list[str]:
    """What a claim rests on, one line each: what holds, what fails and why, what a run cannot decide."""
    found = [one for one in claim.get("assumptions") or () if isinstance(one, dict)]
    if not found:
        return [f"fails: {text}" for text in claim.get("failed", ())]
    lines = []
    for one in found:
        holds = one.get("holds")
        word = ("holds" if holds else "fails") if isinstance(holds, bool) else "not checked"
        lines.append(f"{word}: {one.get('text')}" + (f" ({one['why']})" if one.get("why") else ""))
    return lines


def _shown(value: Any, digits: int) -> str:
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return "-" if value is None else str(value)
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def _one_record(results: Path, wanted: str) -> tuple[store.Record, list[store.Record]]:
    """The record that an id's first digits name, and the other attempts at the same cell."""
    from harness.records import store

    where, _, name = wanted.rpartition("/")
    prefix, _, attempt = name.partition(".")
    if not re.fullmatch(r"[0-9a-f]{1,12}", prefix) or (attempt and not attempt.isdigit()):
        raise UserError(f"{wanted}: not an id; write the first of its 12 hex digits (epsbench plan SUITE lists them).")
    records = store.load(results)
    found = [r for r in records if r["id"].startswith(prefix) and where in ("", r["suite"])]
    names = {(record["suite"], record["id"]) for record in found}
    if not found:
        broken = [str(one) for one in records.broken if one.path.parent.name.startswith(prefix)]
        raise UserError(
            f"{wanted}: no record under {results} has this id; epsbench plan SUITE lists ids."
            + "".join(f"\nThere is a broken one: {text}" for text in broken)
        )
    if len(names) > 1:
        there = "\n".join(f"  {id}  ({suite})" for suite, id in sorted(names))
        ids = {id for _, id in names}
        rest = "write more digits" if len(ids) > 1 else "write SUITE/ID"
        raise UserError(f"{wanted}: {len(names)} records begin so; {rest}:\n{there}")
    if shared := store.crowded(found):
        there = "\n".join(f"  {one}" for one in shared)
        raise UserError(f"{wanted}: there are runs of two cells with the same id, and neither is shown:\n{there}")
    chosen = store.current(found)[0]
    if attempt:
        numbered = [record for record in found if store.attempt_of(record) == int(attempt)]
        if not numbered:
            raise UserError(f"{wanted}: no such attempt; there are {len(found)}.")
        chosen = numbered[0]
    return chosen, [record for record in found if record["path"] != chosen["path"]]
