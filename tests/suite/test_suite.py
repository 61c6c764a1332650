"""Suites: every fault at once with its line, never a traceback; ids that depend on the science alone."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import data, registry, suite
from harness.dp import EMA, LookAhead, Method, Mix
from harness.dp.method import describe
from harness.records import store
from harness.records.cell import Cell
from harness.registry import parts
from harness.running.plan import code_of, methods_of
from harness.running.seeds import Seeds
from harness.suite import Suite, SuiteError
from harness.suite.toml.lines import LineNumbers
from tests.support import ROOT

GOLDEN = ROOT / "tests" / "golden" / "ids.json"

# The suite whose ids are pinned in golden/ids.json. It uses every key of the format.
TEXT = """\
[suite]
name = "pinned"
question = "Which ids?"
seeds = [0, 7]

[privacy]
epsilon = [1.0, 3]
delta = 1e-5
relation = "add-or-remove"
accountant = "rdp"

[train]
batch = 128
epochs = 2

[[task]]
dataset = "digits"
model = "mlp?hidden=64"
name = "digits/mlp"

[[task]]
dataset = "mnist1d"
model = "logistic"
evaluate = "validation"
batch = 256
steps = 5

[[method]]
name = "non-private"
lr = 0.5

[[method]]
name = "dp-sgd"
clip = 1
lr = [0.5, 1]
tasks = ["digits/*"]

[[method]]
name = "dp-sgd"
label = "dp-sgd, heavy"
momentum = 0.95
tasks = "mnist1d/*"

[[method]]
name = "dp-adam"
lr = 0.01
[method.on."mnist1d/*"]
lr = 0.02
beta1 = 0.8

[[device]]
device = "cpu"
dtype = "float32"
tf32 = false
threads = 1
microbatch = 64

[budget]
seconds = 60
memory_mib = 2000

[tuning]
data = "none"
protocol = "no tuning"

