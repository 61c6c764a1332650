"""Checks that a release is made of the examples of its own batch, each prepared by itself, and of nothing older."""

from __future__ import annotations

import torch

from harness.dp.loss import Batch
from harness.dp.random import Stream
from harness.dp.release import Release
from harness.verify.conformance.subject import Subject, Violation


def forgetful(s: Subject) -> None:
    """a release is made of its own batch: none that came before leaves a trace in it"""
    s.noises()
    x, y = s.data.x, s.data.y
    for p in (s.reached[0], s.reached[-1]):
        first = _drawn(s, s.releases(s.prepared(x[:6], y[:6]), at=p))
        for others in (slice(6, 24), slice(24, 48)):
            _drawn(s, s.releases(s.prepared(-3 * x[others], 0 * y[others]), at=p))
        again = _drawn(s, s.releases(s.prepared(x[:6], y[:6]), at=p))
        for name, value in first.items():
            off = float((again[name] - value).norm() / (value.norm() + 1e-12))
            if not off <= 1e-9:
                raise Violation(
                    f'the same batch, weights and state give another "{name}" once other batches came between, by'
                    f" {off:.1e} relative: an earlier example moves it by what is not charged. Keep no private value"
                    " from one step to the next, neither in the engine nor in the loss or the noise",
                    evidence=f"{off:.2g} relative",
                )


def _drawn(s: Subject, releases: dict[str, Release]) -> dict[str, torch.Tensor]:
    """Releases and their noised versions, by the same stream every time."""
    rng = Stream(5, "noise", 0)
    exact = {name: r.value.flat.clone() for name, r in releases.items()}
    noised = {f"noise on {name}": s.method.noise.add(r, rng).flat.clone() for name, r in releases.items()}
    return exact | noised


def separately(s: Subject) -> None:
    """the loss prepares each example by itself: the others of the batch change nothing"""
    s.noises()
    x, y = s.data.x[:8], s.data.y[:8]
    whole = s.prepared(x, y)
    if len(whole.x) != len(x) or len(whole.y) != len(y):
        raise Violation(
            f"Loss.prepare turns {len(x)} examples into {len(whole.x)}, and each may contribute its bound: keep what"
            " is made of one example together, as Views does, or declare what they can move together",
            evidence=f"{len(whole.x)} for {len(x)}",
        )
    for one in range(len(x)):
        for scale in (-1.0, 1e4):
            others, labels = scale * x, (y + 1) % 3
            others[one], labels[one] = x[one], y[one]
            mine = s.prepared(others, labels)
            if not _equal(mine, whole, one):
                raise Violation(
                    "Loss.prepare makes of one example what depends on the others of its batch, so that one example"
                    " moves the contributions of many: prepare each from its own values and the rng alone",
                    evidence="an example changes with the others",
                )


def _equal(a: Batch, b: Batch, one: int) -> bool:
    if len(a.x) != len(b.x):
        return False
    return torch.equal(a.x[one], b.x[one]) and torch.equal(a.y[one], b.y[one])
