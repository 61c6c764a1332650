"""The pages in a real browser: no error, no request, filters and sorting and the address, themes, hostile names, size.

Needs Chromium and playwright's driver for Python; without them the tests are skipped and say how to get them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests import report_scale
from tests.support.browser import Visit, column
from tests.support.report import EVIL

MANY = 1000
"""Rows of the large page: of four thousand records."""


def sort(page: Any, key: str) -> str | None:
    """Press a column's head by keyboard; the order is announced to a screen reader."""
    head = page.locator(f"#board th[data-key={key}]")
    head.locator("button").focus()
    page.keyboard.press("Enter")
    return head.get_attribute("aria-sort")  # type: ignore[no-any-return]


def numbers(texts: list[str]) -> list[float]:
    return [float(t.split()[0].replace(",", "").replace("−", "-")) for t in texts if t[0] not in "–∞"]


def test_every_kind_of_page_opens_without_error_or_request(browser: Any, reports: Path) -> None:
    row = next((reports / "core" / "runs").glob("*.html"))
    card = reports / "core" / "methods" / "dp-sgd.html"
    for path in (reports / "index.html", reports / "core" / "index.html", row, card):
        visit = Visit(browser, path)
        with visit as page:
            assert page.title().endswith("· epsbench") and page.locator("h1").count() == 1
        assert visit.asked == [path.as_uri()], "a page is one file"


def test_sorting_by_keyboard_within_settings_and_as_one_list(browser: Any, reports: Path) -> None:
    with Visit(browser, reports / "core" / "index.html", "#?epsilon=3&task=mnist-5k/tanh-cnn") as page:
        by_rank = column(page, "title")
        assert sort(page, "accuracy") == "descending"
        found = numbers(column(page, "accuracy", 1)[:-1])  # the reference stays below its table
        assert len(found) > 4 and found == sorted(found, reverse=True)
        assert sort(page, "accuracy") == "ascending" and "sort=accuracy" in page.url
        assert numbers(column(page, "accuracy", 1)[:-1]) == sorted(found)
        assert sort(page, "accuracy") is None and column(page, "title") == by_rank and "sort" not in page.url
    with Visit(browser, reports / "core" / "index.html", "#?flat=1&sort=rate.desc") as page:
        rates = numbers(column(page, "rate"))
        assert len(rates) > 20 and rates == sorted(rates, reverse=True) and page.locator("tr.group").count() == 0


def test_filters_live_in_the_address(browser: Any, reports: Path) -> None:
    with Visit(browser, reports / "core" / "index.html") as page:
        every = len(column(page, "title"))
        page.get_by_label("ε", exact=True).select_option("3")
        page.get_by_label("Family", exact=True).select_option("engine")
        page.get_by_label("Status", exact=True).select_option("ok")
        page.get_by_label("Search", exact=True).fill("FAST")
        page.wait_for_url(re.compile("text=FAST"))  # written a moment after the last key
        assert "epsilon=3" in page.url and "family=engine" in page.url
        assert set(column(page, "title")) == {"fast-clipping"} and 0 < len(column(page, "title")) < every
        assert page.locator("#shown").inner_text() == f"{len(column(page, 'title'))} of {every} rows"
        there, shown = page.url, column(page, "title")
        page.get_by_role("button", name="Clear").click()
        assert len(column(page, "title")) == every and "#?" not in page.url
        page.goto("about:blank")
        page.goto(there)  # as from a link that somebody sent
        assert column(page, "title") == shown and page.get_by_label("ε", exact=True).input_value() == "3"
        page.get_by_label("Search", exact=True).fill("nothing like this")
        page.locator("#nothing").wait_for(state="visible")


def test_a_row_leads_to_its_page_and_that_one_back(browser: Any, reports: Path) -> None:
    with Visit(browser, reports / "core" / "index.html", "#?epsilon=8&method=dp-adam") as page:
        page.locator("#board tbody tr:not(.group)").first.locator("td").last.click()  # anywhere in the row
        page.wait_for_url("**/runs/*.html")
        assert page.locator("h1").inner_text() == "dp-adam" and page.locator("article").count() == 3
        assert page.locator("svg.plot circle title").first.text_content().startswith("seed 0")
        page.get_by_role("link", name="Leaderboard of this setting").click()
        page.wait_for_url("**/index.html#?*")
        assert (len(column(page, "title")) >= 4 and set(column(page, "target")) == {"8", "∞"}) or column(page, "title")
        page.get_by_role("link", name="epsbench", exact=True).click()
        page.wait_for_url("**/index.html")
        page.get_by_label("Suite", exact=True).select_option("core")
        assert set(column(page, "suite")) == {"core"}


