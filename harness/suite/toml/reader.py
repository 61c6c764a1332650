"""Reading TOML: tables checked one by one, every problem gathered with its line."""

from __future__ import annotations

import codecs
import copy
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import ValidationError, create_model

from harness import registry
from harness.registry import Registry, RegistryError, did_you_mean, show
from harness.suite.tables import Table
from harness.suite.toml.lines import Lines
from harness.suite.toml.lines import Path as KeyPath
from harness.suite.toml.problems import Problem, Report, SuiteError

__all__ = ["Reader", "document", "heading", "source"]

T = TypeVar("T", bound=Table)
_PATTERNS = {
    ("suite", "name"): 'write lower-case letters, digits and dashes, as in "core"',
    ("device", "device"): 'write "cpu", "cuda" or "cuda:0"',
}


def source(path: str | Path, problems: Iterable[Problem] = ()) -> str:
    """The text of a file, without a byte order mark. Raises :class:`SuiteError` where it cannot be read."""
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise SuiteError([*problems, _unreadable(Path(path), error)]) from None


def document(text: str, file: str, problems: Iterable[Problem] = ()) -> dict[str, Any]:
    """The tables of a TOML text. Raises :class:`SuiteError` where it is not one."""
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise SuiteError([*problems, Problem(file, 1, "not valid TOML: nested too deeply.")]) from None
    except ValueError as error:
        raise SuiteError([*problems, _not_toml(file, text, error)]) from None


def _unreadable(path: Path, error: Exception) -> Problem:
    if isinstance(error, UnicodeDecodeError):
        line = error.object[: error.start].count(b"\n") + 1
        wide = error.object.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        return Problem(str(path), line, f"is {'UTF-16, not' if wide else 'not'} UTF-8 text; save it as UTF-8.")
    if isinstance(error, FileNotFoundError):
        near = {p.name: p for folder in (Path("suites"), path.parent) for p in folder.glob("*.toml")}
        word = did_you_mean(path.name, near) or did_you_mean(f"{path.name}.toml", near)
        return Problem(str(path), 1, "there is no such file.", str(near[word]) if word else None)
    return Problem(str(path), 1, f"cannot be read: {getattr(error, 'strerror', None) or error}.")


def _not_toml(file: str, text: str, error: ValueError) -> Problem:
    place = re.search(r" \(at (?:line (\d+), column (\d+)|end of document)\)$", str(error))
    if place is None:
        return Problem(file, 1, f"not valid TOML: {error}.")
    message = str(error)[: place.start()].rstrip(".")
    if place[1] is None:
        return Problem(file, text.rstrip().count("\n") + 1, f"not valid TOML: {message}, at the end of the file.")
    return Problem(file, int(place[1]), f"not valid TOML: {message} (column {place[2]}).")


