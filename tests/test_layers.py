"""Imports run one way: each room of the package names the rooms it may use, and nothing else."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent

# What each room may import of this project. Nobody may import methods, report or cli.
ALLOWED: dict[str, set[str]] = {
    "dp": set(),
    "provenance": set(),
    "registry": {"dp"},
    "records": {"registry", "provenance"},
    "data": {"registry", "dp", "records"},
    "models": {"registry", "dp"},
    "peers": {"dp", "models"},
    "suite": {"registry", "records", "data", "dp", "models"},
    "running": {"dp", "provenance", "registry", "records", "data", "models"},
    "bench": {"running", "dp", "data", "models", "registry", "provenance", "peers", "suite", "records"},
    "verify": {"running", "dp", "data", "models", "registry", "provenance", "suite", "records", "peers"},
    "report": {"records", "registry"},
    "methods": {"dp", "registry"},
    "cli": {
        "bench", "data", "models", "provenance", "records", "registry", "report", "running", "suite", "verify",
    },
}  # fmt: skip
MATHEMATICS = {
    "torch",
    "dp_accounting",
    "numpy",
    "scipy",
    "attrs",
    "opacus",
}  # the events of dp_accounting are attrs classes


def modules() -> Iterator[tuple[Path, str]]:
    """Each source file and its import name."""
    for file in sorted([*ROOT.glob("harness/**/*.py"), *ROOT.glob("methods/**/*.py")]):
        parts = file.relative_to(ROOT).with_suffix("").parts
        yield file, ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(file: Path, module: str) -> Iterator[tuple[int, str]]:
    """Line and full name of what a file imports; names for type checkers only do not count."""
    todo: list[ast.AST] = [ast.parse(file.read_text())]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo += node.orelse
            continue
        todo += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{name}.{alias.name}") for alias in node.names)


def room(name: str) -> str | None:
    """ "harness.dp.tree.Tree" is in dp, "methods.dp_sgd" in methods; None outside this project."""
    parts = name.split(".")
    if parts[0] == "methods":
        return "methods"
    known = len(parts) > 1 and ((ROOT / "harness" / parts[1]).is_dir() or (ROOT / f"harness/{parts[1]}.py").exists())
    return parts[1] if parts[0] == "harness" and known else None


def test_rooms_import_only_what_they_may() -> None:
    wrong = []
    for file, module in modules():
        here = room(module)
        if here is None:
            continue
        assert here in ALLOWED, f"{file}: a new room; say in {Path(__file__).name} what it may import"
        for line, name in imports(file, module):
            there = room(name)
            if there is not None and there != here and there not in ALLOWED[here]:
                wrong.append(f"{file.relative_to(ROOT)}:{line}: {here} may not import {name}")
    assert not wrong, "\n".join(wrong)


def test_the_allowed_imports_have_no_circle() -> None:
    done: set[str] = set()
    left = dict(ALLOWED)
    while left:
        free = [name for name, uses in left.items() if uses <= done]
        assert free, f"a circle among {sorted(left)}"
        done |= set(free)
        left = {name: uses for name, uses in left.items() if name not in done}
    assert not {"methods", "report", "cli"} & {one for name, uses in ALLOWED.items() if name != "cli" for one in uses}


def test_methods_do_not_import_each_other() -> None:
    for file, module in modules():
        if room(module) == "methods":
            others = [name for _, name in imports(file, module) if room(name) == "methods"]
            assert not others, f"{file}: imports {others}"


def test_the_mathematics_stands_alone() -> None:
    wrong = []
    for file, module in modules():
        if room(module) == "dp":
            for line, name in imports(file, module):
                top = name.split(".")[0]
                if top not in MATHEMATICS | sys.stdlib_module_names | {"harness"}:
                    wrong.append(f"{file.relative_to(ROOT)}:{line}: {name}")
    assert not wrong, "\n".join(wrong)
