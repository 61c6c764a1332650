"""The report: right numbers, the same bytes for the same records; no record can break or fool it."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness.report import FILES, board, build, figures, overview, sources, text
from harness.report.model.fields import visible
from harness.report.model.statistics import Entrant, counted_on, mean_interval, paired_interval, rank
from harness.report.model.tables import RankedTable, place
from harness.report.model.words import epsilon
from harness.report.page import drawings, html, plot
from harness.report.page import pages as below
from harness.report.page.payload import Content
from tests.support import ROOT
from tests.support.report import (
    EVIL,
    FIXTURE,
    ODD,
    PUBLISHED,
    QUESTION,
    THREE,
    TUNING,
    audit,
    claim,
    fixture_records,
    hostile,
    lines,
    make,
    pages,
    record,
    seeds,
    table,
    traced,
    verdict,
)

# ------------------------------------------------------------ records, from the schema


def test_fixture_is_what_the_schema_helper_makes() -> None:
    assert json.loads(FIXTURE.read_text("utf-8")) == fixture_records(), "rewrite it: python -m tests.support.report"


def ranks(model_table: RankedTable) -> dict[str, str]:
    return {e.row.title: place(e) for e in model_table.entries}


def test_a_table_says_how_often_other_work_ran_on_the_machine() -> None:
    quiet, busy = record(seed=0), record(seed=1)
    quiet["measured"]["load_average"], busy["measured"]["load_average"] = 2.9, 3.1  # two runs of one thread
    assert "during 1 of 2 runs" in " ".join(table(make([quiet, busy])).notes)
    assert "Other work" not in " ".join(table(make([quiet])).notes)


# ------------------------------------------------------------ statistics


def test_paired_interval_is_scipys_on_a_worked_example() -> None:
    stats = pytest.importorskip("scipy.stats")
    ours = {0: 0.871, 1: 0.883, 2: 0.868, 3: 0.902, 7: 0.5}
    base = {0: 0.861, 1: 0.866, 2: 0.870, 3: 0.889, 9: 0.9}  # seeds 7 and 9 have no partner
    found = paired_interval(ours, base)
    assert found is not None and found.n == 4
    test = stats.ttest_rel([ours[s] for s in range(4)], [base[s] for s in range(4)])
    low, high = test.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-12)
    # by hand: d = .010 .017 -.002 .013, mean .0095, s = .00818535, t(3, .975) = 3.18244631
    assert found.mean == pytest.approx(0.0095)
    assert found.half == pytest.approx(3.182446305284263 * 0.008185352771872449 / 2, rel=1e-9)
    single = mean_interval([0.5])
    assert single is not None and single.low is None and mean_interval([]) is None


@pytest.mark.parametrize("n", [100, 150, 250, 500, 1000])
@pytest.mark.parametrize("right", [0.5, 0.8, 0.9, 0.97, 0.99])
def test_two_seeds_tell_equal_methods_apart_in_five_percent_at_most(n: int, right: float) -> None:
    """Summed over all outcomes: each seed counts how many of n examples each of two equal methods gets right."""
    from scipy.stats import binom

    chances = binom.pmf(range(n + 1), n, right)
    gaps = numpy.convolve(chances, chances[::-1])  # of the difference of two counts, from -n to n
    likely = [i for i, chance in enumerate(gaps) if chance > 1e-9]
    apart = 0.0
    for i in likely:
        for j in likely[: likely.index(i) + 1]:
            found = paired_interval({0: (i - n) / n, 1: (j - n) / n}, {0: 0.0, 1: 0.0}, n)
            assert found is not None
            if found.contains(0.0) is False:
                apart += gaps[i] * gaps[j] * (1 + (i != j))
    assert apart <= 0.05


def test_examples_are_recorded_or_the_fewest_on_which_accuracies_are_counts() -> None:
    assert counted_on([0.871, 0.5]) == 1000 and counted_on([321 / 364, 7 / 364]) == 364
    assert counted_on([math.pi / 4]) is None and counted_on([]) is None and counted_on([1.0, 0.0]) is None
    two = [record(seed=0), record(seed=1)]
    for one in two:
        one["metrics"]["accuracy"] = 0.9  # the same in both, and not known to more than one example
    (row,) = make(two).rows
    assert row.accuracy is not None and row.examples == 10 and row.accuracy.half > 0
    for one in two:
        one["metrics"]["examples"] = 10_000
    (finer,) = make(two).rows
    assert finer.examples == 10_000 and finer.accuracy is not None
    assert finer.accuracy.half == pytest.approx(12.706204736 * math.sqrt(1 / 12 / 2) / 10_000)


def test_ranks_share_where_the_difference_may_be_zero() -> None:
    base = {0: 0.80, 1: 0.82, 2: 0.81}
    entrants = [
        Entrant(base, base),
        Entrant({s: v + 0.05 for s, v in base.items()}, base),  # always better
        Entrant({0: 0.855, 1: 0.868, 2: 0.858}, base),  # as good as the one above
        Entrant({s: v - 0.01 for s, v in base.items()}, base),  # always worse
        Entrant({0: 0.99}, base),  # one seed proves nothing
        Entrant({0: 0.99, 1: 0.99}, base, barred="1 of 3 runs diverged"),
        Entrant({}, base),
    ]
    order, places = rank(entrants)
    assert [p.rank for p in places] == [3, 1, 1, 4, None, None, None]
    assert [p.tied for p in places] == [False, True, True, False, False, False, False]
    assert order[:4] == [2, 1, 0, 3] or order[:4] == [1, 2, 0, 3]
    assert order[-1] == 6 and all(p.why for p in places[4:])
    _, unpaired = rank([Entrant(e.scores, None, e.barred) for e in entrants])
    assert [p.rank for p in unpaired][:4] == [3, 1, 1, 4] and unpaired[0].difference is None


# ------------------------------------------------------------ tables


def test_board_of_the_fixture() -> None:
    model = make(fixture_records(), published=PUBLISHED, tuning=TUNING)
    assert len(model.tables) == 7 and [t.search for t in model.tables] == [False] * 6 + [True]
    here = table(model)
    shown = ranks(here)
    assert shown["dp-sgd"] == shown["fast-clipping"] == "1=" and shown["dp-adam"] == "4"
    assert shown["dp-lamb"] == shown["automatic (gamma=0.01)"] == shown["group-wise"] == "–"
    assert here.baseline is not None and here.baseline.label == "dp-sgd"
    (reference,) = here.references
    assert reference.row.epsilon == math.inf and epsilon(reference.row.epsilon) == "∞"
    speed = {e.row.title: (e.to_reference, e.to_baseline) for e in here.entries}
    assert speed["fast-clipping"] == pytest.approx((9800 / 21000, 9800 / 5200))
    assert [v.verdict for v in model.published] == ["agrees", "differs", "not comparable"]
    assert model.published[1].difference == pytest.approx(0.85397 - 0.981, abs=1e-4)
    search = next(t for t in model.tables if t.search)
    assert search.baseline is not None and search.baseline.label == "dp-sgd (lr=1)"
    assert "2 dp-sgd rows: paired with the first, dp-sgd (lr=1)." in search.notes


def test_the_page_says_what_happened() -> None:
    shown = pages(make(fixture_records(), published=PUBLISHED, tuning=TUNING))
    for kind in ("html", "md"):
        page = shown[kind]
        for words in ("∞", "the loss is not finite at step 118", "engine ghost has no group-wise clipping",
                      "validation split", "nothing here runs dp-sat", "6 settings a method"):  # fmt: skip
            assert words in page, (kind, words)
    page = shown["runs"]
    one = fixture_records()[0]["id"]
    assert f'href="../../../results/core/{one}/record.json"' in page
    assert f"epsbench show {one}" in page
    assert f"git checkout {'0f' * 20}\nepsbench run SUITE.toml --only {one} --results again --no-track    #" in page
    assert f"tags.&#34;epsbench.id&#34; = &#39;{one}&#39;" in page and ">stale<" in page
    rows = list(csv.DictReader(io.StringIO(shown["csv"])))
    sgd = next(r for r in rows if (r["label"], r["target_epsilon"], r["split"]) == ("dp-sgd", "3.0", "test"))
    assert 0 < float(sgd["accuracy_low"]) < float(sgd["accuracy_mean"]) < float(sgd["accuracy_high"]) < 1
    reference = next(r for r in rows if r["role"] == "reference")
    assert reference["epsilon_spent"] == "inf" and reference["rank"] == ""


# ------------------------------------------------------------ published values


def test_a_published_value_agrees_exactly_within_the_interval() -> None:
    records = seeds("dp-sgd", [0.88, 0.90, 0.92])  # mean .90, s = .02, t(2, .975) = 4.30265
    half = 4.302652729911275 * 0.02 / math.sqrt(3)
    for value, word in ((0.90, "agrees"), (0.90 + half - 1e-9, "agrees"), (0.90 - half + 1e-9, "agrees"),
                        (0.90 + half + 1e-9, "differs"), (100 * (0.90 - half - 1e-9), "differs")):  # fmt: skip
        assert verdict(records, claim(value))[0] == word, value
    assert verdict(records, claim(0.8))[1] == "differs: +10.00 points"
    assert verdict(records, claim(0.97))[1] == "differs: −7.00 points"
    (found,) = make(records, published=[claim(0.97)]).published
    (row,) = csv.DictReader(io.StringIO(text.published_csv(make(records, published=[claim(0.97)]))))
    assert found.difference == pytest.approx(-0.07) and float(row["difference"]) == found.difference
    assert float(row["measured_high"]) == pytest.approx(0.90 + half) and row["measured_n"] == "3"
    assert (row["published"], row["verdict"], row["because"]) == ("0.97", "differs", "")
    assert row["ids"].split() == [r["id"] for r in records]


def stale(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [records[0] | {"stale": True}, *records[1:]]


NOT_COMPARABLE: dict[str, tuple[list[dict[str, Any]], dict[str, Any], str]] = {
    "method": (seeds("dp-adam", THREE), claim(), "nothing here runs dp-sgd on mnist-5k/tanh-cnn"),
    "epsilon": (seeds("dp-sgd", THREE, epsilon=1.0) + seeds("dp-sgd", THREE, epsilon=8.0), claim(),
                "no run at ε = 3, only at 1, 8"),
    "split": (seeds("dp-sgd", THREE, evaluate="validation"), claim(), "only a validation split was evaluated"),
    "failed": (seeds("dp-sgd", THREE, status="diverged"), claim(), "no run gave its accuracy (3 diverged)"),
    "metric": (seeds("dp-sgd", THREE), claim(metric="top_5"), "no run gave its top 5 (3 ok)"),
    "value": (seeds("dp-sgd", THREE), claim(value=math.nan), "no value is given"),
    "seeds": (seeds("dp-sgd", [0.9]), claim(), "one seed gives no interval"),
    "stale": (stale(seeds("dp-sgd", THREE)), claim(), "1 of 3 runs were made by other code than today's"),
    "accountant": (seeds("dp-sgd", THREE), claim(accountant="rdp"), "its epsilon is by rdp, ours by pld"),
    "both": (stale(seeds("dp-sgd", [0.9])), claim(),
             "1 of 1 runs were made by other code than today's and one seed gives no interval"),
    "reduced": (seeds("dp-sgd", THREE, task="mnist-5k/tanh-cnn (reduced)"), claim(), "this is a reduced profile"),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_COMPARABLE)
def test_what_cannot_be_compared_says_why(name: str) -> None:
    records, said, why = NOT_COMPARABLE[name]
    assert verdict(records, said) == ("not comparable", f"not comparable, because {why}")
    model = make(records, published=[said])
    for kind, page in pages(model).items():
        if kind in ("html", "md", "published"):
            assert why in page.replace("&#39;", "'").replace("\\_", "_"), kind
    assert "1 not comparable" in text.top_rows(model)
    # Nothing but the obstacle stands in the way.
    if name in ("stale", "accountant"):
        assert verdict(seeds("dp-sgd", THREE), claim(accountant="pld"))[0] == "agrees"


def test_a_reduced_run_says_so_everywhere() -> None:
    records = [r | {"suite": "mine-reduced"} for r in seeds("dp-sgd", THREE, task="digits/mlp (reduced)")]
    for options in ({"reduced": "CIFAR-10 takes hours"}, {}):
        options |= {"file": "suites/mine.toml"}
        model = board("mine-reduced", QUESTION, records, [claim(), claim(task="digits/mlp")], None, **options)
        assert {v.verdict for v in model.published} == {"not comparable"}
        assert {v.because for v in model.published} == {("this is a reduced profile",)}
        assert [v.measured is None for v in model.published] == [True, False]
        shown = pages(model)
        for kind in ("html", "md"):
            why = options.get("reduced", "other data, models or lengths than the suite asks for")
            assert f"reduced: {why}" in shown[kind] and "mine-reduced" in shown[kind]
        assert all("digits/mlp (reduced)" in shown[kind] for kind in ("html", "md", "csv", "published", "txt"))
        assert f"epsbench run suites/mine.toml --reduced --only {records[0]['id']}" in shown["runs"]
    assert "Profile" not in dict(make(records).facts)


def test_devices_and_failed_launches() -> None:
    records = [
        *seeds("dp-sgd", [0.90, 0.91, 0.89]),
        *seeds("dp-adam", [0.92, 0.93], device="Other CPU", rate=1000.0),
        *[r | {"device": None, "measured": None, "metrics": None} for r in
          seeds("fast-clipping", [0.0], status="crashed", reason="out of disk")],
    ]  # fmt: skip
    (only,) = make(records).tables
    by_name = {e.row.title: e for e in only.entries}
    assert by_name["dp-adam"].place.difference is not None, "pairing works across machines of a kind"
    assert by_name["dp-adam"].to_baseline is None, "speeds are compared on one machine only"
    assert by_name["fast-clipping"].row.failures == [("crashed", "out of disk", 1)]


def test_figures_show_what_the_tables_hold() -> None:
    model = make(fixture_records())
    panels = {p.title: p for p in figures.accuracy_data(model)}
    panel = panels["mnist-5k/tanh-cnn"]
    assert [e for e, _ in panel.series["dp-sgd"]] == [1.0, 3.0, 8.0] and list(panel.references) == ["non-private"]
    assert panel.series["dp-sgd"][1][1] == next(e for e in table(model).entries if e.baseline).row.accuracy
    bars = {b.title: b for b in figures.throughput_data(model)}["mnist-5k/tanh-cnn"]
    assert bars.relative and bars.values["fast-clipping"] == pytest.approx(9800 / 21000)


# ------------------------------------------------------------ files


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    """In another process, with another hash seed, from another folder, with the records in another order."""
    options = {"published": PUBLISHED, "tuning": TUNING, "private": True}
    first = build("core", QUESTION, fixture_records(), tmp_path / "here" / "reports", **options)
    script = (
        "import json, random, sys; from pathlib import Path; from harness.report import build\n"
        "records, options = json.loads(Path(sys.argv[1]).read_text()), json.loads(sys.argv[2])\n"
        "random.Random(1).shuffle(records)\n"
        "for r in records: r['path'] = '/elsewhere/' + r['path']\n"
        "build('core', options.pop('question'), records, Path('reports'), **options)\n"
    )
    there = tmp_path / "there"
    there.mkdir()
    subprocess.run(
        [sys.executable, "-c", script, str(FIXTURE), json.dumps(options | {"question": QUESTION})],
        cwd=there,
        check=True,
        env=os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT), "TZ": "Asia/Tokyo"},
    )
    assert first.written
    assert files(first.folder) == files(there / "reports" / "core")
    assert set(FILES) <= files(first.folder).keys()

    page = first.index.stat()
    again = build("core", QUESTION, list(reversed(fixture_records())), tmp_path / "here" / "reports", **options)
    assert not again.written and again.top == first.top and first.index.stat().st_mtime_ns == page.st_mtime_ns
    (first.folder / "leaderboard.csv").unlink()  # a report that is not whole is made again
    assert build("core", QUESTION, fixture_records(), tmp_path / "here" / "reports", **options).written
    (first.folder / "runs" / f"{fixture_records()[0]['group']}.html").unlink()
    assert build("core", QUESTION, fixture_records(), tmp_path / "here" / "reports", **options).written
    assert build("core", QUESTION, fixture_records()[1:], tmp_path / "here" / "reports", **options).written

    class Resources(HTMLParser):
        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            if tag == "script":
                scripts.append(tag)
            for name, value in attributes:
                assert name not in ("src", "srcset", "data", "poster", "action"), (tag, name, value)
                assert tag == "a" or name != "href" or value == "data:,", (tag, name, value)

    scripts: list[str] = []
    for path in sorted(first.folder.rglob("*/*.html")):
        Resources().feed(path.read_text("utf-8"))
    scripts.clear()
    Resources().feed(first.index.read_text("utf-8"))
    assert scripts == ["script", "script"]  # the page's own, and its data
    for path in first.folder.rglob("*.html"):
        assert not re.search(r"url\((?!#)|@import", path.read_text("utf-8")), path


def test_suite_name_must_name_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot name a folder"):
        build("../x", QUESTION, [], tmp_path)


# ------------------------------------------------------------ hostile and broken records


class Texts(HTMLParser):
    """The tags of a page, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert not any(name.startswith("on") for name, _ in attributes), attributes

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.mark.parametrize("name", EVIL)
def test_hostile_text_is_shown_as_text(name: str) -> None:
    claim = {"method": name, "task": name, "epsilon": name, "metric": name, "value": 1, "source": name, "note": name}
    model = make(hostile(name), published=[claim], tuning={name: name})
    plain = make(hostile("plain"), published=[claim | dict.fromkeys(claim, "plain")], tuning={"plain": "plain"})
    shown = pages(model)
    page, other = Texts(), Texts()
    page.feed(shown["html"])
    other.feed(pages(plain)["html"])
    assert visible(name) in " ".join("".join(page.words).split())
    assert page.tags.count("script") == 2 and not {"img", "iframe", "object"} & set(page.tags)
    assert page.tags.count("svg") == other.tags.count("svg")
    assert visible(name) in {line["method"] for line in lines(model)}
    for kind in ("runs", "cards"):
        page, other = Texts(), Texts()
        page.feed(shown[kind])
        other.feed(pages(plain)[kind])
        assert sorted(page.tags) == sorted(other.tags), "a name has become markup"
    for kind, content in shown.items():
        content.encode("utf-8")  # no half surrogates
        assert not re.search(r"[\u202a-\u202e\u2066-\u2069\u200e\u200f\x1b\x00]", content), kind
    assert not re.search(r"<(?!\!doctype)[a-z]", re.sub(r"!\[[^]]*\]\([^)]*\)", "", shown["md"]))
    for line in shown["md"].splitlines():
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) in (11, 17), line
    for kind in ("csv", "published"):
        for row in csv.DictReader(io.StringIO(shown[kind])):
            for column, cell in row.items():
                assert not re.match(r"\s*[=+@]", cell), (column, cell)
                assert not cell.startswith("-") or isinstance(float(cell), float)
    figures.draw(model)


