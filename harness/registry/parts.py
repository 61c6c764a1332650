"""Finds parts by name: those that a suite may give a method in the place of its own (``with``).

A slot is a part of a method that may be replaced (``clip path optimizer sampler noise loss``), or a wrapper around one
that it has (``filter schedule average views``). Options are the fields of the part's dataclass. They are read from its
source text, as the registry reads signatures: checking names and options imports nothing. :func:`put` imports the
parts.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.registry import Entry, bind
from harness.registry.options import Parameter, RegistryError, did_you_mean, members, parse_spec, show

if TYPE_CHECKING:
    from harness.dp import Method

__all__ = ["SLOTS", "PartChoice", "choose", "combine", "entries", "modules", "put"]


# The dataclass of each part, below `harness.dp`.
_CATALOGUE: Mapping[str, Mapping[str, str]] = {
    "clip": {
        "flat": "clip.flat.Flat",
        "automatic": "clip.scaling.Automatic",
        "psac": "clip.scaling.PSAC",
        "psasc": "clip.scaling.PSASC",
        "group-wise": "clip.grouped.GroupWise",
        "quantile": "clip.grouped.Quantile",
        "refined": "clip.refined.Refined",
    },
    "path": {
        "straight": "path.straight.Path",
        "sharp": "path.sharp.Sharp",
        "mix": "path.mix.Mix",
        "midpoint": "path.mix.Midpoint",
    },
    "optimizer": {
        "sgd": "optimizer.optimizer.SGD",
        "adam": "optimizer.optimizer.Adam",
        "adam-bc": "optimizer.corrected.AdamBC",
        "lamb": "optimizer.optimizer.LAMB",
    },
    "sampler": {
        "poisson": "sampler.Poisson",
        "fixed": "sampler.Fixed",
        "full": "sampler.Full",
        "shuffle": "sampler.Shuffle",
        "cyclic": "sampler.Cyclic",
        "cyclic-poisson": "sampler.CyclicPoisson",
        "truncated-poisson": "sampler.TruncatedPoisson",
    },
    "noise": {
        "gaussian": "noise.noise.Gaussian",
        "banded": "noise.correlated.Banded",
        "banded-inverse": "noise.correlated.BandedInverse",
        "tree": "noise.correlated.TreeAggregation",
    },
    "loss": {
        "cross-entropy": "loss.loss.CrossEntropy",
        "focal": "loss.focal.Focal",
        "sigmoid": "loss.one_vs_all.Sigmoid",
    },
    "filter": {"low-pass": "optimizer.filter.LowPass"},
    "schedule": dict.fromkeys(("constant", "cosine", "step"), "optimizer.optimizer.Scheduled"),
    "average": {"ema": "path.straight.EMA"},
    "views": {"views": "loss.loss.Views", "mixed": "loss.mixed.Mixed"},
}
# A wrapper's slot, to the part of the method that it wraps and the wrapper's field for it.
_WRAPPERS: Mapping[str, tuple[str, str]] = {
    "filter": ("optimizer", "optimizer"),
    "schedule": ("optimizer", "optimizer"),
    "average": ("path", "along"),
    "views": ("loss", "of_view"),
}
SLOTS = tuple(_CATALOGUE)  # in the order in which they are applied: wrappers after what they wrap
_NUMBERS = "tuple[float, ...]"


# Names and options, without imports ---------------------------------------------------------------------------


@dataclass(frozen=True)
class PartChoice:
    """One part as a suite names it: its slot, its name, and every option that has a field."""

    slot: str
    name: str
    options: dict[str, object]

    @property
    def spec(self) -> str:
        """``name?key=value&...`` with defaults expanded, so that a change of defaults changes no record's meaning."""
        options = "&".join(f"{key}={_written(value)}" for key, value in self.options.items())
        return f"{self.name}?{options}" if options else self.name


def entries(slot: str) -> dict[str, Entry]:
    """The parts of a slot by name, with their options. Raises :class:`RegistryError` for an unknown slot."""
    if slot not in _CATALOGUE:
        near = did_you_mean(slot, SLOTS)
        raise RegistryError(f'"with" has no part "{slot}"; it has {", ".join(SLOTS)}.', near)
    return {name: _entry(slot, name) for name in _CATALOGUE[slot]}


def choose(slot: str, spec: str) -> PartChoice:
    """Check ``name?key=value`` for a slot. Raises :class:`RegistryError`, ``OptionError`` with all that is wrong."""
    there = entries(slot)
    name, options = parse_spec(spec)
    if name not in there:
        text = f'no {slot} is called "{name}"; there are {", ".join(there)}.'
        raise RegistryError(text, did_you_mean(name, there))
    return PartChoice(slot, name, bind(there[name], options))


@dataclass(frozen=True)
class _Numbers(Parameter):
    """Numbers joined by commas."""

    def parse(self, text: str) -> object:
        if text == "none" and "None" in self.type:
            return None
        try:
            numbers = tuple(float(one) for one in text.split(","))
        except ValueError:
            numbers = ()
        if not numbers or not all(map(math.isfinite, numbers)):
            example = 'numbers joined by commas, as in "0.5,0.75"'
            raise ValueError(f"{show(text)} does not fit the type {self.type}; write {example}.")
        return numbers


