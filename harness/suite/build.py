"""Builds methods with the parts that a suite gives them, and reports those that cannot be built."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from harness.records.cell import canonical_json
from harness.registry import Registry, RegistryError, parts, show
from harness.suite.toml.lines import KeyPath
from harness.suite.toml.problems import Problems
from harness.suite.values import Second, Variant

if TYPE_CHECKING:
    from harness.dp import Method


class Built(NamedTuple):
    """A method with the parts that the suite gives it, and their description; the same of its second stage."""

    method: Method
    parts: dict[str, Any]
    then: Built | None = None

    @property
    def private(self) -> bool:
        """Whether it adds noise, so that a target of epsilon means something."""
        return bool(self.parts["noise"]["type"] != "NoNoise")


class _CannotBuild(NamedTuple):
    """Why a method refuses its parameters: in its own words, and with the parameters that it was given."""

    words: str
    text: str


@dataclass
class Builder:
    """Builds methods by name, each once; ``unimportable`` are files whose methods have been reported."""

    names: Registry
    report: Problems
    unimportable: Mapping[Path, object] = field(default_factory=dict)
    _made: dict[str, Built | _CannotBuild | None] = field(default_factory=dict)
    _reported: set[tuple[KeyPath, str]] = field(default_factory=set)

    def of(self, variant: Variant) -> Built | None:
        """The method of a variant; None where it cannot be built, or only with a problem."""
        place, then = ("method", variant.index), variant.then
        first = self._method(variant.name, variant.parameters, place, variant.places)
        second = self._method(then.name, then.parameters, (*place, "then", "method"), {}) if then else None
        if first and second and then:
            self._refuse_stages(variant, then, first, second)
        changed = first and self._changed(variant, first)
        if changed is None or (then is not None and second is None):
            return None
        return Built(changed.method, changed.parts, second)

    def _method(
        self, name: str, parameters: dict[str, Any], place: KeyPath, places: Mapping[str, KeyPath]
    ) -> Built | None:
        """A method as its function returns it; None, with a problem at the key it is about, where it does not."""
        key = canonical_json([name, parameters])
        if key not in self._made:
            self._made[key] = self._call(name, parameters)
        made = self._made[key]
        if isinstance(made, _CannotBuild):
            about = [one for word, one in places.items() if re.search(rf"\b{word}\b", made.words)]
            place = about[0] if len(about) == 1 else place
            if (place, made.words) not in self._reported:  # once, not for each value of the others
                self._reported.add((place, made.words))
                self.report.bad(place, f'method "{name}" cannot be built: {made.text}')
            return None
        return made

    def _call(self, name: str, parameters: dict[str, Any]) -> Built | _CannotBuild | None:
        from harness.dp.method import describe

        entry = self.names.resolve("method", name)
        if entry.file in self.unimportable:
            return None
        try:
            method = self.names.load(entry)(**parameters)
            return Built(method, plain(describe(method)))
        except Exception as error:  # the function may be a user's: whatever it raises has a line
            given = ", ".join(f"{k} = {show(v)}" for k, v in parameters.items())
            what = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            return _CannotBuild(what, what if isinstance(error, RegistryError) else f"{what} (with {given})")

    def _changed(self, variant: Variant, first: Built) -> Built | None:
        """A method with its parts replaced; None, with a problem at each part that does not fit."""
        from harness.dp.method import describe

        if not variant.changes:
            return first
        method, fits = first.method, True
        for slot, spec in variant.changes.items():
            try:
                method = parts.put(method, slot, spec)
                described = describe(method)
            except ValueError as error:
                self.report.bad(variant.given[slot], f'method "{variant.name}" cannot take {slot} = "{spec}": {error}.')
                fits = False
        if not fits:
            return None
        self._refuse_idle(variant, described)
        return Built(method, plain(described))

    def _refuse_idle(self, variant: Variant, described: object) -> None:
        """Report hyper-parameters that are written for parts which ``with`` replaces: they would do nothing."""
        from harness.dp.method import describe

        entry = self.names.resolve("method", variant.name)
        function: Callable[..., Method] = self.names.load(entry)
        own = describe(function(**variant.parameters))
        for key, place in variant.places.items():
            if entry.parameters[key].required:
                continue
            try:
                other = function(**variant.parameters | {key: entry.parameters[key].default})
                idle = describe(parts.combine(other, variant.changes)) == described
            except ValueError:  # the default does not go with the other values: so the value matters
                continue
            if idle and describe(other) != own:
                text = f'method "{variant.name}": "{key}" is for a part that "with" replaces; leave it out.'
                self.report.bad(place, text)

    def _refuse_stages(self, variant: Variant, then: Second, first: Built, second: Built) -> None:
        """Report a second stage that would void the first one's privacy, or pay for data that is public."""
        what, public = None, then.table.dataset is not None
        if public and second.private:
            what = 'adds noise to public data, which needs none; write non-private, or leave "dataset" out'
        elif not public and first.private and not second.private:
            what = (
                'would train on the private data without noise; write a private method, or a public "dataset"'
                " (how good the encoder is, its own score says already)"
            )
        elif not public and second.private and not first.private:
            what = f"cannot make private what {variant.name} has learnt without noise; write non-private"
        elif second.private and first.method.sampler.relation is not second.method.sampler.relation:
            what = (
                f"is analysed for {second.method.sampler.relation.value} neighbours, and {variant.name} for"
                f" {first.method.sampler.relation.value}; take samplers of one relation"
            )
        if what:
            place = ("method", variant.index, "then", "method")
            self.report.bad(place, f'"then": {then.name} {what}.')


def plain(value: Any) -> Any:
    """Parts as strict JSON: a bound of infinity is text."""
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
