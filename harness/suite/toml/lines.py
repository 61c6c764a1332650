"""Finds the line numbers of the keys of a TOML document, so that an error can name its place.

:mod:`tomllib` gives values without places. This scanner walks over text that tomllib has accepted and notes
where each key path begins; it reads of values only where they end.
"""

from __future__ import annotations

import bisect
import re
import tomllib

KeyPath = tuple[str | int, ...]
_BARE = re.compile(r"[A-Za-z0-9_-]+")
_SPACE = re.compile(r"[ \t]*")
_BLANK = re.compile(r"(?:[ \t\n]|#[^\n]*)*")
_SCALAR = re.compile(r"[^,\]}\n#]*")
_STRINGS = (
    re.compile(r'"""(?:[^\\]|\\.)*?"""(?:""?(?!"))?', re.DOTALL),
    re.compile(r"'''.*?'''(?:''?(?!'))?", re.DOTALL),
    re.compile(r'"(?:[^"\\\n]|\\.)*"'),
    re.compile(r"'[^'\n]*'"),
)


class LineNumbers:
    """Key paths of valid TOML text to line numbers; ``("task", 1)`` is the second ``[[task]]``.

    ``line(path)`` falls back to the nearest enclosing key, and to line 1.
    """

    def __init__(self, text: str) -> None:
        self._text = text.replace("\r\n", "\n")
        self._starts = [0, *(m.end() for m in re.finditer("\n", self._text))]
        self._found: dict[KeyPath, int] = {}
        self._counts: dict[KeyPath, int] = {}
        self._at = 0
        try:
            self._document()
        except (IndexError, RecursionError, ValueError):
            return  # Lines are best effort: those found so far are kept.

    def line(self, path: KeyPath) -> int:
        """The line on which a key path begins, counted from 1."""
        while path and path not in self._found:
            path = path[:-1]
        return self._found.get(path, 1)

    def has(self, path: KeyPath) -> bool:
        """Whether the document writes this key path itself."""
        return path in self._found

    def _note(self, path: KeyPath, at: int) -> None:
        line = bisect.bisect_right(self._starts, at)
        for length in range(1, len(path) + 1):
            self._found.setdefault(path[:length], line)

    def _skip(self, pattern: re.Pattern[str]) -> None:
        match = pattern.match(self._text, self._at)
        self._at = match.end() if match else self._at

    def _document(self) -> None:
        prefix: KeyPath = ()
        while True:
            self._skip(_BLANK)
            if self._at >= len(self._text):
                return
            start = self._at
            if self._text[self._at] != "[":
                self._pair(prefix)
                continue
            array = self._text.startswith("[[", self._at)
            self._at += 2 if array else 1
            keys = self._keys()
            prefix = self._table(keys, array)
            self._note(prefix, start)
            self._at = self._text.index("]]" if array else "]", self._at) + (2 if array else 1)

    def _table(self, keys: list[str], array: bool) -> KeyPath:
        """The path of a header: keys that name an array of tables lead into its latest table."""
        path: KeyPath = ()
        for number, key in enumerate(keys):
            path += (key,)
            if array and number == len(keys) - 1:
                self._counts[path] = self._counts.get(path, 0) + 1
            if path in self._counts:
                path += (self._counts[path] - 1,)
        return path

    def _keys(self) -> list[str]:
        """A dotted key; stops before what follows it."""
        keys: list[str] = []
        while True:
            self._skip(_SPACE)
            bare = _BARE.match(self._text, self._at)
            if bare:
                keys.append(bare.group())
                self._at = bare.end()
            else:
                start = self._at
                self._string()
                keys.append(str(tomllib.loads(f"key = {self._text[start : self._at]}")["key"]))
            self._skip(_SPACE)
            if self._text[self._at] != ".":
                return keys
            self._at += 1

    def _string(self) -> None:
        for pattern in _STRINGS:
            match = pattern.match(self._text, self._at)
            if match:
                self._at = match.end()
                return
        raise ValueError(f"no string at {self._at}")

    def _pair(self, prefix: KeyPath) -> None:
        start = self._at
        path = (*prefix, *self._keys())
        self._note(path, start)
        self._at = self._text.index("=", self._at) + 1
        self._skip(_SPACE)
        self._value(path)

    def _value(self, path: KeyPath) -> None:
        first = self._text[self._at]
        if first in "\"'":
            self._string()
        elif first == "[":
            self._list(path)
        elif first == "{":
            self._inline(path)
        else:
            self._skip(_SCALAR)

    def _list(self, path: KeyPath) -> None:
        self._at += 1
        for number in range(len(self._text)):
            self._skip(_BLANK)
            if self._text[self._at] == "]":
                break
            self._note((*path, number), self._at)
            self._value((*path, number))
            self._skip(_BLANK)
            if self._text[self._at] == ",":
                self._at += 1
        self._at += 1

    def _inline(self, path: KeyPath) -> None:
        self._at += 1
        while True:
            self._skip(_BLANK)
            if self._text[self._at] == "}":
                self._at += 1
                return
            self._pair(path)
            self._skip(_BLANK)
            if self._text[self._at] == ",":
                self._at += 1
