"""Checks are kept, shown beside the rows of their method, and are what the manual's tables are made of."""

import dataclasses
import functools
import inspect
import json
import shutil
import sys
from types import SimpleNamespace

import pytest

from harness import cli
from harness.records import checks
from harness.records.files import StoreError
from harness.report.model import checked
from harness.report.page import html
from harness.report.page import pages as below
from harness.report.page import payload as rows
from harness.verify import conformance, recorded
from harness.verify.circumstances import code_of
from tests.support import ROOT
from tests.support.report import make, seeds, staged

METHODS = '''
import dataclasses

from harness.dp import Flat, Method
from harness.registry import method

@dataclasses.dataclass(frozen=True)
class Half(Flat):
    """Declares half of its sensitivity."""

    def sensitivity(self, state, relation):
        return super().sensitivity(state, relation) {change}

@method("{name}-sound", paper="-", family="clipping")
def sound(clip: float = 1.0) -> Method:
    """As it should be."""
    return Method(clip=Flat(clip))

@method("{name}-faulty", paper="-", family="clipping")
def faulty() -> Method:
    """With a fault."""
    return Method(clip=Half(1.0))
'''
VERIFICATION = ROOT / "docs" / "verification.md"
CHEAP = (conformance.described, conformance.replaced, conformance.clip_rule, conformance.amended)


@pytest.fixture(autouse=True)
def cheap(monkeypatch):
    monkeypatch.setattr(conformance, "CHECKS", CHEAP)
    monkeypatch.setattr(sys.modules[conformance.Subject.__module__], "AGES", (3, 9))  # a thousand steps, elsewhere


def mine(folder, name, change="/ 2"):
    """A file with a sound method and a faulty one; names are registered once in a process."""
    file = folder / f"{name}.py"
    file.write_text(METHODS.format(name=name, change=change))
    return file


def said(capsys, *arguments):
    """Exit code and output of a command."""
    code = cli.main(list(arguments))
    return code, capsys.readouterr().out


# --- the command ---


def test_methods_of_a_users_file_are_checked_and_recorded(tmp_path, capsys):
    file, results = mine(tmp_path, "checked-mine"), tmp_path / "results"
    request = ["check", str(file), "--results", str(results)]
    code, out = said(capsys, *request)
    assert code == cli.FAILED
    failed, *others = [line for line in out.splitlines() if not line.startswith("checked-mine")]
    assert failed.startswith("FAILED  at any gradient norm") and others == []
    assert "must stay below" in failed and "look at: Clip.weights, Clip.sensitivity" in failed
    assert "checked-mine-sound: 3 of 4 checks apply, all hold, " in out
    assert "checked-mine-faulty: 3 of 4 checks apply, 1 FAILED, " in out

    found = {one["method"]: one for one in checks.load(results / "checks")}
    sound, faulty = found["checked-mine-sound"], found["checked-mine-faulty"]
    assert sound["parameters"] == {"clip": 1.0} and sound["parts"]["clip"] == {"type": "Flat", "clip": 1.0}
    assert (sound["relation"], sound["repeat"], sound["label"]) == ("add-or-remove", None, sound["method"])
    assert [line["function"] for line in sound["lines"]] == [each.__name__ for each in CHEAP]
    assert [line["applies"] for line in sound["lines"]] == [True, False, True, True]
    assert [line["function"] for line in checks.failing(faulty)] == ["clip_rule"]
    assert 0 < sum(line["seconds"] for line in sound["lines"]) <= sound["wall_seconds"]
    assert sound["cpu_seconds"] > 0 and {"commit", "dirty"} <= set(sound["code"])
    files = set(sound["code"]["files"])
    assert {"checked-mine.py", "harness/dp/clip/flat.py", "harness/verify/conformance/noise.py"} <= files
    assert files.isdisjoint({"harness/records/checks.py", "harness/verify/audits/command.py"})
    assert not any(file.startswith("harness/cli") for file in files)
    assert str(tmp_path) not in json.dumps(sound | {"path": ""}), "no path of the machine"


