"""Makes the page of a suite: one self-contained file that sends no request, with nothing of a record as markup.

Jinja escapes every value; what the script shows it puts in as text. The page's policy (`Content-Security-Policy`) lets
only its own script run, by its hash, and forbids every fetch, so a file opened from a mail attachment is as harmless as
a printed page.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections import defaultdict
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

from harness.report.model.fields import natural
from harness.report.model.statistics import RULE
from harness.report.model.tables import Board, RankedTable, TableRow
from harness.report.model.words import epsilon, half, percent
from harness.report.page import drawings
from harness.report.page.payload import COLUMNS, FIELDS, Content, Heading, dumps, payload
from harness.report.text import VERDICTS, measure, measured, outcome

if TYPE_CHECKING:
    from jinja2 import Environment

HERE = Path(__file__).parent
MARK = '<meta name="epsbench-inputs" content="'
"""What stands before the digest in the head of a page."""
_ORDER = ("suite", "task", "target")


@cache
def environment() -> Environment:
    """Jinja over this folder, escaping everything; unknown names are errors."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    made.globals |= {
        "shell": _shell,
        "address": address,
        "epsilon": epsilon,
        "percent": percent,
        "half": half,
        "measure": measure,
        "measured": measured,
        "outcome": outcome,
    }
    made.filters["doc"] = paragraphs
    return made


@cache
def _shell(*names: str) -> dict[str, str]:
    """Style, script and the script's hash of a page that is made of the files `names`."""
    read = {n: (HERE / n).read_text("utf-8") for n in names}
    script = "".join(text for n, text in read.items() if n.endswith(".js"))
    return {
        "style": "".join(text for n, text in read.items() if n.endswith(".css")),
        "script": script,
        "hash": base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode(),
    }


def paragraphs(text: str) -> list[str]:
    """A docstring as paragraphs of plain text. Lines are joined, but for those of an indented block or a list."""
    found = [p for p in re.split(r"\n\s*\n", text) if p.strip()]
    return [p if re.search(r"^(\s|[-*] )", p, re.M) else " ".join(p.split()) for p in found]


def address(text: str) -> str:
    """The web address that `text` stands for, of a paper's id, a DOI, or an address itself; else empty."""
    if found := re.match(r"arxiv:\s*([\w.\-/]+)", text, re.I):
        return f"https://arxiv.org/abs/{found[1]}"
    if found := re.match(r"doi:\s*(10\.\S+)", text, re.I):
        return f"https://doi.org/{quote(found[1])}"
    return text if re.match(r"https?://[^\s\"'<>]+$", text) else ""


def page(content: Content, digest: str = "") -> str:
    """The page of a suite. `digest` is kept in the head."""
    board, data = content.board, payload(content)
    return (
        environment()
        .get_template("page.html")
        .render(
            board=board,
            content=content,
            digest=digest,
            data=dumps(data),
            rule=RULE,
            verdict_rule=VERDICTS,
            columns=columns(data),
            overviews=_overviews(board),
            drawings=drawings.of(board),
            methods=sorted(content.methods.items(), key=lambda method: natural(method[0])),
            failed=sum(r.status != "ok" for r in board.runs),
        )
    )


def columns(data: Mapping[str, Any]) -> list[Heading]:
    """The columns in which some row has something to show. The suite's and the setting's come first."""
    filled = {name for i, name in enumerate(FIELDS) if any(r[i] not in (None, "") for r in data["rows"])}
    if "claim" in filled:
        filled.add("claimed")
    if len({t["suite"] for t in data["tables"]}) > 1:
        filled.add("suite")
    return [c for c in COLUMNS if c.key in filled or c.key in _ORDER[1:]]


def _overviews(board: Board) -> list[dict[str, Any]]:
    """Accuracy of every method at every epsilon, one grid for each task, split and kind of device."""
    groups: dict[tuple[str, str, str, str], list[RankedTable]] = defaultdict(list)
    for table in board.results or board.tables:
        groups[table.setting.task, table.setting.digest, table.setting.split, table.kind].append(table)
    out: list[dict[str, Any]] = []
    kinds = {kind for *_, kind in groups}
    for (task, _, split, kind), tables in groups.items():
        grid: dict[str, dict[int, TableRow]] = defaultdict(dict)
        references: dict[str, TableRow] = {}
        for i, table in enumerate(tables):
            for entry in table.entries:
                grid[entry.row.title][i] = entry
            references |= {e.row.title: e for e in table.references}
        if len(grid) > 60 or len(out) >= 12:
            continue
        lines = [
            (title, [cells.get(i) for i in range(len(tables))])
            for title, cells in sorted(grid.items(), key=lambda g: natural(g[0]))
        ]
        known = {title: [e.row.accuracy.mean for e in line if e and e.row.accuracy] for title, line in lines}
        lines.sort(key=lambda line: -fmean(known[line[0]]) if known[line[0]] else 1.0)
        heads = [epsilon(t.setting.epsilon) for t in tables]
        out.append({
            "title": ", ".join([task, f"{split} split", *([kind] if len(kinds) > 1 else [])]),
            "epsilons": [(e, "#?" + urlencode({"task": task, "epsilon": e})) for e in heads],
            "lines": lines,
            "references": sorted(references.items()),
        })  # fmt: skip
    return out
