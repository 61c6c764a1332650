"""The check of late steps: step numbers, and states of the parts, that a short training does not reach.

Parts are aged by empty batches, which are legal steps and cost next to nothing: all that counts steps counts them.
"""

from __future__ import annotations

import dataclasses
import math

from harness.running.train import Progress
from harness.verify.conformance.neighbours import neighbours
from harness.verify.conformance.subject import SIGMA, Subject, Violation

STEPS_ON = (9, 10, 99, 100, 1000, 10_000, 100_000)  # numbers handed to the engine


def within_sensitivity_much_later(s: Subject) -> None:
    """nor does it at any step up to the 100,000th, and a release has the multiplier that its step plans"""
    s.noises()
    oldest = s.aged[-1]
    for p in [*s.aged, *(dataclasses.replace(oldest, step=step) for step in STEPS_ON)]:
        for scale in (1.0, 1e4):
            story = f"at step {p.step}, inputs times {scale:g}"
            neighbours(s, s.data.x[:3] * scale, s.data.y[:3], story, at=p)
        _planned(s, p)


def _planned(s: Subject, p: Progress) -> None:
    """Judge the multipliers of a step's releases."""
    releases = s.releases(s.prepared(s.data.x[:3], s.data.y[:3]), at=p)
    plan = s.method.engine.split(s.method.clip, SIGMA, p.step)
    done = {name: r.sigma for name, r in releases.items()}
    if done.keys() != plan.keys() or not all(math.isclose(done[name], plan[name]) for name in plan):
        raise Violation(
            f"at step {p.step} the releases have the multipliers {done}, the plan says {plan}: Engine.split must name"
            " what every step releases",
            evidence="the releases are not the plan's",
        )
