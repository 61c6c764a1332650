"""Reading a suite reports all of its errors at once, then building does; each error once, and nothing that follows."""

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
[[method]]
name = "dp-sdg"
with = { clip = "automatc", path = "sharp?rho=far" }
then = { method = "non-private?lr=fast", dataset = "cifar100x", epcohs = 3, trains = "al" }
[[method]]
name = "dp-sgd"
clpi = [1.0, 2.0]
lr = "fast"
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
    (26, 'no method is called "dp-sdg"', "dp-sgd"),
    (27, 'no clip is called "automatc"', "automatic"),
    (27, 'path "sharp", parameter "rho": "far" does not fit', None),
    (28, '[method.then] has no key "epcohs"', "epochs"),
    (28, '[method.then] trains = "al"', "all"),
    (28, 'method "non-private", parameter "lr": "fast" does not fit', None),
    (28, 'no dataset is called "cifar100x"', "cifar100"),
    (31, 'method "dp-sgd" has no parameter "clpi"', "clip"),
    (32, 'method "dp-sgd", parameter "lr": "fast" does not fit', None),
    (36, 'method "dp-sgd" has no parameter "batch"', None),
    (39, '[[device]] device = "gpu"', None),
    (41, '[budget] seconds = "long"', None),
    (45, '[tuning] "tries" is for a search on private data', None),
    (46, '[reduced] needs "why"', None),
    (47, "[reduced] seeds = 0", None),
    (50, "[reduced.train] steps = 0", None),
]  # fmt: skip


COMPARED = """\
[[task]]
dataset = "digits"
model = "mlp"
[[method]]
name = "dp-adam"
label = "same"
epsilon = 2.0
[[method]]
name = "dp-adam"
label = "same"
lr = 0.02
[[method]]
name = "dp-sgd"
with.clip = "flat"
[[method]]
name = "dp-sat"
tasks = "digit/*"
[[published]]
method = "dp-sgd, clip: flt"
task = "sevn"
metric = "acuracy"
value = 0.9
source = "nowhere"
"""
BUILT = """\
[[task]]
dataset = "features:digits?backbone=scatering"
model = "logistic"
[[task]]
dataset = "npz:nowhere.npz"
model = "logistic"
[[task]]
dataset = "npz:nowhere.npz"
model = "mlp"
[[task]]
name = "fine"
dataset = "digits"
model = "mlp"
[[method]]
name = "dp-sgd"
clip = -1
lr = [0.5, 1.0]
[[method]]
name = "dp-adam"
with = { clip = ["automatic", "psac?r=-1"], optimizer = "adam?lr=-1" }
[[method]]
name = "dp-sgd"
label = "refused in the second stage"
then = { method = "dp-sgd?clip=-2", epochs = 1 }
[[method]]
name = "dp-sgd"
label = "private data as public data"
then = { method = "non-private", dataset = "digits", epochs = 1 }
[[method]]
name = "dp-sgd"
label = "private, then not"
then = { method = "non-private", epochs = 1 }
[[method]]
name = "non-private"
epsilon = 1.0
"""


def problems(text: str, file: str = "s.toml") -> list[tuple[int, str]]:
    """Lines and messages of the first report on a suite: that of reading, else that of building."""
    with pytest.raises(SuiteError) as caught:
        suite.parse(text, file).cells()
    return [(one.line, one.message) for one in caught.value.problems]


def test_reading_reports_every_mistake_at_once(
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


def test_valid_tables_are_compared_whatever_is_wrong_in_others() -> None:
    expected = [
        (16, "epsilon 2 is no target of this suite"),
        (17, 'two methods are labelled "same" (the other on line 13)'),
        (26, '"digit/*" matches no task'),
        (28, '[[published]] method "dp-sgd, clip: flt"'),
        (29, '[[published]] task "sevn"'),
        (30, '[[published]] metric "acuracy"'),
        (34, '[budget] seconds = "long"'),
    ]
    found = problems(HEAD + COMPARED + '[budget]\nseconds = "long"\n')
    assert [line for line, _ in found] == [line for line, _ in expected]
    assert all(message.startswith(start) for (_, message), (_, start) in zip(found, expected, strict=True)), found


def test_building_reports_every_mistake_at_once() -> None:
    expected = [
        (11, "there is no backbone scatering; write efficientnet-lite0, scattering"),
        (14, 'data set "npz:nowhere.npz" was not found'),
        (23, 'method "dp-sgd" cannot be built: clipping norm must be positive'),
        (29, 'method "dp-adam" cannot take clip = "psac?clip=1.0&r=-1.0"'),
        (29, 'method "dp-adam" cannot take optimizer = "adam?lr=-1.0'),
        (33, 'method "dp-sgd" cannot be built: clipping norm must be positive'),
        (37, '"then": digits is the private data of task "fine"'),
        (41, '"then": non-private would train on the private data without noise'),
        (44, 'method "non-private" trains without privacy; leave "epsilon" out'),
    ]
    found = problems(HEAD + BUILT)
    assert [line for line, _ in found] == [line for line, _ in expected]
    assert all(message.startswith(start) for (_, message), (_, start) in zip(found, expected, strict=True)), found


def test_nothing_is_built_of_a_suite_that_cannot_be_read() -> None:
    assert [line for line, _ in problems(HEAD.replace("1e-5", "2") + BUILT)] == [6]


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
def test_what_only_follows_is_not_reported(text: str, expected: list[int]) -> None:
    assert [line for line, _ in problems(text)] == expected


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


def method(name: str, body: str = "return Method()") -> str:
    return f'@method("{name}")\ndef {name.replace("-", "_")}() -> Method:\n    {body}\n'


IMPORTS = "from harness.dp import Method\nfrom harness.registry import method\n"


def test_what_is_wrong_with_the_users_files_is_reported_with_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each file once and at its line, however many methods of it the suite names. Building imports the files."""
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
        ("odd.py", 4, "parameter x has no type"),
        ("s.toml", 22, 'no method is called "dp-sdg"'),
        ("syntax.py", 6, "not valid Python: invalid syntax"),
        ("twice.py", 4, 'two methods are called "dp-sgd":'),
    ]
    assert "dp-sgd" in names.index("method")  # the refused file was not added
    Path("s.toml").write_text(HEAD + TASK + '[[method]]\nname = "dp-sgd"\n')
    with pytest.raises(SuiteError, match=r"^missing\.py:3: cannot be imported"):
        suite.load("s.toml", ["missing.py"], names=registry.Registry()).cells()
