"""Names to functions: ``@method``, ``@dataset``, ``@model`` and the index of everything they mark.

The index is read from source text with :mod:`ast`; nothing is imported to list names, parameters and
summaries, so ``epsbench ls`` and the validation of a suite never import torch. A function's signature is its
parameter schema::

    @method("dp-sgd", paper="arXiv:1607.00133", family="baseline")
    def dp_sgd(clip: float = 1.0, lr: float = 1.0, momentum: float = 0.9) -> Method:
        \"\"\"Clipped per-example gradients plus Gaussian noise.\"\"\"

Names come from four places: ``methods/*.py`` beside this package, ``harness/data/*.py`` and
``harness/models/*.py``, installed packages with an entry point in the group ``epsbench.methods`` (``module``
or ``module:function``), and files named by the user (:func:`add_file`). A file that cannot be read is listed
as :class:`Broken` with its reason and takes no other name down; two functions of one name are refused.

Some parameters are not options but are handed over by the harness (:data:`SUPPLIED`); they are left out of
``Entry.parameters``. A dataset with a parameter ``path`` and a model with a parameter ``name`` take the text
after a colon, as in ``npz:PATH`` and ``timm:NAME`` (:data:`ARGUMENT`).
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from harness.options import (
    OptionError,
    OptionProblem,
    Parameter,
    RegistryError,
    SpecError,
    check_type,
    did_you_mean,
    parse_spec,
    show,
    split_name,
)

__all__ = [
    "ARGUMENT",
    "GROUP",
    "KINDS",
    "SUPPLIED",
    "Broken",
    "BrokenEntry",
    "DuplicateName",
    "Entry",
    "LoadError",
    "OptionError",
    "OptionProblem",
    "Parameter",
    "Registry",
    "RegistryError",
    "SpecError",
    "UnknownName",
    "add_file",
    "bind",
    "broken",
    "check_options",
    "dataset",
    "did_you_mean",
    "files",
    "index",
    "installed",
    "load",
    "lookup",
    "method",
    "model",
    "parse_spec",
    "resolve",
    "show",
    "split_name",
]

GROUP = "epsbench.methods"
KINDS = ("method", "dataset", "model")

# Parameters that the harness fills in; they are never options of a suite or of a spec.
SUPPLIED: Mapping[str, frozenset[str]] = {
    "method": frozenset(),
    "dataset": frozenset({"root", "path"}),
    "model": frozenset({"input_shape", "classes", "seed", "name"}),
}
# The supplied parameter that takes the text after the colon of "npz:PATH" and "timm:NAME".
ARGUMENT: Mapping[str, str] = {"dataset": "path", "model": "name"}
# Keys of a [[method]] table of a suite, so no hyper-parameter may have such a name.
RESERVED: Mapping[str, frozenset[str]] = {
    "method": frozenset({"name", "label", "tasks", "epsilon", "on"}),
    "dataset": frozenset(),
    "model": frozenset(),
}

_NAME = re.compile(r"[a-z0-9]+(?:[-._][a-z0-9]+)*")

F = TypeVar("F", bound=Callable[..., Any])


# Errors ---------------------------------------------------------------------------------------------------


class UnknownName(RegistryError):
    """No method, dataset or model has this name."""


class DuplicateName(RegistryError):
    """Two functions claim one name; the message names both files and lines."""


class BrokenEntry(RegistryError):
    """The name belongs to a file that cannot be read as Python or is not declared properly."""


class LoadError(RegistryError):
    """Importing the file of an entry failed."""


# What the index holds -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A registered function as read from its source, without importing it.

    ``module`` is the import name, empty for a file named by the user. ``argument`` is the parameter that
    takes the text after a colon (``npz:PATH``), None where the name stands alone.
    """

    kind: str
    name: str
    function: str
    file: Path
    line: int
    summary: str = ""
    meta: dict[str, object] = field(default_factory=dict)
    parameters: dict[str, Parameter] = field(default_factory=dict)
    module: str = ""
    argument: str | None = None

    @property
    def where(self) -> str:
        """``file:line`` of the function."""
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Broken:
    """A file, entry point or declaration that cannot be used, and why; ``name`` may be a guess."""

    kind: str
    name: str
    file: Path | None
    line: int
    reason: str

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}: " if self.file is not None else ""
        return f"{where}{self.kind} {self.name!r} is broken: {self.reason}"


