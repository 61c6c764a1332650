"""What a shell completes: commands, options, suites, methods."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from harness import cli

BASH = shutil.which("bash")


def script(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(["completion", shell]) == cli.OK
    return capsys.readouterr().out


@pytest.mark.skipif(BASH is None, reason="there is no bash here")
def test_bash_completes_commands_suites_and_methods(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "epsbench.bash"
    file.write_text(script("bash", capsys))
    assert BASH is not None
    assert subprocess.run([BASH, "-n", str(file)], check=False, capture_output=True).stderr == b""
    (tmp_path / "suites").mkdir()
    for name in ("suites/core.toml", "mine.toml", "mine.py", "other.txt"):
        (tmp_path / name).touch()

    def completed(*words: str) -> set[str]:
        code = f"source {file}; COMP_WORDS=(epsbench \"$@\"); COMP_CWORD=$#; _shtab_epsbench; printf '%s\\n' "
        request = [BASH, "-c", code + '"${COMPREPLY[@]}"', "bash", *words]
        done = subprocess.run(request, cwd=tmp_path, capture_output=True, text=True, check=True)
        return set(done.stdout.split())

    assert completed("ru") == {"run"}
    assert completed("") >= set(cli.known())
    assert completed("run", "--re") == {"--reduced", "--results", "--retry", "--report", "--reports"}
    assert completed("run", "co") == {"suites/core.toml"}
    assert completed("plan", "m") == {"mine.toml"}
    assert completed("audit", "dp-sg") == {"dp-sgd"}
    assert completed("check", "mine") == {"mine.toml", "mine.py"}
    assert completed("check", "dp-sg") == {"dp-sgd"}


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells_have_a_script_too(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = script(shell, capsys)
    assert all(word in text for word in ("epsbench", "*.toml", "dp-sgd", *cli.known()))