def test_what_says_the_same_needs_no_second_file(tmp_path, capsys, monkeypatch):
    file, results = mine(tmp_path, "checked-again"), tmp_path / "results"
    request = ["check", str(file), "--results", str(results)]
    said(capsys, *request)
    before = {path: path.read_bytes() for path in (results / "checks").iterdir()}
    code, out = said(capsys, *request)
    assert code == cli.FAILED and out.count("(recorded before)") == 2
    assert {path: path.read_bytes() for path in (results / "checks").iterdir()} == before
    file.write_text(file.read_text() + "\n\nLATER = 1\n")  # other code, the same parts
    _, out = said(capsys, *request)
    assert "(recorded before)" not in out
    after = {path: path.read_bytes() for path in (results / "checks").iterdir()}
    assert len(after) == 4 and before.items() <= after.items()
    assert {path.name for path in after if path not in before} == {f"{path.stem}.2.json" for path in before}
    monkeypatch.setattr(conformance, "CHECKS", CHEAP[:-1])  # another outcome
    said(capsys, *request)
    assert len(list((results / "checks").iterdir())) == 6


def test_a_single_method_is_shown_line_by_line(tmp_path, capsys):
    code, out = said(capsys, "check", "dp-sgd", "--results", str(tmp_path))
    *table, last = out.splitlines()
    assert code == cli.OK and len(table) == len(CHEAP) and all(line.startswith("ok  ") for line in table)
    assert "does not apply: its sampler claims" in table[1]
    assert last.startswith("dp-sgd: 3 of 4 checks apply, all hold, ")
    code, out = said(capsys, "check", "dp-sgd", "dp-adam", "--results", str(tmp_path))
    assert [line.split(":")[0] for line in out.splitlines()] == ["dp-sgd", "dp-adam"]
    assert "recorded before" in out.splitlines()[0] and "recorded before" not in out.splitlines()[1]


def test_requests_that_make_no_sense_are_refused(tmp_path, capsys):
    for arguments in ([], ["dp-sgd", "--docs", "x.md"]):
        assert cli.main(["check", *arguments, "--results", str(tmp_path / "none")]) == cli.USER_ERROR
    with pytest.raises(SystemExit) as end:
        cli.main(["check", "dp-sgd", "--repeat", "0", "--results", str(tmp_path / "none")])
    assert end.value.code == cli.USER_ERROR
    assert not (tmp_path / "none").exists()


def test_an_error_says_where_it_was_raised():
    def broken(s):
        raise KeyError("sigma")

    line = conformance.verdict(broken, conformance.subject(conformance.named("dp-sgd")[0].method))
    assert not line.ok and line.detail.startswith("KeyError: 'sigma'; raised in broken, test_checks.py:")


def test_every_check_says_what_to_look_at():
    functions = [one for one in vars(conformance).values() if inspect.isfunction(one)]
    assert set(conformance.WHERE) == {one for one in functions if list(inspect.signature(one).parameters) == ["s"]}
    assert set(conformance.WHERE) >= {*CHEAP, *conformance.STATISTICAL}


# --- repetitions ---


def alarming(s):
    """never two in a row"""
    if s.seed % 3 == 0:
        raise conformance.Violation("by chance")


def idle(s):
    """nothing to look at"""
    raise conformance.Inapplicable("it has none")