[[published]]
method = "dp-sgd, heavy"
task = "digits/mlp"
epsilon = 3
metric = "accuracy"
value = 0.9
source = "nowhere"
note = "made up"
"""


def problems(text: str) -> list[str]:
    """What is wrong with the text of a suite, each as ``line: message``."""
    with pytest.raises(SuiteError) as caught:
        suite.parse(text, "s.toml")
    assert str(caught.value) == "\n".join(map(str, caught.value.problems))
    return [str(problem).removeprefix("s.toml:") for problem in caught.value.problems]


def ids(cells: list[Cell]) -> dict[str, dict[str, str]]:
    """What golden/ids.json holds: a readable name of each cell, to its id and group."""
    return {
        f"{c.label} on {c.task['name']}, epsilon {c.privacy['epsilon']}, seed {c.seed}": {"id": c.id, "group": c.group}
        for c in cells
    }


@pytest.fixture(scope="module")
def pinned() -> Suite:
    return suite.parse(TEXT)


@pytest.fixture(scope="module")
def cells(pinned: Suite) -> list[Cell]:
    return pinned.cells()


# What a suite means ---------------------------------------------------------------------------------------


def test_variants(pinned: Suite) -> None:
    shown = [(v.task.name, v.label, v.parameters["lr"]) for v in pinned.variants]
    assert shown == [
        ("digits/mlp", "non-private", 0.5),
        ("digits/mlp", "dp-sgd (lr=0.5)", 0.5),
        ("digits/mlp", "dp-sgd (lr=1.0)", 1.0),
        ("digits/mlp", "dp-adam", 0.01),
        ("mnist1d/logistic", "non-private", 0.5),
        ("mnist1d/logistic", "dp-sgd, heavy", registry.resolve("method", "dp-sgd").parameters["lr"].default),
        ("mnist1d/logistic", "dp-adam", 0.02),
    ]
    assert pinned.variants[-1].parameters["beta1"] == 0.8
    assert [task.schedule for task in pinned.tasks] == [
        {"batch": 128, "epochs": 2.0, "steps": None},
        {"batch": 256, "epochs": None, "steps": 5},
    ]


def test_cells(cells: list[Cell]) -> None:
    """Per seed: (1 + 3 * 2 epsilons) on the first task, (1 + 2 * 2) on the second; seeds outermost."""
    assert len(cells) == 2 * (7 + 5)
    assert [cell.seed for cell in cells] == [0] * 12 + [7] * 12
    free, private = cells[0], cells[1]
    assert not free.private
    assert free.privacy == dict.fromkeys(["epsilon", "delta", "relation", "accountant"]) | {"unit": "example"}
    assert private.privacy == {
        "epsilon": 1.0, "delta": 1e-5, "relation": "add-or-remove", "unit": "example", "accountant": "rdp",
    }  # fmt: skip
    assert private.schedule == {"batch": 128, "steps": 2 * data.describe("digits")["n_train"] // 128}
    assert private.task["architecture"] == {
        "name": "mlp", "options": {"hidden": "64", "activation": "tanh"},
    }  # fmt: skip
    assert private.parts["clip"] == {"type": "Flat", "clip": 1.0}
    assert cells[-1].task["n_train"] == 3200
    assert private.device == {"device": "cpu", "threads": 1, "engine": None, "microbatch": 64}
    assert len({cell.id for cell in cells}) == len(cells)
    assert len({cell.group for cell in cells}) == len(cells) // 2


def test_record_and_child_process_see_the_same_cell(cells: list[Cell]) -> None:
    for cell in cells:
        copy = Cell.from_json(cell.to_json())
        assert (copy, copy.id, copy.group) == (cell, cell.id, cell.group)
        assert json.loads(json.dumps(cell.canonical())) == cell.canonical()


# Identity -------------------------------------------------------------------------------------------------


def test_ids_are_the_golden_ones(cells: list[Cell]) -> None:
    """A change here orphans every record. Where it is meant, run ``python -m tests.suite.test_suite``."""
    assert ids(cells) == json.loads(GOLDEN.read_text())


def test_ids_do_not_depend_on_place_device_or_names(tmp_path: Path, cells: list[Cell]) -> None:
    """The same suite in a copy of this tree elsewhere, on another device, with labels and tasks renamed."""
    for package in ("harness", "methods"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    text = TEXT.replace('device = "cpu"', 'device = "cuda:3"').replace("threads = 1", "threads = 9")
    text = text.replace("microbatch = 64", "").replace("seconds = 60", "seconds = 5")
    text = text.replace('name = "pinned"', 'name = "elsewhere"').replace("digits/mlp", "digits/other")
    text = text.replace("dp-sgd, heavy", "renamed").replace("mlp?hidden=64", "mlp?activation=tanh&hidden=64")
    (tmp_path / "other.toml").write_text(text)
    code = (
        "import harness.suite as s, pathlib\n"
        f"assert pathlib.Path(s.__file__).is_relative_to({str(tmp_path)!r})\n"
        "print(*[c.id + c.group for c in s.load('other.toml').cells()])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [cell.id + cell.group for cell in cells]


def test_ids_depend_on_the_science(cells: list[Cell]) -> None:
    def first(old: str, new: str) -> Cell:
        assert old in TEXT
        return suite.parse(TEXT.replace(old, new)).cells()[1]

    changed = [
        first("epsilon = [1.0, 3]", "epsilon = 2.0"),
        first("delta = 1e-5", "delta = 1e-6"),
        first('accountant = "rdp"', 'accountant = "pld"'),
        first("batch = 128", "batch = 127"),
        first("epochs = 2", "epochs = 3"),
        first("hidden=64", "hidden=65"),
        first("clip = 1", "clip = 2"),
        first('dtype = "float32"', 'dtype = "float64"'),
        first("seeds = [0, 7]", "seeds = [1, 7]"),
    ]
    assert len({cell.id for cell in [cells[1], *changed]}) == len(changed) + 1
    assert changed[-1].group == cells[1].group


def test_methods_of_a_task_start_from_the_same_weights(cells: list[Cell]) -> None:
    here = [cell for cell in cells if cell.task["name"] == "digits/mlp" and cell.seed == 0]

    def seeds(cell: Cell, attempt: int = 1, code: str = "a") -> Seeds:
        return Seeds(cell, attempt=attempt, code=code)

    assert len({seeds(cell).init for cell in here}) == 1
    assert len({seeds(cell, n, code).init for cell in cells for n in (1, 2) for code in "ab"}) == 4  # tasks times seeds
    made = [seeds(cell, n, code) for cell in cells for n in (1, 2) for code in "ab"]
    every = [seed for one in made for seed in (one.sampling, one.noise, one.path)]
    assert len(set(every)) == 3 * 4 * len(cells)  # roles, two attempts by two codes
    assert all(0 <= seed < 2**256 for seed in every)


# Faults ---------------------------------------------------------------------------------------------------


def test_all_faults_at_once_with_their_lines() -> None:
    text = """\
[suite]
name = "Core"
question = "?"
sedes = 3
seeds = [1, 1]

[privacy]
epsilon = [1.0, -3.0]
delta = 2
accountant = "prv"

[train]
batch = 256
epochs = 20
steps = 100

[trian]

[[task]]
dataset = "digitz"
model = "mlp?widht=3"

[[task]]
dataset = "digits"
model = "mlp"
epochs = 1
steps = 2

[[method]]
name = "dp-sdg"

[[method]]
name = "dp-sgd"
clpi = 1.0
lr = ["fast", true, 0.5]
momentum = []

[[device]]
device = "gpu"
dtype = "float23"

[[device]]
tf32 = true