# Decorators -----------------------------------------------------------------------------------------------


def method(name: str, /, **meta: object) -> Callable[[F], F]:
    """Mark a function that returns a ``Method``; by convention ``paper="arXiv:..."`` and ``family="..."``.

    The function itself comes back unchanged (it gains an attribute ``__epsbench__``). ``name`` and ``meta``
    must be literals, because the index reads them from the source.
    """
    return _mark("method", name, meta)


def dataset(name: str, /, **meta: object) -> Callable[[F], F]:
    """Mark a function that returns a ``Dataset``; the harness supplies ``root`` and ``path``."""
    return _mark("dataset", name, meta)


def model(name: str, /, **meta: object) -> Callable[[F], F]:
    """Mark a function that returns a module; the harness supplies ``input_shape``, ``classes``, ``name``."""
    return _mark("model", name, meta)


def _mark(kind: str, name: str, meta: Mapping[str, object]) -> Callable[[F], F]:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RegistryError(
            f'{kind} name {name!r}: write lower-case letters, digits and dashes, as in "dp-sgd".'
        )

    def mark(function: F) -> F:
        function.__epsbench__ = {"kind": kind, "name": name, **meta}  # type: ignore[attr-defined]
        return function

    return mark


# Reading source -------------------------------------------------------------------------------------------


class _Malformed(Exception):
    """A declaration that the index cannot use: line and reason."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(reason)
        self.line = line
        self.reason = reason


def _aliases(tree: ast.Module) -> dict[str, str]:
    """Local spelling of each decorator (``"method"``, ``"registry.method"``) to its kind."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            source = node.module or ""
            for alias in node.names:
                local = alias.asname or alias.name
                if (
                    source == "harness.registry" or (node.level and source == "registry")
                ) and alias.name in KINDS:
                    found[local] = alias.name
                elif (source == "harness" or (node.level and not source)) and alias.name == "registry":
                    found.update({f"{local}.{kind}": kind for kind in KINDS})
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name == "harness.registry":
                    found.update({f"{alias.asname or alias.name}.{kind}": kind for kind in KINDS})
    return found


def _constants(tree: ast.Module) -> dict[str, object]:
    """Module-level names bound once to a literal, so that ``clip: float = CLIP`` can be read."""
    found: dict[str, object] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            target, value = node.targets[0], node.value
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            target, value = node.target, node.value
        else:
            continue
        if isinstance(target, ast.Name):
            try:
                found[target.id] = ast.literal_eval(value)
            except (ValueError, TypeError, SyntaxError):
                continue  # not a literal: simply not a constant
    return found


def _literal(node: ast.expr, constants: Mapping[str, object], what: str) -> object:
    if isinstance(node, ast.Name) and node.id in constants:
        return constants[node.id]
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError):
        raise _Malformed(
            node.lineno,
            f"{what} is {ast.unparse(node)}; write a literal, because the index is read "
            "without importing the file",
        ) from None


def _annotation(arg: ast.arg) -> str:
    node = arg.annotation
    if node is None:
        raise _Malformed(
            arg.lineno, f"parameter {arg.arg} has no type; write {arg.arg}: float, int, str or bool"
        )
    text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ast.unparse(node)
    try:
        check_type(text)
    except (ValueError, SyntaxError) as error:
        raise _Malformed(arg.lineno, f"parameter {arg.arg}: {error}") from None
    return text


