"""A search for the neighbours that a declared sensitivity does not cover.

Engines are black boxes, so the gradient of |M(S) - M(S')| / sensitivity is estimated from differences along random
directions (Nesterov and Spokoiny 2017, Foundations of Computational Mathematics 17), and ascended from random
starts: in all inputs of the batch, those of the example that differs, and the scale of the weights.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from harness.dp.loss import Batch
from harness.dp.release import Relation
from harness.running.train import start
from harness.verify.conformance.neighbours import moved
from harness.verify.conformance.subject import STEPS, Subject, Violation

CLASSES = 3
DIRECTIONS, ASCENTS = 2, 10


class Start(NamedTuple):
    """Where an ascent begins: the scale of inputs and of weights, and how many examples both neighbours hold."""

    inputs: float = 1.0
    weights: float = 1.0
    others: int = 1
    alike: bool = False  # inputs, that is; labels differ


STARTS = (Start(others=3), Start(30.0, 3.0), Start(1e-2, 0.3), Start(alike=True))
EXTREMES = (1e-30, 1e-10, 1e5, 1e30)


@dataclass(frozen=True)
class Pair:
    """Two neighbours at some public weights: `x` [B + 2, ...], whose last two are one example or another."""

    x: Tensor
    y: Tensor
    scale: float  # of the weights

    def stepped(self, direction: Pair, size: float) -> Pair:
        """Some way along: inputs by their own size, weights by a factor."""
        unit = self.x.abs().mean().clamp(min=1e-300)
        x = self.x + size * unit * direction.x
        return Pair(x, self.y, self.scale * math.exp(size * max(-3.0, min(3.0, direction.scale))))


def adversarial(s: Subject) -> None:
    """a search by gradient ascent finds no neighbours, under either relation, further apart than is declared"""
    s.noises()
    claimed = s.method.sampler.relation
    ways = [claimed, next(relation for relation in Relation if relation.moves != claimed.moves)]
    searches = [Search(s, relation) for relation in ways if _serves(s, relation)]
    for search in searches:
        for begun in STARTS:
            search.ascend(begun)
            if search.worst:
                raise search.worst
        for where, slack in ((s, 1e-6), (s.single(), 1e-4)):
            for pair in extremes(where):
                ratio(where, pair, search.relation, slack)


def _serves(s: Subject, relation: Relation) -> bool:
    try:
        s.releases(s.prepared(s.data.x[:2], s.data.y[:2]), relation=relation)
    except ValueError:
        if relation is s.method.sampler.relation:
            raise
        return False  # an engine may refuse a relation that its method does not claim
    return True


def started(s: Subject, begun: Start, rng: torch.Generator) -> Pair:
    """A random pair."""
    shape = (begun.others + 2, *s.data.x.shape[1:])
    x = begun.inputs * torch.randn(shape, generator=rng, dtype=torch.float64)
    if begun.alike:
        return Pair(x[:1].expand_as(x).clone(), torch.arange(len(x)) % CLASSES, begun.weights)
    return Pair(x, torch.randint(CLASSES, (len(x),), generator=rng), begun.weights)


class Search:
    """Ascents in one subject under one relation; `worst` is the largest violation on the way."""

    def __init__(self, s: Subject, relation: Relation) -> None:
        self.s, self.relation = s, relation
        self.rng = torch.Generator().manual_seed(77 + s.seed)
        self.worst: Violation | None = None

    def ratio(self, pair: Pair) -> float:
        """As the function of that name; a violation is noted, and the search goes on from there."""
        try:
            return ratio(self.s, pair, self.relation)
        except Violation as violation:
            if not math.isfinite(violation.ratio):
                raise
            if self.worst is None or violation.ratio > self.worst.ratio:
                self.worst = violation
            return violation.ratio

    def ascend(self, begun: Start) -> None:
        """Climb from a random pair."""
        pair = started(self.s, begun, self.rng)
        best, size = self.ratio(pair), 0.5
        for _ in range(ASCENTS):
            slope = Pair(torch.zeros_like(pair.x), pair.y, 0.0)
            for _ in range(DIRECTIONS):
                u = _direction(pair, self.rng)
                rise = self.ratio(pair.stepped(u, 1e-2)) - best
                slope = Pair(slope.x + rise * u.x, pair.y, slope.scale + rise * u.scale)
            length = math.sqrt(float(slope.x.square().sum()) + slope.scale**2)
            if not length > 0:
                return  # flat: every example is at its bound, or none contributes
            unit = math.sqrt(pair.x.numel()) / length
            ahead = pair.stepped(Pair(slope.x * unit, pair.y, slope.scale * unit), size)
            there = self.ratio(ahead)
            if there > best:
                pair, best = ahead, there
            else:
                size /= 2


def _direction(pair: Pair, rng: torch.Generator) -> Pair:
    x = torch.randn(pair.x.shape, generator=rng, dtype=torch.float64)
    return Pair(x, pair.y, float(torch.randn((), generator=rng)))


def extremes(s: Subject) -> Iterator[Pair]:
    """Pairs at the ends of the number range, of examples that are all alike, and with what is not a number."""
    plain = started(s, Start(others=3), torch.Generator().manual_seed(5))
    for scale in EXTREMES:
        yield dataclasses.replace(plain, x=plain.x * scale)
        yield dataclasses.replace(plain, scale=scale)
        for one in (-1, -2):
            mixed = plain.x.clone()
            mixed[one] *= scale
            yield dataclasses.replace(plain, x=mixed)
    alike = plain.x[:1].expand_as(plain.x).clone()
    opposed = torch.cat([alike[:-1], -alike[-1:]])
    for x in (alike, opposed, torch.zeros_like(alike)):
        yield dataclasses.replace(plain, x=x)
        yield dataclasses.replace(plain, x=x, y=torch.arange(len(x)) % CLASSES)
    for value in (math.nan, math.inf, -math.inf):
        spoilt = plain.x.clone()
        spoilt[-2].view(-1)[0] = value
        yield dataclasses.replace(plain, x=spoilt)


def ratio(s: Subject, pair: Pair, relation: Relation, slack: float = 1e-6) -> float:
    """How far the releases of two neighbours lie apart, in sensitivities. Raises Violation above 1."""
    x, begun = pair.x.to(s.data.x.dtype), start(s.method, s.model, STEPS)
    at = dataclasses.replace(begun, w=begun.w * pair.scale)
    ours = s.prepared(x[:-1], pair.y[:-1])
    if relation is not Relation.REPLACE_ONE:
        theirs = Batch(ours.x[:-1], ours.y[:-1])
        story = "adding an example"
    else:
        keep = [*range(len(x) - 2), len(x) - 1]
        theirs = s.prepared(x[keep], pair.y[keep])
        story = "replacing an example"
    size = f"up to {float(x.abs().nan_to_num(math.inf).max()):.2g}"
    story = f"under {relation.value}, at weights scaled by {pair.scale:.2g} and inputs of {size}, {story}"
    a, b = (s.releases(batch, at=at, relation=relation) for batch in (ours, theirs))
    return moved(a, b, story, slack)