def _written(value: object) -> str:
    """A value as :func:`choose` reads it."""
    if isinstance(value, tuple):
        return ",".join(map(repr, value))
    if isinstance(value, bool) or value is None:
        return "none" if value is None else str(value).lower()
    return value if isinstance(value, str) else repr(value)


@cache
def _entry(slot: str, name: str) -> Entry:
    module, _, kind = f"harness.dp.{_CATALOGUE[slot][name]}".rpartition(".")
    file, node = _class(module, kind)
    parameters = {key: p for key, p in _fields(module, kind).items() if key not in _given(slot, name)}
    summary = (ast.get_docstring(node) or "").split("\n")[0]
    return Entry(slot, name, kind, file, node.lineno, summary, {}, parameters, module)


def _given(slot: str, name: str) -> dict[str, object]:
    """The fields that the name of a part sets."""
    return {"decay": name} if slot == "schedule" else {}


@cache
def _tree(module: str) -> tuple[Path, ast.Module]:
    file = Path(__file__).parents[1].joinpath(*module.split(".")[1:]).with_suffix(".py")
    return file, ast.parse(file.read_text("utf-8"))


def _class(module: str, name: str) -> tuple[Path, ast.ClassDef]:
    file, tree = _tree(module)
    return file, next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name)


def _fields(module: str, name: str) -> dict[str, Parameter]:
    """The fields of a dataclass that a text can set, those of its bases first, as dataclasses order them."""
    tree = _tree(module)[1]
    aliases = {
        target.id: ast.unparse(node.value)
        for node in tree.body if isinstance(node, ast.Assign)
        for target in node.targets if isinstance(target, ast.Name)
    }  # fmt: skip
    found: dict[str, Parameter] = {}
    node = _class(module, name)[1]
    for base in node.bases:
        found |= _fields(_home(tree, module, ast.unparse(base)), ast.unparse(base))
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            written = ast.unparse(line.annotation)
            parameter = _parameter(aliases.get(written, written), line.value)
            if parameter is not None:
                found[line.target.id] = parameter
    return found


def _home(tree: ast.Module, module: str, name: str) -> str:
    """The module that a class named in a module lives in."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
            return str(node.module)
    return module


def _parameter(type_text: str, default: ast.expr | None) -> Parameter | None:
    """A field as an option; None for a field that holds a part."""
    kind: type[Parameter] = _Numbers
    if not type_text.startswith(_NUMBERS):
        kind = Parameter
        try:
            members(type_text)
        except ValueError:
            return None
    if default is None:
        return kind(type_text, required=True)
    value = ast.literal_eval(default)
    return kind(type_text, value if value is None or kind is _Numbers else kind(type_text).convert(value))


# Putting together ---------------------------------------------------------------------------------------------


def combine(method: Method, changes: Mapping[str, str]) -> Method:
    """The method with the parts that ``changes`` (slot to spec) name. Raises ValueError where they do not fit.

    And where there is no such slot: a name more would make another id of the same method.
    """
    for slot in changes.keys() - set(SLOTS):
        raise ValueError(f'a method has no part "{slot}"; it has {", ".join(SLOTS)}')
    for slot in SLOTS:
        if slot in changes:
            method = put(method, slot, changes[slot])
    return method


def put(method: Method, slot: str, spec: str) -> Method:
    """The method with one part replaced, or wrapped where the slot is a wrapper's.

    Raises ValueError where the part refuses its options, where a method without privacy would get a clipping rule or a
    sampler, and where the method's path is made for an optimizer of its own.
    """
    from harness.dp import EverySecond, NoNoise

    choice = choose(slot, spec)
    if slot in ("clip", "noise", "sampler") and isinstance(method.noise, NoNoise):
        raise ValueError(f'it trains without privacy, which has no use for another {slot}; leave "{slot}" out')
    if slot == "path" and isinstance(method.optimizer, EverySecond):
        raise ValueError(
            f'its path {type(method.path).__name__} takes two gradients for each step of the optimizer; leave "path"'
            " out, or give the path to a method that steps by every gradient"
        )
    entry = _entry(slot, choice.name)
    make = getattr(importlib.import_module(entry.module), entry.function)
    part, inner = _WRAPPERS.get(slot, (slot, None))

    def given(old: Any) -> Any:
        return make(**choice.options, **_given(slot, choice.name), **({inner: old} if inner else {}))

    old: Any = getattr(method, part)
    # What moves by every second gradient goes on doing so: the path needs it.
    new = dataclasses.replace(old, optimizer=given(old.optimizer)) if isinstance(old, EverySecond) else given(old)
    changed: dict[str, Any] = {part: new}
    return dataclasses.replace(method, **changed)


def modules(part: object) -> Iterator[str]:
    """The modules of a part's class and of the parts that it holds."""
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        yield type(part).__module__
        for one in dataclasses.fields(part):
            yield from modules(getattr(part, one.name))
    elif isinstance(part, tuple | list):
        for item in part:
            yield from modules(item)
