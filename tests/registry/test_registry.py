"""The registry: names from source text, one fault harming no other, errors that say what to write."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness import registry
from harness.registry import (
    BrokenEntry,
    DuplicateName,
    LoadError,
    OptionError,
    Registry,
    RegistryError,
    SpecError,
    UnknownName,
)
from tests.support import ROOT

GOOD = '''"""A file of methods."""
from typing import Literal
from harness.registry import method

CLIP = 1.0

@method("first", paper="arXiv:1", family="baseline")
def first(clip: float = CLIP, steps: int | None = None, mode: Literal["a", "b"] = "a", on_off: bool = False):
    """What it does.

    More.
    """
    return ("first", clip, steps, mode, on_off)

@method("second")
def second_one(lr: "float"):
    return ("second", lr)
'''


def house(root: Path, **files: str) -> Registry:
    """A registry over a folder of method files."""
    (root / "methods").mkdir(exist_ok=True)
    for name, text in files.items():
        (root / "methods" / f"{name}.py").write_text(text)
    return Registry(root, entry_points=False)


def test_signature_is_the_schema(tmp_path: Path) -> None:
    names = house(tmp_path, good=GOOD)
    entry = names.resolve("method", "first")
    assert (entry.function, entry.line, entry.summary) == ("first", 8, "What it does.")
    assert entry.meta == {"paper": "arXiv:1", "family": "baseline"}
    shown = {name: (p.type, p.default, p.required) for name, p in entry.parameters.items()}
    assert shown == {
        "clip": ("float", 1.0, False),
        "steps": ("int | None", None, False),
        "mode": ("Literal['a', 'b']", "a", False),
        "on_off": ("bool", False, False),
    }
    second = names.resolve("method", "second")
    assert second.summary == "A file of methods."
    assert second.parameters["lr"].required
    assert list(names.index("method")) == ["first", "second"]


def test_load_runs_the_function_of_this_very_file(tmp_path: Path) -> None:
    """Another tree's ``methods`` package is installed here; the entry's own file must win."""
    names = house(tmp_path, dp_sgd=GOOD)
    function = names.load(names.resolve("method", "first"))
    assert function(clip=2.0) == ("first", 2.0, None, "a", False)
    assert Path(function.__code__.co_filename) == tmp_path / "methods" / "dp_sgd.py"


@pytest.mark.parametrize(
    ("text", "name", "line", "reason"),
    [
        ("x = 1\ndef broken(:\n", "bad-one", 2, "not valid Python"),
        ("\0", "bad-one", 1, "null bytes"),
        ("from harness.registry import method\n@method\ndef f(): ...\n", "f", 3, '@method("name", ...)'),
        ("from harness.registry import method\nN = 'a'\n@method(N)\ndef f(): ...\n", "f", 3, "as a literal"),
        ("from harness.registry import method\n@method('A b')\ndef f(): ...\n", "A b", 2, "lower-case"),
        ("from harness.registry import method\n@method('m')\ndef f(a): ...\n", "m", 3, "has no type"),
        ("from harness.registry import method\n@method('m')\ndef f(a: list): ...\n", "m", 3, "type list"),
        ("from harness.registry import method\n@method('m')\ndef f(a: int = 0.5): ...\n", "m", 3, "default of a"),
        ("from harness.registry import method\n@method('m')\ndef f(a: int = g()): ...\n", "m", 3, "write a literal"),
        ("from harness.registry import method\n@method('m')\ndef f(**k: int): ...\n", "m", 3, "hides the schema"),
        ("from harness.registry import method\n@method('m')\ndef f(label: str): ...\n", "m", 3, "[[method]]"),
        ("from harness import registry as r\n@r.method('m')\nclass F: ...\n", "m", 3, "plain function"),
    ],
)
def test_a_broken_file_is_listed_and_harms_no_other(
    tmp_path: Path, text: str, name: str, line: int, reason: str
) -> None:
    names = house(tmp_path, good=GOOD, bad_one=text)
    assert list(names.index("method")) == ["first", "second"]
    (broken,) = names.broken("method")
    assert (broken.name, broken.file, broken.line) == (name, tmp_path / "methods" / "bad_one.py", line)
    assert reason in broken.reason
    with pytest.raises(BrokenEntry, match=r"bad_one\.py:\d+: .* is broken"):
        names.resolve("method", name)


def test_duplicate_names_are_refused_with_both_places(tmp_path: Path) -> None:
    names = house(tmp_path, good=GOOD)
    mine = tmp_path / "mine.py"
    mine.write_text(GOOD)
    names.add_file(mine)
    with pytest.raises(DuplicateName) as caught:
        names.index("method")
    assert f"{tmp_path / 'methods' / 'good.py'}:8" in str(caught.value)
    assert f"{mine}:8" in str(caught.value)


def test_did_you_mean(tmp_path: Path) -> None:
    names = house(tmp_path, good=GOOD)
    with pytest.raises(UnknownName, match=r'"frist"; there are first, second\. Did you mean "first"\?'):
        names.resolve("method", "frist")
    with pytest.raises(UnknownName) as caught:
        names.resolve("method", "zzz")
    assert caught.value.suggestion is None
    with pytest.raises(UnknownName, match="takes nothing after a colon"):
        names.resolve("method", "first:x")


def test_a_users_file(tmp_path: Path) -> None:
    names = house(tmp_path)
    mine = tmp_path / "mine.py"
    mine.write_text(
        "from dataclasses import dataclass\nfrom harness.registry import method, model\n"
        "@dataclass(frozen=True)\nclass Part:\n    x: float = 1.0\n"
        "@method('mine')\ndef mine(x: float = 1.0): return Part(x)\n"
        "@model('net')\ndef net(input_shape: tuple, classes: int, width: int = 3): return None\n"
    )
    names.add_file(mine)
    names.add_file(mine)
    entry = names.resolve("method", "mine")
    assert entry.module == ""
    assert names.load(entry)(x=2.0).x == 2.0
    assert names.load(entry) is names.load(entry)
    assert list(names.resolve("model", "net").parameters) == ["width"]
    with pytest.raises(RegistryError, match=r"absent\.py: no such file"):
        names.add_file(tmp_path / "absent.py")


def test_import_errors_name_the_place(tmp_path: Path) -> None:
    names = house(tmp_path, bad="import no_such_package_xyz\n" + GOOD)
    with pytest.raises(LoadError, match=r'bad\.py:\d+: method "first" cannot be imported: ModuleNotFoundError'):
        names.load(names.resolve("method", "first"))


def test_entry_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "some_lab"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('listing names must not import')\n")
    (package / "ours.py").write_text(GOOD)
    monkeypatch.syspath_prepend(tmp_path)
    values = ["some_lab.ours:second_one", "some_lab.ours:none", "no_such_lab.x", "some_lab.absent", "math"]
    points = EntryPoints(EntryPoint(f"p{i}", value, registry.GROUP) for i, value in enumerate(values))
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: points.select(group=group))
    names = Registry(tmp_path / "nothing")
    assert list(names.index("method")) == ["second"]
    assert names.resolve("method", "second").module == "some_lab.ours"
    assert [(b.name, b.reason.split(":")[0]) for b in names.broken()] == [
        ("p2", "entry point 'no_such_lab.x'"),
        ("p3", "entry point 'some_lab.absent'"),
        ("p4", "entry point 'math'"),
        ("none", "entry point names 'none', which is not a function marked with @method"),
    ]


def test_specs() -> None:
    assert registry.parse_spec("mlp") == ("mlp", {})
    assert registry.parse_spec("mlp?width=2&ws=true") == ("mlp", {"width": "2", "ws": "true"})
    assert registry.parse_spec("npz:/a/b?mean=0.5") == ("npz:/a/b", {"mean": "0.5"})
    for wrong in ("", " mlp", "?a=1", "mlp?", "mlp?a", "mlp?a=", "mlp?=1", "mlp?a=1&a=2"):
        with pytest.raises(SpecError, match="spec"):
            registry.parse_spec(wrong)


def test_bind(tmp_path: Path) -> None:
    entry = house(tmp_path, good=GOOD).resolve("method", "first")
    expanded = {"clip": 1.0, "steps": None, "mode": "a", "on_off": False}
    assert registry.bind(entry, {}) == expanded
    assert registry.bind(entry, {"steps": "3", "clip": "1e-1", "on_off": "true", "mode": "b"}) == {
        "clip": 0.1, "steps": 3, "mode": "b", "on_off": True,
    }  # fmt: skip
    assert registry.bind(entry, {"steps": "none", "clip": 2}) == expanded | {"clip": 2.0}
    assert type(registry.bind(entry, {"clip": 2})["clip"]) is float
    with pytest.raises(OptionError) as caught:
        registry.bind(entry, {"clp": "1", "steps": "1.5", "mode": "c", "on_off": 1})
    assert [str(p) for p in caught.value.problems] == [
        'method "first" has no parameter "clp"; it has clip, steps, mode, on_off. Did you mean "clip"?',
        'method "first", parameter "steps": "1.5" does not fit the type int | None; '
        "write a whole number such as 3 or none.",
        'method "first", parameter "mode": "c" does not fit the type Literal[\'a\', \'b\']; write one of "a", "b".',
        'method "first", parameter "on_off": 1 does not fit the type bool; write true or false.',
    ]
    with pytest.raises(OptionError, match='needs parameter "lr"'):
        registry.bind(house(tmp_path).resolve("method", "second"), {})


@given(
    st.dictionaries(
        st.sampled_from(["clip", "steps", "mode", "on_off", "other"]),
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers()),
    )
)
def test_bind_raises_nothing_else(options: dict[str, object]) -> None:
    entry = registry.Entry(
        "method", "m", "f", Path("m.py"), 1,
        parameters={
            "clip": registry.Parameter("float", 1.0), "steps": registry.Parameter("int | None"),
            "mode": registry.Parameter("Literal['a', 'b']", "a"), "on_off": registry.Parameter("bool", False),
        },
    )  # fmt: skip
    try:
        bound = registry.bind(entry, options)
    except OptionError:
        return
    assert list(bound) == list(entry.parameters)


@given(st.text(alphabet="abc?&=: %") | st.text())
def test_lookup_raises_nothing_else(spec: str) -> None:
    for kind in registry.KINDS:
        try:
            registry.lookup(kind, spec)
        except RegistryError as error:
            assert str(error)


def test_this_installation() -> None:
    """Every file of this repository can be read, and listing all of it imports neither torch nor a method."""
    code = (
        "import sys\nfrom harness.registry import registry\n"
        "counts = [len(registry.index(kind)) for kind in registry.KINDS]\n"
        "assert all(counts), counts\nassert not registry.broken(), list(map(str, registry.broken()))\n"
        "assert 'torch' not in sys.modules and 'methods' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in ("non-private", "dp-sgd", "fast-clipping", "dp-adam"):
        assert registry.resolve("method", name).meta["paper"]
