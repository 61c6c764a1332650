"""Engines: the only rooms that see raw gradients or know of microbatches."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness.dp.engines.engine import PerExample

# Those that are one mechanism, per-example clipping, and differ in speed alone.
PER_EXAMPLE = {"bookkeeping": "BookKeeping", "ghost": "Ghost", "vmap": "Vmap", "loop": "Loop", "auto": "Auto"}


def per_example(name: str) -> PerExample:
    """The engine of this name, with its defaults. Raises KeyError for any other name."""
    engine: PerExample = getattr(import_module("harness.dp"), PER_EXAMPLE[name])()
    return engine
