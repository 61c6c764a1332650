"""Finds engines by name: ours, other people's, and any by its import path. Options may follow: "vmap?microbatch=32"."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from harness.dp.engines import PER_EXAMPLE, per_example
from harness.registry import parse_spec

if TYPE_CHECKING:
    from harness.dp.engines.engine import PerExample

OURS = tuple(PER_EXAMPLE)


class Absent(Exception):
    """Nothing can be imported by this name."""


def peers() -> dict[str, Any]:
    """The engines made of other people's libraries, by name."""
    from harness.peers import PEERS

    return dict(PEERS)


def names() -> list[str]:
    """Every name that `make` knows."""
    return [*OURS, *peers()]


def parsed(name: str) -> tuple[str, dict[str, Any]]:
    """ "name?key=value" as a name and options, whose values are JSON. Raises ValueError."""
    name, options = parse_spec(name)
    return name, {key: json.loads(value) for key, value in options.items()}


def unknown(name: str) -> str | None:
    """Why `name` names no engine; None if it does. An import path is not followed here."""
    try:
        name, _ = parsed(name)
    except ValueError as why:
        return str(why)
    if ":" in name or name in names():
        return None
    return f'no engine is called "{name}"; there are {", ".join(names())}, and MODULE:CLASS for one of yours.'


def make(name: str) -> PerExample:
    """The engine of this name, or of this import path ("package.module:Class"), with its options, else its defaults.

    Raises `Absent` where the path leads nowhere, and KeyError for any other name.
    """
    name, options = parsed(name)
    if name in OURS:
        return replace(per_example(name), **options)
    module, colon, attribute = name.partition(":")
    try:
        factory = getattr(importlib.import_module(module), attribute) if colon else peers()[name]
    except (ImportError, AttributeError) as why:
        raise Absent(str(why)) from why
    engine: PerExample = factory(**options)
    return engine


def versions() -> dict[str, str | None]:
    """Distribution to installed version (None where absent), for the libraries of the peers."""
    return dict(sorted((peer.PACKAGE, peer.version()) for peer in peers().values()))
