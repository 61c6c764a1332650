"""Words and places: no terminal, encoding or name of a file ends a command, or ends it later than at its check."""

from __future__ import annotations

import codecs
import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness import suite
from harness.dp import Method
from harness.dp.calibrate import calibrate
from harness.suite import SuiteError
from tests.support import ROOT

TEXT = """\
[suite]
name = "tiny"
question = "Größe → 苹果?"
[privacy]
epsilon = 3.0
delta = 1e-4
[train]
batch = 64
steps = 2
[[task]]
dataset = "digits"
model = "logistic"
[[method]]
name = "non-private"
label = "größe → ε 🙂"
"""


def test_ascii_terminals_show_what_they_can(tmp_path: Path) -> None:
    """Also in the workers, whose output is a file; and files are UTF-8 whatever the terminal is."""
    (tmp_path / "s.toml").write_text(TEXT, encoding="utf-8")
    commands = [["plan", "s.toml"], ["run", "s.toml", "--no-track", "--report"], ["status", "s.toml"]]
    main = "import sys\nfrom harness.cli import main\nif __name__ == '__main__':\n"
    main += f"    sys.exit(max(map(main, {commands})))\n"
    (tmp_path / "main.py").write_text(main)
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "EPSBENCH_NATIVE": "0", "PYTHONIOENCODING": "ascii", "LC_ALL": "C", "TERM": "dumb",
        "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0",
    }  # fmt: skip
    done = subprocess.run([sys.executable, "main.py"], cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()
    assert rb"gr\xf6\xdfe \u2192 \u03b5" in done.stdout and b"ok 1" in done.stdout
    written = [*(tmp_path / "results").rglob("*.json"), *(tmp_path / "reports").rglob("*.md")]
    assert written and all("größe" in file.read_text("utf-8") for file in written if file.name == "README.md")
    assert any("größe → ε 🙂" in file.read_text("utf-8") for file in written)


def test_a_byte_order_mark_is_no_mistake_and_other_encodings_are_named(tmp_path: Path) -> None:
    file = tmp_path / "s.toml"
    file.write_bytes(codecs.BOM_UTF8 + TEXT.encode())
    assert suite.load(file).question == "Größe → 苹果?"
    for encoding, expected in (("utf-16", r":1: is UTF-16, not UTF-8"), ("latin-1", r":3: is not UTF-8")):
        file.write_bytes(TEXT.replace("→ 苹果", "").replace("→ ε 🙂", "").encode(encoding))
        with pytest.raises(SuiteError, match=rf"s\.toml{expected} text; save it as UTF-8"):
            suite.load(file)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('name = "tiny"', f'name = "{"n" * 300}"', "2: .*has 300 letters; it names a folder, write 100 at most"),
        ('name = "tiny"', 'name = "audits"', "2: .*is a folder of results/ for other things"),
        ('name = "tiny"', 'name = "checks"', "2: .*is a folder of results/ for other things"),
        ('name = "tiny"', 'name = "throughput"', "2: .*is a folder of results/ for other things"),
        ('name = "tiny"', 'name = "con"', "2: .*is not allowed as the name of a folder on Windows"),
        ('name = "tiny"', 'name = "x-reduced"', "2: .*would be taken for a reduced profile"),
        ('name = "tiny"', 'name = "../up"', "2: .*lower-case letters, digits and dashes"),
        ('name = "tiny"', r'name = "a\u0000b"', "2: .*lower-case letters, digits and dashes"),
        ("größe → ε 🙂", r"a\nb", r"15: .*holds the control character '\\n'"),
        ("größe → ε 🙂", r"\u001b[2Jx", r"15: .*holds the control character '\\x1b'"),
        ("größe → ε 🙂", "  ", "15: .*is blank"),
        ('model = "logistic"', 'model = "logistic"\nname = "a\\tb"', r"13: .*holds the control character '\\t'"),
    ],
)  # fmt: skip
def test_names_that_no_folder_or_table_can_have_are_refused(old: str, new: str, message: str) -> None:
    with pytest.raises(SuiteError, match=rf"suite\.toml:{message}"):
        suite.parse(TEXT.replace(old, new))


def test_misspelt_published_values_are_reported_by_check(tmp_path: Path) -> None:
    row = '[[published]]\nmethod = "non-private"\ntask = "digits/logistic"\nvalue = 0.9\nsource = "x"\n'
    (tmp_path / "s.toml").write_text(TEXT + row + 'epsilon = 3.1\nmetric = "acuracy"\n', encoding="utf-8")
    with pytest.raises(SuiteError) as caught:
        suite.load(tmp_path / "s.toml", thorough=True)
    assert [(one.line, one.suggestion) for one in caught.value.problems] == [(21, None), (22, "accuracy")]


@pytest.mark.parametrize("target", [1e9, 1e15])
def test_targets_that_need_no_noise_have_a_message_of_their_own(target: float) -> None:
    with pytest.raises(ValueError, match=r"less noise than a multiplier of 0\.05.*write a smaller epsilon"):
        calibrate(Method(), 1000, 100, 20, target, 1e-4)


def test_a_folder_of_results_is_named_where_it_is_none(tmp_path: Path) -> None:
    """A path too long for the system is a problem of the suite's data, with its line."""
    long = TEXT.replace('"digits"', f'"npz:{"d" * 300}.npz"')
    with pytest.raises(SuiteError, match=r"suite\.toml:11: .*(too long|was not found)"):
        suite.parse(long).cells()
