"""Works out today's code of cells and of records; a record of other code is stale."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.records import store
    from harness.records.cell import Cell


def codes_of_cells(cells: Iterable[Cell]) -> dict[str, dict[str, Any]]:
    """Today's code of each cell, by id; worked out once for each method and model."""
    from harness.running.plan import code_of

    known: dict[str, dict[str, Any]] = {}
    codes: dict[str, dict[str, Any]] = {}
    for cell in cells:
        key = json.dumps([
            cell.method, cell.parameters, cell.changes, cell.task["architecture"]["name"], cell.method_files,
            cell.then.get("name"), cell.then.get("parameters"), cell.then.get("trains"),
        ])  # fmt: skip
        if key not in known:
            known[key] = code_of(cell)
        codes[cell.id] = known[key]
    return codes


def codes_of_records(records: Iterable[store.Record]) -> dict[str, Mapping[str, Any] | str]:
    """Today's code of each record's cell by id, or why it cannot be known."""
    from harness.records import store

    found: dict[str, Mapping[str, Any] | str] = {}
    known: dict[str, Mapping[str, Any] | str] = {}
    for record in records:
        try:
            cell = store.cell_of(record)
        except (KeyError, TypeError, ValueError):
            found[record["id"]] = "its cell is incomplete"
            continue
        # Where today's method makes other parts of the same parameters, its file has changed, and so the code.
        types = re.findall(r'"type": "(\w+)"', json.dumps([cell.parts, cell.then]))
        key = json.dumps([cell.method, types, cell.then.get("name"), cell.task.get("architecture")])
        if key not in known:
            try:
                known[key] = next(iter(codes_of_cells([cell]).values()))
            except Exception as error:  # a record from elsewhere may name anything, built by any code
                line = (str(error).splitlines() or [""])[0][:200]
                known[key] = f"its method cannot be built here: {line or type(error).__name__}"
        found[record["id"]] = known[key]
    return found
