"""Writes the report of a suite from its records: self-contained pages, Markdown, CSV and figures.

>>> from harness import report
>>> report.build("core", question, records, Path("reports")).top        # doctest: +SKIP
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from harness.records import public
from harness.report import export, text
from harness.report.model.fields import RecordLike, canonical, record_path
from harness.report.model.tables import Board, board

__all__ = ["Board", "Report", "board", "build", "overview"]

FILES = (
    "leaderboard.md",
    "leaderboard.csv",
    "published.csv",
    "accuracy-vs-epsilon.svg",
    "throughput.svg",
    "memory.svg",
    "pareto.svg",
    "training-curves.svg",
    "clipped-fraction.svg",
    "index.html",
)
POINT = ("stage", "step", "seconds", "accuracy", "loss", "epsilon", "clipped_fraction")
"""What is read of a log point."""
MOST_BYTES = 4 * 2**20
"""A larger trace is not read: runs write about 20 points."""
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Report:
    """A report on disk: where it is, whether this call wrote it, and its top rows as text for a terminal."""

    folder: Path
    written: bool
    top: str

    @property
    def index(self) -> Path:
        """The page to open."""
        return self.folder / "index.html"


def build(
    suite_name: str,
    question: str,
    records: Iterable[RecordLike],
    out: Path,
    *,
    published: Iterable[Mapping[str, Any]] = (),
    tuning: Mapping[str, Any] | None = None,
    reduced: str | None = None,
    quarantine: Iterable[tuple[str, str]] = (),
    results: Path | None = None,
    audits: Iterable[Mapping[str, Any]] = (),
    checks: Iterable[Mapping[str, Any]] = (),
    sources: Mapping[str, Any] | None = None,
    file: str = "",
    left_out: str = "",
    private: bool = False,
) -> Report:
    """Write the report of one suite into ``out/<suite_name>/`` and return where it is.

    `records` are record dicts, best those of `harness.records.store.current`, with the computed keys ``path`` (a path
    that ends in ``<suite>/<id>/record.json``; links lead to that file under `results`, by default the folder
    ``results`` beside `out`) and ``stale``. `published` rows have the keys method, task, epsilon (null:
    infinite), metric, value, source, note, accountant (of the published epsilon, if known). `tuning` says how
    hyper-parameters were chosen. `reduced` says why these are runs of the suite's reduced profile, None where they are
    not; nothing that is published is compared with those. `quarantine` are the files that hold no valid record, each
    with the reason; they are named and nothing else. `audits` are what `harness.records.audits` holds, shown beside the
    rows of the same method and epsilon; `checks` are those of `harness.records.checks.latest`. `sources` is what
    `sources.describe` says of the methods, for their cards. `file` is the suite's file, for the command that repeats a
    run. `left_out` says which records of the suite are not among `records`, and why.

    Of a record and its trace only what may be published is shown (`harness.records.public`), unless `private`.

    Each record's trace is read from ``trace.jsonl`` beside it, unless the record has a key ``trace`` (its points).
    Every row has a page in ``runs/``, every method one in ``methods/``; pages there that are no longer of a row or a
    method are removed.

    The files depend on the arguments and on this package only: the order of the records, the time and the
    machine do not matter, and a report that is already there for the same arguments is left alone.

    Raises ValueError if `suite_name` cannot name a folder.
    """
    if not suite_name or suite_name in (".", "..") or any(c in suite_name for c in "/\\\0"):
        raise ValueError(f"suite name {suite_name!r}: cannot name a folder; use letters, digits, '-' and '_'")
    out = Path(out)
    folder = out / suite_name
    results = out.parent / "results" if results is None else Path(results)
    records = [_traced({**record, "path": record_path(record.get("path"))}, results) for record in records]
    if not private:
        records = [public.view(r) | {"trace": public.points(r, r.get("trace") or ())} for r in records]
    published = [dict(claim) for claim in published]
    quarantine = [(record_path(path), reason) for path, reason in quarantine]
    link = os.path.relpath(results, folder)
    found = [{k: v for k, v in audit.items() if k != "path"} for audit in audits]
    checks = [{k: v for k, v in check.items() if k != "path"} for check in checks]
    model = board(suite_name, question, records, published, tuning, reduced, quarantine, file, left_out)
    inputs = [run.order for run in model.runs]
    examined = sorted(map(canonical, found)), sorted(map(canonical, checks))
    arguments = suite_name, question, published, tuning, reduced, quarantine, link, sources, file, left_out
    digest = _digest([arguments, inputs, examined])
    top = text.top_rows(model)
    tables = export.files(model)
    from harness.report import figures
    from harness.report.model import checked
    from harness.report.page import html, pages
    from harness.report.page import payload as rows

    content = rows.Content(
        model, audits=rows.audits(found), checked=checked.checks(checks), sources=sources, results=results, here=folder
    )
    if _current(folder) == digest and all((folder / name).is_file() for name in (*tables, *content.below)):
        return Report(folder, False, top)
    drawings = figures.draw(model)
    below = pages.run_pages(content) | pages.cards(content)
    files = {
        "leaderboard.md": text.markdown(model),
        "leaderboard.csv": text.table_csv(model),
        "published.csv": text.published_csv(model),
        **drawings,
        "index.html": html.page(content, digest),
    }
    _replace(folder, tables | below)
    for name in FILES:  # the page is last: it holds the digest, so a report cut short is never taken for a whole one
        _write(folder / name, files[name])
    return Report(folder, True, top)


def overview(reports: Path, results: Path | None = None) -> Path | None:
    """Write ``index.html`` in `reports`: every suite there with its rows. None where no suite has a report.

    A suite that has no report which can be read, but an older one or records in `results`, is listed with the reason.
    """
    from harness.report.page import pages

    content = pages.overview(Path(reports), results)
    if content is None:
        return None
    path = Path(reports) / "index.html"
    if not path.is_file() or path.read_text("utf-8", errors="replace") != content:
        _write(path, content)
    return path


def _digest(inputs: Any) -> str:
    """Digest of all that a report depends on: the inputs, the files that read them, the libraries that draw."""
    digest = hashlib.sha256(canonical(inputs).encode("ascii"))
    mine = [p for p in _HERE.rglob("*") if p.suffix in (".py", ".html", ".css", ".js")]
    for path in (
        *sorted(mine),
        *(_HERE.parent / "records" / name for name in ("public.py", "stages.py", "drawing.py")),
    ):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    digest.update(" ".join(version(name) for name in ("matplotlib", "jinja2", "scipy")).encode())
    return digest.hexdigest()[:32]


def _traced(record: dict[str, Any], results: Path) -> dict[str, Any]:
    """`record` with what the report uses of its trace. What is not JSON or not a plain file is left out."""
    if "trace" in record or not record["path"]:
        return record
    points: list[Any] = []
    with contextlib.suppress(OSError, ValueError):  # no trace, or a path that no file can have
        path = (results / record["path"]).with_name("trace.jsonl")
        if path.is_file() and path.stat().st_size <= MOST_BYTES:  # a pipe would wait for a writer
            points = _points(path.read_bytes().splitlines())
    return record | {"trace": points}


def _points(lines: list[bytes]) -> list[dict[str, Any]]:
    found = []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):  # a damaged line; the others are kept
            found.append(json.loads(line))
    return [
        {key: one[key] for key in POINT if isinstance(one.get(key, ""), int | float | None)}
        for one in found
        if isinstance(one, dict)
    ]


def _replace(folder: Path, files: Mapping[str, str]) -> None:
    """Write `files` below `folder`, and remove the pages and tables beside them that are of earlier records."""
    for below in ("runs", "methods", export.FOLDER):
        (folder / below).mkdir(parents=True, exist_ok=True)
        for path in (folder / below).iterdir():
            ours = export.SUFFIXES if below == export.FOLDER else (".html",)
            if path.suffix in ours and f"{below}/{path.name}" not in files:
                path.unlink()
    for name, content in files.items():
        _write(folder / name, content)


def _current(folder: Path) -> str | None:
    """The digest of the report in `folder`, if it is whole."""
    if not all((folder / name).is_file() for name in FILES):
        return None
    with (folder / "index.html").open(encoding="utf-8", errors="replace") as page:
        head = page.read(2000)
    before, found, after = head.partition('<meta name="epsbench-inputs" content="')
    return after.partition('"')[0] if found and before else None


def _write(path: Path, content: str) -> None:
    """Write `path` in one step, so that a reader never sees half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(content, encoding="utf-8", newline="\n")
    os.replace(temporary, path)