[budget]
seconds = "long"
"""
    assert problems(text) == [
        '2: [suite] name = "Core": write lower-case letters, digits and dashes, as in "core".',
        '4: [suite] has no key "sedes"; it has name, question, seeds. Did you mean "seeds"?',
        "5: [suite] seeds: 1 is given twice; keep one.",
        "8: [privacy] epsilon = -3.0: should be greater than 0.",
        "9: [privacy] delta = 2: should be less than 1.",
        "10: [privacy] accountant = \"prv\": should be 'pld' or 'rdp'.",
        "15: [train] has both epochs and steps; keep one.",
        '17: a suite has no table "trian"; it has suite, privacy, train, budget, tuning, reduced, task, '
        'method, device, published. Did you mean "train"?',
        '20: no dataset is called "digitz"; there are '
        + ", ".join(registry.index("dataset"))
        + '. Did you mean "digits"?',
        '21: model "mlp" has no parameter "widht"; it has hidden, activation.',
        "27: [[task]] has both epochs and steps; keep one.",
        '30: no method is called "dp-sdg"; there are '
        + ", ".join(registry.index("method"))
        + '. Did you mean "dp-sgd"?',
        '34: method "dp-sgd" has no parameter "clpi"; it has '
        + ", ".join(registry.resolve("method", "dp-sgd").parameters)
        + '. Did you mean "clip"?',
        '35: method "dp-sgd", parameter "lr": "fast" does not fit the type float; write a number such as 0.5.',
        '35: method "dp-sgd", parameter "lr": true does not fit the type float; write a number such as 0.5.',
        '36: "momentum" is an empty list; write at least one value.',
        '39: [[device]] device = "gpu": write "cpu", "cuda" or "cuda:0".',
        "40: [[device]] dtype = \"float23\": should be 'float32' or 'float64'. Did you mean \"float32\"?",
        "43: [[device]] tf32 = true: it exists for float32 on cuda only; remove it.",
        '46: [budget] seconds = "long": should be a valid number; write it without quotes.',
    ]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("seeds = [0, 7]", "seeds = [7, 7]", ["4: [suite] seeds: 7 is given twice; keep one."]),
        ("seeds = [0, 7]", "seeds = 0",
         ["4: [suite] seeds = 0: should be a number of seeds from 1 to 10000, or a list of seeds."]),
        ("seeds = [0, 7]", "seeds = []",
         ["4: [suite] seeds = []: is an empty list; write at least one value."]),
        ("epochs = 2\n", "\n",
         ['16: [[task]] has no length; write "epochs = 20" or "steps = 300" here or in [train].']),
        ('tasks = ["digits/*"]', 'tasks = ["digit/*"]',
         ['36: "digit/*" matches no task; tasks are digits/mlp, mnist1d/logistic. '
          'Did you mean "digits/mlp"?']),
        ('[method.on."mnist1d/*"]', '[method.on."nist1d"]',
         ['47: "nist1d" matches no task; tasks are digits/mlp, mnist1d/logistic.']),
        ("beta1 = 0.8", "beta3 = 0.8",
         ['49: method "dp-adam" has no parameter "beta3"; it has clip, lr, beta1, beta2. '
          'Did you mean "beta2"?']),
        ('label = "dp-sgd, heavy"', 'label = "dp-adam"',
         ['44: two methods are labelled "dp-adam" (the other on line 38); give one a label.',
          '67: [[published]] method "dp-sgd, heavy" is not in this suite; '
           'it has non-private, dp-sgd, dp-adam. '
           'Did you mean "dp-sgd"?']),
        ('name = "digits/mlp"\n', 'name = "mnist1d/logistic"\n',
         ['21: two tasks are called "mnist1d/logistic" (the other on line 16); give one another name.',
          '36: "digits/*" matches no task; tasks are mnist1d/logistic, mnist1d/logistic.',
          '68: [[published]] task "digits/mlp" is not in this suite; it has mnist1d/logistic.']),
        ("lr = [0.5, 1]", "lr = [0.5, 0.5]", ['35: "lr": 0.5 is given twice; keep one.']),
        ("[budget]", "[[device]]\n[budget]",
         ["58: [[device]] has the numerics of the one on line 51 (float32), so its runs would be the same; "
          "remove one, or give it another dtype."]),
        ("[privacy]", "[privacy",
         ["6: not valid TOML: Expected ']' at the end of a table declaration (column 9)."]),
        ("seeds = [0, 7]", "seeds = [0, 7]\nseeds = 3",
         ["5: not valid TOML: Cannot overwrite a value (column 10)."]),
        ('[[task]]\ndataset = "digits"', '[task]\ndataset = "digits"', None),
    ],
)  # fmt: skip
def test_one_fault(old: str, new: str, expected: list[str] | None) -> None:
    assert old in TEXT
    found = problems(TEXT.replace(old, new, 1))
    assert expected is None or found == expected


def test_missing_tables_and_files(tmp_path: Path) -> None:
    assert problems("") == [f"1: the suite needs {table}." for table in
                            ("[[method]]", "[[task]]", "[privacy]", "[suite]")]  # fmt: skip
    without = TEXT[: TEXT.index("[[task]]")] + TEXT[TEXT.index("[[method]]") :]
    assert problems(without) == ["1: the suite needs [[task]]."]
    assert '1: "task" should be a list of tables; write [[task]] above each.' in problems("task = 3")
    (tmp_path / "smoke.toml").write_text(TEXT)
    for name, text in [("smok.toml", f'Did you mean "{tmp_path / "smoke.toml"}"'), (".", "cannot be read")]:
        with pytest.raises(SuiteError, match=text):
            suite.load(tmp_path / name)
    (tmp_path / "latin.toml").write_bytes(b"\xe9 = 1")
    with pytest.raises(SuiteError, match=r"latin\.toml:1: is not UTF-8 text"):
        suite.load(tmp_path / "latin.toml")
    with pytest.raises(SuiteError, match=r"absent\.py: no such file"):
        suite.load(tmp_path / "smoke.toml", files=[tmp_path / "absent.py"])


def test_twins_are_refused() -> None:
    same = TEXT + '[[task]]\ndataset = "mnist1d?n=5000"\nmodel = "logistic"\nname = "mnist1d/again"\n'
    same += 'evaluate = "validation"\nbatch = 256\nsteps = 5\n'
    with pytest.raises(SuiteError, match=r'74: "dp-adam" on task "mnist1d/again" is the same run as "dp-adam" on'):
        suite.parse(same).cells()
    again = TEXT + '[[method]]\nname = "dp-sgd"\nlr = 0.5\nlabel = "other"\ntasks = "digits/*"\n'
    assert problems(again) == ['74: [[method]] "other" is the same as the one on line 32; remove one.']


def test_what_only_building_can_tell_has_its_line_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters that a method refuses, data that is missing, a batch larger than the data: all at once."""
    monkeypatch.setenv("EPSBENCH_DATA", str(tmp_path))
    text = TEXT.replace("clip = 1\n", "clip = -1\n").replace("batch = 128", "batch = 5000")
    text += f'[[task]]\ndataset = "npz:{tmp_path / "absent.npz"}"\nmodel = "mlp"\nname = "mine"\n'
    checked = suite.parse(text, "s.toml")
    with pytest.raises(SuiteError) as caught:
        checked.cells()
    lines = [(problem.line, problem.message) for problem in caught.value.problems]
    assert [line for line, _ in lines] == [13, 32, 75]  # once for both learning rates
    assert "batch 5000 is more than its" in lines[0][1]
    assert 'method "dp-sgd" cannot be built' in lines[1][1]
    assert "clip = -1.0" in lines[1][1]
    assert "absent.npz" in lines[2][1]


