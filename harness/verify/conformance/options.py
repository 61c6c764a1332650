"""The check of a registered method with other values of its options."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness import registry
from harness.dp.method import Method, describe
from harness.registry.options import Parameter, members
from harness.verify.conformance.ledger import billed
from harness.verify.conformance.neighbours import scaled
from harness.verify.conformance.rule import ruled
from harness.verify.conformance.subject import STEPS, Inapplicable, N, Subject, Violation, subject


def other_options(s: Subject) -> None:
    """the clipping rule, the sensitivity and the ledger are right for other values of its options too, one at a time"""
    s.noises()
    if s.identity is None:
        raise Inapplicable("it is not registered, and has no options")
    seen = 0
    for what, method in _variants(*s.identity):
        if _bounding(method) == _bounding(s.method) or not method.noise.private:
            continue
        try:
            other = subject(method)
        except Violation:  # no small problem suits these options
            continue
        if method.unfit(N, other.batch, STEPS):  # more groups than there are examples for, say
            continue
        seen += 1
        try:
            scaled(other, 3)
            billed(other)
            with contextlib.suppress(Inapplicable):
                ruled(other, other.reached[::4])
        except Violation as violation:
            raise Violation(f"with {what}: {violation}", violation.evidence, violation.ratio) from None
    if not seen:
        raise Inapplicable("it has no options with other values that it accepts")


def _bounding(method: Method) -> dict[str, Any]:
    """All that decides what is released and charged; not the optimizer, which sees public values alone."""
    return {name: part for name, part in describe(method).items() if name != "optimizer"}


def _variants(name: str, file: str) -> Iterator[tuple[str, Method]]:
    """The method with one option changed, and which; values that its parts refuse are left out."""
    entries = registry.index("method")
    if name not in entries or Path(entries[name].file).resolve() != Path(file).resolve():
        return
    entry = entries[name]
    make = registry.load(entry)
    for key, parameter in entry.parameters.items():
        for value in others(parameter):
            try:
                yield f"{key} = {value!r}", make(**{key: parameter.convert(value)})
            except ValueError:
                continue


def others(parameter: Parameter) -> list[Any]:
    """Other values of an option: each of a choice, and numbers some way off."""
    default = parameter.default
    kinds = members(parameter.type)
    names = [name for name, _ in kinds]
    found: list[Any] = [choice for _, choices in kinds for choice in choices if choice != default]
    if "bool" in names:
        found.append(not default)
    elif isinstance(default, int | float) and not isinstance(default, bool):
        found += [3 * default, type(default)(default / 3)] if default else [1]
    elif default is None:
        found += [1] if {"int", "float"} & set(names) else []
    if default is not None and "None" in names:
        found.append(None)
    return [value for value, _ in itertools.groupby(found) if value != default]