def test_repetitions_count_alarms(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(conformance, "STATISTICAL", (alarming, idle))
    code, out = said(capsys, "check", "dp-sgd", "--repeat", "7", "--results", str(tmp_path))
    assert code == cli.FAILED and "2 of 7 repetitions fail; seed 3: by chance" in out
    assert "dp-sgd: 7 repetitions of 1 statistical checks, seeds 1 to 7, 2 ALARMS" in out
    (made,) = checks.load(tmp_path / "checks")
    assert made["repeat"] == {"count": 7, "first": 1, "last": 7}
    assert [(line["failures"], line["applies"]) for line in made["lines"]] == [(2, True), (0, False)]
    shown = recorded.tables(tmp_path / "checks")
    assert "| method | repetitions | seeds | alarming | idle | s |" in shown["alarms"]
    assert "| dp-sgd | 7 | 1 to 7 | 2 | – |" in shown["alarms"]
    assert shown["times"] == "There is no record of this yet."


# --- what is kept ---


@functools.cache
def code(name):
    """The code of a method's check today."""
    (one,) = conformance.named(name)
    return code_of(one.method, one.file, "harness.verify.conformance")


def record(name="dp-sgd", ok=True, repeat=None, **changes):
    """A valid record by today's code."""
    facts = {
        "schema": 1, "kind": "check", "method": name, "label": name, "parameters": {"clip": 1.0},
        "parts": {"clip": {"type": "Flat"}, "engine": {"type": "Ghost"}}, "relation": "add-or-remove",
        "repeat": repeat and {"count": repeat, "first": 1, "last": repeat},
    }  # fmt: skip
    failures = None if repeat is None else 0 if ok else 1
    line = {"function": "billed", "name": "the ledger is the plan", "ok": ok, "detail": "" if ok else "name <it>",
            "applies": True, "seconds": 0.5, "failures": failures}  # fmt: skip
    other = line | {"function": "still", "name": "still", "ok": True, "detail": "", "seconds": 2.5, "failures": None}
    return facts | {
        "id": checks.identity(facts), "lines": [line, other], "wall_seconds": 3.21, "cpu_seconds": 4.5,
        "load_average": 1.25, "code": code(name) | {"commit": None, "dirty": None},
        "device": {"name": "CPU", "threads": 1}, "environment": {"torch": "2"}, "started": "2026-01-02T03:04:05+00:00",
    } | changes  # fmt: skip


def test_checks_are_written_once_and_damaged_ones_are_named(tmp_path):
    first = checks.write(tmp_path, record())
    second = checks.write(tmp_path, record(wall_seconds=9.0))
    assert [first.name, second.name] == [f"{record()['id']}.json", f"{record()['id']}.2.json"]
    (tmp_path / "notes.txt").write_text("no check")
    second.write_text(second.read_text().replace('"dp-sgd"', '"dp-adam"'))  # no longer what its id says
    found = checks.load(tmp_path)
    assert [one["path"] for one in found] == [str(first)]
    assert sorted(one.path.name for one in found.broken) == [second.name, "notes.txt"]


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "audit"}, {"schema": 2}, {"lines": []}, {"lines": [{"name": "x"}]}, {"load_average": "high"},
        {"lines": [record()["lines"][0] | {"ok": False}]}, {"code": {"hash": "0"}}, {"started": "today"},
        {"started": "2026-01-02T03:04:05"}, {"wall_seconds": float("inf")}, {"id": "0" * 12},
        {"repeat": {"count": 3, "first": 1, "last": 2}}, {"lines": [record()["lines"][0] | {"failures": 1}]},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_valid_check_is_not_written(tmp_path, change):
    one = record() | change
    if "repeat" in change:
        one["id"] = checks.identity(one)
    with pytest.raises(StoreError, match="not valid"):
        checks.write(tmp_path, one)
    assert list(tmp_path.iterdir()) == []


def write(folder, *records):
    for one in records:
        checks.write(folder, one)
    return checks.latest(checks.load(folder))


def test_a_failure_stands_until_the_code_changes(tmp_path):
    later, latest = "2026-01-03T00:00:00+00:00", "2026-01-04T00:00:00+00:00"
    (one,) = write(tmp_path / "a", record(ok=False), record(started=later))
    assert checks.failing(one) and not one["stale"]
    old = {"hash": "0" * 12, "files": record()["code"]["files"] | {"methods/dp_sgd.py": "0" * 12}}
    (one,) = write(tmp_path / "b", record(ok=False, code=old), record(started=later))
    assert not checks.failing(one) and not one["stale"]
    (one,) = write(tmp_path / "c", record(), record(ok=False, code=old, started=latest))
    assert not checks.failing(one) and not one["stale"], "today's code comes before what was tried later"
    (one,) = write(tmp_path / "d", record(code=old))
    assert one["stale"]