def test_a_users_method(tmp_path: Path) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(
        "from harness.dp import Flat, Method\nfrom harness.registry import method\n"
        "@method('mine')\ndef mine(clip: float) -> Method:\n    return Method(clip=Flat(clip))\n"
    )
    names = registry.Registry()
    text = TEXT + '[[method]]\nname = "mine"\n[method.on."digits/*"]\nclip = 0.1\n'
    (tmp_path / "s.toml").write_text(text)
    with pytest.raises(SuiteError, match=r's\.toml:74: method "mine" needs parameter "clip" \(float\) on "mnist1d'):
        suite.load(tmp_path / "s.toml", files=[mine], names=names)
    (tmp_path / "s.toml").write_text(text.replace('name = "mine"', 'name = "mine"\ntasks = "digits/*"'))
    (one, *_) = [c for c in suite.load(tmp_path / "s.toml", files=[mine], names=names).cells() if c.method == "mine"]
    assert one.method_files == [str(mine)]
    text = TEXT + '[[method]]\nname = "dp-sgd"\nlabel = "two"\nclip = 1.0\n'
    (tmp_path / "s.toml").write_text(text + 'then = { method = "mine?clip=0.5", epochs = 1 }\n')
    cells = suite.load(tmp_path / "s.toml", files=[mine], names=names).cells()
    assert {tuple(c.method_files) for c in cells if c.label == "two"} == {(str(mine),)}  # a second stage's too
    assert {tuple(c.method_files) for c in cells if not c.then and c.method == "dp-sgd"} == {()}
    assert str(tmp_path) not in json.dumps(one.canonical())


def test_checking_a_suite_does_not_import_torch() -> None:
    code = "import sys\nfrom harness import suite\nsuite.load('suites/smoke.toml')\n"
    code += "assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# Parts ----------------------------------------------------------------------------------------------------

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
[[task]]
dataset = "digits"
model = "mlp"
"""


def every_part() -> list[tuple[str, str]]:
    return [(slot, name) for slot in parts.SLOTS for name in parts.entries(slot)]


@pytest.mark.parametrize(("slot", "name"), every_part())
def test_options_read_from_source_are_the_fields_of_the_class(slot: str, name: str) -> None:
    """With their defaults; fields that hold parts are no options, nor are those that the name itself sets."""
    entry = parts.entries(slot)[name]
    kind = getattr(importlib.import_module(entry.module), entry.function)
    fields = {f.name: f for f in dataclasses.fields(kind) if f.default is not dataclasses.MISSING}
    if slot == "schedule":
        assert fields.pop("decay")
    assert {key: p.default for key, p in entry.parameters.items()} == {k: f.default for k, f in fields.items()}
    made = describe(parts.combine(Method(), {slot: name}))
    wrapped = {"schedule": "optimizer", "filter": "optimizer", "average": "path", "views": "loss"}.get(slot, slot)
    assert made[wrapped]["type"] == entry.function
    assert {key: one for key, one in made.items() if key != wrapped} == {
        key: one for key, one in describe(Method()).items() if key != wrapped
    }
    spec = parts.choose(slot, name).spec
    assert parts.choose(slot, spec).spec == spec
    assert parts.combine(Method(), {slot: spec}) == parts.combine(Method(), {slot: name})


def test_a_suite_gives_a_method_other_parts() -> None:
    text = (
        HEAD
        + """
