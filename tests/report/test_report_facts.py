"""One fact has one name and one rounding in every file of a report, and what cannot be compared is not ranked."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import harness
from harness import cli, report
from harness.cli.commands import plan as plan_command
from harness.cli.commands import status as status_command
from harness.report import export, figures, text
from harness.report.model import runs as read
from harness.report.model import tables, words
from harness.report.page import html, pages
from harness.report.page import payload as rows
from tests.support.browser import Visit, column
from tests.support.records import make_record, put
from tests.support.report import THREE, claim, lines, make, record, seeds, table, traced, verdict

ONLY = "only plain Gaussians are exact"


def loaded(record: dict[str, Any], load: float) -> dict[str, Any]:
    """The record with the load average of its machine: two runs of one thread each ran at a time."""
    record["measured"]["load_average"] = load
    return record


def cards(records: list[dict[str, Any]]) -> str:
    model = make(records)
    return "".join(pages.cards(rows.Content(model)).values())


# ------------------------------------------------------------ intervals


@settings(max_examples=24, deadline=None)
@given(st.lists(st.floats(0.5, 0.9), min_size=2, max_size=4), st.lists(st.floats(0.5, 0.9), min_size=4, max_size=4))
def test_an_interval_reads_the_same_in_every_file(mine: list[float], base: list[float]) -> None:
    model = make([*seeds("dp-sgd", base), *seeds("dp-adam", mine)])
    (entry,) = [e for e in table(model).entries if not e.baseline]
    assert entry.row.accuracy is not None and entry.row.accuracy.half is not None
    (line,) = [one for one in lines(model) if one["title"] == "dp-adam"]
    around = f"{100 * entry.row.accuracy.half:.2f}"  # of the exact half, not of rounded ends
    accuracy, gap = " ".join(line["accuracy"][4:]), " ".join(line["difference"][4:])
    assert accuracy == words.interval(entry.row.accuracy) and accuracy.endswith(f"± {around}")
    assert gap == words.gap(entry.place.difference)
    page = "".join(pages.run_pages(rows.Content(model)).values())
    leaderboard, exported = text.markdown(model), "".join(export.files(model).values())
    for said in (accuracy, gap):
        assert said in page and text.escape(said) in leaderboard and export.tex(said) in exported
    assert f"<small>± {around}</small>" in html.page(rows.Content(model))


def test_the_leaderboard_shows_the_intervals_it_is_given(browser: Any, tmp_path: Path) -> None:
    records = [*seeds("dp-sgd", [0.51234, 0.52345, 0.53359]), *seeds("dp-adam", [0.6123456, 0.6154321, 0.61777])]
    page = report.build("core", "", records, tmp_path, private=True).index
    entry = {e.row.title: e for e in table(make(records)).entries}["dp-adam"]
    with Visit(browser, page) as shown:
        cells = dict(zip(column(shown, "title"), column(shown, "accuracy"), strict=True))
        gaps = dict(zip(column(shown, "title"), column(shown, "difference"), strict=True))
    assert cells["dp-adam"] == f"{words.interval(entry.row.accuracy)} n = 3"
    assert gaps["dp-adam"] == words.gap(entry.place.difference)


# ------------------------------------------------------------ accountants


def test_no_bound_and_an_infinite_one_have_two_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = make_record(0)
    one["privacy"] |= {
        "spent": {"gdp": None, "pld": 2.9, "rdp": None}, "planned": {"gdp": None, "pld": 3.0, "rdp": None},
        "accountant": "pld", "accounting": {"gdp": f"PoissonSampledDpEvent: {ONLY}"},
    }  # fmt: skip
    none = make_record(1)
    none["privacy"] |= {"spent": {"pld": None, "rdp": None}, "accountant": "pld", "epsilon": None}
    for each in (one, none):
        put(tmp_path / "results", each)
    model = tables.board("core", "", [one])
    page = "".join(pages.run_pages(rows.Content(model)).values())
    markdown = text.markdown(model)
    said = "gdp does not apply, pld 2.9, rdp does not apply"
    assert (
        said in page
        and "∞" not in page.split("Runs</h2>")[0]
        and f"gdp does not apply: PoissonSampledDpEvent: {ONLY}" in page
    )
    assert "| does not apply |" in markdown
    (line,) = lines(model)
    assert line["rdp"] == "does not apply"
    (line,) = lines(tables.board("core", "", [none]))
    assert line["rdp"] == line["spent"] == "inf"
    for record_, expected in ((one, said), (none, "pld ∞, rdp ∞")):
        assert cli.main(["show", record_["id"], "--results", str(tmp_path / "results")]) == cli.OK
        assert f"spent        {expected}; pld ranks" in capsys.readouterr().out
    frame = harness.load_results(tmp_path / "results").set_index("seed")
    assert math.isnan(frame.epsilon_rdp[0]) and frame.epsilon_pld[0] == 2.9
    assert frame.epsilon_rdp[1] == frame.epsilon[1] == math.inf


# ------------------------------------------------------------ timings


def test_a_row_is_timed_by_its_quiet_runs_and_marked_without(tmp_path: Path) -> None:
    mixed = [loaded(one, load) for one, load in zip(seeds("dp-sgd", THREE), (9.0, 1.0, 1.2), strict=True)]
    for one, rate in zip(mixed, (10.0, 4000.0, 6000.0), strict=True):
        one["diagnostics"]["examples_per_second"]["median"] = rate
    crowded = [loaded(one, 9.0) for one in seeds("dp-adam", THREE, rate=1000.0)]
    model = make([*mixed, *crowded])
    entries = {e.row.title: e for e in table(model).entries}
    assert entries["dp-sgd"].row.rate == 5000.0 and not entries["dp-sgd"].doubted
    assert entries["dp-adam"].doubted == {"rate", "seconds", "reach", "baseline", "reference"}
    assert entries["dp-adam"].to_baseline == 0.2
    markdown = text.markdown(model)
    assert "| 1,000† |" in markdown and "| 0.20×† |" in markdown and "| 5,000 |" in markdown
    assert {one["title"]: one["busy"] for one in lines(model)} == {
        "dp-sgd": [], "dp-adam": ["baseline", "rate", "reach", "reference", "seconds"],
    }  # fmt: skip
    assert r"1,000\dag{}" in "".join(export.files(model).values())
    assert "1,000†" in text.top_rows(model)
    page = "".join(pages.run_pages(rows.Content(model)).values())
    assert "9.0 on 2 cores in use †: other work ran on the machine" in page and "1.0 on 2 cores in use<" in page


def test_ratios_to_a_row_of_a_busy_machine_are_marked() -> None:
    busy = [loaded(one, 9.0) for one in seeds("non-private", THREE, epsilon=None)]
    (entry, *_) = table(make([*seeds("dp-sgd", THREE), *busy])).entries
    assert entry.doubted == {"reference"}


def test_no_ranking_by_time_counts_a_row_of_a_busy_machine() -> None:
    quiet, busy = seeds("dp-sgd", THREE), [loaded(one, 9.0) for one in seeds("dp-adam", THREE, rate=1e6)]
    ((_, choices),) = figures.pareto_data(make([*quiet, *busy]))
    assert {(c.title, c.front, c.busy) for c in choices} == {("dp-sgd", True, False), ("dp-adam", False, True)}
    (bars,) = figures.throughput_data(make([*quiet, *busy]))
    assert bars.busy == {"dp-adam"} and not figures.memory_data(make([*quiet, *busy]))[0].busy
    said = claim(5000.0, metric="examples_per_second")
    assert verdict(quiet, said)[0] == "agrees"
    loaded(quiet[0], 3.0)
    assert "1 of 3 runs were timed on a busy machine" in " ".join(verdict(quiet, said))
    assert verdict(quiet, claim())[0] == "agrees", "an accuracy does not depend on the load"


@pytest.mark.parametrize(
    ("kind", "load", "busy"), [("cpu", 2.9, False), ("cpu", 3.0, True), ("cuda", 3.0, False), ("cuda", 24.0, True)]
)
def test_the_load_is_held_against_the_cores_in_use(kind: str, load: float, busy: bool) -> None:
    one = loaded(record(), load)
    one["device"]["kind"], one["environment"]["cores"] = kind, 16
    assert read.read([one])[0].busy is busy


def test_the_leaderboard_sorts_timings_of_a_busy_machine_last(browser: Any, tmp_path: Path) -> None:
    busy = [loaded(one, 9.0) for one in seeds("dp-adam", THREE, rate=9000.0)]
    records = [*seeds("dp-sgd", THREE, rate=4000.0), *busy, *seeds("dp-lamb", THREE, rate=5000.0)]
    page = report.build("core", "", records, tmp_path, private=True).index
    with Visit(browser, page, "#?sort=rate.desc") as shown:
        assert column(shown, "rate") == ["5,000", "4,000", "9,000†"]
    with Visit(browser, page, "#?sort=rate") as shown:
        assert column(shown, "rate") == ["4,000", "5,000", "9,000†"]
    with Visit(browser, page, "#?sort=memory.desc") as shown:
        assert not any("†" in cell for cell in column(shown, "memory"))


def test_no_column_is_cut_on_a_small_laptop(browser: Any, reports: Path, tmp_path: Path) -> None:
    records = [traced(loaded(one, 9.0), [0.5, 0.7, 0.85]) for one in seeds("dp-sgd", THREE, rate=123456.0)]
    records += [traced(loaded(one, 9.0), [0.5]) for one in seeds("one-step-last-layer", THREE, rate=512345.0)]
    records += seeds("non-private", THREE, epsilon=None, rate=345678.0)
    for one in records:
        one["privacy"]["public_data"] = "efficientnet"
        one["privacy"]["claimed"] = {"epsilon": 1.234, "source": "x", "assumptions": []}
    report.build("cifar10-transfer", "", records, tmp_path, private=True)
    path = report.overview(tmp_path)
    assert path is not None
    with Visit(browser, path) as shown:
        assert {"rate", "reach", "claimed"} <= set(
            shown.evaluate("[...document.querySelectorAll('#board th[data-key]')].filter(h => h.offsetWidth)"
                           ".map(h => h.dataset.key)")
        )  # fmt: skip
        inner, outer = shown.evaluate(
            "(b => [b.scrollWidth, b.clientWidth])(document.getElementById('board').parentNode)"
        )
        assert inner <= outer


# ------------------------------------------------------------ parts, commands, suites without rows


def test_a_card_marks_the_parts_that_the_suite_gave_and_their_rows() -> None:
    changed = seeds("dp-sgd", THREE, label="averaged")
    for one in changed:
        one["cell"]["method"]["with"] = {"clip": "automatic?gamma=0.01"}
        one["cell"]["method"]["parts"]["clip"] = {"type": "Automatic"}
    both, alone, plain = (cards([*seeds("dp-sgd", THREE), *changed]), cards(changed), cards(seeds("dp-sgd", THREE)))
    assert "<em" not in plain and "with clip" not in plain
    assert '<strong>Flat</strong><small>clip=1</small><em class="mark warn">not in every row</em>' in both
    assert '<strong>Automatic</strong><em class="mark warn">not its default</em>' in alone
    for page in (both, alone):
        assert page.count("<em") == 1 and page.count("with clip = automatic?gamma=0.01") == 1
        assert '<code>automatic?gamma=0.01</code></td><td class="prose">averaged (1 setting)</td>' in page


def test_the_command_is_the_same_on_a_page_and_from_show() -> None:
    one = record()
    one["code"]["files"] = {"mine.py": "0" * 12, "harness/running/train.py": "1" * 12}
    (run,) = read.read([one])
    again = f"--only {run.id} --results again --no-track"
    checkout = f"git checkout {run.commit}"
    assert words.recipe(run, "suites/a b.toml", True) == [
        checkout, f"epsbench run 'suites/a b.toml' --reduced {again}",
    ]  # fmt: skip
    note = "    # with the files of your own that it was run from"
    assert words.recipe(run, "/home/me/a.toml") == [checkout, f"epsbench run a.toml {again}{note}"]
    assert words.recipe(run, "", installed=False)[1] == f"epsbench run SUITE.toml {again} --method mine.py{note}"
    model = make([one], file="elsewhere/a.toml")
    known = {"methods": {"dp-sgd": {"installed": True}}}
    for said, method in ((known, ""), (None, ""), ({"methods": {}}, " --method mine.py")):
        (page,) = pages.run_pages(rows.Content(model, sources=said)).values()
        assert f"{checkout}\nepsbench run elsewhere/a.toml {again}{method}" in page
    one["code"] |= {"commit": None}
    assert len(words.recipe(read.read([one])[0], "a.toml")) == 1


def test_a_suite_without_rows_is_listed_with_the_reason(tmp_path: Path) -> None:
    out, results = tmp_path / "reports", tmp_path / "results"
    report.build("core", "Why?", seeds("dp-sgd", THREE), out, private=True)
    report.build("gone", "Which?", [], out, left_out="1 record of a run that is no more: 0123", private=True)
    old = report.build("old", "What?", seeds("dp-sgd", THREE), out, private=True).index
    old.write_text(old.read_text().replace(json.dumps(list(rows.FIELDS), separators=(",", ":")), '["x"]'))
    (out / "stray").mkdir()
    (out / "stray" / "index.html").write_text("not ours")
    put(results, make_record(suite="unseen"))
    path = report.overview(out, results)
    assert path is not None
    lines = [line for line in path.read_text().split("<tbody>")[1].split("</tbody>")[0].splitlines() if "<tr>" in line]
    assert [line.count("no rows") for line in lines] == [0, 1, 1, 1] and "stray" not in "".join(lines)
    assert "1 record of a run that is no more: 0123" in lines[1] and 'href="gone/index.html"' in lines[1]
    assert "of another version of epsbench; epsbench report old" in lines[2]
    assert "it has records and no report; epsbench report unseen" in lines[3] and "href" not in lines[3]
    assert "No rows: 1 record of a run that is no more" in (out / "gone" / "index.html").read_text()


# ------------------------------------------------------------ commands


@pytest.mark.parametrize(
    "request_",
    [["status"], ["show", "3f2a"], ["report"], ["compare", "a", "b"], ["pack", "core"], ["merge", "x"], ["track"],
     ["plan", "smoke"], ["run", "smoke"]],
)  # fmt: skip
def test_a_suites_folder_is_no_results_folder(
    request_: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = put(tmp_path / "results", make_record())
    for folder in (path.parent, path.parent.parent):
        with pytest.raises(SystemExit) as stopped:
            cli.main([*request_, "--results", str(folder)])
        assert stopped.value.code == cli.USER_ERROR
        assert f"in its suite core; write --results {tmp_path / 'results'}" in capsys.readouterr().err


def test_the_table_of_one_suite_is_that_of_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(tmp_path / "results", make_record())
    put(tmp_path / "results", make_record(1, suite="other"))
    assert list(harness.load_results(tmp_path / "results").suite) == ["core", "other"]
    assert list(harness.load_results(tmp_path / "results" / "core").suite) == ["core"]
    monkeypatch.chdir(tmp_path / "results" / "core")
    assert list(harness.load_results(".").suite) == ["core"]
    with pytest.raises(ValueError, match="the folder of one run"):
        harness.load_results(path.parent)


def test_status_of_every_suite_names_the_stale_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fresh, old, lost = make_record(0), make_record(1), make_record(2, suite="other")
    for one in (fresh, old):
        put(tmp_path / "results", one)
    put(tmp_path / "results", lost)
    codes = {fresh["id"]: {"hash": "c" * 12}, old["id"]: {"hash": "d" * 12}, lost["id"]: "its method is not here"}
    monkeypatch.setattr(status_command, "codes_of_records", lambda records: codes)
    assert cli.main(["status", "--results", str(tmp_path / "results")]) == cli.OK
    said = capsys.readouterr().out
    assert " ".join(said.split()).startswith(
        "suite runs code core 2 ok 2 1 stale other 1 ok 1 0 stale, 1 whose code is unknown"
    )
    assert f"stale in core: {old['id']}\n" in said and fresh["id"] not in said


def test_a_plan_names_bounds_as_a_report_does() -> None:
    planned = {"pld": 2.0, "gdp": None}
    shown = [plan_command._planned(planned, name) for name in ("pld", "gdp", "prv")]
    assert shown == ["2", "does not apply", "-"]
    assert plan_command._planned({"pld": None, "gdp": None}, "gdp") == "∞"