def test_an_audit_above_its_claim_is_flagged(browser: Any, reports: Path) -> None:
    with Visit(browser, reports / "core" / "index.html", "#?epsilon=3&task=mnist-5k/tanh-cnn") as page:
        cells = dict(zip(column(page, "title"), column(page, "audited"), strict=True))
        assert "above the claim" in cells["dp-sgd"] and cells["dp-adam"] == "1.2 95 %" and cells["dp-lamb"] == "–"


def test_light_and_dark(browser: Any, reports: Path) -> None:
    def paper(page: Any) -> int:
        shade = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(int(part) for part in shade.removeprefix("rgb(").removesuffix(")").split(","))

    with Visit(browser, reports / "core" / "index.html", color_scheme="light") as page:
        light = paper(page)
    with Visit(browser, reports / "core" / "index.html", color_scheme="dark") as page:
        assert paper(page) < 150 < 600 < light
        page.get_by_role("button", name="Use the light theme").click()
        assert paper(page) == light
        page.reload()
        assert paper(page) == light, "the choice is kept"


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_but_tables_is_wider_than_the_screen(browser: Any, reports: Path, width: int) -> None:
    core, evil = reports / "core", reports / "evil"
    runs = sorted((evil / "runs").glob("*.html"))[:2]
    for path in (reports / "index.html", core / "index.html", evil / "index.html", *runs, core / "methods/dp-sgd.html"):
        with Visit(browser, path) as page:
            page.set_viewport_size({"width": width, "height": 800})
            assert page.evaluate("document.documentElement.scrollWidth") <= width, path


def test_controls_have_names_and_tables_heads(browser: Any, reports: Path) -> None:
    with Visit(browser, reports / "core" / "index.html") as page:
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
        nameless = "e => !(e.labels?.length || e.textContent.trim() || e.getAttribute('aria-label'))"
        assert page.evaluate(f"[...document.querySelectorAll('button,select,input')].filter({nameless}).length") == 0
        assert page.evaluate("[...document.querySelectorAll('table')].filter(t => !t.caption).length") == 0
        assert page.evaluate("[...document.querySelectorAll('th')].filter(t => !t.scope).length") == 0
        page.keyboard.press("Tab")
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid", "focus is seen"


def test_hostile_names_are_shown_as_text(browser: Any, reports: Path) -> None:
    paths = [reports / "index.html", *(reports / "evil").rglob("*.html"), *(reports / "tiny").rglob("*.html")]
    with Visit(browser, paths[0]) as page:
        for path in paths:
            page.goto(path.as_uri())
            scripts = 2 if path.name == "index.html" else 1  # the page's own, and its data
            assert page.locator("img, iframe, object, script, [onerror]").count() == scripts, path
    with Visit(browser, reports / "evil" / "index.html") as page:
        shown = " ".join(column(page, "title"))
        assert "<script>alert(1)</script>" in shown and "\\u202etxt.exe" in shown and "\u202e" not in page.content()
        page.get_by_label("Method", exact=True).select_option(EVIL[0])
        assert 0 < len(column(page, "title")) < 4 and all(EVIL[0] in title for title in column(page, "title"))


def test_thousands_of_records_stay_a_page_of_rows(browser: Any, tmp_path: Path) -> None:
    """What bounds the time is that at most a page of rows is in the document, whatever is asked of the table."""
    from harness.report import board
    from harness.report.page import html
    from harness.report.page.payload import Content

    path = tmp_path / "index.html"
    model = board("scale", "", report_scale.records(4 * MANY))
    assert len(model.rows) >= MANY
    path.write_text(html.page(Content(model)), encoding="utf-8")
    with Visit(browser, path) as page:
        size = "document.querySelectorAll('#board *').length"
        first = page.evaluate(size)
        assert len(column(page, "title")) == 100 and first < 6000
        assert page.locator("#pages output").inner_text() == f"page 1 of {-(-MANY // 100)}"
        page.get_by_label("One list").check()
        sort(page, "accuracy")
        best = numbers(column(page, "accuracy"))
        page.get_by_role("button", name="Last", exact=True).click()
        assert min(best) > max(numbers(column(page, "accuracy")) or [0.0]) and "page=10" in page.url
        assert page.evaluate(size) < 6000
        page.get_by_label("Task", exact=True).select_option("task-1/net")
        assert set(column(page, "task")) == {"task-1/net"} and "page=" not in page.url
        assert page.evaluate(size) < 6000
