"""What check says is fine can be trained: every model is built and tried, wherever it is from, before anything runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from harness import cli, models, suite
from harness.data import load
from harness.suite import SuiteError
from tests.support import ROOT

HEAD = """\
[suite]
name = "s"
question = "?"
seeds = 2
[privacy]
epsilon = 8.0
delta = 1e-3
[train]
batch = 64
steps = 2
"""
METHOD = '[[method]]\nname = "dp-sgd"\n'
UNFIT = """\
[[task]]
dataset = "digits"
model = "timm:resnet10t"
name = "batchnorm"
[[task]]
dataset = "digits"
model = "timm:resnet18x?norm_layer=groupnorm"
name = "misspelt architecture"
[[task]]
dataset = "digits"
model = "tanh-cnn-28"
name = "too small"
[[task]]
dataset = "digits"
model = "transformer"
name = "not tokens"
[[task]]
dataset = "mnist1d?n=100"
model = "resnet20"
name = "not images"
[[task]]
dataset = "digits"
model = "mlp"
name = "fine"
"""
THEN = (
    METHOD + 'label = "two"\ntasks = "fine"\nthen = { method = "non-private", dataset = "mnist1d?n=100", steps = 1 }\n'
)
EXPECTED = {
    13: 'task "batchnorm": module ".*" (BatchNorm2d)',
    17: 'no model "resnet18x". Did you mean "resnet18"?',
    21: "at least 18x18",
    25: "takes sequences [length] of token numbers",
    29: "examples of shape [1, 40]",
    41: '"then" on task "fine": the network mlp, made for examples of shape [1, 8, 8], does not take those of mnist1d',
}


def found_in(text: str, thorough: bool = True) -> dict[int, str]:
    Path("s.toml").write_text(text)
    try:
        suite.load("s.toml", thorough=thorough).cells()
    except SuiteError as error:
        return {one.line: one.message for one in error.problems}
    return {}


def test_check_reports_every_model_that_cannot_be_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All at once, each at its line; a run starts nothing either; what only plans or reports builds no model."""
    monkeypatch.chdir(tmp_path)
    text = HEAD + UNFIT + METHOD + THEN
    found = found_in(text)
    assert sorted(found) == sorted(EXPECTED)
    for line, words in EXPECTED.items():
        assert re.search(re.escape(words).replace(re.escape(".*"), ".*"), found[line]), found[line]
    assert found_in(text, thorough=False) == {}
    assert cli.main(["run", "s.toml", "--no-track"]) == cli.USER_ERROR
    said = capsys.readouterr().err
    assert all(f"s.toml:{line}:" in said for line in EXPECTED)
    assert not Path("results").exists()


