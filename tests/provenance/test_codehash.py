"""The hash of the code behind a record: what it must notice, what not, and which files it reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.provenance import code as codehash

SOURCE = '''"""A module."""
import math

# a comment
class Part:
    """A part."""
    x: float = 1.0

    def area(self, r):
        """Of a circle."""
        return math.pi * r**2
'''

KERNEL = """/* Twice x. */
#define FLAGS -ffp-contract=off
float f(float x) {
return x + x;  // exact
}
"""


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("/* Twice x. */", "/* A sum\n * of x and x. */", True),
        ("  // exact", "", True),
        ("return x", "    return x", True),
        ("x + x", "x * 2", False),
        ("-ffp-contract=off", "-ffp-contract=fast", False),
        ('"""A module."""', '"""Another text\n\nover lines."""', True),
        ('        """Of a circle."""\n', "", True),
        ("# a comment\n", "", True),
        ("math.pi * r**2", "(math.pi  *  r ** 2)  # circle", True),
        ("r**2", "r**3", False),
        ("x: float = 1.0", "x: float = 1", False),
        ("def area(self, r)", "def area(self, r=None)", False),
        ("return math", "yield math", False),
    ],
)
def test_hash_sees_code_and_not_prose(tmp_path: Path, old: str, new: str, same: bool) -> None:
    name, text = ("one.c", KERNEL) if old in KERNEL else ("one.py", SOURCE)
    assert old in text
    one = write(tmp_path / "a" / name, text)
    two = write(tmp_path / "b" / name, text.replace(old, new))
    assert (codehash.code_hash([one]) == codehash.code_hash([two])) is same


def test_hash_does_not_depend_on_place_or_order(tmp_path: Path) -> None:
    files = [write(tmp_path / "a" / name, f"x = {name!r}\n") for name in ("m.py", "n.py")]
    moved = [write(tmp_path / "elsewhere" / file.name, file.read_text()) for file in files]
    assert codehash.code_hash(files) == codehash.code_hash(reversed([*moved, moved[0]]))
    assert codehash.hashes(files, [tmp_path / "a"]) == codehash.hashes(moved, [tmp_path / "elsewhere"])
    assert list(codehash.hashes(files, [tmp_path])) == ["a/m.py", "a/n.py"]


def test_hash_does_not_depend_on_where_imports_lie_but_on_what_they_are(tmp_path: Path) -> None:
    """Files in other folders, their imports in another order; then a name from another file of the same closure."""
    one = {
        "harness/a.py": "from harness.b import f\nfrom harness.c import g\nimport math\nx = f(g(math.pi))\n",
        "harness/b.py": "def f(x): return x\n",
        "harness/c.py": "def g(x): return -x\ndef f(x): return 2 * x\n",
    }
    moved = {
        "harness/a.py": "import math\nfrom harness.room import f\nfrom harness.room.c import g\nx = f(g(math.pi))\n",
        "harness/room/__init__.py": '"""A room."""\nfrom harness.room.b import f\n',
        "harness/room/b.py": one["harness/b.py"],
        "harness/room/c.py": one["harness/c.py"],
    }
    other = one | {"harness/a.py": one["harness/a.py"].replace("harness.b import f", "harness.c import f")}
    found = []
    for number, files in enumerate((one, moved, other)):
        root = tmp_path / str(number)
        for name, text in files.items():
            write(root / name, text)
        taken = {*codehash.closure(["harness.a"], [root]), *root.rglob("b.py")}
        found.append(codehash.code_hash(taken, [root]))
        assert len(taken) == 3
    assert found[0] == found[1] != found[2]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A small project with every way of importing."""
    files = {
        "harness/__init__.py": "",
        "harness/registry/__init__.py": "import harness.unrelated\n",
        "harness/registry/source.py": "",
        "harness/unrelated.py": "",
        "harness/dp/__init__.py": '_WHERE = {"Flat": "clip", "Ghost": "engines.ghost"}\n',
        "harness/dp/clip.py": "from harness.dp.tree import Tree\n",
        "harness/dp/tree.py": "import torch\n",
        "harness/dp/engines/__init__.py": "",
        "harness/dp/engines/ghost.py": "def f():\n    from .shared import g\n",
        "harness/dp/engines/shared.py": "from ..tree import Tree as T\n",
        "harness/dp/native/__init__.py": "def library(): ...\n",
        "harness/dp/native/kernels.py": "from harness.dp.native import library\n",
        "harness/dp/native/gaussian.c": "",
        "harness/dp/native/vector.h": "",
        "harness/dp/noise.py": "from harness.dp.native import kernels\n",
        "harness/models/__init__.py": "from .nets import mlp as net\nLATE = 1\n",
        "harness/models/nets.py": "import typing\nif typing.TYPE_CHECKING:\n    import harness.dp.clip\n",
        "methods/__init__.py": "",
        "methods/flat.py": "from harness.dp import Flat\nfrom harness.registry import method\n",
        "methods/ghost.py": "from harness.dp import Ghost\nfrom harness.models import net\n"
        "from harness.registry import source\nfrom harness.registry.source import KINDS\n",
        "methods/whole.py": "import harness.dp as dp\nfrom harness.models import LATE\n",
        "lab/mine.py": "from harness.dp import Flat\nfrom lab import other\n",
        "lab/other.py": "import os\n",
    }
    for name, text in files.items():
        write(tmp_path / name, text)
    return tmp_path


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        ("methods.flat", "harness/dp/clip harness/dp/tree methods/flat"),
        (
            "methods.ghost",
            "harness/dp/engines/ghost harness/dp/engines/shared harness/dp/tree harness/models/nets methods/ghost",
        ),
        (
            "methods.whole",
            "harness/dp/__init__ harness/dp/clip harness/dp/engines/ghost harness/dp/engines/shared "
            "harness/dp/tree harness/models/__init__ harness/models/nets methods/whole",
        ),
        (
            "harness.dp.noise",
            "harness/dp/native/__init__ harness/dp/native/gaussian harness/dp/native/kernels harness/dp/native/vector "
            "harness/dp/noise",
        ),
        ("lab.mine", "harness/dp/clip harness/dp/tree lab/mine lab/other"),
    ],
)
def test_closure(tree: Path, start: str, expected: str) -> None:
    """By name and by path; docstring-only packages, the registry and typing-only imports stay out."""
    for one in (start, tree / (start.replace(".", "/") + ".py")):
        found = codehash.closure([one], [tree])
        assert [p.relative_to(tree).with_suffix("").as_posix() for p in found] == expected.split()


