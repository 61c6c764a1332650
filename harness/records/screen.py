"""What goes to a terminal: text, and nothing that a terminal would obey.

Labels, reasons and paths come from files that anybody may have written. An escape sequence in one could rewrite what
stands above it, and a mark that turns the direction of a line what stands beside it. :func:`clean` puts one filter
between all that a command prints and the terminal, so that no print has to think of it.
"""

from __future__ import annotations

import contextlib
import sys
import unicodedata
from collections.abc import Iterator
from typing import Any

_OBEYED = frozenset(("Cc", "Cf", "Cs", "Zl", "Zp"))  # control, format, half a pair, separators of lines and paragraphs


def plain(text: str) -> str:
    """`text` with all that a terminal would obey, but for ends of lines and tabs, written out as in JSON: ``\\u001b``.

    JSON stays the JSON that it was: what is written out can only stand inside its strings.
    """
    if text.isprintable():
        return text
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in _OBEYED else _written(c) for c in text)


def _written(character: str) -> str:
    units = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2))


class _Filter:
    """A text stream that writes :func:`plain` text to another one, and is that one in all else."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Write, and say that all of `text` was."""
        self.stream.write(plain(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write each."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def clean() -> Iterator[None]:
    """While it lasts, standard output and standard error take plain text alone."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_Filter(raw(stream)) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def raw(stream: Any) -> Any:
    """The stream behind a filter, for what draws with a terminal's own commands and cleans its texts itself."""
    return stream.stream if isinstance(stream, _Filter) else stream