[[method]]
name = "dp-sat"
rho = 0.1
with = { average = "ema?decay=0.9", clip = "automatic?clip=0.5", schedule = "step?at=0.25,0.5" }
[[method]]
name = "dp-sat"
rho = 0.1
[[method]]
name = "dp-sam"
label = "swept"
with.optimizer = ["adam", "lamb?lr=1", "lamb?lr=2"]
with.schedule = "cosine"
"""
    )
    cells = suite.parse(text).cells()
    assert list(dict.fromkeys(cell.label for cell in cells)) == [
        "dp-sat, clip: automatic, schedule: step, average: ema", "dp-sat",
        "swept (optimizer=adam)", "swept (optimizer=lamb?lr=1)", "swept (optimizer=lamb?lr=2)",
    ]  # fmt: skip
    one, plain, sam = cells[0], cells[2], cells[4]
    assert one.parts["clip"] == {"type": "Automatic", "clip": 0.5, "gamma": 0.01, "form": "stable"}
    assert one.parts["path"] == {
        "type": "EMA", "decay": 0.9, "along": {"type": "Sharp", "rho": 0.1, "along": "gradient"},
    }  # fmt: skip
    assert one.parts["optimizer"]["at"] == [0.25, 0.5]
    assert one.parts["optimizer"]["optimizer"] == plain.parts["optimizer"]  # what was not replaced is the method's
    # A path with two gradients a step keeps its optimizer's pace, and the schedule is that of the steps it makes.
    inner = sam.parts["optimizer"]["optimizer"]
    assert (sam.parts["path"]["type"], sam.parts["optimizer"]["type"]) == ("LookAhead", "EverySecond")
    assert (inner["type"], inner["optimizer"]["type"]) == ("Scheduled", "Adam")
    for cell in cells:
        assert describe(methods_of(cell)[0]) == json.loads(json.dumps(cell.parts))
        assert ("with" in cell.canonical()["method"]) is bool(cell.changes)
        record = {"cell": cell.canonical(), "suite": "s", "device": {}}
        assert store.cell_of(record).id == Cell.from_json(cell.to_json()).id == cell.id
    spelled = text.replace("automatic?clip=0.5", "automatic?gamma=1e-2&clip=.5")
    assert [cell.id for cell in suite.parse(spelled).cells()] == [cell.id for cell in cells]


def test_the_code_of_a_run_is_that_of_inner_parts_too() -> None:
    assert set(parts.modules(EMA(along=Mix()))) == {"harness.dp.path.straight", "harness.dp.path.mix"}
    text = HEAD + '[[method]]\nname = "dp-sgd"\nwith = { path = "mix", average = "ema" }\n'
    (cell, _) = suite.parse(text).cells()
    assert "harness/dp/path/mix.py" in code_of(cell)["files"]


def test_all_faults_of_parts_at_once_with_their_lines() -> None:
    text = (
        HEAD
        + """\
[[method]]
name = "dp-sgd"
[method.with]
clpi = "flat"
clip = "automatc"
path = "sharp?rho=far&alnog=step"
optimizer = ["adam", "adam?lr=0.001", "adam?"]
sampler = 3
schedule = "step?at=0.5,x"
average = []
[[method]]
name = "dp-adam"
on."*" = { with = { clip = "flat" } }
"""
    )
    assert problems(text) == [
        '16: "with" has no part "clpi"; it has clip, path, optimizer, sampler, noise, loss, filter, schedule, average, '
        'views. Did you mean "clip"?',
        '17: no clip is called "automatc"; there are flat, automatic, psac, psasc, group-wise, quantile, refined. '
        'Did you mean "automatic"?',
        '18: path "sharp" has no parameter "alnog"; it has rho, along. Did you mean "along"?',
        '18: path "sharp", parameter "rho": "far" does not fit the type float; write a number such as 0.5.',
        '19: "optimizer": "adam?lr=0.001" is given twice; keep one.',
        '19: spec "adam?": "" is not an option; write key=value, joined by "&".',
        '20: "sampler" = 3: should be the name of a part, as in "name?key=value".',
        '21: schedule "step", parameter "at": "0.5,x" does not fit the type tuple[float, ...]; '
        'write numbers joined by commas, as in "0.5,0.75".',
        '22: "average" is an empty list; write at least one part.',
        '25: "with" is for all tasks of a [[method]]; write another [[method]], with "tasks", for these.',
    ]
    same = '[[method]]\nname = "dp-sgd"\nwith.clip = "flat"\n[[method]]\nname = "dp-sgd"\nwith.clip = "flat?clip=1"\n'
    assert problems(HEAD + same) == [
        '16: [[method]] "dp-sgd, clip: flat" is the same as the one on line 13; remove one.'
    ]
    one = same[: same.index("[[method]]", 1)]
    row = 'task = "digits/mlp"\nmetric = "accuracy"\nvalue = 1.0\nsource = "nowhere"\naccountant = "rdp"\n'
    published = f'{HEAD}{one}[[published]]\nmethod = "dp-sgd, clip: flt"\n{row}'
    assert problems(published) == [
        '17: [[published]] method "dp-sgd, clip: flt" is not in this suite; it has dp-sgd, dp-sgd, clip: flat. '
        'Did you mean "dp-sgd, clip: flat"?'
    ]


def test_parts_that_do_not_go_together_have_their_lines() -> None:
    text = (
        HEAD
        + """\