class Reader(Report):
    """Checks the tables of one document and gathers every problem before it gives up.

    ``wrong`` are the key paths of what has been reported, and of what it was probably meant to be, so that nobody
    complains of what follows from it. ``meant`` are the corrected texts of misspelt specs, by path.
    """

    kind: ClassVar[str] = "suite"
    single: ClassVar[Mapping[str, type[Table]]]
    arrays: ClassVar[Mapping[str, type[Table]]]
    needed: ClassVar[Sequence[str]]

    def __init__(self, file: str, data: dict[str, Any], lines: Lines, names: Registry, problems: list[Problem]) -> None:
        super().__init__(file, lines, problems)
        self.data, self.names = data, names
        self.wrong: set[KeyPath] = set()
        self.meant: dict[KeyPath, str] = {}

    def bad(self, path: KeyPath, message: str, suggestion: str | None = None) -> None:
        """Report a problem at the line of a key path."""
        self.wrong.add(path)
        super().bad(path, message, suggestion)

    def sound(self, *paths: KeyPath) -> bool:
        """Whether nothing has been reported at these paths, below them, or of the tables that they are in."""
        return not any(one[: len(path)] == path or path[: len(one)] == one for one in self.wrong for path in paths)

    def known_tables(self) -> None:
        """Report tables that are unknown, and those that are missing."""
        known = [*self.single, *self.arrays]
        for key in self.data:
            if key not in known:
                near = did_you_mean(key, known)
                text = f'a {self.kind} has no table "{key}"; it has {", ".join(known)}.'
                self.bad((key,), text, near)
                self._instead((), near, self.data)
        for key in self.needed:
            if key not in self.data and self.sound((key,)):
                self.bad((key,), f"the {self.kind} needs {self._title(key)}.")

    def _instead(self, path: KeyPath, near: str | None, written: Mapping[str, Any]) -> None:
        """A misspelt key stands for the one that was meant, unless that is written too."""
        if near is not None and near not in written:
            self.wrong.add((*path, near))

    def _title(self, key: str) -> str:
        return f"[[{key}]]" if key in self.arrays else f"[{key}]"

    def written(self, path: KeyPath) -> Any:
        """What the document has at a path of keys; None where it has nothing there."""
        found: Any = self.data
        for key in path:
            found = found.get(key) if isinstance(found, dict) else None
        return found

    def one(self, key: str, table: type[T], within: KeyPath = (), *, whole: bool = True) -> T | None:
        """The table ``[key]``, or that ``within`` another; None where it is absent or wrong.

        With ``whole`` False one with something wrong in it comes back as :meth:`read` gives it.
        """
        path = (*within, key)
        raw = self.written(path)
        if raw is None:
            return None
        if not isinstance(raw, dict):
            self.bad(path, f'"{_dotted(path)}" should be one table; write [{_dotted(path)}].')
            return None
        return self._table(path, raw, table, whole)

    def array(self, key: str, table: type[T], within: KeyPath = (), *, whole: bool = True) -> dict[int, T]:
        """The tables of an array by index: the valid ones, or with ``whole`` False all, as :meth:`read` gives them."""
        path = (*within, key)
        raw = self.written(path)
        if raw is None:
            return {}
        if not isinstance(raw, list) or not all(isinstance(one, dict) for one in raw):
            text = f'"{_dotted(path)}" should be a list of tables; write [[{_dotted(path)}]] above each.'
            self.bad(path, text)
            return {}
        if not raw:
            self.bad(path, f'"{_dotted(path)}" is an empty list; write at least one [[{_dotted(path)}]].')
        found = {index: self._table((*path, index), one, table, whole) for index, one in enumerate(raw)}
        return {index: one for index, one in found.items() if one is not None}

    def read(self, path: KeyPath, raw: dict[str, Any], table: type[T]) -> T:
        """A table without what is wrong with it, which is reported: such keys take their defaults.

        Those without a default are None, whatever the type says; :meth:`sound` tells.
        """
        try:
            return table.model_validate(raw)
        except ValidationError as error:
            found = error.errors(include_url=False)
        for one in sorted(found, key=lambda one: one["type"] == "missing"):  # which a misspelt key may explain
            self._explain(path, raw, one, _keys(table))
        faulty = {str(one["loc"][0]) for one in found if one["loc"]}
        return _lenient(table).model_validate({key: one for key, one in raw.items() if key not in faulty})

    def _table(self, path: KeyPath, raw: dict[str, Any], table: type[T], whole: bool) -> T | None:
        found = self.read(path, raw, table)
        return None if whole and type(found) is not table else found

    def _explain(self, path: KeyPath, raw: dict[str, Any], error: Any, keys: list[str]) -> None:
        """One error of pydantic as a problem."""
        place: KeyPath = error["loc"]
        title, key = heading(path), str(place[0]) if place else ""
        if error["type"] == "extra_forbidden":
            text = f'{title} has no key "{key}"; it has {", ".join(keys)}.'
            near = did_you_mean(key, keys)
            self.bad((*path, *place), text, near)
            self._instead(path, near, raw)
        elif error["type"] == "missing":
            if self.sound((*path, key)):
                self.bad((*path, key), f'{title} needs "{key}".')
        else:
            cause = error["ctx"]["error"] if error["type"] == "value_error" else None
            message = str(getattr(cause, "message", cause)) if cause else error["msg"]
            message = message.removeprefix("Input ").replace("dictionary", "table").replace("tuple", "list")
            value = error["input"]
            guess = getattr(cause, "suggestion", None)
            if error["type"] in ("float_type", "int_type", "bool_type") and isinstance(value, str):
                message += "; write it without quotes"
            if error["type"] == "literal_error" and isinstance(value, str):
                guess = did_you_mean(value, re.findall(r"'([^']*)'", error["ctx"]["expected"]))
            if error["type"] == "string_pattern_mismatch":
                message = _PATTERNS.get((str(path[0]), key), message)
            self.bad((*path, *place), f"{title} {key} = {show(_listed(value))}: {message}.", guess)

    def distinct(self, path: KeyPath, values: Iterable[object]) -> None:
        """Report values of a list that are given twice."""
        seen: set[object] = set()
        for number, value in enumerate(values):
            if value in seen:
                self.bad((*path, number), f"[{path[0]}] {path[1]}: {show(value)} is given twice; keep one.")
            seen.add(value)

    def lookup(self, path: KeyPath, kind: str, spec: str) -> dict[str, Any] | None:
        """``{"name", "options"}`` of a spec, with defaults expanded."""
        try:
            entry, arguments = self.names.lookup(kind, spec)
        except RegistryError as error:
            self.refuse(path, error, spec)
            return None
        given = arguments.pop(entry.argument, None) if entry.argument else None
        name = entry.name if given is None else f"{entry.name}:{given}"
        return {"name": name, "options": arguments}

    def refuse(self, path: KeyPath, error: RegistryError, spec: str) -> None:
        """Report what the registry says of a spec."""
        if isinstance(error, registry.OptionError):
            for one in error.problems:
                self.bad(path, one.message, one.suggestion)
            return
        self.bad(path, error.message, error.suggestion)
        if error.suggestion is not None:
            base = registry.split_name(spec.partition("?")[0])[0]
            self.meant[path] = error.suggestion + spec[len(base) :]


@cache
def _lenient(table: type[T]) -> type[T]:
    """The table with nothing required: what is absent is None."""
    fields: dict[str, Any] = {}
    for key, one in table.model_fields.items():
        if one.is_required():
            fields[key] = (one.annotation, copy.copy(one))
            fields[key][1].default = None
    return create_model(table.__name__, __base__=table, **fields)


def _keys(table: type[Table]) -> list[str]:
    """The keys of a table as the file writes them."""
    return [one.alias or key for key, one in table.model_fields.items()]


def _dotted(path: KeyPath) -> str:
    return ".".join(key for key in path if isinstance(key, str))


def heading(path: KeyPath) -> str:
    """The header of a table as the file writes it: ``[train]``, ``[[task]]``, ``[[reduced.task]]``."""
    return f"[[{_dotted(path)}]]" if isinstance(path[-1], int) else f"[{_dotted(path)}]"


def _listed(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