def test_many_repetitions_are_not_undone_by_few(tmp_path):
    few = record(repeat=2, started="2026-01-03T00:00:00+00:00")
    whole, again = write(tmp_path, record(repeat=200), few, record())
    assert (whole["repeat"], again["repeat"]["count"]) == (None, 200)


def test_a_check_is_stale_once_a_file_that_decided_it_changes(tmp_path, capsys):
    file, results = mine(tmp_path, "checked-stale"), tmp_path / "results"
    said(capsys, "check", str(file), "--results", str(results))
    found = checks.load(results / "checks")
    assert [checks.stale(one) for one in found] == [False, False]
    file.write_text(METHODS.format(name="checked-stale", change="/ 4"))
    assert [checks.stale(one) for one in found] == [True, True]
    file.write_text(METHODS.format(name="checked-stale", change="/ 2") + "# a remark\n")
    assert [checks.stale(one) for one in found] == [False, False]
    file.unlink()
    assert [checks.stale(one) for one in found] == [True, True]


# --- the manual ---

MANUAL = "a\n<!-- times -->\nEARLIER\n<!-- end of times -->\nb\n<!-- alarms -->\nEARLIER\n<!-- end of alarms -->\nc\n"


def test_tables_stand_between_their_markers(tmp_path, capsys):
    write(tmp_path / "checks", record(), record("dp-adam", ok=False), record(repeat=200))
    (tmp_path / "checks" / "notes.txt").write_text("no check")
    manual = tmp_path / "manual.md"
    manual.write_text(MANUAL)
    code, out = said(capsys, "check", "--tables", "--docs", str(manual), "--results", str(tmp_path))
    text = manual.read_text()
    assert code == cli.OK and "notes.txt" in out and "EARLIER" not in text
    assert [text.count(letter) for letter in ("a\n<!--", "\nb\n", "\nc\n")] == [1, 1, 1]
    assert "| dp-sgd | 2 of 2 | all hold | 3.2 | 4.5 | 1.2 | still 2.5, billed 0.5 |" in text
    assert "| dp-adam | 2 of 2 | FAILED: billed |" in text
    assert "2 methods, CPU, 1 thread; torch 2; 2026-01-02." in text
    assert f"| dp-sgd | 200 | 1 to 200 |{' – |' * len(conformance.STATISTICAL)} 3.2 |" in text
    manual.write_text(MANUAL.replace("<!-- alarms -->", ""))
    damaged = manual.read_text()
    code, _ = said(capsys, "check", "--tables", "--docs", str(manual), "--results", str(tmp_path))
    assert code == cli.USER_ERROR and manual.read_text() == damaged


def test_the_manual_has_the_markers(tmp_path):
    manual = tmp_path / "verification.md"
    shutil.copy(VERIFICATION, manual)
    recorded.write_tables(tmp_path / "none", manual)
    assert manual.read_text().count("There is no record of this yet.") == 2


def test_the_manual_names_every_check():
    text = VERIFICATION.read_text().partition("### Records")[0]
    named = {each.__name__ for each in conformance.WHERE}
    assert {name for name in named if f"`{name}" not in text} <= {
        name for name in named if name.startswith("within_sensitivity_")
    }


# --- the pages ---


def shown(*found, method="dp-sgd"):
    """Mark of the rows, and the pages of rows and cards, of a board of one method."""
    model = make(seeds(method, [0.7, 0.8, 0.9]))
    content = rows.Content(model, checked=checked.checks(found))
    page = html.page(content)
    data = json.loads(page.partition(below.DATA)[2].partition("</script>")[0])
    (row,) = data["rows"]
    return row[data["fields"].index("checked")], {
        "runs": "".join(below.run_pages(content).values()),
        "cards": "".join(below.cards(content).values()),
    }