PATHS = [
    ".", "cell", "cell.method", "cell.method.name", "cell.method.label", "cell.method.parameters",
    "cell.method.parts", "cell.task", "cell.task.name", "cell.task.digest", "cell.task.evaluate",
    "cell.privacy", "cell.privacy.epsilon", "cell.privacy.delta", "cell.schedule",
    "cell.schedule.batch", "cell.numerics", "cell.seed", "card", "card.paper", "privacy",
    "privacy.planned", "privacy.spent", "privacy.spent.pld", "privacy.epsilon", "privacy.claimed",
    "privacy.noise_multiplier", "metrics", "metrics.accuracy", "measured",
    "measured.examples_per_second", "measured.examples_per_second.median", "measured.peak_memory_mib",
    "measured.jobs", "code", "code.commit", "device", "device.name", "device.kind",
    "device.fingerprint", "environment", "started", "finished", "id", "group", "status", "reason",
    "path", "stale", "suite",
]  # fmt: skip


@settings(max_examples=32, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.tuples(st.integers(0, 8), st.sampled_from([path.split(".") for path in PATHS]), st.booleans(), ODD),
        max_size=12,
    )
)
def test_missing_and_odd_fields_never_stop_a_report(edits: list[tuple[int, list[str], bool, Any]]) -> None:
    records = [
        *seeds("dp-sgd", [0.8, 0.82, 0.81]),
        *seeds("dp-adam", [0.7, 0.75, 0.74]),
        *seeds("non-private", [0.9, 0.91], epsilon=None),
        record("dp-lamb", status="diverged", reason="the loss is not finite"),
    ]
    for index, path, drop, value in edits:
        inner: Any = records[index]
        for key in path[:-1]:
            inner = inner.get(key) if isinstance(inner, dict) else None
        if isinstance(inner, dict):
            inner.pop(path[-1], None) if drop else inner.__setitem__(path[-1], value)
    model = make(records, published=PUBLISHED)
    for content in pages(model).values():
        content.encode("utf-8")
    assert sum(len(t.entries) for t in model.tables) >= 1
    assert {r.order for t in model.tables for e in (*t.entries, *t.references) for r in e.row.runs} == {
        r.order for r in model.runs
    }, "a run has fallen out of the tables"
    for panel in figures.accuracy_data(model):
        assert all(e > 0 for points in panel.series.values() for e, _ in points)