def test_models_are_tried_beside_other_mistakes_and_each_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = found_in(HEAD + UNFIT + METHOD + "clip = -1\n")
    assert sorted(found) == [13, 17, 21, 25, 29, 35]
    built: list[str] = []
    build = models.build

    def counted(spec: str, *rest: object, **more: object) -> object:
        built.append(spec)
        return build(spec, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(models, "build", counted)
    fine = '[[task]]\ndataset = "digits"\nmodel = "mlp"\nname = "{}"\n'
    tasks = fine.format("one") + fine.format("two") + 'evaluate = "validation"\n'
    other = METHOD + 'label = "slow"\nlr = [0.1, 0.2]\n'
    assert found_in(HEAD + tasks + METHOD + other) == {} and built == ["mlp"]


OWN = """\
from torch import nn
from harness.registry import model

@model("careless")
def careless(input_shape: tuple[int, ...], classes: int, fault: str = "none") -> nn.Module:
    if fault == "raises":
        raise KeyError("width")
    if fault == "shape":
        return nn.Sequential(nn.Flatten(), nn.Linear(64, classes + 1))
    if fault == "nothing":
        return None
    if fault == "half":
        return nn.Sequential(nn.Flatten(), nn.Linear(64, classes)).bfloat16()
    if fault == "mixes":
        return nn.Sequential(nn.Flatten(), Mixes(), nn.Linear(64, classes))
    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))

class Mixes(nn.Module):
    def forward(self, x):
        return x - x.mean(0)
"""


def test_models_of_a_users_file_are_tried_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(OWN.replace("careless", "careless-one", 1))
    words = {
        "raises": "KeyError: 'width'", "shape": r"it should give one row per example, \[5, 10\]",
        "mixes": r"\(Mixes\) gives another output", "nothing": "gives NoneType: its function must return",
        "half": "has parameters in torch.bfloat16",
    }  # fmt: skip
    tasks = [f'[[task]]\ndataset = "digits"\nmodel = "careless-one?fault={one}"\n' for one in ("none", *words)]
    Path("s.toml").write_text(HEAD + "".join(tasks) + METHOD)
    with pytest.raises(SuiteError) as caught:
        suite.load("s.toml", files=["own.py"], thorough=True).cells()
    assert [one.line for one in caught.value.problems] == [16, 19, 22, 25, 28]
    for problem, pattern in zip(caught.value.problems, words.values(), strict=True):
        assert re.search(pattern, problem.message), problem.message
    Path("other.py").write_text("import nowhere_at_all\n" + OWN.replace("careless", "careless-two", 1))
    Path("s.toml").write_text(HEAD + tasks[0].replace("careless-one", "careless-two") + METHOD)
    with pytest.raises(SuiteError) as caught:
        suite.load("s.toml", files=["other.py"], thorough=True).cells()
    assert [(one.file, one.line) for one in caught.value.problems] == [("other.py", 1)]


def test_the_documented_model_and_data_work_in_every_command(tmp_path: Path) -> None:
    """In a process of its own, as users have it; the workers of the run load the file themselves."""
    page = (ROOT / "docs" / "adding-a-method.md").read_text()
    (code,) = [one for one in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "@dataset(" in one]
    (tmp_path / "mine.py").write_text(code)
    task = '[[task]]\ndataset = "waves"\nmodel = "two-layers?width=8"\n'
    (tmp_path / "s.toml").write_text(
        HEAD.replace("seeds = 2", "seeds = 1") + task + METHOD.replace("dp-sgd", "non-private")
    )
    own = ["s.toml", "--method", "mine.py"]
    commands = [
        ["check", *own], ["plan", *own], ["run", *own, "--no-track", "--report"], ["status", *own],
        ["pack", "s.toml"],
    ]  # fmt: skip
    main = "import sys\nfrom harness.cli import main\nif __name__ == '__main__':\n"
    main += f"    sys.exit(max(map(main, {commands})))\n"
    (tmp_path / "main.py").write_text(main)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "EPSBENCH_NATIVE": "0"}
    done = subprocess.run(
        [sys.executable, "main.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for words in ("nothing is wrong", "1 runs finished: ok 1", "done  1  ok 1", "1 records in"):
        assert words in done.stdout, done.stdout
    assert "stale" not in done.stdout
    (record,) = (tmp_path / "results" / "s").glob("*/record.json")
    held = json.loads(record.read_text())
    assert held["cell"]["task"]["dataset"] == "waves" and held["metrics"]["accuracy"] > 0
    assert any(name.endswith("mine.py") for name in held["code"]["files"])


def test_tokens_are_known_as_such() -> None:
    """Whole numbers from 0 that are used as they are: what says so is handed to the check of models."""
    assert load("digits").tokens is None and load("mnist1d?n=100").tokens is None


def test_tokens_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    monkeypatch.setenv("EPSBENCH_CACHE", str(tmp_path / "cache"))
    y = np.arange(20) % 2
    tokens = np.random.default_rng(0).integers(0, 500, (20, 7)).astype(np.float32)
    tokens[3, 2] = 499

    def known(x: np.ndarray, options: str = "") -> int | None:
        np.savez(tmp_path / "a.npz", x_train=x, y_train=y, x_test=x, y_test=y)
        return load(f"npz:{tmp_path / 'a.npz'}{options}").tokens

    assert known(tokens) == 500 and known(tokens, "?mean=1") is None
    tokens[3, 2] = 0
    assert known(tokens - 1) is None and known(tokens + 0.5) is None and known(tokens * 0) is None
