"""Writes every table of a report in four forms, for papers and programs: Markdown, CSV, LaTeX and JSON.

``tables/<task>-eps-<epsilon>.md .csv .tex .json``, and ``tables/published.*``. The CSV and the JSON have full precision
and the same columns. In JSON a number is a number, with its unit in ``columns``. An unknown value is left out of its
row, and an infinite one is null, as in a record. The LaTeX needs the package booktabs and nothing else.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from harness.report import text
from harness.report.model.tables import Board, RankedTable, heading, statement

__all__ = ["UNITS", "files", "tex"]

FOLDER = "tables"
SUFFIXES = (".md", ".csv", ".tex", ".json")
UNITS: Mapping[str, str] = {
    "delta": "probability", "rank_shared": "0 or 1", "batch": "examples", "steps": "steps", "rank": "place",
    **dict.fromkeys(("accuracy_mean", "accuracy_low", "accuracy_high"), "fraction"),
    **dict.fromkeys(("difference_mean", "difference_low", "difference_high"), "fraction"),
    **dict.fromkeys(("accuracy_n", "difference_n", "measured_n"), "seeds"),
    **dict.fromkeys(("target_epsilon", "epsilon", "epsilon_planned_pld", "epsilon_planned_rdp"), "epsilon"),
    **dict.fromkeys(("epsilon_spent", "epsilon_spent_pld", "epsilon_spent_rdp", "epsilon_claimed"), "epsilon"),
    "noise_multiplier": "standard deviations per sensitivity", "examples_per_second": "1/s",
    "rate_to_non_private": "ratio", "rate_to_dp_sgd": "ratio", "peak_memory_mib": "MiB", "train_seconds": "s",
    "stale_runs": "runs", "merged_runs": "runs", "busy_runs": "runs",
    **dict.fromkeys(("published", "measured_mean", "measured_low", "measured_high", "difference"), "that of metric"),
}  # fmt: skip
"""Unit of each column of numbers; every other column is text."""

TEX = ("rank", "method", "accuracy", "difference", "spent", "sigma", "rate", "memory")
"""The columns of a table in LaTeX; the number of seeds is beside them."""

_Row = Mapping[str, text.Field]


def files(board: Board) -> dict[str, str]:
    """The content of every file by its path below the report's folder. They depend on the board alone."""
    found: dict[str, str] = {}
    for table in board.tables:
        name = _name(table, found)
        notes = [*table.unranked, *table.notes]
        facts = {
            "suite": board.suite, "table": heading(table), "statement": statement(table),
            "search": table.search, "notes": notes,
        }  # fmt: skip
        search = "Hyper-parameter search, not a result: " if table.search else ""
        caption = f"{search}{heading(table)} ({', '.join(statement(table))}). {text.LEGEND}"
        titles = [*text.titles(table, TEX), "seeds"]
        lines = [[*map(text.cells(e).__getitem__, TEX), str(len(e.row.scores))] for e in table.every]
        latex = _tex(titles, lines, "llrrrrrrr", caption, name, notes)
        rows = [text.csv_row(table, entry) for entry in table.every]
        found |= _forms(name, "\n".join(text.markdown_table(table)), text.csv_text(rows), latex, facts, rows)
    return found | (_published(board) if board.published else {})


def _forms(
    name: str, markdown: str, table: str, latex: str, facts: Mapping[str, Any], rows: Sequence[_Row]
) -> dict[str, str]:
    """The four forms of one table by path."""
    forms = (markdown, table, latex, _json(facts, rows))
    return {f"{FOLDER}/{name}{suffix}": form for suffix, form in zip(SUFFIXES, forms, strict=True)}


def _name(table: RankedTable, taken: Mapping[str, str]) -> str:
    """A name that says which table this is, and stays when others come or go."""
    s = table.setting
    words = f"{s.task}-eps-{'inf' if math.isinf(s.epsilon) else f'{s.epsilon:g}'}"
    words += "-search" if table.search else ""
    stem = re.sub(r"[^a-z0-9.]+", "-", words.lower()).strip("-.")[:80] or "table"
    name, number = stem, 1
    while f"{FOLDER}/{name}.md" in taken or name == "published":
        number += 1
        name = f"{stem}-{number}"
    return name