# ------------------------------------------------------------ the leaderboard's data


def test_the_leaderboard_holds_what_the_tables_hold() -> None:
    model = make(fixture_records())
    entries = [e for t in model.tables for e in (*t.entries, *t.references)]
    shown = lines(model)
    assert [r["title"] for r in shown] == [e.row.title for e in entries]
    for line, entry in zip(shown, entries, strict=True):
        accuracy, gap = entry.row.accuracy, entry.place.difference
        assert (line["accuracy"] is None) == (accuracy is None)
        if accuracy:
            assert line["accuracy"][0] == pytest.approx(accuracy.mean, abs=5e-7) and line["accuracy"][3] == accuracy.n
        if gap and not entry.baseline:
            assert line["difference"][:2] == pytest.approx([gap.mean, gap.low], abs=5e-7)
        spent = entry.row.epsilon
        assert line["spent"] == ("inf" if spent == math.inf else spent if spent is None else pytest.approx(spent))
        assert (line["rank"] is None) == (line["role"] == "reference" or entry.place.rank is None)
    sgd = next(r for r in shown if r["title"] == "dp-sgd")
    assert (sgd["role"], sgd["baseline"], sgd["at"]["task"]) == ("baseline", 1.0, "mnist1d/cnn-1d")
    automatic = next(r for r in shown if r["method"] == "automatic")
    assert automatic["failures"] == [["diverged", "the loss is not finite at step 118", 1]]
    assert next(r for r in shown if r["method"] == "modelmix")["stale"] == 1


