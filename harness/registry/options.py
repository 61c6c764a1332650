"""Options and their types: the parameters of a registered function, and the texts that set them.

A parameter's type is the text of its annotation: ``int float str bool Literal[...]`` and unions of these
with None. Nothing here imports or evaluates the code that the text was read from.
"""

from __future__ import annotations

import ast
import difflib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

_EXAMPLES = {
    "int": "a whole number such as 3",
    "float": "a number such as 0.5",
    "bool": "true or false",
    "str": "text",
    "None": "none",
}


class RegistryError(ValueError):
    """A name, a spec or a registered file is wrong; ``suggestion`` is what was probably meant, or None."""

    def __init__(self, message: str, suggestion: str | None = None) -> None:
        super().__init__(message + (f' Did you mean "{suggestion}"?' if suggestion else ""))
        self.message = message
        self.suggestion = suggestion


class SpecError(RegistryError):
    """A text of the form ``name?key=value&key=value`` is malformed."""


class OptionError(RegistryError):
    """Options do not fit the signature; ``problems`` holds all that is wrong."""

    def __init__(self, problems: list[OptionProblem]) -> None:
        super().__init__("\n".join(str(p) for p in problems))
        self.problems = problems
        self.suggestion = problems[0].suggestion


@dataclass(frozen=True)
class Parameter:
    """One parameter of a registered function: its type as written, default, whether it is required."""

    type: str
    default: object = None
    required: bool = False

    def convert(self, value: object) -> object:
        """``value`` as this parameter's type, or ``ValueError`` saying what to write. Text is not parsed.

        An int is accepted for a float (and becomes one), a bool is never a number, ``"none"`` stands for None
        where None is allowed (TOML has no null), and infinities and NaN are refused.
        """
        return self._read(value, text=False)

    def parse(self, text: str) -> object:
        """``text`` read as this parameter's type, or raise ``ValueError`` saying what to write."""
        return self._read(text, text=True)

    def _read(self, value: object, text: bool) -> object:
        # None first, so that "none" is None also for `str | None`; text last, because it accepts everything.
        for name, choices in sorted(members(self.type), key=lambda m: {"None": 0, "str": 9}.get(m[0], 5)):
            ok, result = _convert_one(name, choices, value, text)
            if ok:
                return result
        wanted = (
            f"one of {', '.join(map(show, choices))}" if choices else _EXAMPLES[name]
            for name, choices in members(self.type)
        )
        raise ValueError(f"{show(value)} does not fit the type {self.type}; write {' or '.join(wanted)}.")


@dataclass(frozen=True)
class OptionProblem:
    """One option that does not fit: its key, what is wrong, and the name that was probably meant."""

    key: str
    message: str
    suggestion: str | None = None

    def __str__(self) -> str:
        return self.message + (f' Did you mean "{self.suggestion}"?' if self.suggestion else "")


def did_you_mean(word: str, candidates: Iterable[str]) -> str | None:
    """The candidate nearest to ``word``, None where none is near."""
    by_lower = {c.lower().replace("_", "-"): c for c in candidates}
    near = difflib.get_close_matches(word.lower().replace("_", "-"), list(by_lower), n=1, cutoff=0.6)
    return by_lower[near[0]] if near else None


def split_name(name: str) -> tuple[str, str | None]:
    """``"npz:PATH"`` to ``("npz", "PATH")`` and ``"mnist"`` to ``("mnist", None)``."""
    base, colon, argument = name.partition(":")
    return base, argument if colon else None


def parse_spec(spec: str) -> tuple[str, dict[str, str]]:
    """``"name?key=value&k2=v2"`` to ``("name", {"key": "value", "k2": "v2"})``. Raises :class:`SpecError`."""
    name, mark, query = spec.partition("?")
    if not name.strip() or name != name.strip():
        raise SpecError(f'spec "{spec}": write a name, then options, as in "name?key=value&key=value".')
    options: dict[str, str] = {}
    for part in query.split("&") if mark else ():
        key, equals, value = part.partition("=")
        if not key or not equals or not value:
            raise SpecError(f'spec "{spec}": "{part}" is not an option; write key=value, joined by "&".')
        if key in options:
            raise SpecError(f'spec "{spec}": option "{key}" is given twice; keep one.')
        options[key] = value
    return name, options


# Types of parameters --------------------------------------------------------------------------------------


@lru_cache(maxsize=512)
def members(type_text: str) -> tuple[tuple[str, tuple[object, ...]], ...]:
    """``(name, choices)`` of each member of a union that an annotation writes; the name of a choice is ``"Literal"``.

    Raises ``ValueError`` where it is not a type that a suite can write.
    """
    found: list[tuple[str, tuple[object, ...]]] = []
    todo: list[ast.expr] = [ast.parse(type_text, mode="eval").body]
    while todo:
        node = todo.pop(0)
        head = ast.unparse(node.value).split(".")[-1] if isinstance(node, ast.Subscript) else ""
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
            todo[:0] = [node.left, node.right]
        elif isinstance(node, ast.Subscript) and head == "Optional":
            todo[:0] = [node.slice, ast.Constant(None)]
        elif isinstance(node, ast.Subscript) and head == "Literal":
            value = ast.literal_eval(node.slice)
            found.append((head, value if isinstance(value, tuple) else (value,)))
        elif ast.unparse(node) in _EXAMPLES:
            found.append((ast.unparse(node), ()))
        else:
            raise ValueError(
                f"type {ast.unparse(node)} cannot be written in a suite; use int, float, str, bool, "
                "Literal[...] or one of these with | None"
            )
    return tuple(found)


def _convert_one(name: str, choices: tuple[object, ...], value: object, text: bool) -> tuple[bool, object]:
    """``(fits, converted value)`` for one member of a union."""
    if name == "None":
        return value is None or value == "none", None
    if name == "Literal":
        for choice in choices:
            if (text and str(choice) == value) or (type(choice) is type(value) and choice == value):
                return True, choice
        return False, None
    if name == "str":
        return isinstance(value, str), value
    if text and isinstance(value, str):
        return _parse_text(name, value)
    if name == "bool":
        return isinstance(value, bool), value
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False, None
    if name == "int":
        return isinstance(value, int) and abs(value) < 2**63, value
    return _finite(value)


def _parse_text(name: str, value: str) -> tuple[bool, object]:
    if name == "bool":
        return value in ("true", "false"), value == "true"
    if name == "int":
        return (True, int(value)) if re.fullmatch(r"[+-]?[0-9]{1,18}", value) else (False, None)
    try:
        return _finite(float(value))
    except ValueError:
        return False, None


def _finite(value: int | float) -> tuple[bool, object]:
    try:
        number = float(value)
    except OverflowError:
        return False, None
    return math.isfinite(number), number


def show(value: object) -> str:
    """A value as a user would write it in TOML, shortened."""
    if isinstance(value, bool):
        return "true" if value else "false"
    try:
        shown = f'"{value}"' if isinstance(value, str) else repr(value)
    except (ValueError, RecursionError):  # Python refuses to print integers of thousands of digits
        return f"this {type(value).__name__}"
    # A terminal obeys control characters; here they are only shown.
    shown = "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in shown)
    return shown if len(shown) <= 60 else shown[:57] + "..."
