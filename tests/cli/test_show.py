"""What the commands say of a record and of a suite is what it is, and what they advise can be typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness import cli
from harness.cli import selecting
from harness.cli.commands import check as check_command
from harness.records import screen
from harness.records.cell import Cell
from tests.support.records import make_record, put
from tests.support.show import said

REST = """
[privacy]
epsilon = 1.0
delta = 1e-5
[train]
batch = 8
steps = 1
[[task]]
dataset = "digits"
model = "logistic"
[[method]]
name = "non-private"
"""
SUITE = '[suite]\nname = "{name}"\nquestion = "?"\n'


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "suites").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_show_prints_what_a_part_replaced_and_what_a_claim_rests_on(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = make_record()
    record["cell"]["method"]["with"] = {"clip": "automatic?gamma=0.01", "views": "views?views=4"}
    record["cell"]["method"]["parts"] = {
        "clip": {"type": "Automatic", "clip": 2.0, "inner": {"type": "Views", "views": 4}}
    }
    record["privacy"]["claimed"] = {
        "epsilon": 1.5, "source": "a paper", "failed": [],
        "assumptions": [{"text": "one draw a step", "holds": True, "why": ""},
                        {"text": "nothing else is released", "holds": None, "why": "not seen"}],
    }  # fmt: skip
    put(Path("results"), record)
    shown = said(capsys, "show", record["id"])
    assert "dp-sgd(lr 0.5)" in shown  # its own clip was for the part that is not there
    assert "clip: automatic?gamma=0.01; views: views?views=4" in shown
    assert "Automatic(clip=2.0, inner=Views(views=4))" in shown
    assert "epsilon 1.5; a paper holds: one draw a step not checked: nothing else is released (not seen)" in shown


def test_the_command_that_repeats_a_run_names_its_files(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = make_record()
    record["code"]["files"] = {"mine.py": "a" * 12, "harness/running/train.py": "b" * 12}
    record["cell"]["method"]["name"] = "of-my-own"
    put(Path("results"), record)
    Path("elsewhere.toml").write_text(SUITE.format(name="core"))
    assert f"epsbench run elsewhere.toml --only {record['id']} --results again --no-track --method mine.py" in said(
        capsys, "show", record["id"]
    )
    Path("suites/other-name.toml").write_text(SUITE.format(name="core") + '[reduced]\nwhy = "x"\n')
    assert selecting.suite_file("core") == (Path("suites/other-name.toml"), False)
    assert selecting.suite_file("core-reduced") == (Path("suites/other-name.toml"), True)
    options = cli.build_parser().parse_args(["run", "a b.toml", "--reduced", "--method", "m.py", "--results", "r"])
    assert selecting.again(options, "plan") == "epsbench plan 'a b.toml' --reduced --method m.py --results r"


def test_suites_are_found_by_name_wherever_they_are(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(Path("results"), make_record())
    put(Path("results"), make_record(1, suite="another"))
    assert "core 1 ok 1" in (shown := said(capsys, "status", "core")) and "another" not in shown
    body = SUITE.format(name="core") + REST
    Path("suites/core.toml").write_text(body)
    assert "1 runs of 1 settings" in said(capsys, "check", "core")  # as `check suites/core.toml`
    Path("suites/dp-sgd.toml").write_text(body)
    assert not check_command._is_suite("nothing")
    assert not check_command._is_suite("dp-sgd")  # a method of that name comes first


def test_ls_parts_lists_every_slot(capsys: pytest.CaptureFixture[str]) -> None:
    shown = said(capsys, "ls", "parts")
    for expected in ('clip: with = { clip = "NAME?OPTION=VALUE" }', "automatic", "views", "cosine", "warmup"):
        assert expected in shown


HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202ecba\u2028\r"


def test_no_command_prints_what_a_terminal_would_obey(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every text of a record may hold anything; whatever a command says of it or writes, none of that is raw."""
    for seed, status in ((0, "ok"), (1, "crashed"), (2, "diverged")):
        record = make_record(seed, status, reason=None if status == "ok" else HOSTILE, card={"summary": HOSTILE})
        record["cell"]["method"]["label"] = record["cell"]["task"]["name"] = f"dp {HOSTILE}"
        record["cell"]["method"]["parameters"]["lr"] = HOSTILE
        record["privacy"] |= {"sampling": HOSTILE, "public_data": HOSTILE, "planned": {HOSTILE: 1.0}}
        record["privacy"]["accounting"] = {HOSTILE: HOSTILE}
        record["device"]["name"] = HOSTILE
        record["code"] |= {"commit": HOSTILE}
        record["measured"] |= {"engine": HOSTILE}
        record["metrics"][HOSTILE] = 1.0
        cell = Cell.from_canonical(record["cell"], suite="core")
        record |= {"id": cell.id, "group": cell.group}
        put(Path("results"), record)
        put(Path("there"), record | ({} if status == "ok" else {"reason": HOSTILE * 2}), 2)
    broken = Path("results/core/0123456789ab")
    broken.mkdir()
    (broken / "record.json").write_text(json.dumps({"schema": 1, "status": HOSTILE}))
    told = ""
    for request in (
        ["show", f"core/{record['id']}"], ["show", f"core/{record['id']}", "--json"], ["status"], ["status", "core"],
        ["merge", "there"], ["pack", "results", "-o", "all.zip"], ["report"],
        ["compare", "results", "there", "--markdown", "c.md", "--json", "c.json"],
    ):  # fmt: skip
        cli.main(request)
        found = capsys.readouterr()
        told += found.out + found.err
        if "--json" in request and request[0] == "show":
            assert json.loads(found.out)["reason"] == HOSTILE
    written = [file for folder in ("reports", ".") for file in Path(folder).rglob("*") if file.suffix in
               (".md", ".csv", ".html", ".tex", ".svg")]  # fmt: skip
    assert any(file.suffix == ".html" for file in written) and any(file.suffix == ".csv" for file in written)
    for text in (told, *(file.read_text("utf-8") for file in written)):
        assert not set(text) & set("\x1b\x07\x9b\u202e\u2028\r")
    assert "\\u001b]0;owned\\u0007" in told


def test_what_a_terminal_draws_with_is_not_written_out() -> None:
    """Letters of every script, ends of lines and tabs are as they were."""
    kept = "Grüße, ε = 3\t日本語 ± 0.41 – 1\u00a0000\n"
    assert screen.plain(kept) == kept
    assert screen.plain("\U000e0041\x7f") == "\\udb40\\udc41\\u007f"  # as JSON has them
