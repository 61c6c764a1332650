"""A pair of neighbours: an audit of any private method, by many short runs on one of two data sets.

The data sets differ in one example, the *target*, and each run tosses a coin for which of them it is trained on. What
is scored is what a run makes public: its noised releases, all of them. The score knows both data sets and all that is
public, and so what the target adds to the releases at the run's own weights: the method's own engine says it. It knows
neither the coin, nor the noise, nor who was sampled, nor the views that were drawn. docs/audits.md has the argument why
a true claim stands, and `harness.verify.audits.candidates` the search for a target that moves the releases far.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from harness.dp.loss import Batch
from harness.dp.method import Method, describe
from harness.dp.random import Stream
from harness.dp.release import Relation, Release
from harness.dp.tree import Tree
from harness.running.seeds import derive
from harness.running.train import Progress, Schedule
from harness.verify.audits.bounds import Sample
from harness.verify.audits.canary import SCORES, AuditTask, Overheard, Projections, Refused, Watched, whitened
from harness.verify.audits.verdict import (
    RATES,
    TRADEOFF,
    AuditSetting,
    Claim,
    Verdict,
    needs_noise,
    secrets,
    seeds,
    trained,
)

OWN = "pictures"  # the name of the task below
TARGET = 0  # its slot: the first, which no cap on a batch leaves out
DRAWS = 16  # batches and views that an expectation is taken over, where they are drawn at random
SHARED = 128  # of the first step, which all runs share
PATIENCE = 10_000  # batches drawn in search of one with the target


@dataclass(frozen=True)
class PairSetting(AuditSetting):
    """How to audit by a pair of neighbours: `examples` are those beside the target, at most."""

    instrument: ClassVar[str] = "neighbours"

    task: str = OWN
    repeat: int = 8000

    def trained(self) -> AuditTask:
        """The task, with the weights that all runs start from."""
        seed = derive("neighbours init", self.task, self.seed)
        if self.task != OWN:
            return AuditTask.named(self.task, seed, self.examples)
        rng = torch.Generator().manual_seed(seed % 2**63)
        y = torch.arange(self.examples or 16) % 4
        x = torch.randn(len(y), 1, 8, 8, generator=rng)
        return AuditTask.linear(self.task, x, y, 4, seed)


@dataclass(frozen=True)
class Neighbours:
    """Two data sets: `x` [n, ...], `y` [n], one of which is the target, and the same with another in its place,
    `x_other` [1, ...] and `y_other` [1], or with an empty slot where those are None. `body` starts at public weights.

    n counts the target's slot in both, so that q, the noise and the denominator are the same. `target` is that slot, if
    not the first.
    """

    x: Tensor
    y: Tensor
    body: nn.Module
    x_other: Tensor | None = None
    y_other: Tensor | None = None
    story: dict[str, Any] = field(default_factory=dict)
    target: int = TARGET

    n_test = 0

    @property
    def n_train(self) -> int:
        """Public, and the same for both."""
        return len(self.x)

    def without(self, x: Tensor, y: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """Examples with the target's [B], which is where `at` [B] is true, taken out or replaced."""
        if self.x_other is None or self.y_other is None:
            return x[~at], y[~at]
        x, y = x.clone(), y.clone()
        x[at], y[at] = self.x_other, self.y_other
        return x, y


@dataclass(frozen=True)
class Neighbour:
    """One of the two, as training sees it: with the target where `present`."""

    pair: Neighbours
    present: bool

    n_test = 0

    @property
    def n_train(self) -> int:
        """Public."""
        return self.pair.n_train

    def batch(self, indices: Tensor, split: str = "train") -> tuple[Tensor, Tensor]:
        """Inputs and labels; shorter by one where the target's slot was drawn and is empty."""
        x, y = self.pair.x[indices], self.pair.y[indices]
        return (x, y) if self.present else self.pair.without(x, y, indices == self.pair.target)


# What is public of a run ----------------------------------------------------------------------------------


@dataclass
class Heard:
    """One step as everyone may see it: where it differentiated, its rule's state, and its noised releases in order."""

    w: Tree
    state: Any
    step: int
    releases: list[Release] = field(default_factory=list)

    def units(self, raw: list[Tensor]) -> Tensor:
        """Values of the releases, flat and one after the other, over the claimed deviation of their noise, float64."""
        out = []
        for release, flat in zip(self.releases, raw, strict=True):
            value = release.in_units(release.value.with_flat(flat.double()))
            out.append(value.flat / (release.sigma * release.sensitivity))
        return torch.cat(out)


