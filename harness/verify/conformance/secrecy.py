"""Checks that nothing leaves a step but through the noise, and that it is made of the examples of its batch alone."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from harness.dp.loss import Batch
from harness.dp.random import Stream
from harness.dp.release import Bounded, Release
from harness.dp.tree import Tree
from harness.running.train import Diverged, Progress, evaluate, start
from harness.verify.around import AroundEngine, AroundNoise
from harness.verify.conformance.replay import same
from harness.verify.conformance.subject import STEPS, Inapplicable, N, Subject, Violation

LITTLE, LONG = 18, 40  # examples, so that batches of 16 hold most of them, and steps


def twins(s: Subject) -> None:
    """nothing but the noised releases depends on the data"""
    s.noises()
    _alike(s, start(s.method, s.model, STEPS, s.apart), STEPS)
    for name, r in s.whole.items():
        _blind_state(s, name, r)


def _blind_state(s: Subject, name: str, release: Release) -> None:
    """Whether what noise keeps follows from its stream alone: kept sums would outlive their release."""
    noise, values = s.method.noise, (release.value, release.value * -3.0 + 1.0)
    states = [noise.init(STEPS, s.apart) for _ in values]
    for t in range(STEPS):
        streams = [Stream(6, name, t) for _ in values]
        pairs = zip(values, streams, states, strict=True)
        states = [noise.publish(release._replace(value=v.clone()), rng, state)[1] for v, rng, state in pairs]
        if not same(*states):
            raise Violation(
                f'the state of the noise on "{name}" depends on what is released: keep what was drawn, and no sum',
                evidence="noise state differs",
            )


def twins_later(s: Subject) -> None:
    """nor does anything in the long run: over 40 steps, and after 119 and 1019"""
    s.noises()
    small, n = copy.copy(s.data), LITTLE if s.method.unfit(LITTLE, s.batch, LONG) is None else N
    small.x, small.y, small.n_train = s.data.x[:n], s.data.y[:n], n
    little = dataclasses.replace(s, data=small)
    _alike(little, start(s.method, s.model, LONG, s.apart), LONG)
    for p in s.aged:
        _alike(little, p, p.step + 12)


def _alike(s: Subject, begun: Progress, until: int) -> None:
    """Train on two data sets, with the same public releases, and compare all that is public."""
    blind = dataclasses.replace(s.method, noise=_Blind(s.method.noise))
    other = copy.copy(s.data)
    other.x, other.y = -other.x, (other.y + 1) % 3
    logs: list[list[dict[str, Any]]] = []
    for data in (s.data, other):
        points: list[dict[str, Any]] = []
        end = dataclasses.replace(s, data=data).run(
            blind,
            copy.deepcopy(begun),
            until=until,
            log=lambda point, points=points: points.append(_public(s, point.progress)),
        )
        logs.append([*points, _public(s, end)])
    for ours, theirs in zip(*logs, strict=True):
        for name, value in ours.items():
            if not same(value, theirs[name]):
                raise Violation(
                    f"two data sets with the same public releases end in different {name}: compute it from the"
                    " noised values handed in, and nothing else",
                    evidence=f"{name} differ",
                )


def _public(s: Subject, p: Progress) -> dict[str, Any]:
    # The noise's own state is secret, and is looked at in `_forgetful_noise`.
    states = {f"{name} state": copy.deepcopy(value) for name, value in p.parts._asdict().items() if name != "noise"}
    return {
        "sensitivities": dict(p.sensitivity), "charges": p.ledger.to_json(), "weights": p.w.clone(),
        "kept weights": s.method.path.kept(p.w, p.parts.path).clone(), **states
    }  # fmt: skip


class _Blind(AroundNoise):
    """Noise that never looks at the value: what is public does not depend on the data."""

    def publish(self, release: Release, rng: Stream, state: Any) -> tuple[Tree, Any]:
        flat = release.value.flat
        return release.value.with_flat(0.1 * rng.normal(len(flat), flat.dtype)), state


def judged(s: Subject) -> None:
    """scores follow from the weights and the split that is judged"""
    s.noises()
    if s.method.loss.probes:
        raise Inapplicable("its loss says that it reads training examples, so that its scores are private")
    try:
        evaluate(s.model, start(s.method, s.model, STEPS, s.apart).w, s.method.loss, s.data)
    except PermissionError as error:
        raise Violation(str(error), evidence="training examples read") from error


def poisoned(s: Subject) -> None:
    """nothing private outlives its release"""
    s.noises()
    spy = dataclasses.replace(s.method, engine=_Poison(s.method.engine), noise=_Shred(s.method.noise))
    try:
        same_end = torch.equal(s.run(spy).w.flat, s.reached[-1].w.flat)
    except Diverged:  # what is not a number has reached the weights
        same_end = False
    if not same_end:
        raise Violation("weights depend on a private value after it was released: use the noised one")


class _Poison(AroundEngine):
    """An engine whose observations are ruined: a loop that used them would show it."""

    def bounded(self, *args: Any) -> Bounded:
        releases, seen = self.engine.bounded(*args)
        losses = torch.full_like(seen.losses, math.nan)
        norms = None if seen.norms is None else torch.full_like(seen.norms, math.nan)
        return Bounded(releases, dataclasses.replace(seen, losses=losses, norms=norms))


class _Shred(AroundNoise):
    """Noise that ruins the private value as soon as the public one is made."""

    def publish(self, release: Release, rng: Stream, state: Any) -> tuple[Tree, Any]:
        public, after = self.noise.publish(release, rng, state)
        public = public.clone()
        release.value.flat.fill_(math.nan)
        return public, after


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


def _drawn(s: Subject, releases: dict[str, Release]) -> dict[str, Tensor]:
    """Releases and their noised versions, by the same stream every time."""
    rng = Stream(5, "noise", 0)
    exact = {name: r.value.flat.clone() for name, r in releases.items()}
    noise = s.method.noise
    published = {name: noise.publish(r, rng, noise.init(1, 1))[0] for name, r in releases.items()}
    return exact | {f"noise on {name}": tree.flat.clone() for name, tree in published.items()}


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