[[method]]
name = "non-private"
[method.with]
optimizer = "adam"
sampler = "full"
clip = "flat"
[[method]]
name = "dp-sgd"
label = "refused"
with.clip = "psac?r=-1"
with.schedule = "cosine?warmup=2"
[[method]]
name = "dp-sam"
with.path = "sharp"
[[method]]
name = "dp-sat"
clip = 0.3
lr = 0.1
rho = 0.1
with = { clip = "automatic", optimizer = "adam", average = "ema" }
"""
    )
    with pytest.raises(SuiteError) as caught:
        suite.parse(text, "s.toml").cells()
    found = [(problem.line, problem.message) for problem in caught.value.problems]
    assert [line for line, _ in found] == [17, 18, 22, 23, 26, 29, 30]
    assert "trains without privacy" in found[0][1] and "trains without privacy" in found[1][1]
    assert "r must be positive" in found[2][1] and "warmup must lie" in found[3][1]
    assert LookAhead.__name__ in found[4][1]
    assert [message for _, message in found[5:]] == [
        f'method "dp-sat": "{key}" is for a part that "with" replaces; leave it out.' for key in ("clip", "lr")
    ]


def test_a_target_beyond_a_clipping_rules_noise_is_refused_with_the_number_to_write() -> None:
    """The noise on a count is fixed, so no multiplier above twice it can be served: epsilon 0.1 needs more."""
    text = (
        HEAD.replace("[1.0, 8.0]", "[0.1, 2.0]").replace("steps = 10", "steps = 2")
        + """\
[[method]]
name = "adaptive"
on."digits/*" = { count_noise = 1.0 }
[[method]]
name = "dp-sgd"
[method.with]
path = "sharp"
clip = "quantile?count_noise=1.0"
"""
    )
    with pytest.raises(SuiteError) as caught:
        suite.parse(text, "s.toml").cells()
    assert [problem.line for problem in caught.value.problems] == [15, 20]
    first, second = (problem.message for problem in caught.value.problems)
    assert 'method "adaptive" on task "digits/mlp": epsilon = 0.1 at delta = 1e-05 needs' in first
    above = re.search(r"write a count_noise above ([0-9.]+)\.$", first)
    assert above and above[0] in second
    enough = text.replace("count_noise = 1.0", f"count_noise = {float(above[1]) * 1.01}")
    with pytest.raises(SuiteError) as caught:
        suite.parse(enough, "s.toml").cells()
    assert [problem.line for problem in caught.value.problems] == [20]
    other = text.replace("delta = 1e-5", 'delta = 1e-5\nrelation = "replace-one"')
    assert len(suite.parse(other).cells()) == 4  # whose runs are skipped for another reason


# Reduced profiles -----------------------------------------------------------------------------------------

REDUCED = """
[reduced]
why = "two steps on the digits"
seeds = [3]
epsilon = 3.0

[reduced.train]
batch = 32
steps = 2