def overheard(
    method: Method, side: Neighbour, model: nn.Module, sigma: float, schedule: Schedule, seed: int
) -> tuple[list[Heard], Progress]:
    """What one run makes public, and where it ended. Raises Refused where the method cannot be trained so.

    `model` may be one that another run was given: it is set back to where the pair starts. (Engines prepare themselves
    for a model when they first see it, which takes longer than a step.)
    """
    model.load_state_dict(side.pair.body.state_dict())
    steps: list[Heard] = []
    watched = dataclasses.replace(
        method,
        engine=Watched(method.engine, lambda w, state, step: steps.append(Heard(w, state, step))),
        noise=Overheard(method.noise, lambda public: steps[-1].releases.append(public)),
    )
    progress = trained(watched, model, side, sigma, schedule, secrets(seed), where="on the pair")
    return steps, progress


# What the observer expects --------------------------------------------------------------------------------


class Drawn(NamedTuple):
    """A batch that the target is in, as it is trained on: with the target, and without."""

    present: Batch
    absent: Batch


class Expected(NamedTuple):
    """What the observer expects of a step at weights `w`: the mean releases without the target, and what it adds to
    them, flat and in units of the claimed noise; and how long that is, over how long it may be by what is claimed."""

    step: int
    w: Tree
    base: Tensor
    moved: Tensor
    reach: float


def squared_mean(draws: Tensor) -> float:
    """An estimate without bias of the squared length of the mean of which `draws` [k, P] are, or 0 if it is below.

    That of their own mean is too long by their spread: one would take views for a difference.
    """
    k = len(draws)
    if k == 1:
        return float(draws.square().sum())
    crossed = draws.sum(0).square().sum() - draws.square().sum()
    return max(0.0, float(crossed) / (k * (k - 1)))


class Reading(NamedTuple):
    """Of one step: the releases along what the target adds, and the length of that, in units of the claimed noise."""

    value: float
    length: float
    reach: float


