"""All that is wrong with a suite and the user's files is told at once, each thing once, and nothing that follows."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness import cli, registry, suite
from harness.suite import SuiteError

HEAD = """\
[suite]
name = "s"
question = "?"
[privacy]
epsilon = [1.0, 8.0]
delta = 1e-5
[train]
batch = 64
steps = 10
"""
TASK = '[[task]]\ndataset = "digits"\nmodel = "mlp"\n'
MANY = """\
[suite]
name = "many"
question = "How many mistakes?"
seeds = 0
[privacy]
epsilon = [0, 3.0]
delta = 1e-5
accountant = "prv"
[train]
batch = "ful"
epochs = 2
[trian]
[[task]]
name = "one"
dataset = "digitz"
model = "mlp"
[[task]]
name = "two"
dataset = "digits"
model = "mlpp"
[[task]]
name = "three"
dataset = "mnist1d?nn=3"
model = "mlp?widht=3"
[[task]]
name = "four"
dataset = "features:digits?backbone=scatering"
model = "logistic"
[[task]]
name = "five"
dataset = "npz:nowhere.npz"
model = "logistic"
[[task]]
name = "five again"
dataset = "npz:nowhere.npz"
model = "mlp"
[[method]]
name = "dp-sdg"
with = { clip = "automatc", path = "sharp?rho=far", optimizer = "adam?lr=-1" }
then = { method = "non-private?lr=fast", dataset = "cifar100x", epcohs = 3, trains = "al" }
[[method]]
name = "dp-sgd"
clpi = [1.0, 2.0]
lr = "fast"
[[method]]
name = "dp-sgd"
label = "another"
clip = -1
lr = [0.5, 1.0]
[[method]]
name = "dp-adam"
label = "same"
[[method]]
name = "dp-adam"
label = "same"
lr = 0.02
[[method]]
name = "dp-sgd"
label = "staged"
then = { method = "non-private", dataset = "digits", epochs = 1 }
[[method]]
name = "dp-sgd"
label = "private then not"
batch = 3
then = { method = "non-private", epochs = 1 }
[[device]]
device = "gpu"
[budget]
seconds = "long"
[tuning]
data = "x"
protocol = "y"
tries = 3
[[published]]
method = "dp-sgdd"
task = "sevn"
metric = "accuracy"
value = 0.9
source = "nowhere"
[reduced]
seeds = 0
[reduced.train]
batch = 8
steps = 0
"""
FOUND = [
    (4, "[suite] seeds = 0", None),
    (6, "[privacy] epsilon = 0", None),
    (8, '[privacy] accountant = "prv"', None),
    (10, '[train] batch = "ful"', "full"),
    (12, 'a suite has no table "trian"', "train"),
    (15, 'no dataset is called "digitz"', "digits"),
    (20, 'no model is called "mlpp"', "mlp"),
    (23, 'dataset "mnist1d" has no parameter "nn"', "n"),
    (24, 'model "mlp" has no parameter "widht"', None),
    (27, "there is no backbone scatering; write efficientnet-lite0, scattering", None),
    (31, 'data set "npz:nowhere.npz" was not found', None),
    (38, 'no method is called "dp-sdg"', "dp-sgd"),
    (39, 'method "dp-sdg" cannot take optimizer = "adam?lr=-1.0', None),
    (39, 'no clip is called "automatc"', "automatic"),
    (39, 'path "sharp", parameter "rho": "far" does not fit', None),
    (40, '[method.then] has no key "epcohs"', "epochs"),
    (40, '[method.then] trains = "al"', "all"),
    (40, 'method "non-private", parameter "lr": "fast" does not fit', None),
    (40, 'no dataset is called "cifar100x"', "cifar100"),
    (43, 'method "dp-sgd" has no parameter "clpi"', "clip"),
    (44, 'method "dp-sgd", parameter "lr": "fast" does not fit', None),
    (45, 'method "dp-sgd" cannot be built: clipping norm must be positive', None),
    (53, 'two methods are labelled "same" (the other on line 50)', None),
    (60, '"then": digits is the private data of task "two"', None),
    (64, 'method "dp-sgd" has no parameter "batch"', None),
    (67, '[[device]] device = "gpu"', None),
    (69, '[budget] seconds = "long"', None),
    (73, '[tuning] "tries" is for a search on private data', None),
    (75, '[[published]] method "dp-sgdd" is not in this suite', "dp-sgd"),
    (76, '[[published]] task "sevn" is not in this suite', None),
    (80, '[reduced] needs "why"', None),
    (81, "[reduced] seeds = 0", None),
    (84, "[reduced.train] steps = 0", None),
]  # fmt: skip


def problems(text: str, file: str = "s.toml") -> list[tuple[int, str]]:
    """Lines and messages, of a suite that is wrong, whether reading or building tells."""
    with pytest.raises(SuiteError) as caught:
        suite.parse(text, file).cells()
    return [(one.line, one.message) for one in caught.value.problems]


def test_thirty_mistakes_are_told_in_one_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("many.toml").write_text(MANY)
    with pytest.raises(SuiteError) as caught:
        suite.load("many.toml")
    found = caught.value.problems
    assert [one.line for one in found] == [line for line, _, _ in FOUND]
    for one, (line, start, word) in zip(found, FOUND, strict=True):
        assert one.message.startswith(start), line
        assert one.suggestion == word, line
    assert cli.main(["check", "many.toml"]) == cli.USER_ERROR
    shown = capsys.readouterr().err
    assert all(shown.count(f"many.toml:{line}: {start}") == 1 for line, start, _ in FOUND)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # A misspelt table, key or name stands for what was meant.
        (HEAD.replace("[train]", "[trian]") + TASK + '[[method]]\nname = "dp-sgd"\n', [7]),
        (HEAD + TASK.replace("[[task]]", "[[tsak]]") + '[[method]]\nname = "dp-sgd"\n', [10]),
        (HEAD.replace("question", "qestion") + TASK + '[[method]]\nname = "dp-sgd"\n', [3]),
        (HEAD.replace("steps", "stesp") + TASK + '[[method]]\nname = "dp-sgd"\n', [9]),
        (HEAD + TASK.replace("digits", "digist") + '[[method]]\nname = "dp-sgd"\ntasks = "digits/*"\n', [11]),
        (HEAD + TASK + '[[method]]\nname = "dp-sdg"\n[[published]]\nmethod = "dp-sgd"\ntask = "digits/mlp"\n'
         'metric = "accuracy"\nvalue = 1.0\nsource = "x"\n', [14]),
        (HEAD + TASK + '[[method]]\nname = "dp-sgd"\nwith.clip = "flta"\n[[published]]\nmethod = "dp-sgd, clip: flat"\n'
         'task = "digits/mlp"\nmetric = "accuracy"\nvalue = 1.0\nsource = "x"\n', [15]),
        (HEAD + TASK + '[[method]]\nname = "dp-sgd"\ntaks = "*"\n', [15]),
        # One value, one mistake, wherever it is written and whatever stands beside it.
        (HEAD.replace("64", '"ful"') + TASK + '[[method]]\nname = "dp-sgd"\n', [8]),
        (HEAD + TASK + 'batch = "ful"\n[[method]]\nname = "dp-sgd"\n', [13]),
        (HEAD + TASK + '[[method]]\nname = "dp-sgd"\ntrain = { batch = "ful" }\n', [15]),
        (HEAD + TASK + '[[method]]\nname = "dp-sgd"\nthen = { method = "dp-sgd", epochs = "x" }\n', [15]),
        (HEAD.replace("1e-5", "2") + TASK + '[[method]]\nname = "adaptive"\ncount_noise = 1.0\n', [6]),
    ],
)  # fmt: skip
def test_what_only_follows_is_not_told(text: str, expected: list[int]) -> None:
    assert [line for line, _ in problems(text)] == expected


def test_building_tells_of_what_is_sound_beside_what_is_not() -> None:
    """No task, no target and no name needs to be right for the values of the others to be looked at."""
    text = HEAD.replace("1e-5", "2") + TASK.replace("digits", "nowhere") + '[[method]]\nname = "dp-sgd"\nclip = -1\n'
    text += '[[method]]\nname = "dp-sdg"\nwith.clip = ["flat", "psac?r=-1"]\n'
    text += '[[method]]\nname = "dp-sgd"\nlabel = "x"\nthen = { method = "dp-sgd?clip=-2", epochs = 1 }\n'
    text += '[[method]]\nname = "non-private"\nepsilon = 1.0\n'
    found = problems(text)
    assert [line for line, _ in found] == [6, 11, 13, 17, 18, 22, 25]
    assert "clip = -1.0" in found[2][1] and "r must be positive" in found[4][1]
    assert "clip = -2.0" in found[5][1] and 'leave "epsilon" out' in found[6][1]
    twice = '[[method]]\nname = "dp-sgd"\nclip = -1\n[[method]]\nname = "dp-sgd"\nclip = -1\nlabel = "x"\n'
    assert [line for line, _ in problems(HEAD + TASK + twice)] == [13, 16, 16]  # and twins


def test_files_that_are_not_here_are_wrong_where_they_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All is known of CIFAR-10 without its files: plans and reports need none, a check says what a run would miss."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EPSBENCH_DATA", str(tmp_path))
    monkeypatch.delenv("EPSBENCH_DOWNLOAD", raising=False)
    task = '[[task]]\ndataset = "cifar10"\nmodel = "logistic"\n'
    text = f'{HEAD}{TASK}{task}name = "a"\n{task}name = "b"\nbatch = 32\n[[method]]\nname = "dp-sgd"\n'
    Path("s.toml").write_text(text)
    assert len(suite.load("s.toml").cells()) == 6
    with pytest.raises(SuiteError) as caught:
        suite.load("s.toml", thorough=True).cells()
    (one,) = caught.value.problems
    assert one.line == 14 and one.message.startswith('data set "cifar10" was not found')
    Path("s.toml").write_text(text.replace('"dp-sgd"', '"dp-sdg"'))
    with pytest.raises(SuiteError) as caught:
        suite.load("s.toml", thorough=True)
    assert [one.line for one in caught.value.problems] == [14, 23]


def method(name: str, body: str = "return Method()") -> str:
    return f'@method("{name}")\ndef {name.replace("-", "_")}() -> Method:\n    {body}\n'


IMPORTS = "from harness.dp import Method\nfrom harness.registry import method\n"


def test_what_is_wrong_with_the_users_files_is_told_with_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each file once and at its line, however many methods of it the suite names."""
    monkeypatch.chdir(tmp_path)
    Path("syntax.py").write_text(IMPORTS + method("mine-a") + "x = = 1\n")
    Path("missing.py").write_text(IMPORTS + "import nothing_of_this_name\n" + method("mine-b"))
    Path("twice.py").write_text(IMPORTS + method("dp-sgd") + method("mine-c"))
    Path("odd.py").write_text(IMPORTS + method("mine-d").replace("mine_d()", "mine_d(x)"))
    used = "".join(f'[[method]]\nname = "mine-{letter}"\n' for letter in "abcd")
    Path("s.toml").write_text(HEAD + TASK + used + '[[method]]\nname = "dp-sdg"\n')
    names = registry.Registry()
    files = ["syntax.py", "missing.py", "twice.py", "odd.py", "absent.py"]
    with pytest.raises(SuiteError) as caught:
        suite.load("s.toml", files, names=names)
    found = [(one.file, one.line, one.message.split(";")[0][:32]) for one in caught.value.problems]
    assert found == [
        ("absent.py", 0, "no such file"),
        ("missing.py", 3, "cannot be imported: ModuleNotFou"),
        ("odd.py", 4, "parameter x has no type"),
        ("s.toml", 22, 'no method is called "dp-sdg"'),
        ("syntax.py", 6, "not valid Python: invalid syntax"),
        ("twice.py", 4, 'two methods are called "dp-sgd":'),
    ]
    assert "dp-sgd" in names.index("method")  # which the refused file has not spoilt
    Path("s.toml").write_text(HEAD + TASK + '[[method]]\nname = "dp-sgd"\n')
    with pytest.raises(SuiteError, match=r"^missing\.py:3: cannot be imported"):
        suite.load("s.toml", ["missing.py"], names=registry.Registry()).cells()