def test_an_audit_stands_beside_its_method_and_epsilon_and_flags_what_it_refutes() -> None:
    records = [*seeds("dp-sgd", THREE), *seeds("dp-sgd", THREE, epsilon=1.0), *seeds("dp-adam", THREE)]
    found = [audit(), audit(epsilon_audited=2.0, task={"name": "other"}), audit(method="dp-lamb"), {"method": 3}]
    audited = {(r["method"], r["at"]["target"]): r["audited"] for r in lines(make(records), found)}
    assert audited["dp-sgd", 3.0] == [1.2, 0.95, "canaries", "mnist-5k/tanh-cnn", 0], "of its own task first"
    assert audited["dp-sgd", 1.0] is audited["dp-adam", 3.0] is None
    (elsewhere,) = [r for r in lines(make(records), found[1:]) if r["audited"]]
    assert elsewhere["audited"][3] == "other"
    (refuted,) = [r for r in lines(make(records), [audit(epsilon_audited=3.01)]) if r["audited"]]
    assert refuted["audited"][4] == 1
    assert "above the claim" in pages(make(records), [audit(epsilon_audited=3.01)])["cards"]
    claiming = seeds("dp-sgd", THREE)
    for one in claiming:
        one["privacy"]["claimed"] = {"epsilon": 1.1}  # under assumptions, which an audit refutes as well
    assert lines(make(claiming), [audit()])[0]["audited"][4] == 1


