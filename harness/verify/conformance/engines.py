"""The check of the engines that a suite's `[[device]]`, or `auto`, may put in the place of a method's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from harness.dp.engines.auto import CANDIDATES
from harness.dp.engines.engine import PerExample, Unserved
from harness.dp.engines.loop import Loop
from harness.verify.conformance.neighbours import compared, neighbours
from harness.verify.conformance.subject import Inapplicable, Subject

FEW = 6  # examples, of which each is left out once
SCALES = (1.0, 1e4)  # of inputs: norms below the bound and far above it


def other_engines(s: Subject) -> None:
    """so it is with every engine that a suite or auto may take instead"""
    s.noises()
    if not isinstance(s.method.engine, PerExample):
        raise Inapplicable(f"{type(s.method.engine).__name__} bounds in a way of its own, and is never replaced")
    for other in replacing(s):
        label = getattr(other.method.engine, "label", type(other.method.engine).__name__)
        for scale in SCALES:
            x, y = scale * other.data.x[:FEW], other.data.y[:FEW]
            try:
                neighbours(other, x, y, f"with the engine {label}, inputs times {scale:g}")
                compared(other, other.prepared(x, y), f" with the engine {label}")
            except Unserved:  # a run is skipped then, and says why
                break


def replacing(s: Subject) -> Iterator[Subject]:
    """The method with each engine that may replace its own and accepts it."""
    m = s.method
    for engine in (Loop(), *CANDIDATES.values()):
        if type(engine) is type(m.engine) and engine == m.engine:
            continue
        if engine.accepts(m.loss, m.clip, s.model) is None:
            yield dataclasses.replace(s, method=dataclasses.replace(m, engine=engine))