@dataclass
class PairObserver:
    """Knows both data sets and all that is public. Batches and views it draws itself: those of a run are secret.

    `expected` takes the difference that the target makes, by the method's own engine. Where neither batches nor views
    are random one evaluation says it exactly; else it is a mean over `draws` of them, or `DRAWS` after the first step.
    """

    method: Method
    pair: Neighbours
    sigma: float
    batch: int
    seed: int
    draws: int = SHARED
    first: Expected | None = None

    @cached_property
    def model(self) -> nn.Module:
        """Code, buffers and frozen parameters, as at the start of a run."""
        return copy.deepcopy(self.pair.body).train()

    def drawn(self, step: int) -> list[Drawn]:
        """Fresh batches that hold the target: one, where another would be the same."""
        found = self._draw(step, 0), self._draw(step, 1)
        if all(torch.equal(a.x, b.x) for a, b in zip(*found, strict=True)):
            return [found[0]]
        more = min(self.draws, DRAWS) if step else self.draws
        return [*found, *(self._draw(step, k) for k in range(2, more))]

    def _draw(self, step: int, k: int) -> Drawn:
        n, prepare = self.pair.n_train, self.method.loss.prepare
        for attempt in range(PATIENCE):
            seed = derive("audit fresh batch", self.seed, step, k, attempt)
            indices = self.method.sampler.draw(n, self.batch, step, seed)
            at = indices == TARGET
            if at.any():
                break
        else:
            raise Refused(f"no batch of {PATIENCE} holds the target")
        x, y = self.pair.x[indices], self.pair.y[indices]
        views = derive("audit fresh views", self.seed, step, k)
        present = prepare(Batch(x, y), Stream(views, "views", step))
        if self.pair.x_other is None:  # the views of the others are the same, which makes for a closer estimate
            return Drawn(present, Batch(present.x[~at], present.y[~at]))
        other = Batch(*self.pair.without(x, y, at))
        return Drawn(present, prepare(other, Stream(views, "views", step)))

    def rate(self) -> float:
        """How often the target is drawn: the distribution of batches is public."""
        n = self.pair.n_train
        seeds = (derive("audit rate", self.seed, t) for t in range(64))
        sizes = [len(self.method.sampler.draw(n, self.batch, t, s)) for t, s in enumerate(seeds)]
        return min(1.0, sum(sizes) / (64 * n))

    def raw(self, batch: Batch, at: Heard) -> list[Release]:
        """The releases of a batch before noise, in order."""
        m = self.method
        args = (at.w, batch, at.state, self.sigma, m.sampler.relation, at.step)
        return list(m.engine.bounded(m.loss, m.clip, self.model, *args).releases.values())

    def expected(self, at: Heard) -> Expected:
        """What the observer expects of a step."""
        if self.first and at.step == self.first.step and torch.equal(at.w.flat, self.first.w.flat):
            return self.first  # all runs start at the same weights
        base, moved = [], []
        known: dict[tuple[bytes, bytes], Tensor] = {}  # of few examples there are few batches

        def released(batch: Batch) -> Tensor:
            key = batch.x.numpy(force=True).tobytes(), batch.y.numpy(force=True).tobytes()
            if key not in known:
                known[key] = at.units([r.value.flat for r in self.raw(batch, at)])
            return known[key]

        for present, absent in self.drawn(at.step):
            here, gone = released(present), released(absent)
            base.append(gone)
            moved.append(here - gone)
        allowed = sum(r.sigma**-2 for r in at.releases) ** 0.5
        added = torch.stack(moved)
        reach = squared_mean(added) ** 0.5 / allowed
        found = Expected(at.step, at.w, torch.stack(base).mean(0), added.mean(0), reach)
        self.first = self.first or found
        return found

    def reading(self, at: Heard) -> Reading:
        """A step's releases along the difference that the target makes. Under replace-one from half way between the
        two data sets, and half the length."""
        expected = self.expected(at)
        base, moved = expected.base, expected.moved
        if self.method.sampler.relation is Relation.REPLACE_ONE:
            base, moved = base + moved / 2, moved / 2
        length = float(moved.norm())
        heard = at.units([r.value.flat for r in at.releases])
        return Reading(float((heard - base) @ moved) / max(length, 1e-300), length, expected.reach)


# The audit ------------------------------------------------------------------------------------------------


def audit(
    method: Method, s: PairSetting, find: Callable[[Method, AuditTask, float], Neighbours], sigma: float | None = None,
    task: AuditTask | None = None,
) -> Verdict:  # fmt: skip
    """Train `method` on one or the other of two neighbours, `s.repeat` times, and bound its epsilon from below.

    `find` gives the pair, and sees no run; `sigma` is the noise multiplier, by default the one at which the plan costs
    `s.epsilon`. Raises Refused where the method claims nothing, cannot be trained on a pair, or writes a ledger that is
    not its plan.
    """
    needs_noise(method)
    pair = find(method, task or s.trained(), s.rate)
    claim = Claim.of(method, s, pair.n_train, sigma)
    own = derive("neighbours observer", describe(method), dataclasses.asdict(s))
    observer = PairObserver(method, pair, claim.sigma, claim.batch, own)
    rate, model = observer.rate(), copy.deepcopy(pair.body)
    coins, reaches = [], []
    scores: dict[str, list[float]] = {name: [] for name in SCORES}
    for seed in seeds("neighbours", method, s):
        coins.append(bool(Stream(seed, "coins", 0).uniform(1) < 0.5))
        steps, progress = overheard(method, Neighbour(pair, coins[-1]), model, claim.sigma, claim.schedule, seed)
        claim.check(progress.ledger)
        readings = [observer.reading(at) for at in steps]
        values, lengths, reached = torch.tensor(readings, dtype=torch.float64).T[:, :, None]
        observed = whitened(Projections(values, lengths, rate), method, pair.n_train, claim.batch)
        for name, score in SCORES.items():
            scores[name].append(float(score(observed, method.sampler.relation)))
        reaches.append(reached.mean().item())
    sample = Sample({name: np.array(v) for name, v in scores.items()}, np.array(coins))
    first = observer.first.reach if observer.first else 0.0
    facts = {**pair.story, "reach": round(first, 4), "mean_reach": round(float(np.mean(reaches)), 4)}
    return claim.verdict(claim.bounds(sample, s.level, (RATES, TRADEOFF)), sample.inside, facts)