def test_a_claim_that_failed_says_so_where_its_number_would_stand() -> None:
    records = seeds("modelmix", THREE)
    for one in records:
        one["privacy"]["claimed"] = {
            "epsilon": None, "source": "arXiv:2210.03843", "failed": ["wide"],
            "assumptions": [{"text": "wide intervals", "holds": False, "why": "0.1 of them were narrow"}],
        }  # fmt: skip
    (line,) = lines(make(records))
    assert line["claimed"] is None and "failed: wide intervals (0.1 of them were narrow)" in line["claim"]
    assert "off (source: arXiv:2210.03843. failed: wide intervals" in pages(make(records))["runs"]


def test_a_published_value_is_not_held_against_a_method_with_other_parts() -> None:
    changed = seeds("dp-sgd", THREE, label="dp-sgd, averaged")
    for one in changed:
        one["cell"]["method"]["with"] = {"average": {"type": "EMA"}}
    assert verdict(changed, claim())[0] == "not comparable"
    assert verdict(changed, claim(method="dp-sgd, averaged"))[0] == "agrees", "by its label it is"
    assert verdict([*changed, *seeds("dp-sgd", [0.5, 0.6, 0.7], label="dp-sgd (lr=9)")], claim())[0] == "differs"


@given(st.floats(0.5, 0.99))
@settings(max_examples=20, deadline=None)
def test_what_would_change_a_verdict_does(value: float) -> None:
    (found,) = make(seeds("dp-sgd", THREE), published=[claim(value)]).published
    m, (amount,) = found.measured, re.findall(r"[\d.]+(?= points)", found.would_change)
    assert m is not None and m.low is not None and m.high is not None
    ends = sorted((abs(value - m.low), abs(value - m.high)))
    assert float(amount) == pytest.approx(100 * ends[0], abs=0.0051), "the nearer end of the interval"
    assert ("further" in found.would_change) == (found.verdict == "differs")