[[reduced.task]]
dataset = "digits"
model = "logistic"
name = "digits/mlp"
[[reduced.task]]
dataset = "digits"
model = "mlp"
name = "mnist1d/logistic"
steps = 3
"""


def test_a_reduced_profile_is_another_suite_of_the_same_methods(cells: list[Cell]) -> None:
    text = TEXT.replace("lr = 0.01\n", "lr = 0.01\nepsilon = 1.0\n") + REDUCED
    assert ids(suite.parse(TEXT + REDUCED).cells()) == ids(cells)  # it changes nothing in the suite
    small = suite.parse(text, reduced=True)
    assert (small.name, small.question, small.reduced) == ("pinned-reduced", "Which ids?", "two steps on the digits")
    assert [(task.name, task.schedule["batch"], task.schedule["steps"]) for task in small.tasks] == [
        ("digits/mlp (reduced)", 32, 2), ("mnist1d/logistic (reduced)", 32, 3),
    ]  # fmt: skip
    found = [(c.label, c.task["name"], c.task["dataset"], c.privacy["epsilon"], c.seed) for c in small.cells()]
    assert found == [
        ("non-private", "digits/mlp (reduced)", "digits", None, 3),
        ("dp-sgd (lr=0.5)", "digits/mlp (reduced)", "digits", 3.0, 3),
        ("dp-sgd (lr=1.0)", "digits/mlp (reduced)", "digits", 3.0, 3),
        ("non-private", "mnist1d/logistic (reduced)", "digits", None, 3),
        ("dp-sgd, heavy", "mnist1d/logistic (reduced)", "digits", 3.0, 3),
    ]  # dp-adam is for epsilon 1 alone
    (row,) = small.published
    assert (row.method, row.task) == ("dp-sgd, heavy", "digits/mlp (reduced)")
    second = text.replace('task = "digits/mlp"', 'task = "mnist1d/logistic"')
    one = second[: second.rindex("[[reduced.task]]")].replace('"mnist1d/*"', '"*"').replace("mnist1d/*", "*")
    assert suite.parse(one, reduced=True).published == ()  # the profile has no second task
    tables = text[: text.index("[[reduced.task]]")]  # with the suite's own tasks, one of which has steps of its own
    assert [(c.task["dataset"], c.schedule) for c in suite.parse(tables, reduced=True).cells()[2:4]] == [
        ("digits", {"batch": 32, "steps": 2}), ("mnist1d", {"batch": 256, "steps": 5}),
    ]  # fmt: skip


def test_faults_of_a_reduced_profile_have_their_lines() -> None:
    base = TEXT.count("\n")
    broken = (
        REDUCED.replace("why", "because").replace("seeds = [3]", "seeds = [3, 3]")
        .replace("steps = 2\n", "steps = 2\nepochs = 1\n").replace('"logistic"', '"logistik"')
    )  # fmt: skip
    for reduced in (False, True):
        with pytest.raises(SuiteError) as caught:
            suite.parse(TEXT + broken, "s.toml", reduced=reduced)
        found = [(problem.line - base, problem.message.split(";")[0]) for problem in caught.value.problems]
        assert found == [
            (2, '[reduced] needs "why".'),
            (3, '[reduced] has no key "because"'),
            (4, "[reduced] seeds: 3 is given twice"),
            (9, "[reduced.train] has both epochs and steps"),
            (14, 'no model is called "logistik"'),
        ]
    lost = REDUCED.replace("[reduced.train]\nbatch = 32\n", "[reduced.train]\n").replace("steps = 3", "batch = 8")
    assert problems(TEXT + lost) == [
        f'{base + 10}: [[reduced.task]] has no batch; write "batch = 256" here or in [reduced.train].'
    ]
    with pytest.raises(SuiteError, match=r"^s\.toml:1: the suite has no reduced profile"):
        suite.parse(TEXT, "s.toml", reduced=True)
    # Globs and targets must fit the profile that is asked for, and no other.
    elsewhere = REDUCED.replace('"mnist1d/logistic"', '"elsewhere"').replace("epsilon = 3.0", "epsilon = 5.0")
    suite.parse(TEXT + elsewhere)
    with pytest.raises(SuiteError) as caught:
        suite.parse(TEXT + elsewhere, "s.toml", reduced=True)
    assert [problem.line for problem in caught.value.problems] == [42, 47]
    assert '"mnist1d/*" matches no task; tasks are digits/mlp, elsewhere.' in str(caught.value)
    with pytest.raises(SuiteError, match=r'"elsewhere" matches no task; tasks are digits/mlp, mnist1d/logistic'):
        suite.parse(TEXT.replace('tasks = "mnist1d/*"', 'tasks = "elsewhere"') + elsewhere)
    nobody = TEXT[: TEXT.index("[[method]]")] + '[[method]]\nname = "dp-sgd"\nepsilon = 1.0\n' + REDUCED
    with pytest.raises(SuiteError, match=r"\[reduced\] epsilon: no method is for these targets"):
        suite.parse(nobody, reduced=True)


# Malformed input ------------------------------------------------------------------------------------------

VALUES = st.sampled_from(
    ["3", "-1", "0", "1e400", "nan", "inf", "true", '""', '"x"', "[]", "[[]]", "[1, 'a']", "{}", "{a = 1}",
     "1979-05-27", "07:32:00", '"none"', "9" * 30, "0x" + "f" * 9000, "[{}]", "'*'", '"["', '"mlp?"',
     '"npz:"', "[" * 40 + "]" * 40, '"""\n\n"""', r'"\u0000"'])  # fmt: skip


def survives(text: str) -> None:
    """The text is a suite, or everything said about it has a place and a message; so for its reduced profile."""
    for reduced in (False, True):
        try:
            suite.parse(text, "s.toml", reduced=reduced)
        except SuiteError as error:
            assert error.problems
            for problem in error.problems:
                assert problem.message
                assert 1 <= problem.line <= text.count("\n") + 1


@settings(deadline=None, max_examples=120)
@given(st.data())
def test_malformed_suites_never_end_in_a_traceback(draws: st.DataObject) -> None:
    with_parts = 'lr = 0.01\nwith = { clip = ["flat", "psac?r=1"], average = "ema" }\n'
    lines = (TEXT.replace("lr = 0.01\n", with_parts) + REDUCED).splitlines()
    for _ in range(draws.draw(st.integers(1, 3))):
        at = draws.draw(st.integers(0, len(lines) - 1))
        kind = draws.draw(st.sampled_from(["value", "key", "drop", "double", "swap", "character"]))
        if kind == "value" and " = " in lines[at]:
            lines[at] = lines[at].split(" = ")[0] + " = " + draws.draw(VALUES)
        elif kind == "key" and " = " in lines[at]:
            lines[at] = (
                draws.draw(st.sampled_from(["name", "on", "a.b", "tasks", '""', "x"])) + " = " + draws.draw(VALUES)
            )
        elif kind == "drop":
            lines[at] = ""
        elif kind == "double":
            lines.insert(at, lines[at])
        elif kind == "swap":
            other = draws.draw(st.integers(0, len(lines) - 1))
            lines[at], lines[other] = lines[other], lines[at]
        elif lines[at]:
            place = draws.draw(st.integers(0, len(lines[at]) - 1))
            text = draws.draw(st.text(max_size=2) | st.sampled_from(list("[]{}\"'=.#,\n")))
            lines[at] = lines[at][:place] + text + lines[at][place + draws.draw(st.integers(0, 2)) :]
    survives("\n".join(lines))


@settings(deadline=None, max_examples=20)
@given(st.binary() | st.text().map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_never_end_in_a_traceback(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.mktemp("any") / "s.toml"
    file.write_bytes(content)
    with pytest.raises(SuiteError):
        suite.load(file)


@pytest.mark.parametrize(
    "text", ["a = " + "[" * 5000, "a = " + "{a = " * 5000, "a" + ".a" * 1000 + " = 1", "a = 1" + "0" * 5000]
)
def test_huge_input_never_ends_in_a_traceback(text: str) -> None:
    survives(text)
    survives(TEXT.replace('name = "pinned"', text))


# Lines ----------------------------------------------------------------------------------------------------

NUMBERED = (
    r'''
# every value is the number of its line
a = 3
b . "c.d" . 'e' = 4
"quoted \" key" = 5
list = [6, 6, [6,
  7], # 99 = [
  { x = 8, y.z = 8 }, 8
]
[table.x]
one = 11
[[rows]]
one = 13
[rows.sub]
one = 15
[[rows]]
one = 17
[[rows.deep]]
one = 19
[[rows.deep]]
one = 21
text = """
[[rows]] \""" # ["" """
one2 = 24
text2 = '''
    + "'''"
    + r"""
'' one = 9"""
    + "''''"
    + r"""
one3 = 27
text3 = "x = # \" ["
"text4" = '# \'
[[rows.deep.deeper]]
one = 31
"""
)


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_lines(ends: str) -> None:
    text = NUMBERED.replace("\n", ends)
    lines = LineNumbers(text)

    def walk(value: object, path: tuple[str | int, ...]) -> int:
        if isinstance(value, dict):
            return sum(walk(one, (*path, key)) for key, one in value.items())
        if isinstance(value, list):
            return sum(walk(one, (*path, number)) for number, one in enumerate(value))
        if isinstance(value, int):
            assert lines.line(path) == value, path
            return 1
        return 0

    assert walk(tomllib.loads(text), ()) == 19
    assert lines.line(("rows", 1)) == 16
    assert lines.line(("rows", 1, "absent", 3)) == 16
    assert lines.line(("absent",)) == 1


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(ids(suite.parse(TEXT).cells()), indent=1) + "\n")


