"""Reads TOML into typed tables, and reports every error with its line."""

from __future__ import annotations

import codecs
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args

from pydantic import ValidationError

from harness import registry
from harness.registry import OptionError, Registry, RegistryError, did_you_mean, show
from harness.suite.tables import TomlTable
from harness.suite.toml.lines import KeyPath, LineNumbers
from harness.suite.toml.problems import FileProblem, Problems, SuiteError

T = TypeVar("T", bound=TomlTable)
_PATTERNS = {
    ("suite", "name"): 'write lower-case letters, digits and dashes, as in "core"',
    ("device", "device"): 'write "cpu", "cuda" or "cuda:0"',
}
_INLINE = {
    "train": "should be a table; write train = { steps = 1 }",
    "then": 'should be a table; write then = { method = "dp-sgd?lr=0.5", epochs = 5 }',
}


def source(path: str | Path, problems: Iterable[FileProblem] = ()) -> str:
    """The text of a file, without a byte order mark. Raises :class:`SuiteError` where it cannot be read."""
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise SuiteError([*problems, _unreadable(Path(path), error)]) from None


def kind_of(path: Path) -> str:
    """What a TOML file says it is, by its key ``kind``; "suite" where it says nothing, or cannot be read."""
    try:
        return str(tomllib.loads(path.read_text("utf-8-sig")).get("kind", "suite"))
    except (OSError, ValueError, RecursionError):
        return "suite"


def _unreadable(path: Path, error: Exception) -> FileProblem:
    if isinstance(error, UnicodeDecodeError):
        line = error.object[: error.start].count(b"\n") + 1
        wide = error.object.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        return FileProblem(str(path), line, f"is {'UTF-16, not' if wide else 'not'} UTF-8 text; save it as UTF-8.")
    if isinstance(error, FileNotFoundError):
        near = {p.name: p for folder in (Path("suites"), path.parent) for p in folder.glob("*.toml")}
        word = did_you_mean(path.name, near) or did_you_mean(f"{path.name}.toml", near)
        return FileProblem(str(path), 1, "there is no such file.", str(near[word]) if word else None)
    return FileProblem(str(path), 1, f"cannot be read: {getattr(error, 'strerror', None) or error}.")


def _document(text: str, file: str) -> dict[str, Any] | FileProblem:
    """The tables of a TOML text, or why it is not one."""
    try:
        return tomllib.loads(text)
    except RecursionError:
        return FileProblem(file, 1, "not valid TOML: nested too deeply.")
    except ValueError as error:
        place = re.search(r" \(at (?:line (\d+), column (\d+)|end of document)\)$", str(error))
        message = str(error)[: place.start()].rstrip(".") if place else f"{error}."
        if place is None:
            return FileProblem(file, 1, f"not valid TOML: {message}")
        if place[1] is None:
            last = text.rstrip().count("\n") + 1
            return FileProblem(file, last, f"not valid TOML: {message}, at the end of the file.")
        return FileProblem(file, int(place[1]), f"not valid TOML: {message} (column {place[2]}).")