# ------------------------------------------------------------ traces and figures


def test_curves_and_the_time_to_an_accuracy_by_hand() -> None:
    records = [
        traced(record("dp-sgd", 0.90, 0), [0.5, 0.8, 0.902]),
        traced(record("dp-sgd", 0.92, 1), [0.7, 0.9, 0.92]),
        traced(record("dp-adam", 0.80, 0), [0.1, 0.2, 0.8]),
    ]
    model = make(records)
    (panel,) = figures.curves_data(model)
    assert [(e, i.mean, i.n) for e, i in panel.series["dp-sgd"]] == [
        (0.1, pytest.approx(0.6), 2), (0.2, pytest.approx(0.85), 2), (0.3, pytest.approx(0.911), 2)
    ]  # fmt: skip
    (clipped,) = figures.curves_data(model, "clipped")
    assert [i.mean for _, i in clipped.series["dp-adam"]] == pytest.approx([0.1, 0.2, 0.3])
    by_name = {r["title"]: r["reach"] for r in lines(model)}
    assert by_name == {"dp-sgd": 3.0, "dp-adam": "inf"}  # 99 % of .91: reached after 3 s by both seeds
    assert "not private to publish" in html.page(Content(model)) and "not private to publish" in pages(model)["runs"]
    assert "not private to publish" not in html.page(Content(make([record()]))), "no curve, no warning"


