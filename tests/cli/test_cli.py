"""The command line: quick without torch, errors that say what to write, and one suite from start to leaderboard."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from harness import cli, suite
from harness.cli import selecting
from harness.records import store
from tests.support import ROOT
from tests.support.records import record_of

TINY = """
[suite]
name = "tiny"
question = "Does it run?"
seeds = 2
[privacy]
epsilon = [1.0, 8.0]
delta = 1e-5
[train]
batch = 128
steps = 4
[[task]]
dataset = "digits"
model = "logistic"
[[method]]
name = "non-private"
[[method]]
name = "dp-sgd"
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a suite in it and nothing else."""
    (tmp_path / "suites").mkdir()
    (tmp_path / "suites" / "tiny.toml").write_text(TINY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


def python(code: str, home: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=home, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def commands(*requests: list[str], home: Path) -> subprocess.CompletedProcess[str]:
    """Run commands in one process of its own; stderr names the heavy modules imported after the first."""
    return python(
        f"""
import sys
from harness.cli import main

if __name__ == "__main__":
    for number, request in enumerate({list(requests)!r}):
        code = main(request)
        if number == 0:
            print([m for m in ("torch", "mlflow", "matplotlib") if m in sys.modules], file=sys.stderr)
        if code:
            sys.exit(code)
""",
        home,
    )


@pytest.mark.parametrize("arguments", [["ls"], ["ls", "methods"], ["--help"], ["run", "--help"]])
def test_ls_and_help_import_nothing_heavy(arguments: list[str], home: Path) -> None:
    code = (f"import sys; from harness.cli import main\ntry: main({arguments!r})\nexcept SystemExit: pass\n"
            "heavy = {'torch', 'numpy', 'pydantic', 'mlflow', 'rich', 'jinja2'} & set(sys.modules)\n"
            "assert not heavy, heavy")  # fmt: skip
    done = python(code, home)
    assert done.returncode == 0, done.stderr
    assert "dp-sgd" in done.stdout or "examples" in done.stdout or "a first look" in done.stdout


def test_every_command_teaches_by_example(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in cli.known():
        with pytest.raises(SystemExit) as end:
            cli.main([verb, "--help"])
        text = capsys.readouterr().out
        assert end.value.code == 0
        assert "examples:" in text and f"epsbench {verb}" in text and "exit codes:" in text


def test_a_user_error_says_what_where_and_what_to_write(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "broken.toml").write_text(TINY.replace("dp-sgd", "dp-sdg").replace("[train]", "[trian]"))
    (home / "syntax.toml").write_text("[suite\n")
    (home / "empty.py").write_text("x = 1\n")
    (home / "file").touch()
    errors = {
        "rnu suites/tiny.toml": 'no command "rnu".*Did you mean "run"',
        "run suites/tinny.toml": 'no such suite.*suites/tiny.toml.*Did you mean "tiny"',
        "run broken.toml": r'(?s)broken.toml:\d+: .*trian.*broken.toml:\d+: .*Did you mean "dp-sgd"',
        "check syntax.toml": r"syntax.toml:1: ",
        "check dp-sdg": 'Did you mean "dp-sgd"',
        "check missing.py": "missing.py: no such file",
        "check empty.py": "holds no method; mark a function",
        "plan tiny --method no.py": "no.py: no such file",
        "plan tiny --only dp-sdg": 'matches no run.*Did you mean "dp-sgd"',
        "plan tiny --only eps=2": "the suite has eps inf, 1, 8; write eps=VALUE",
        "plan tiny --only non-private eps=8": "no run matches all of them",
        "run tiny --reduced": r"suites/tiny.toml:1: the suite has no reduced profile; write one, as \[reduced\]",
        "check dp-sgd --reduced": "--reduced: dp-sgd is a method; it is for suites",
        "status --reduced": "the profile of which suite",
        "run tiny --device cuda:99": "this machine has .* CUDA devices; write --device",
        "run tiny --no-track --results file": "file",
        "show 123": "no record under results has this id",
        "show xyz": "not an id",
        "merge nowhere": "nowhere: no such folder",
        "merge suites": "holds no <suite>/<id>/record.json",
        "report": "holds no records",
        "report tiny": "holds no records",
        "track": "results: no such folder",
    }
    for request, expected in errors.items():
        code = cli.main(request.split())
        said = capsys.readouterr().err
        assert code == cli.USER_ERROR and re.search(expected, said), f"{request}: {code}: {said}"
        assert "Traceback" not in said
    with pytest.raises(SystemExit) as end:
        cli.main(["run", "tiny", "--device", "gpu"])
    assert end.value.code == cli.USER_ERROR and 'write "cpu" or "cuda:0"' in capsys.readouterr().err
    assert not (home / "results").exists()  # nothing was begun


def test_only_selects_by_kind(home: Path) -> None:
    cells = suite.load("suites/tiny.toml").cells()

    def only(patterns: str) -> list[str]:
        return [cell.id for cell in selecting._only(cells, patterns.split())]

    every = [cell.id for cell in cells]
    assert len(every) == 6
    assert only("digits/*") == only("non-private dp-sgd") == only("seed=0 seed=1") == every
    assert len(only("dp-sgd")) == 4
    assert len(only("dp-sgd eps=8.0")) == 2
    assert len(only("dp-sgd non-private eps=inf eps=8 seed=1")) == 2
    assert only(every[3][:6]) == [every[3]]


@pytest.mark.slow
def test_a_suite_from_nothing_to_leaderboard(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a method of one's own in it, which is known by its file only."""
    (home / "mine.py").write_text((ROOT / "methods" / "dp_sgd.py").read_text().replace('"dp-sgd"', '"mine"'))
    (home / "suites" / "tiny.toml").write_text(TINY + '[[method]]\nname = "mine"\nlr = 0.5\n')
    assert cli.main(["check", "suites/tiny.toml"]) == cli.USER_ERROR
    assert 'no method is called "mine"' in capsys.readouterr().err
    chosen = ["tiny", "--method", "mine.py", "--only", "mine", "non-private", "eps=8", "eps=inf", "seed=0"]
    request = ["run", *chosen, "--report"]
    first = commands(request, home=home)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "2 to run" in first.stdout and "[2/2] ok" in first.stdout and "ok 2" in first.stdout
    assert "leaderboard: reports/tiny/index.html" in first.stdout and (home / "reports/tiny/index.html").exists()
    assert re.search(r"rank +method +accuracy", first.stdout)  # the top rows
    records = store.load(home / "results")
    assert len(records) == 2 and not records.broken
    for record in records:
        assert store.cell_of(record).id == record["id"] and record["status"] == "ok"
        assert "path" not in json.loads(Path(record["path"]).read_text())
        folder = Path(record["path"]).parent
        assert sorted(path.name for path in folder.iterdir()) == ["env.json", "record.json", "trace.jsonl"]
    assert (home / "mlflow.db").exists()

    before = {path: path.stat().st_mtime_ns for path in home.rglob("*") if path.is_file()}
    again = commands(request, ["plan", *chosen], home=home)
    assert again.returncode == 0 and "nothing to run" in again.stdout, again.stdout + again.stderr
    assert "leaderboard: reports/tiny/index.html" in again.stdout
    assert again.stderr.splitlines()[-1] == "['torch']"  # neither MLflow nor matplotlib
    assert again.stdout.count("done, ok") == 3 and "nothing is left" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in home.rglob("*") if path.is_file()} == before

    def said(*arguments: str) -> str:
        assert cli.main(arguments) == cli.OK
        return capsys.readouterr().out

    one = records[0]
    shown = said("show", one["id"][:8])
    assert one["id"] in shown and f"--only {one['id']} --results again" in shown
    assert json.loads(said("show", f"tiny/{one['id']}", "--json"))["id"] == one["id"]
    assert "tiny   2     ok 2" in said("status")
    assert "2 records added to all" in said("merge", "results", "--results", "all")