def test_closure_of_a_lone_file_and_of_nothing(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    lone = write(tmp_path_factory.mktemp("lone") / "mine.py", "from harness.dp import Flat\nfrom . import x\n")
    found = codehash.closure([lone], [tree])
    assert list(codehash.hashes(found, [tree])) == ["harness/dp/clip.py", "harness/dp/tree.py", "mine.py"]
    with pytest.raises(LookupError, match=r"absent.* has no Python source"):
        codehash.closure(["harness.absent"], [tree])


def test_what_a_file_of_the_user_imports_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Helpers beside it, packages with and without __init__, and what these import; nothing that is installed."""
    mine = write(
        tmp_path / "mine.py",
        "import json\nimport attrs\nfrom torch import nn\nfrom epsb_help import net\nimport epsb_pack.b\n",
    )
    helper = write(tmp_path / "lib" / "epsb_help.py", "from epsb_bare.part import net\n")
    parts = [write(tmp_path / "lib" / "epsb_bare" / "part.py", "net = 1\n")]
    parts += [write(tmp_path / "lib" / "epsb_pack" / name, "x = 1\n") for name in ("__init__.py", "b.py")]
    monkeypatch.syspath_prepend(tmp_path / "lib")
    found = codehash.closure([mine])
    assert set(found) == {file.resolve() for file in (mine, helper, *parts)} - {parts[1].resolve()}
    before = codehash.code_hash(found)
    parts[0].write_text("net = 2\n")
    assert codehash.code_hash(codehash.closure([mine])) != before


def test_a_method_of_this_project_depends_on_the_mathematics_and_on_no_other_method() -> None:
    found = codehash.hashes(codehash.closure(["methods.dp_sgd"]))
    assert {"methods/dp_sgd.py", "harness/dp/clip/flat.py", "harness/dp/noise/noise.py"} <= set(found)
    assert {"harness/dp/random.py", "harness/dp/native/gaussian.c", "harness/dp/native/vector.h"} <= set(found)
    assert [name for name in found if name.startswith("methods/")] == ["methods/dp_sgd.py"]
    assert not {
        "harness/registry/registry.py",
        "harness/dp/engines/taped/ghost.py",
        "harness/dp/clip/scaling.py",
        "harness/dp/noise/correlated.py",
        "harness/dp/noise/strategy.py",
    } & set(found)