@given(st.lists(st.tuples(*[st.integers(0, 3)] * 3), max_size=12))
def test_the_front_is_what_nothing_dominates(costs: list[tuple[int, int, int]]) -> None:
    def dominated(i: int) -> bool:
        return any(all(a <= b for a, b in zip(c, costs[i], strict=True)) and c != costs[i] for c in costs)

    floats = [(float(a), float(b), float(c)) for a, b, c in costs]
    assert figures._front(floats) == {i for i in range(len(costs)) if not dominated(i)}


def test_a_chart_puts_values_in_their_order_and_says_them() -> None:
    dots = [plot.Dot(1.0, 5.0, "first"), plot.Dot(10.0, 7.0, "second", low=6.0, high=8.0), plot.Dot(100.0, 6.0, "<b>")]
    drawn = plot.chart({"a & b": dots}, plot.Axis("x", log=True), plot.Axis("y"), '"label"')
    found = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"[^>]*><title>([^<]*)', drawn)
    (x0, y0), (x1, y1), (x2, y2) = [(float(x), float(y)) for x, y, _ in found]
    assert x0 < x1 < x2 and x1 - x0 == pytest.approx(x2 - x1, abs=0.03), "a decade is as wide as the next"
    assert y1 < y2 < y0 and (y0 - y2) == pytest.approx((y2 - y1), abs=0.03), "up is more"
    assert [says for *_, says in found] == ["a &amp; b\nfirst", "a &amp; b\nsecond", "a &amp; b\n&lt;b&gt;"]
    assert "<b>" not in drawn and 'aria-label="&quot;label&quot;"' in drawn
    assert plot.chart({}, plot.Axis("x"), plot.Axis("y"), "nothing") == ""
    halves = plot.bars({"one": (1.0, "1×"), "half": (0.5, "0.5×")}, "bars", 1.0)
    assert re.findall(r"width:([\d.]+)%", halves) == ["100", "50"]


def test_the_page_draws_what_the_figures_hold() -> None:
    model = make(fixture_records())
    drawn = {d.name: d for d in drawings.of(model)}
    panel = next(p for p in figures.accuracy_data(model) if p.title == "mnist-5k/tanh-cnn")
    svg = dict(drawn["accuracy"].panels)[panel.title]
    assert svg.count("<circle") == sum(len(points) for points in panel.series.values())
    value = panel.series["dp-sgd"][1][1]
    assert f"dp-sgd\nε = 3: {100 * value.mean:.2f} %" in svg
    dot = drawings._dot(3.0, value, "")
    assert (dot.y, dot.low, dot.high) == (100 * value.mean, 100 * (value.low or 0), 100 * (value.high or 0))
    front = {c.title for _, choices in figures.pareto_data(model) for c in choices if c.front}
    assert "fast-clipping" in front and "dp-adam" not in front, "slower and less accurate at every epsilon"


def test_a_trace_is_read_beside_its_record_whatever_is_in_it(tmp_path: Path) -> None:
    one = record("dp-sgd", 0.9)
    results = tmp_path / "results"
    trace = results / "core" / one["id"] / "trace.jsonl"
    trace.parent.mkdir(parents=True)
    deep = b'{"step": 2, "loss": ' + b"[" * 100_000 + b"}"
    good = [
        b'{"step": 10, "seconds": 1.0, "accuracy": 0.5, "epsilon": 0.25, "loss": {"a": 1}}',
        b'{"step": 20, "epsilon": null}',
    ]
    trace.write_bytes(b"\n".join([b"nonsense", good[0], b"[]", deep, b'{"step": "x"}', good[1], b'{"step": 3']))
    folder = build("core", QUESTION, [one], tmp_path / "reports", private=True).folder
    page = (folder / "runs" / f"{one['group']}.html").read_text()
    assert page.count("<circle") == 1 and "step 10, 0.25: 50.00 %" in page
    trace.unlink()
    os.mkfifo(trace)  # reading it would wait for ever
    assert build("core", QUESTION, [one], tmp_path / "reports", private=True).written
    assert "<circle" not in (folder / "runs" / f"{one['group']}.html").read_text()