def test_a_method_may_be_for_some_targets_only():
    """Tuned values differ by epsilon: two tables of one method may share a label where their targets differ."""
    head = (
        '[suite]\nname = "s"\nquestion = "?"\n[privacy]\nepsilon = [1.0, 3.0]\ndelta = 1e-5\n'
        '[train]\nbatch = 64\nsteps = 10\n[[task]]\ndataset = "digits"\nmodel = "mlp"\n'
    )
    two = '[[method]]\nname = "dp-sgd"\nepsilon = 1.0\nlr = 0.5\n[[method]]\nname = "dp-sgd"\nepsilon = 3.0\nlr = 2.0\n'
    cells = suite.parse(head + two, "s.toml").cells()
    assert [(c.privacy["epsilon"], c.parameters["lr"], c.label) for c in cells] == [
        (1.0, 0.5, "dp-sgd"),
        (3.0, 2.0, "dp-sgd"),
    ]
    for bad, message in (
        (two.replace("= 3.0", "= 1.0", 1), 'two methods are labelled "dp-sgd"'),
        (two.replace("epsilon = 3.0", "epsilon = 4.0"), "epsilon 4 is no target of this suite; [privacy] has 1, 3."),
        (two.replace("epsilon = 1.0", "epsilon = [1.0, 1.0]"), "1.0 is given twice"),
        ('[[method]]\nname = "non-private"\nepsilon = 1.0\n', 'trains without privacy; leave "epsilon" out'),
    ):
        with pytest.raises(suite.SuiteError) as error:
            suite.parse(head + bad, "s.toml").cells()
        assert message in str(error.value)
