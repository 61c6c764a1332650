"""Reads docstrings and defaults of methods and of their parts from the source, without importing anything."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

from harness import registry

_PARTS = Path(__file__).parents[1] / "dp"


def describe(methods: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """``{"methods": {name: ...}, "parts": {class: ...}}`` for the cards. `methods` are ``cell.method`` of records.

    Of a method: ``installed`` (whether it needs no file of the user), ``summary`` and ``module`` (docstrings),
    ``paper``, ``family``, ``parameters`` (name to type and default, as text). Of a part's class: its docstring, then
    those of its own methods, each after its name; classes of the file of a user's method are known too. What is not
    known here, such as a method of somebody else's file, is left out.
    """
    names: set[str] = set()
    kinds: set[str] = set()
    for one in methods:
        names.add(one["name"])
        parts = (part for part in one.get("parts", {}).values() if isinstance(part, dict))
        kinds |= {part["type"] for part in parts if isinstance(part.get("type"), str)}
    known = {name: found for name in sorted(names) if (found := _method(name))}
    classes = _classes()
    for name in known:
        entry = registry.resolve("method", name)
        if not entry.module:
            classes = _documented(entry.file) | classes
    return {"methods": known, "parts": {name: classes[name] for name in sorted(kinds) if name in classes}}


def _method(name: str) -> dict[str, Any] | None:
    try:
        entry = registry.resolve("method", name)
        tree = ast.parse(entry.file.read_text("utf-8"))
    except (registry.RegistryError, OSError, ValueError, SyntaxError):
        return None
    function = next((n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == entry.function), None)
    return {
        "installed": bool(entry.module),
        "summary": _doc(function) if function else entry.summary,
        "module": _doc(tree),
        "paper": str(entry.meta.get("paper") or ""),
        "family": str(entry.meta.get("family") or ""),
        "parameters": {
            key: [one.type, "required" if one.required else registry.show(one.default)]
            for key, one in entry.parameters.items()
        },
    }


@cache
def _classes() -> dict[str, list[list[str]]]:
    """Class name -> [what, text] pairs: the class itself, then its documented methods and properties."""
    found = (_documented(path).items() for path in sorted(_PARTS.rglob("*.py"), reverse=True))
    return dict(chain.from_iterable(found))


def _documented(path: Path) -> dict[str, list[list[str]]]:
    """The same of one file."""
    found: dict[str, list[list[str]]] = {}
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.ClassDef) and _doc(node):
            members = [n for n in node.body if isinstance(n, ast.FunctionDef) and _doc(n)]
            found[node.name] = [["", _doc(node)], *([n.name, _doc(n)] for n in members if n.name[0] != "_")]
    return found


def _doc(node: ast.Module | ast.ClassDef | ast.FunctionDef) -> str:
    return ast.get_docstring(node) or ""
