"""Keeps the index of everything that @method, @dataset and @model mark, and looks names up in it."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from harness.registry.options import OptionError, OptionProblem, RegistryError, did_you_mean, parse_spec, split_name
from harness.registry.source import KINDS, NAME, BrokenSource, Entry, locate, read

GROUP = "epsbench.methods"

F = TypeVar("F", bound=Callable[..., Any])


class UnknownName(RegistryError):
    """No method, dataset or model has this name."""


class DuplicateName(RegistryError):
    """Two functions claim one name; the message names both files and lines."""

    def __init__(self, first: Entry, second: Entry) -> None:
        places = f"{first.where} and {second.where}"
        super().__init__(f'two {first.kind}s are called "{first.name}": {places}; rename one of them.')
        self.entries = (first, second)


class BrokenEntry(RegistryError):
    """The name belongs to a file that cannot be read as Python or is not declared properly."""


class LoadError(RegistryError):
    """Importing the file of an entry failed."""


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
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise RegistryError(f'{kind} name {name!r}: write lower-case letters, digits and dashes, as in "dp-sgd".')

    def mark(function: F) -> F:
        function.__epsbench__ = {"kind": kind, "name": name, **meta}  # type: ignore[attr-defined]
        return function

    return mark


class Registry:
    """Names found in the source under ``root`` (the folder that holds ``harness/`` and ``methods/``).

    The module-level functions act on one such object for this installation; tests make their own.
    """

    def __init__(self, root: Path | None = None, *, entry_points: bool = True) -> None:
        self.root = (root or Path(__file__).parents[2]).resolve()
        self.entry_points = entry_points
        self._files: list[Path] = []
        self._index: tuple[dict[str, dict[str, Entry]], list[BrokenSource], list[DuplicateName]] | None = None

    # sources

    def add_file(self, path: str | Path) -> Path:
        """Index one more file. Raises :class:`RegistryError` where it is missing; adding a file twice is harmless."""
        file = Path(path).expanduser().resolve()
        if not file.is_file():
            text = "no such file; name a Python file with an @method, @model or @dataset function in it."
            raise RegistryError(f"{path}: {text}")
        if file not in self._files:
            self._files.append(file)
            self._index = None
        return file

    def in_file(self, kind: str, path: str | Path) -> list[Entry]:
        """What one file registers of a kind; the file is added. Raises :class:`RegistryError`."""
        file = self.add_file(path)
        return [one for one in self.index(kind).values() if one.file.resolve() == file]

    def files(self) -> tuple[Path, ...]:
        """The files added by the user, in order."""
        return tuple(self._files)

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

    def _points(self, bad: list[BrokenSource]) -> Iterator[tuple[Path, str, str, str | None]]:
        """The same for entry points; those that cannot be found are added to ``bad``."""
        if not self.entry_points:
            return
        for point in importlib.metadata.entry_points(group=GROUP):
            module, _, attribute = point.value.partition(":")
            try:
                yield locate(module.strip()), module.strip(), "method", attribute.strip() or None
            except Exception as error:
                # A finder of another package may raise anything; it must not stop the rest.
                bad.append(BrokenSource("method", point.name, None, 0, f"entry point {point.value!r}: {error}"))

    def _scan(self) -> tuple[dict[str, dict[str, Entry]], list[BrokenSource], list[DuplicateName]]:
        if self._index is not None:
            return self._index
        found: dict[str, dict[str, Entry]] = {kind: {} for kind in KINDS}
        bad: list[BrokenSource] = []
        clashes: list[DuplicateName] = []
        seen: set[tuple[Path, str | None]] = set()
        for file, module, kind, function in (*self._sources(), *self._points(bad)):
            key = file.resolve()
            if (key, None) in seen or (key, function) in seen:
                continue
            seen.add((key, function))
            entries, problems = read(file, module, kind)
            bad += problems
            if function is not None:
                entries = [e for e in entries if e.function == function]
                if not entries and not problems:
                    text = f"entry point names {function!r}, which is not a function marked with @method"
                    bad.append(BrokenSource(kind, function, file, 1, text))
            for entry in entries:
                other = found[entry.kind].setdefault(entry.name, entry)
                if other is not entry and other.where != entry.where:
                    clashes.append(DuplicateName(other, entry))
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

    def broken(self, kind: str | None = None) -> list[BrokenSource]:
        """What could not be indexed, and why."""
        return [b for b in self._scan()[1] if kind in (None, b.kind)]

    def clashes(self) -> list[DuplicateName]:
        """Every name that two functions share; :meth:`index` raises the first."""
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
                f'no {kind} is called "{base}"; there are {", ".join(entries) or "none"}.', did_you_mean(base, entries)
            )
        if entry.argument is None and argument is not None:
            raise UnknownName(f'{kind} "{base}" takes nothing after a colon; write "{base}", options after a "?".')
        if entry.argument is not None and not argument:
            raise UnknownName(f'{kind} "{base}" needs a {entry.argument}; write "{base}:{entry.argument.upper()}".')
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
                f'{entry.where}: {entry.kind} "{entry.name}" cannot be imported: {type(error).__name__}: {error}'
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
            return _same(str(locate(entry.module)), entry.file)
        except LookupError:
            return False


def _same(one: str | None, other: Path) -> bool:
    return one is not None and Path(one).resolve() == other.resolve()


def check_options(
    entry: Entry, options: Mapping[str, object], *, text: bool = True
) -> tuple[dict[str, object], list[OptionProblem]]:
    """Arguments (defaults expanded, in signature order) and all that is wrong with them.

    With ``text`` strings are read as the parameter's type, as in a spec; else they are taken as they are, as in TOML,
    where ``"0.5"`` is not a float.
    """
    problems: list[OptionProblem] = []
    given: dict[str, object] = {}
    for key, value in options.items():
        parameter = entry.parameters.get(key)
        if parameter is None:
            message = f'has no parameter "{key}"; it has {", ".join(entry.parameters) or "none"}.'
            near = did_you_mean(key, entry.parameters)
            problems.append(OptionProblem(key, f'{entry.kind} "{entry.name}" {message}', near))
            continue
        try:
            given[key] = parameter.parse(value) if text and isinstance(value, str) else parameter.convert(value)
        except ValueError as error:
            problems.append(OptionProblem(key, f'{entry.kind} "{entry.name}", parameter "{key}": {error}'))
    arguments: dict[str, object] = {}
    for key, parameter in entry.parameters.items():
        if key in given:
            arguments[key] = given[key]
        elif parameter.required and key not in options:
            message = f'{entry.kind} "{entry.name}" needs parameter "{key}" ({parameter.type}).'
            problems.append(OptionProblem(key, message))
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


_HERE = Registry()
# The look-ups in the registry of this installation.
add_file, in_file, files, index, broken = _HERE.add_file, _HERE.in_file, _HERE.files, _HERE.index, _HERE.broken
resolve, lookup, load = _HERE.resolve, _HERE.lookup, _HERE.load


def installed() -> Registry:
    """The registry of this installation."""
    return _HERE
