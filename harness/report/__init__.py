"""From records to a report: one self-contained page, Markdown, CSV and two figures.

>>> from harness import report
>>> report.build("core", question, records, Path("reports")).top        # doctest: +SKIP
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from . import text
from .read import RecordLike, canonical, record_path
from .tables import Board, board

__all__ = ["Board", "Report", "board", "build", "top_rows"]

FILES = (
    "leaderboard.md",
    "leaderboard.csv",
    "published.csv",
    "accuracy-vs-epsilon.svg",
    "throughput.svg",
    "index.html",
)
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

    @property
    def paths(self) -> tuple[Path, ...]:
        """Every file of the report."""
        return tuple(self.folder / name for name in FILES)


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
) -> Report:
    """Write the report of one suite into ``out/<suite_name>/`` and return where it is.

    `records` are record dicts, best those of `harness.store.current`, with the computed keys ``path`` (a path
    that ends in ``<suite>/<id>/record.json``; links lead to that file under `results`, by default the folder
    ``results`` beside `out`) and ``stale``. `published` rows have the keys method, task, epsilon (null:
    infinite), metric, value, source, note, accountant (of the published epsilon, if known). `tuning` says how
    hyper-parameters were chosen. `reduced` says why these are runs of the suite's reduced profile, None where they are
    not; nothing that is published is compared with those. `quarantine` are the files that hold no valid record, each
    with the reason; they are named and nothing else.

    The files depend on the arguments and on this package only: the order of the records, the time and the
    machine do not matter, and a report that is already there for the same arguments is left alone.

    Raises ValueError if `suite_name` cannot name a folder.
    """
    if not suite_name or suite_name in (".", "..") or any(c in suite_name for c in "/\\\0"):
        raise ValueError(f"suite name {suite_name!r}: cannot name a folder; use letters, digits, '-' and '_'")
    out = Path(out)
    folder = out / suite_name
    results = out.parent / "results" if results is None else Path(results)
    records = [{**record, "path": record_path(record.get("path"))} for record in records]
    published = [dict(claim) for claim in published]
    quarantine = [(record_path(path), reason) for path, reason in quarantine]
    link = os.path.relpath(results, folder)
    digest = _digest(
        [suite_name, question, sorted(map(canonical, records)), published, tuning, reduced, quarantine, link]
    )
    model = board(suite_name, question, records, published, tuning, reduced, quarantine)
    top = text.top_rows(model)
    if _current(folder) == digest:
        return Report(folder, False, top)

    from . import figures, html

    drawings = figures.draw(model)
    files = {
        "leaderboard.md": text.markdown(model),
        "leaderboard.csv": text.table_csv(model),
        "published.csv": text.published_csv(model),
        **drawings,
        "index.html": html.page(model, drawings, digest=digest, here=folder, results=results),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for (
        name
    ) in FILES:  # the page is last: it holds the digest, so a report cut short is never taken for a whole one
        _write(folder / name, files[name])
    return Report(folder, True, top)


def top_rows(records: Iterable[RecordLike], n: int = 5) -> str:
    """The first `n` rows of every table as text for a terminal, without writing anything."""
    return text.top_rows(board("", "", records), n)


def _digest(inputs: Any) -> str:
    """Digest of all that a report depends on: the inputs, this package's files, the libraries that draw."""
    digest = hashlib.sha256(canonical(inputs).encode("ascii"))
    for path in sorted(p for p in _HERE.iterdir() if p.suffix in (".py", ".html", ".css", ".js")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    digest.update(" ".join(version(name) for name in ("matplotlib", "jinja2", "scipy")).encode())
    return digest.hexdigest()[:32]


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