def test_rows_and_cards_say_whether_the_method_is_checked():
    good, bad = record() | {"stale": False}, record(ok=False) | {"stale": False}
    again = record(repeat=200) | {"stale": False}
    mark, made = shown(good, again)
    assert mark[:2] == ["checked", "good"] and mark[2] == "2 of 2 checks that apply hold, 2026-01-02"
    assert '<span class="mark good">checked</span> 2 of 2 checks that apply hold, 2026-01-02.' in made["cards"]
    assert "200 repetitions of 2 statistical checks with fresh seeds raised no alarm, 2026-01-02." in made["cards"]
    assert "checked: 2 of 2 checks that apply hold" in made["runs"] and "FAILED" not in made["cards"]
    mark, made = shown(bad)
    assert mark[:2] == ["FAILED", "bad"] and "1 of 2 checks that apply hold" in mark[2]
    assert "Failed: the ledger is the plan" in mark[2] and "FAILED: 1 of 2" in made["runs"]
    assert made["cards"].count('<span class="mark bad">FAILED</span>') == 2 and "name &lt;it&gt;" in made["cards"]
    alarmed = record(ok=False, repeat=200)
    mark, made = shown(good, alarmed | {"stale": False})
    assert mark[:2] == ["FAILED", "bad"] and "raised 1 alarm, " in made["cards"]
    assert shown(good, alarmed | {"stale": True})[0][:2] == ["checked", "good"]
    mark, made = shown(good | {"stale": True})
    assert mark[:2] == ["check stale", "warn"] and "its code has changed since" in made["cards"]
    assert shown(bad | {"stale": True})[0][:2] == ["FAILED", "bad"]
    mark, made = shown(record("dp-adam") | {"stale": False})
    assert mark[:2] == ["not checked", "warn"] and "epsbench check dp-sgd" in made["cards"]


def test_a_row_of_two_stages_is_checked_where_both_methods_are():
    (row,) = [entry.row for table in make([staged(0), staged(1)]).tables for entry in table.entries]
    first, second = (record(name) | {"stale": False} for name in ("logit-dp", "dp-adam"))
    failed = record("dp-adam", ok=False) | {"stale": False}
    assert checked.of_row(checked.checks([first, second]), row).text == "checked"
    assert checked.of_row(checked.checks([first]), row).text == "not checked"
    mark = checked.of_row(checked.checks([first, failed]), row)
    assert mark.text == "FAILED" and "logit-dp: checked, 2 of 2" in mark.words and "then dp-adam: FAILED" in mark.words
    public = dataclasses.replace(row.first.stages[1], public=True)
    alone = dataclasses.replace(row.first, stages=(row.first.stages[0], public))
    assert checked.of_row(checked.checks([first]), SimpleNamespace(first=alone)).text == "checked"


def test_an_audit_of_one_stage_says_nothing_of_two():
    (two,) = [entry.row for table in make([staged(0)]).tables for entry in table.entries]
    audits = [rows.Audit("logit-dp", two.setting.epsilon, 3.0, 1.0, 0.99, "one-run", "mnist-5k/encoder")]
    one = SimpleNamespace(first=dataclasses.replace(two.first, stages=()), setting=two.setting)
    assert rows.audit_of(one, audits) == audits[0] and rows.audit_of(two, audits) is None


def test_parts_that_a_suite_put_in_place_were_not_checked():
    known = checked.checks([record() | {"stale": False}])
    parts = (("clip", "Flat(clip=0.5)"), ("engine", "Vmap"), ("path", "Path"))
    mark = checked.mark(known, "dp-sgd", parts)
    assert mark.text == "checked but for engine" and mark.kind == "warn" and "with engine Ghost" in mark.words
    assert checked.mark(known, "dp-sgd", parts[:1]).text == "checked"
