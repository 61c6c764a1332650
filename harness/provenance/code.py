"""A hash of the code that a run's numbers come from, found statically.

The closure starts at the modules of a method, its parts and its model and follows imports inside the
packages of this project. Names taken from a package are followed to the module that defines them, so that a
method which uses ``Flat`` does not depend on an engine it never calls. C files belong to the package in whose
folder they lie. Files are compared as syntax trees without docstrings and comments, C files without comments:
mending a sentence makes no record stale. Nor does moving a file: an import inside this project counts by the names that
it binds and by what the file says that they come from, not by where that file lies.

A file of the user's may import others of theirs. These are followed too: whatever Python finds outside the folders that
it installs into. What is installed counts by its version (`harness.provenance.measure`), unless a starting module
belongs to it. An import by a computed name is not seen.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import re
import site
import sys
import sysconfig
from collections.abc import Collection, Iterable, Iterator
from functools import lru_cache
from pathlib import Path

# Decorators hand their function back unchanged, so the registry takes no part in any number.
IGNORED: frozenset[str] = frozenset({"harness.registry"})
# Packages whose imports are followed, besides those that the starting modules belong to.
FOLLOWED: frozenset[str] = frozenset({"harness", "methods"})


def code_hash(files: Iterable[Path], roots: Iterable[Path] | None = None) -> str:
    """12 hex digits over the contents of Python and C files; order, names and places do not matter.

    Which of ``files`` a name is imported from does matter. ``roots`` are as in :func:`closure`.
    """
    graph = _Graph(_roots(roots), frozenset())
    digests = {file: _digest(file) for file in {f.resolve() for f in files}}
    lines = []
    for file, digest in digests.items():
        bound = graph.bound(file) if file.suffix == ".py" else ()
        lines.append(
            " ".join([digest, *sorted(f"{local}={digests[home]}" for local, home in bound if home in digests)])
        )
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:12]


def hashes(files: Iterable[Path], roots: Iterable[Path] | None = None) -> dict[str, str]:
    """Path relative to its root (the bare name where it is under none) to 12 hex digits, by path."""
    places = _roots(roots)
    found: dict[str, str] = {}
    for file in {f.resolve() for f in files}:
        root = next((r for r in places if file.is_relative_to(r)), file.parent)
        found[file.relative_to(root).as_posix()] = _digest(file)[:12]
    return dict(sorted(found.items()))


def closure(
    modules: Iterable[str | Path], roots: Iterable[Path] | None = None, skip: Collection[str] = IGNORED
) -> list[Path]:
    """Files that the modules import, directly or not, themselves and C files included, in order of paths.

    ``modules`` are import names or paths of files; ``roots`` are the folders that hold the packages, by
    default the one that holds ``harness``; ``skip`` are modules, and packages with all in them, that are left
    out. Imports inside functions count; those under ``if TYPE_CHECKING`` do not. A package's ``__init__`` is
    part of the closure only where something it defines is imported, or the package as a whole. Raises
    ``LookupError`` where a starting module has no source.
    """
    graph = _Graph(_roots(roots), frozenset(skip))
    starts = [(one, graph.name_of(one)) if isinstance(one, Path) else (graph.start(one), one) for one in modules]
    graph.followed = FOLLOWED | {module.split(".")[0] for _, module in starts if module}
    for file, module in starts:
        graph.visit(file.resolve(), module)
        if module:
            graph.module(module)
    return sorted(graph.seen)


def _roots(roots: Iterable[Path] | None) -> tuple[Path, ...]:
    found = (Path(__file__).parents[2],) if roots is None else tuple(roots)
    return tuple(root.resolve() for root in found)


@lru_cache(maxsize=1)
def _installed() -> tuple[Path, ...]:
    """The folders of Python's own modules and of installed packages."""
    paths = sysconfig.get_paths()
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    folders = [*(paths[name] for name in names), *site.getsitepackages(), site.getusersitepackages()]
    return tuple({Path(folder).resolve() for folder in folders})