def _parameters(
    kind: str, function: ast.FunctionDef, constants: Mapping[str, object]
) -> dict[str, Parameter]:
    args = function.args
    for extra in (args.vararg, args.kwarg):
        if extra is not None:
            raise _Malformed(extra.lineno, f"parameter *{extra.arg} hides the schema; name every parameter")
    if args.posonlyargs:
        raise _Malformed(function.lineno, "positional-only parameters cannot be given by name; drop the /")
    none: list[ast.expr | None] = [None] * (len(args.args) - len(args.defaults))
    pairs = [
        *zip(args.args, none + list(args.defaults), strict=True),
        *zip(args.kwonlyargs, args.kw_defaults, strict=True),
    ]
    found: dict[str, Parameter] = {}
    for arg, default in pairs:
        if arg.arg in SUPPLIED[kind]:
            continue
        if arg.arg in RESERVED[kind]:
            raise _Malformed(
                arg.lineno, f"parameter {arg.arg} has the name of a key of [[method]]; choose another"
            )
        type_text = _annotation(arg)
        if default is None:
            found[arg.arg] = Parameter(type_text, None, required=True)
            continue
        value = _literal(default, constants, f"the default of {arg.arg}")
        try:
            found[arg.arg] = Parameter(
                type_text, None if value is None else Parameter(type_text).convert(value)
            )
        except ValueError as error:
            raise _Malformed(default.lineno, f"the default of {arg.arg}: {error}") from None
    return found


def _summary(*docstrings: str | None) -> str:
    return next((d.strip().splitlines()[0] for d in docstrings if d and d.strip()), "")


def _entry(
    kind: str, call: ast.Call, function: ast.FunctionDef, tree: ast.Module, file: Path, module: str
) -> Entry:
    constants = _constants(tree)
    if len(call.args) != 1 or not (
        isinstance(call.args[0], ast.Constant) and isinstance(call.args[0].value, str)
    ):
        raise _Malformed(call.lineno, f'write @{kind}("name", ...) with the name as a literal')
    name = call.args[0].value
    if not _NAME.fullmatch(name):
        raise _Malformed(call.lineno, f"name {name!r}: write lower-case letters, digits and dashes")
    meta: dict[str, object] = {}
    for keyword in call.keywords:
        if keyword.arg is None:
            raise _Malformed(call.lineno, f"@{kind} takes no **; write every keyword")
        meta[keyword.arg] = _literal(keyword.value, constants, keyword.arg)
    names = {a.arg for a in (*function.args.args, *function.args.kwonlyargs)}
    argument = ARGUMENT.get(kind)
    return Entry(
        kind=kind,
        name=name,
        function=function.name,
        file=file,
        line=function.lineno,
        summary=_summary(ast.get_docstring(function), ast.get_docstring(tree)),
        meta=meta,
        parameters=_parameters(kind, function, constants),
        module=module,
        argument=argument if argument in names else None,
    )


def _read(file: Path, module: str, kind: str) -> tuple[list[Entry], list[Broken]]:
    """Everything declared at the top level of one file; ``kind`` is what an unreadable file counts as."""
    guess = file.stem.replace("_", "-")
    try:
        tree = ast.parse(file.read_bytes(), filename=str(file))
    except SyntaxError as error:
        return [], [Broken(kind, guess, file, error.lineno or 1, f"not valid Python: {error.msg}")]
    except (OSError, ValueError, RecursionError) as error:
        return [], [Broken(kind, guess, file, 1, f"cannot be read: {error}")]
    aliases = _aliases(tree)
    entries: list[Entry] = []
    bad: list[Broken] = []
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        for decorator in node.decorator_list:
            called = decorator.func if isinstance(decorator, ast.Call) else decorator
            found = aliases.get(ast.unparse(called))
            if found is None:
                continue
            try:
                if not isinstance(node, ast.FunctionDef):
                    raise _Malformed(
                        node.lineno, f"@{found} marks a plain function, not a class or coroutine"
                    )
                if not isinstance(decorator, ast.Call):
                    raise _Malformed(node.lineno, f'write @{found}("name", ...), not @{found}')
                entries.append(_entry(found, decorator, node, tree, file, module))
            except _Malformed as error:
                bad.append(Broken(found, _declared(decorator, node.name), file, error.line, error.reason))
    return entries, bad


