"""A real browser, and the pages that it opens."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import report
from tests.support.report import EVIL, THREE, fixture_records, hostile, seeds, traced
from tests.support.report import audit as one_audit

CHROMIUM = os.environ.get("EPSBENCH_CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: uv pip install playwright"
    )
    if CHROMIUM is None:
        pytest.skip("no browser: apt-get install chromium, or name one in EPSBENCH_CHROMIUM")
    with sync_api.sync_playwright() as driver:
        # The sandbox of Chromium does not run as root, as in a container. What is opened is our own file.
        started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small suites, one of hostile names, and the page over all."""
    folder = tmp_path_factory.mktemp("reports")
    records = [traced(one, [0.5, 0.7, 0.85]) for one in fixture_records()]
    audits = [one_audit(epsilon_audited=3.5), one_audit(method="dp-adam")]
    report.build("core", "What wins?", records, folder, audits=audits, private=True)
    report.build("evil", EVIL[0], [r for name in EVIL for r in hostile(name)[-3:]], folder, private=True)
    report.build("tiny", "How small?", seeds("dp-sgd", THREE, device=EVIL[1]), folder, private=True)
    report.overview(folder)
    return folder


class Visit:
    """A page that is opened, with all that went wrong in it and all that it asked for."""

    def __init__(self, browser: Any, path: Path, after: str = "", **options: Any) -> None:
        self.context = browser.new_context(viewport={"width": 1280, "height": 900}, **options)
        self.page = self.context.new_page()
        self.wrong: list[str] = []
        self.asked: list[str] = []
        self.page.set_default_timeout(10_000)
        self.page.on("console", lambda m: self.wrong.append(m.text))
        self.page.on("pageerror", lambda e: self.wrong.append(str(e)))
        self.page.on("dialog", lambda d: (self.wrong.append("dialog"), d.dismiss()))
        self.page.on("request", lambda r: self.asked.append(r.url))
        self.page.goto(path.as_uri() + after)

    def __enter__(self) -> Any:
        return self.page

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            assert self.wrong == []
            assert all(url.startswith(("file:", "data:")) for url in self.asked)
        self.context.close()


COLUMN = """([key, tables]) => {
  const at = [...document.querySelectorAll('#board thead th')].findIndex(th => th.dataset.key === key);
  const rows = [...document.getElementById('board').tBodies].slice(0, tables).flatMap(body => [...body.rows]);
  return rows.filter(tr => tr.className !== 'group').map(tr => tr.cells[at].textContent.trim());
}"""


def column(page: Any, key: str, settings: int = 1000) -> list[str]:
    """The text of every shown cell of a column, from above; of so many settings."""
    return page.evaluate(COLUMN, [key, settings])  # type: ignore[no-any-return]