class _Graph:
    """Depth-first walk over imports; ``seen`` are the files of the closure."""

    def __init__(self, roots: tuple[Path, ...], skip: frozenset[str]) -> None:
        self.roots = roots
        self.skip = skip
        self.followed = FOLLOWED
        self.seen: set[Path] = set()
        self._trees: dict[Path, ast.Module] = {}
        self._files: dict[str, Path | None] = {}
        self._theirs: dict[str, Path | None] = {}

    def start(self, module: str) -> Path:
        """The file of a starting module; a module of the user's is found among those that are imported."""
        file = self.file(module)
        if file is None:
            loaded = getattr(sys.modules.get(module), "__file__", None)
            if loaded is None or not loaded.endswith(".py"):
                places = ", ".join(map(str, self.roots))
                raise LookupError(f"module {module!r} has no Python source under {places}")
            file = Path(loaded)
        return file

    def name_of(self, file: Path) -> str:
        """The import name of a file under a root, empty for a file that stands alone."""
        for root in self.roots:
            if file.resolve().is_relative_to(root):
                parts = file.resolve().relative_to(root).with_suffix("").parts
                return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        return ""

    def file(self, module: str) -> Path | None:
        """``a.b`` to ``a/b.py`` or ``a/b/__init__.py`` under the first root that has it."""
        if module not in self._files:
            theirs = self.theirs(module.split(".")[0])
            roots = self.roots if theirs is None else (*self.roots, theirs)
            bases = [root.joinpath(*module.split(".")) for root in roots]
            every = (file for base in bases for file in (base.with_name(base.name + ".py"), base / "__init__.py"))
            self._files[module] = next((file for file in every if file.is_file()), None)
        return self._files[module]

    def theirs(self, top: str) -> Path | None:
        """The folder that holds a module or package of the user's; None where it is installed, or not found."""
        if top not in self._theirs:
            try:
                spec = None if top in self.followed else importlib.util.find_spec(top)
            except (ImportError, ValueError):  # the module that runs has no spec
                spec = None
            places = [*(spec.submodule_search_locations or ())] if spec is not None else []
            places += [spec.origin] if spec is not None and spec.has_location and spec.origin else []
            found = [Path(place).resolve().parent for place in places]
            found = [folder for folder in found if not any(folder.is_relative_to(one) for one in _installed())]
            self._theirs[top] = found[0] if found else None
        return self._theirs[top]

    def visit(self, file: Path, module: str) -> None:
        """Add a file and all it imports."""
        if file in self.seen:
            return
        self.seen.add(file)
        if file.name == "__init__.py":
            self.seen.update(file.parent.glob("*.[ch]"))
        for target, names in _imports(self.tree(file), module, file.name == "__init__.py"):
            for name, _ in names:
                if name == "*":
                    self.module(target)
                else:
                    self.name(target, name)

    def module(self, module: str) -> None:
        """``import module``: any of its names may be used, so a lazy package brings all of its modules."""
        file = self.file(module) if self._wanted(module) else None
        if file is None:
            return
        self.visit(file, module)
        for place in sorted(set(_where(self.tree(file)).values())):
            self.module(f"{module}.{place}")

    def name(self, module: str, name: str) -> None:
        """``from module import name``: a submodule, a name a package passes on, or one the module defines."""
        file = self.file(module) if self._wanted(module) else None
        if file is None:
            if self._wanted(module):  # a folder without __init__.py is a package too
                self.module(f"{module}.{name}")
            return
        if file.name == "__init__.py":
            if self.file(f"{module}.{name}") is not None:
                self.module(f"{module}.{name}")
                return
            passed_on = self._passed_on(module, file, name)
            if passed_on is not None:
                self.name(*passed_on)
                return
        self.visit(file, module)

    def bound(self, file: Path) -> Iterator[tuple[str, Path | None]]:
        """The names that a file's imports bind, each with the file that it comes from."""
        for target, names in _imports(self.tree(file), self.name_of(file), file.name == "__init__.py"):
            for name, local in names:
                yield local, self.home(target, name)

    def home(self, module: str, name: str) -> Path | None:
        """The file that defines a name of a module, or that is it; None for what is not under a root."""
        file = self.file(module)
        if name == "*":
            return file
        if file is None or file.name == "__init__.py":
            submodule = self.file(f"{module}.{name}")
            if file is None or submodule is not None:
                return submodule
            passed_on = self._passed_on(module, file, name)
            if passed_on is not None:
                return self.home(*passed_on)
        return file

    def tree(self, file: Path) -> ast.Module:
        if file not in self._trees:
            self._trees[file] = _parsed(str(file), file.read_bytes())
        return self._trees[file]

    def _wanted(self, module: str) -> bool:
        skipped = any(module == one or module.startswith(f"{one}.") for one in self.skip)
        top = module.split(".")[0]
        return not skipped and (top in self.followed or self.theirs(top) is not None)

    def _passed_on(self, module: str, file: Path, name: str) -> tuple[str, str] | None:
        """Where a package's ``__init__`` takes a name from, by its ``_WHERE`` map or a top-level import."""
        tree = self.tree(file)
        place = _where(tree).get(name)
        if place is not None:
            return f"{module}.{place}", name
        for node in tree.body:
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return _absolute(node, module, True), alias.name
        return None


