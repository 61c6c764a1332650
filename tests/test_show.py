"""What the commands say of a record and of a suite is what it is, and what they advise can be typed."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_store import make_record, put

from harness import cli
from harness.cli import checking, parser, selecting

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


def said(capsys: pytest.CaptureFixture[str], *request: str) -> str:
    assert cli.main(request) == cli.OK
    return " ".join(capsys.readouterr().out.split())


def test_show_tells_what_a_part_replaced_and_what_a_claim_rests_on(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = make_record()
    record["cell"]["method"]["with"] = {"clip": "automatic?gamma=0.01", "views": "views?views=4"}
    record["cell"]["method"]["parts"] = {
        "clip": {"type": "Automatic", "clip": 2.0, "inner": {"type": "Views", "views": 4}}
    }
    record["privacy"]["claimed"] = {
        "epsilon": 1.5, "source": "a paper", "failed": [],
        "assumptions": [{"text": "one draw a step", "holds": True, "why": None},
                        {"text": "nothing else is released", "holds": None, "why": "not seen"}],
    }  # fmt: skip
    put(Path("results"), record)
    shown = said(capsys, "show", record["id"])
    assert "dp-sgd(lr 0.5)" in shown  # its own clip was for the part that is not there
    assert "clip: automatic?gamma=0.01; views: views?views=4" in shown
    assert "Automatic(clip=2.0, inner=Views(views=4))" in shown
    assert (
        "epsilon 1.5; a paper holds: one draw a step not checked: nothing else is released (not seen)"
        in shown
    )


def test_the_command_that_repeats_a_run_names_its_files(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = make_record()
    record["code"]["files"] = {"mine.py": "a" * 12, "harness/train.py": "b" * 12}
    record["cell"]["method"]["name"] = "of-my-own"
    put(Path("results"), record)
    Path("elsewhere.toml").write_text(SUITE.format(name="core"))
    assert (
        f"epsbench run elsewhere.toml --only {record['id']} --results again --no-track --method mine.py"
        in said(capsys, "show", record["id"])
    )
    Path("suites/other-name.toml").write_text(SUITE.format(name="core") + '[reduced]\nwhy = "x"\n')
    assert selecting.suite_file("core") == (Path("suites/other-name.toml"), False)
    assert selecting.suite_file("core-reduced") == (Path("suites/other-name.toml"), True)
    options = parser.build_parser().parse_args(
        ["run", "a b.toml", "--reduced", "--method", "m.py", "--results", "r"]
    )
    assert selecting.again(options, "plan") == "epsbench plan 'a b.toml' --reduced --method m.py --results r"


def test_suites_are_found_by_name_wherever_they_are(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(Path("results"), make_record())
    put(Path("results"), make_record(1, suite="another"))
    assert "core 1 ok 1" in (shown := said(capsys, "status", "core")) and "another" not in shown
    body = SUITE.format(name="core") + REST
    Path("suites/core.toml").write_text(body)
    assert "1 runs of 1 settings" in said(capsys, "check", "core")  # as `check suites/core.toml`
    Path("suites/dp-sgd.toml").write_text(body)
    assert not checking._is_suite("nothing")
    assert not checking._is_suite("dp-sgd")  # a method of that name comes first


def test_ls_parts_lists_every_slot(capsys: pytest.CaptureFixture[str]) -> None:
    shown = said(capsys, "ls", "parts")
    for expected in ('clip: with = { clip = "NAME?OPTION=VALUE" }', "automatic", "views", "cosine", "warmup"):
        assert expected in shown