def _published(board: Board) -> dict[str, str]:
    """The table of published values beside measured ones."""
    titles = ("method", "task", "ε", "metric", "published", "measured", "verdict", "source")
    cells = [text.verdict_cells(v)[: len(titles)] for v in board.published]
    markdown = ["## Published and measured", "", text.VERDICTS, ""]
    markdown += text.grid(titles, cells)
    caption = f"Published and measured values, {board.suite}."
    latex = _tex(titles, cells, "lllllllp{4cm}", caption, "published", [text.VERDICTS])
    facts = {"suite": board.suite, "table": "published and measured", "notes": [text.VERDICTS]}
    values = map(text.published_row, board.published)
    rows = [{name: float(one) if isinstance(one, int) else one for name, one in row.items()} for row in values]
    return _forms("published", "\n".join(markdown), text.published_csv(board), latex, facts, rows)


# JSON -----------------------------------------------------------------------------------------------------


def _json(facts: Mapping[str, Any], rows: Sequence[_Row]) -> str:
    columns = [
        {"name": name, "type": "number", "unit": UNITS[name]} if name in UNITS else {"name": name, "type": "text"}
        for name in (rows[0] if rows else ())
    ]
    known = [
        {name: None if value in (math.inf, -math.inf) else value for name, value in row.items() if _known(value)}
        for row in rows
    ]
    shown = {**facts, "columns": columns, "rows": known}
    return json.dumps(shown, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _known(value: text.Field) -> bool:
    return value not in (None, "") and not (isinstance(value, float) and math.isnan(value))


# LaTeX ----------------------------------------------------------------------------------------------------

_TEX: Mapping[str, str] = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "`": r"\textasciigrave{}", '"': "{''}",
    "[": "{[}", "]": "{]}", "*": "{*}",  # after \\ they would be its argument
    "ε": r"$\varepsilon$", "δ": r"$\delta$", "σ": r"$\sigma$", "Δ": r"$\Delta$", "−": "$-$", "±": r"$\pm$",
    "×": r"$\times$", "∞": r"$\infty$", "≥": r"$\ge$", "≤": r"$\le$", "–": "--", "…": r"\ldots{}", "·": r"$\cdot$",
    "†": r"\dag{}", "²": r"\textsuperscript{2}", "ℓ": r"$\ell$", "’": "'",
}  # fmt: skip
_LETTERS = frozenset(map(chr, range(0xC0, 0x100))) - frozenset("×÷ÐðÞþ")  # what every engine has


def tex(words: str) -> str:
    """`words` as LaTeX text in which nothing is markup; a character that a plain document lacks as ``[U+4E2D]``."""
    shown = (
        _TEX.get(c) or (c if " " <= c <= "~" or c in _LETTERS else f"{{[}}U+{ord(c):04X}{{]}}")
        for c in " ".join(words.split())
    )
    return re.sub(r"(?<=-)-", "{}-", "".join(one if one != "--" else "\0" for one in shown)).replace("\0", "--")


def _tex(
    titles: Sequence[str], lines: Iterable[Sequence[str]], columns: str, caption: str, label: str, notes: Sequence[str]
) -> str:
    """A floating table of booktabs; every text is escaped here."""
    out = [
        r"% needs \usepackage{booktabs}", r"\begin{table}", r"\centering", r"\small", rf"\caption{{{tex(caption)}}}",
        rf"\label{{tab:{label}}}", rf"\begin{{tabular}}{{{columns}}}", r"\toprule",
        " & ".join(map(tex, titles)) + r" \\", r"\midrule",
        *(" & ".join(map(tex, line)) + r" \\" for line in lines),
        r"\bottomrule", r"\end{tabular}",
        *(rf"\par\smallskip\footnotesize {tex(note)}" for note in notes), r"\end{table}",
    ]  # fmt: skip
    return "\n".join(out) + "\n"
