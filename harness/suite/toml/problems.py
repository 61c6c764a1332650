"""Collects the errors of a file, each with its line, and raises them together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from harness.suite.toml.lines import KeyPath, LineNumbers


@dataclass(frozen=True)
class FileProblem:
    """One error in a file: where, what, and the word that was probably meant.

    ``line`` counts from 1; it is 0 where the error is about the file as a whole.
    """

    file: str
    line: int
    message: str
    suggestion: str | None = None

    def __str__(self) -> str:
        hint = f' Did you mean "{self.suggestion}"?' if self.suggestion else ""
        where = f"{self.file}:{self.line}" if self.line else self.file
        return f"{where}: {self.message}{hint}"


class SuiteError(Exception):
    """A suite cannot be run; ``problems`` is everything that is wrong, in order of files and lines."""

    def __init__(self, problems: Iterable[FileProblem]) -> None:
        self.problems = sorted(problems, key=lambda p: (p.file, p.line, p.message))
        super().__init__("\n".join(map(str, self.problems)))


class Problems:
    """The problems of one file, each once; ``lines`` finds the line of a key path."""

    def __init__(self, file: str, lines: LineNumbers, problems: Iterable[FileProblem] = ()) -> None:
        self.file, self.lines, self.problems = file, lines, list(problems)

    def bad(self, path: KeyPath, message: str, suggestion: str | None = None) -> None:
        """Report a problem at the line of a key path."""
        problem = FileProblem(self.file, self.lines.line(path), message, suggestion)
        if problem not in self.problems:
            self.problems.append(problem)

    def stop(self) -> None:
        """Raise :class:`SuiteError` where there are problems."""
        if self.problems:
            raise SuiteError(self.problems)