def _declared(decorator: ast.expr, function: str) -> str:
    """The name in the decorator where it can be read, else one made of the function's name."""
    if isinstance(decorator, ast.Call) and decorator.args and isinstance(decorator.args[0], ast.Constant):
        return str(decorator.args[0].value)
    return function.replace("_", "-")


# The registry ---------------------------------------------------------------------------------------------


def _locate(module: str) -> Path:
    """The source file of an installed module, found without importing it or its parent packages.

    Raises ``LookupError`` saying why not.
    """
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None:
        raise LookupError(f"no module named {top!r} is installed")
    if not rest:
        if spec.origin is None or not spec.origin.endswith(".py"):
            raise LookupError(f"module {module!r} has no Python source to index")
        return Path(spec.origin)
    for folder in spec.submodule_search_locations or ():
        base = Path(folder).joinpath(*rest)
        for candidate in (base.with_name(base.name + ".py"), base / "__init__.py"):
            if candidate.is_file():
                return candidate
    raise LookupError(f"package {top!r} is installed but has no source file for {module!r}")


class Registry:
    """Names found in the source under ``root`` (the folder that holds ``harness/`` and ``methods/``).

    The module-level functions act on one such object for this installation; tests make their own.
    """

    def __init__(self, root: Path | None = None, *, entry_points: bool = True) -> None:
        self.root = (root or Path(__file__).parent.parent).resolve()
        self.entry_points = entry_points
        self._files: list[Path] = []
        self._index: tuple[dict[str, dict[str, Entry]], list[Broken], list[DuplicateName]] | None = None

    # sources

    def add_file(self, path: str | Path) -> Path:
        """Index one more file. Raises ``FileNotFoundError`` naming it; adding a file twice is harmless."""
        file = Path(path).expanduser().resolve()
        if not file.is_file():
            raise FileNotFoundError(
                f"{path}: no such file; name a Python file with an @method, @model or @dataset function in it"
            )
        if file not in self._files:
            self._files.append(file)
            self._index = None
        return file

    def files(self) -> tuple[Path, ...]:
        """The files added by the user, in order."""
        return tuple(self._files)

    def refresh(self) -> None:
        """Forget what was read, so that the next look-up reads the sources again."""
        self._index = None

    def _sources(self) -> Iterator[tuple[Path, str, str, str | None]]:
        """``(file, module, kind, function or None)`` of each built-in or user file."""
        for folder, package, kind in (
            ("methods", "methods", "method"),
            ("harness/data", "harness.data", "dataset"),
            ("harness/models", "harness.models", "model"),
        ):
            for file in sorted((self.root / folder).glob("*.py")):
                module = package if file.stem == "__init__" else f"{package}.{file.stem}"
                yield file, module, kind, None
        for file in self._files:
            yield file, "", "method", None

    def _points(self, bad: list[Broken]) -> Iterator[tuple[Path, str, str, str | None]]:
        """The same for entry points; those that cannot be found are added to ``bad``."""
        if not self.entry_points:
            return
        for point in importlib.metadata.entry_points(group=GROUP):
            module, _, attribute = point.value.partition(":")
            try:
                yield _locate(module.strip()), module.strip(), "method", attribute.strip() or None
            except (
                Exception
            ) as error:  # a finder of another package may raise anything; it must not stop the rest
                bad.append(Broken("method", point.name, None, 0, f"entry point {point.value!r}: {error}"))

    def _scan(self) -> tuple[dict[str, dict[str, Entry]], list[Broken], list[DuplicateName]]:
        if self._index is not None:
            return self._index
        found: dict[str, dict[str, Entry]] = {kind: {} for kind in KINDS}
        bad: list[Broken] = []
        clashes: list[DuplicateName] = []
        seen: set[tuple[Path, str | None]] = set()
        for file, module, kind, function in (*self._sources(), *self._points(bad)):
            key = file.resolve()
            if (key, None) in seen or (key, function) in seen:
                continue
            seen.add((key, function))
            entries, problems = _read(file, module, kind)
            bad += problems
            if function is not None:
                entries = [e for e in entries if e.function == function]
                if not entries and not problems:
                    bad.append(
                        Broken(
                            kind,
                            function,
                            file,
                            1,
                            f"entry point names {function!r}, which is not a function marked with @method",
                        )
                    )
            for entry in entries:
                other = found[entry.kind].setdefault(entry.name, entry)
                if other is not entry and other.where != entry.where:
                    clashes.append(
                        DuplicateName(
                            f'two {entry.kind}s are called "{entry.name}": {other.where} and {entry.where}; '
                            "rename one of them."
                        )
                    )
        self._index = found, bad, clashes
        return self._index

    # look-ups

    def index(self, kind: str) -> dict[str, Entry]:
        """Name to entry, in order of names. Raises :class:`DuplicateName` where two share one."""
        if kind not in KINDS:
            raise ValueError(f"no kind {kind!r}; kinds are {', '.join(KINDS)}")
        found, _, clashes = self._scan()
        for clash in clashes:
            raise clash
        return dict(sorted(found[kind].items()))

    def broken(self, kind: str | None = None) -> list[Broken]:
        """What could not be indexed, and why."""
        return [b for b in self._scan()[1] if kind in (None, b.kind)]

    def clashes(self) -> list[DuplicateName]:
        """Every name that two functions share, for who wants to know of all."""
        return list(self._scan()[2])

    def resolve(self, kind: str, name: str) -> Entry:
        """The entry of a name (``npz:PATH`` resolves ``npz``).

        Raises :class:`UnknownName` with the nearest name, :class:`BrokenEntry` where its file is broken.
        """
        base, argument = split_name(name)
        entries = self.index(kind)
        entry = entries.get(base)
        if entry is None:
            for one in self.broken(kind):
                if one.name == base:
                    raise BrokenEntry(str(one))
            raise UnknownName(
                f'no {kind} is called "{base}"; there are {", ".join(entries) or "none"}.',
                did_you_mean(base, entries),
            )
        if entry.argument is None and argument is not None:
            raise UnknownName(
                f'{kind} "{base}" takes nothing after a colon; write "{base}", options after a "?".'
            )
        if entry.argument is not None and not argument:
            raise UnknownName(
                f'{kind} "{base}" needs a {entry.argument}; write "{base}:{entry.argument.upper()}".'
            )
        return entry

    def lookup(self, kind: str, spec: str) -> tuple[Entry, dict[str, object]]:
        """Entry and keyword arguments of a spec: ``"mlp?width=64"``, ``"npz:PATH"``, ``"timm:NAME?..."``.

        The arguments hold every option (defaults expanded) and, after a colon, the entry's ``argument``.
        Raises a :class:`RegistryError`.
        """
        name, options = parse_spec(spec)
        entry = self.resolve(kind, name)
        arguments = bind(entry, options)
        if entry.argument is not None:
            arguments[entry.argument] = split_name(name)[1]
        return entry, arguments

    def load(self, entry: Entry) -> Callable[..., Any]:
        """Import the entry's file and return its function. Raises :class:`LoadError` where that fails."""
        try:
            function: Callable[..., Any] = getattr(self._module(entry), entry.function)
        except Exception as error:  # the file is the user's: whatever it raises is reported with its place
            raise LoadError(
                f'{entry.where}: {entry.kind} "{entry.name}" cannot be imported: '
                f"{type(error).__name__}: {error}"
            ) from error
        if not callable(function):
            raise LoadError(f"{entry.where}: {entry.function} is not a function any more after import")
        return function

    def _module(self, entry: Entry) -> ModuleType:
        if entry.module:
            installed = sys.modules.get(entry.module)
            if installed is None and self._importable(entry):
                installed = importlib.import_module(entry.module)
            if installed is not None and _same(getattr(installed, "__file__", None), entry.file):
                return installed
        digest = hashlib.sha256(str(entry.file.resolve()).encode()).hexdigest()[:8]
        name = f"epsbench_file_{re.sub(r'[^0-9a-zA-Z_]', '_', entry.file.stem)}_{digest}"
        if name in sys.modules:
            return sys.modules[name]
        spec = importlib.util.spec_from_file_location(name, entry.file)
        if spec is None or spec.loader is None:
            raise ImportError(f"{entry.file} is not a Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look their module up while it is being executed
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
        return module

    def _importable(self, entry: Entry) -> bool:
        """Whether the import name leads to this very file (another package may be called ``methods``)."""
        try:
            return _same(str(_locate(entry.module)), entry.file)
        except LookupError:
            return False


def _same(one: str | None, other: Path) -> bool:
    return one is not None and Path(one).resolve() == other.resolve()


# Options ------------------------------------------------------------------------------------------


def check_options(
    entry: Entry, options: Mapping[str, object], *, text: bool | None = None
) -> tuple[dict[str, object], list[OptionProblem]]:
    """Arguments (defaults expanded, in signature order) and all that is wrong with them.

    ``text`` False takes strings as they are, as in TOML, where ``"0.5"`` is no float. None, the default,
    reads strings as the parameter's type, as in a spec.
    """
    problems: list[OptionProblem] = []
    given: dict[str, object] = {}
    for key, value in options.items():
        parameter = entry.parameters.get(key)
        if parameter is None:
            has = f"it has {', '.join(entry.parameters)}" if entry.parameters else "it has none"
            problems.append(
                OptionProblem(
                    key,
                    f'{entry.kind} "{entry.name}" has no parameter "{key}"; {has}.',
                    did_you_mean(key, entry.parameters),
                )
            )
            continue
        try:
            as_text = isinstance(value, str) and text is not False
            given[key] = parameter.parse(str(value)) if as_text else parameter.convert(value)
        except ValueError as error:
            problems.append(OptionProblem(key, f'{entry.kind} "{entry.name}", parameter "{key}": {error}'))
    arguments: dict[str, object] = {}
    for key, parameter in entry.parameters.items():
        if key in given:
            arguments[key] = given[key]
        elif parameter.required and key not in options:
            problems.append(
                OptionProblem(key, f'{entry.kind} "{entry.name}" needs parameter "{key}" ({parameter.type}).')
            )
        else:
            arguments[key] = parameter.default
    return arguments, problems


def bind(entry: Entry, options: Mapping[str, object]) -> dict[str, object]:
    """Options as keyword arguments of the function, defaults expanded. Raises :class:`OptionError` with all.

    Strings are read as the parameter's type, so the result of :func:`parse_spec` can be passed on.
    """
    arguments, problems = check_options(entry, options)
    if problems:
        raise OptionError(problems)
    return arguments


# This installation ----------------------------------------------------------------------------------------

_HERE = Registry()


def installed() -> Registry:
    """The registry of this installation, which the functions below act on."""
    return _HERE


def add_file(path: str | Path) -> Path:
    """Index a file named by the user and return its absolute path. See :meth:`Registry.add_file`."""
    return _HERE.add_file(path)


def files() -> tuple[Path, ...]:
    """The files added with :func:`add_file`."""
    return _HERE.files()


def index(kind: str) -> dict[str, Entry]:
    """Name to entry for ``"method"``, ``"dataset"`` or ``"model"``. See :meth:`Registry.index`."""
    return _HERE.index(kind)


def broken(kind: str | None = None) -> list[Broken]:
    """What could not be indexed. See :meth:`Registry.broken`."""
    return _HERE.broken(kind)


def resolve(kind: str, name: str) -> Entry:
    """The entry of a name, or :class:`UnknownName` with a suggestion. See :meth:`Registry.resolve`."""
    return _HERE.resolve(kind, name)


def lookup(kind: str, spec: str) -> tuple[Entry, dict[str, object]]:
    """Entry and keyword arguments of a spec. See :meth:`Registry.lookup`."""
    return _HERE.lookup(kind, spec)


def load(entry: Entry) -> Callable[..., Any]:
    """Import and return the function of an entry. See :meth:`Registry.load`."""
    return _HERE.load(entry)