# ------------------------------------------------------------ the other pages


def test_a_card_says_what_the_source_says() -> None:
    parts = {"clip": {"type": "PSAC"}, "noise": {"type": "Gaussian"}, "path": {"type": "Nothing"}, "loss": 3}
    found = sources.describe([{"name": "dp-psac", "parts": parts}, {"name": "nobody's"}])
    assert found["methods"].keys() == {"dp-psac"} and found["parts"].keys() == {"PSAC", "Gaussian"}
    assert found["methods"]["dp-psac"]["parameters"]["r"] == ["float", "0.1"]
    records = [*seeds("dp-sgd", THREE), *seeds("dp-psac", [0.98, 0.99, 0.985], r=0.2)]
    for one in records[3:]:
        one["cell"]["method"]["parts"]["clip"] = {"type": "PSAC", "clip": 1.0, "r": 0.2}
        one["card"]["paper"] = "arXiv:2212.00328"
    model = make(records)
    cards = below.cards(Content(model, sources=found))
    card = cards["methods/dp-psac.html"]
    assert "sensitivity C." in card and found["parts"]["PSAC"][0][1].split("\n")[0].replace("/", "/") in card
    assert 'class="own"' in card and "eprint = {2212.00328}" in card
    assert ">wins<" in card and "1 wins" in card and ">loses<" not in card
    assert 'class="own"' not in cards["methods/dp-sgd.html"] and ">baseline<" in cards["methods/dp-sgd.html"]


def test_bibtex_is_made_of_the_id_alone() -> None:
    assert below.bibtex("a b", "doi:10.1/x", "Note {}\nmore") == "@misc{a-b,\n  doi = {10.1/x},\n  note = {Note }\n}"
    assert below.bibtex("x", "somewhere") == ""


def test_pages_of_rows_that_are_gone_are_removed_and_the_overview_follows(tmp_path: Path) -> None:
    folder = build("core", QUESTION, fixture_records(), tmp_path, private=True).folder
    build("other", "Why?", seeds("dp-sgd", THREE), tmp_path, private=True)
    every = {p.name for p in (folder / "runs").iterdir()}
    for line in lines(make(fixture_records())):
        assert (folder / line["href"]).is_file()
    mine = folder / "notes.html"
    mine.write_text("kept")
    kept = fixture_records()[:3]
    build("core", QUESTION, kept, tmp_path, private=True)
    left = {p.name for p in (folder / "runs").iterdir()}
    assert left == {f"{kept[0]['group']}.html"} and left < every and mine.exists()
    (tmp_path / "stray").mkdir()
    (tmp_path / "stray" / "index.html").write_text("not ours")
    path = overview(tmp_path)
    assert path is not None
    data = json.loads(path.read_text().partition(below.DATA)[2].partition("</script>")[0])
    assert [t["suite"] for t in data["tables"]] == ["core", "other"] and len(data["rows"]) == 2
    where = data["fields"].index("href")
    assert all((tmp_path / row[where]).is_file() for row in data["rows"])
    before = path.stat().st_mtime_ns
    assert overview(tmp_path) == path and path.stat().st_mtime_ns == before


def test_a_larger_folder_makes_more_data_and_no_more_markup() -> None:
    from tests import report_scale  # which imports this file

    def tags(n: int) -> int:
        page = Texts()
        page.feed(html.page(Content(board("scale", "", report_scale.records(n)))))
        return len(page.tags)

    assert tags(960) < 2 * tags(240) and tags(960) < 12_000


@pytest.mark.parametrize("records", [[], [{}], [{"status": "crashed"}], [record(accuracy=None)]])
def test_a_report_of_next_to_nothing(records: list[dict[str, Any]], tmp_path: Path) -> None:
    report = build("core", "", records, tmp_path / "reports", private=True)
    assert all((report.folder / name).stat().st_size or name.endswith(".csv") for name in FILES)
    assert text.top_rows(board("", "", records)) == report.top
