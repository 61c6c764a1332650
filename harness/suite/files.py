"""Checks Python files of the user: first their text, then whether they can be imported."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from harness.registry import KINDS, Entry, LoadError, Registry, RegistryError
from harness.suite.toml.problems import FileProblem


class _Tolerant(Registry):
    """A registry in which the first of two functions of one name counts; the second is among :attr:`Files.problems`."""

    def index(self, kind: str) -> dict[str, Entry]:
        return dict(sorted(self._scan()[0][kind].items()))


@dataclass(frozen=True)
class Files:
    """The user's files as they were named, what is wrong with them, and the registry that knows their names.

    ``texts`` are those of the files that hold something which cannot be read, None for a file that is not there.
    """

    named: tuple[str, ...]
    names: Registry
    problems: tuple[FileProblem, ...] = ()
    texts: tuple[str | None, ...] = ()

    @classmethod
    def admit(cls, files: Iterable[str | Path], names: Registry) -> Files:
        """Add files to a registry, or to a copy of it where two functions share a name."""
        named = tuple(dict.fromkeys(map(str, files)))
        there = {file: Path(file).expanduser().resolve() for file in named}
        absent = [file for file in named if not there[file].is_file()]
        text = "no such file; name a Python file with an @method, @model or @dataset function in it."
        problems = [FileProblem(file, 0, text) for file in absent]
        found = [file for file in named if file not in absent]
        tried = names
        if names.clashes() or any(there[file] not in names.files() for file in found):
            tried = _Tolerant(names.root, entry_points=names.entry_points)
            for known in (*names.files(), *(there[file] for file in found)):
                tried.add_file(known)
        clashes, given = tried.clashes(), {there[file]: file for file in found}
        for clash in clashes:  # reported at the function in a file of the user
            entry = next((one for one in reversed(clash.entries) if one.file in given), clash.entries[1])
            problems.append(FileProblem(given.get(entry.file, str(entry.file)), entry.line, clash.message))
        broken = [(file, one) for file in found for one in tried.broken() if one.file == there[file]]
        problems += [FileProblem(file, max(1, one.line), f"{one.reason.rstrip('.')}.") for file, one in broken]
        if not clashes:
            for file in found:
                names.add_file(file)
        texts = [there[file].read_text("utf-8", "replace") for file in dict.fromkeys(f for f, _ in broken)]
        return cls(named, tried if clashes else names, tuple(problems), (*texts, *(None for _ in absent)))

    def explain(self, error: RegistryError, name: str) -> bool:
        """Whether what is wrong with a file explains that a name is not known."""
        written = re.compile(rf"""["']{re.escape(name)}["']""")
        return any(
            error.suggestion is None if text is None else written.search(text) is not None for text in self.texts
        )


def unimportable(files: Iterable[str], names: Registry) -> dict[Path, FileProblem]:
    """The files whose import fails, and why."""
    found: dict[Path, FileProblem] = {}
    for file in files:
        path = Path(file).expanduser().resolve()
        entries = [one for kind in KINDS for one in names.index(kind).values() if one.file == path]
        entry = min(entries, key=lambda one: one.line, default=None)
        if entry is None:
            continue
        try:
            names.load(entry)
        except LoadError as error:
            cause = error.__cause__ or error
            frames = [f for f in traceback.extract_tb(cause.__traceback__) if f.filename == str(path)]
            line = (frames[-1].lineno if frames else None) or entry.line
            text = f"cannot be imported: {type(cause).__name__}: {cause}"
            found[path] = FileProblem(file, line, text if text.endswith(".") else f"{text}.")
    return found