REDUCED = """
[reduced]
why = "one run"
seeds = [1]
epsilon = 0.5
[[reduced.task]]
dataset = "digits"
model = "logistic"
batch = 64
steps = 2
"""


def test_a_reduced_profile_has_results_of_its_own(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every command that takes a suite takes the profile; what it advises is about the profile."""
    (home / "suites" / "tiny.toml").write_text(TINY + REDUCED)
    for verb, expected in {
        "check": "2 runs of 2 settings",
        "plan": r"digits/logistic \(reduced\).*2 runs of suite tiny-reduced: missing 2",
        "status": "suite tiny-reduced: 2 runs.*epsbench run tiny --reduced",
    }.items():
        assert cli.main([verb, "suites/tiny.toml" if verb == "check" else "tiny", "--reduced"]) == cli.OK
        said = capsys.readouterr().out
        assert re.search(expected, said, re.DOTALL), said
    assert selecting.suite_file("tiny-reduced") == (Path("suites/tiny.toml"), True)
    assert selecting.suite_file("tiny") == (Path("suites/tiny.toml"), False)
    (home / "suites" / "tiny.toml").write_text(TINY)
    assert selecting.suite_file("tiny-reduced") == (None, False)


@pytest.mark.slow
def test_a_reduced_run_says_so_in_its_report(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "suites" / "tiny.toml").write_text(TINY + REDUCED)
    request = ["run", "tiny", "--reduced", "--only", "eps=0.5", "--no-track", "--report"]
    assert cli.main(request) == cli.OK
    assert cli.main(["report"]) == cli.OK  # found by the name of the results' folder
    assert capsys.readouterr().out.count("leaderboard: reports/tiny-reduced/index.html") == 2
    (record,) = store.load(home / "results")
    assert (record["suite"], record["cell"]["seed"], record["status"]) == ("tiny-reduced", 1, "ok")
    page = (home / "reports" / "tiny-reduced" / "leaderboard.md").read_text()
    assert "reduced: one run" in page.split("## ")[0]
    assert cli.main(["show", record["id"]]) == cli.OK
    assert f"epsbench run suites/tiny.toml --reduced --only {record['id']}" in capsys.readouterr().out


def test_failures_end_with_exit_code_1_and_stale_ones_are_listed(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = suite.load("suites/tiny.toml").cells()
    for number, cell in enumerate(cells):
        record = record_of(cell, "tiny", "crashed" if number == 0 else "ok", code={"hash": "0" * 12})
        store.write_record(home / "results" / "tiny" / cell.id, record)
    assert cli.main(["run", "tiny", "--no-track"]) == cli.FAILED
    said = capsys.readouterr().out
    assert "5 are stale and kept (--stale runs them again); 1 failed (--retry runs them again)" in said
    assert f"stale: {cells[1].id}" in said and "for the test" in said
    assert cli.main(["status", "tiny"]) == cli.FAILED
    said = capsys.readouterr().out
    assert "epsbench run tiny --stale" in said and "epsbench run tiny --retry" in said
    assert cli.main(["status"]) == cli.FAILED