class Reader(Problems):
    """Reads the tables of one document, each by itself, and collects every error.

    ``single`` are the tables ``[key]`` that it may have, ``arrays`` those written ``[[key]]``, ``needed`` the ones that
    it must have. ``kind`` is what its key of that name must be, where it has one; ``noun`` what messages call the
    document. Raises :class:`SuiteError` where the text is not TOML.
    """

    noun: ClassVar[str] = "suite"
    kind: ClassVar[str | None] = None
    single: ClassVar[Mapping[str, type[TomlTable]]]
    arrays: ClassVar[Mapping[str, type[TomlTable]]]
    needed: ClassVar[Sequence[str]]

    def __init__(
        self, text: str, file: str, names: Registry | None = None, problems: Iterable[FileProblem] = ()
    ) -> None:
        super().__init__(file, LineNumbers(text), problems)
        self.names = names or registry.installed()
        self._faulty: set[str | int] = set()
        data = _document(text, file)
        if isinstance(data, FileProblem):
            raise SuiteError([*self.problems, data])
        self.data = data
        self._known_tables()

    def bad(self, path: KeyPath, message: str, suggestion: str | None = None) -> None:
        """Report a problem at the line of a key path."""
        self._faulty.update(path[:1])
        super().bad(path, message, suggestion)

    def valid(self, *keys: str) -> bool:
        """Whether nothing is wrong in these tables. Else they cannot be compared with others yet."""
        return self._faulty.isdisjoint(keys)

    def _known_tables(self) -> None:
        """Report tables that are unknown, and those that are missing."""
        if self.kind is not None and self.data.pop("kind", None) != self.kind:
            self.bad(("kind",), f'the file should begin with kind = "{self.kind}".')
        tables = [*self.single, *self.arrays]
        for key in self.data.keys() - set(tables):
            near = did_you_mean(key, tables)
            self.bad((key,), f'a {self.noun} has no table "{key}"; it has {", ".join(tables)}.', near)
            if near is not None:
                self._faulty.add(near)
        for key in self.needed:
            if key not in self.data and self.valid(key):
                self.bad((key,), f"the {self.noun} needs {f'[[{key}]]' if key in self.arrays else f'[{key}]'}.")

    def one(self, key: str, table: type[T]) -> T | None:
        """The table ``[key]``; None where it is absent, or something is wrong with it."""
        raw = self.data.get(key)
        if raw is not None and not isinstance(raw, dict):
            self.bad((key,), f'"{key}" should be one table; write [{key}].')
        return self._table((key,), raw, table) if isinstance(raw, dict) else None

    def array(self, key: str, table: type[T]) -> dict[int, T]:
        """The valid tables ``[[key]]`` by their index."""
        found = {index: self._table((key, index), raw, table) for index, raw in enumerate(self.rows(key))}
        return {index: one for index, one in found.items() if one is not None}

    def rows(self, key: str) -> list[dict[str, Any]]:
        """The tables ``[[key]]`` as they are written; none where ``key`` is something else, which is reported."""
        raw = self.data.get(key)
        if raw is None:
            return []
        if not isinstance(raw, list) or not all(isinstance(one, dict) for one in raw):
            self.bad((key,), f'"{key}" should be a list of tables; write [[{key}]] above each.')
            return []
        if not raw:
            self.bad((key,), f'"{key}" is an empty list; write at least one [[{key}]].')
        return raw

    def _table(self, path: KeyPath, raw: dict[str, Any], table: type[T]) -> T | None:
        try:
            return table.model_validate(raw, context=self.names)
        except ValidationError as error:
            problems = error.errors(include_url=False)
        meant: set[KeyPath] = set()  # keys that are there, misspelt
        for one in sorted(problems, key=lambda one: one["type"] == "missing"):
            self._explain(path, one, table, meant)
        return None

    def _explain(self, path: KeyPath, error: Any, table: type[TomlTable], meant: set[KeyPath]) -> None:
        """Report one error of pydantic, at a key of the table or of one inside it."""
        kind, value, context = error["type"], error["input"], error.get("ctx", {})
        at = (*path, *error["loc"])
        whole = kind == "table" and not isinstance(value, str | int | float)  # of a table as such
        depth = len(at) if whole else max(number for number, one in enumerate(at) if isinstance(one, str))
        inner, key = at[:depth], "" if whole else str(at[depth])
        title, near = heading(inner), None
        if kind == "registry":
            self.refuse(at, context["error"], str(value))
            return
        if kind in ("table", "key"):
            at = at if context["at"] is None else (*at, context["at"])
            text = f"{title} {context['text']}." if kind == "table" else f"{title} {key}: {context['text']}."
        elif kind == "extra_forbidden":
            keys = _keys(_nested(table, inner[len(path) :]))
            near = did_you_mean(key, keys)
            text = f'{title} has no key "{key}"; it has {", ".join(keys)}.'
            meant.add((*inner, near or ""))
        elif kind == "missing":
            if at in meant:
                return
            text = f'{title} needs "{key}".'
        elif kind == "model_type" and key in _INLINE:
            text = f'"{key}" {_INLINE[key]}.'
        else:
            cause = context["error"] if kind == "value_error" else None
            message = str(getattr(cause, "message", cause)) if cause else error["msg"]
            message = message.removeprefix("Input ").replace("dictionary", "table").replace("tuple", "list")
            near = getattr(cause, "suggestion", None)
            if kind in ("float_type", "int_type", "bool_type") and isinstance(value, str):
                message += "; write it without quotes"
            if kind == "literal_error" and isinstance(value, str):
                near = did_you_mean(value, re.findall(r"'([^']*)'", context["expected"]))
            if kind == "string_pattern_mismatch":
                message = _PATTERNS.get((str(path[0]), key), message)
            text = f"{title} {key} = {show(list(value) if isinstance(value, tuple) else value)}: {message}."
        self.bad(at, text, near)

    def refuse(self, path: KeyPath, error: RegistryError, spec: str) -> None:
        """Report what the registry says of a spec."""
        for one in error.problems if isinstance(error, OptionError) else [error]:
            self.bad(path, one.message, one.suggestion)


def _keys(table: type[TomlTable]) -> list[str]:
    """The keys of a table as the file writes them."""
    return [one.alias or key for key, one in table.model_fields.items()]


def _nested(table: type[TomlTable], path: KeyPath) -> type[TomlTable]:
    """The type of a table inside a table."""
    for key in path:
        if isinstance(key, str):
            inside = [table.model_fields[key].annotation]
            while not (isinstance(inside[0], type) and issubclass(inside[0], TomlTable)):
                inside = [*get_args(inside[0]), *inside[1:]]
            table = inside[0]
    return table


def _dotted(path: KeyPath) -> str:
    return ".".join(key for key in path if isinstance(key, str))


def heading(path: KeyPath) -> str:
    """The header of a table as the file writes it: ``[train]``, ``[[task]]``, ``[[reduced.task]]``."""
    return f"[[{_dotted(path)}]]" if isinstance(path[-1], int) else f"[{_dotted(path)}]"