def _where(tree: ast.Module) -> dict[str, str]:
    """The literal map ``_WHERE = {name: submodule}`` of a package whose names are looked up on first use."""
    for node in tree.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
        if isinstance(target, ast.Name) and target.id == "_WHERE" and isinstance(value, ast.Dict):
            found = ast.literal_eval(value)
            return {str(name): str(place) for name, place in found.items()}
    return {}


def _absolute(node: ast.ImportFrom, module: str, is_package: bool) -> str:
    """The absolute name of ``X`` in ``from X import``; empty for a relative import of a single file."""
    if not node.level:
        return node.module or ""
    if not module:
        return ""
    parts = module.split(".")
    base = parts[: len(parts) - node.level + (1 if is_package else 0)]
    return ".".join([*base, *([node.module] if node.module else [])])


@lru_cache(maxsize=512)
def _imports(tree: ast.Module, module: str, is_package: bool) -> tuple[tuple[str, tuple[tuple[str, str], ...]], ...]:
    """``(module, ((name, local name), ...))`` of each import that runs; the name is ``*`` for ``import module``."""
    found: list[tuple[str, tuple[tuple[str, str], ...]]] = []
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test).split(".")[-1] == "TYPE_CHECKING":
            todo += node.orelse
            continue
        todo += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            found += [(alias.name, (("*", alias.asname or ""),)) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            target = _absolute(node, module, is_package)
            if target:
                found.append((target, tuple((one.name, one.asname or one.name) for one in node.names)))
    return tuple(found)


def _digest(file: Path) -> str:
    if file.suffix == ".py":
        text = _meaning(str(file), file.read_bytes())
    else:
        lines = re.sub(r"/\*.*?\*/|//[^\n]*", " ", file.read_text(encoding="utf-8"), flags=re.DOTALL).splitlines()
        text = "\n".join(" ".join(line.split()) for line in lines if line.strip())
    return hashlib.sha256(text.encode()).hexdigest()


@lru_cache(maxsize=512)  # the closures of different methods share most of their files
def _parsed(name: str, source: bytes) -> ast.Module:
    return ast.parse(source, filename=name)


@lru_cache(maxsize=512)
def _meaning(name: str, source: bytes) -> str:
    return _normal(_parsed(name, source))


def _normal(node: object) -> str:
    """A syntax tree as text without docstrings, places and empty fields, the same under every Python version.

    ``ast.dump`` and ``ast.unparse`` change from one version to the next.
    """
    if isinstance(node, ast.Constant):  # with its type: 1 is not 1.0 nor True
        return f"{type(node.value).__name__}:{node.value!r}"
    if isinstance(node, ast.AST):
        fields = []
        for name, value in sorted(ast.iter_fields(node)):
            if name == "body" and isinstance(node, ast.Module | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                value = value if ast.get_docstring(node, clean=False) is None else value[1:]
            if value is None or value == [] or name in ("type_comment", "kind", "type_ignores"):
                continue
            fields.append(f"{name}={_normal(value)}")
        return f"{type(node).__name__}({','.join(fields)})"
    if isinstance(node, list):
        names = sorted(name for one in node for name in _names_inside(one) or ())
        return "[" + ",".join([*names, *(_normal(one) for one in node if _names_inside(one) is None)]) + "]"
    return repr(node)


def _names_inside(node: object) -> list[str] | None:
    """The names that an import of this project's files binds, whose places do not count; None for anything else."""
    if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] in FOLLOWED):
        return [f"{alias.name} as {alias.asname or alias.name}" for alias in node.names]
    if isinstance(node, ast.Import) and all(a.asname and a.name.split(".")[0] in FOLLOWED for a in node.names):
        return [f"module as {alias.asname}" for alias in node.names]
    return None
