"""A support attack: whether a released float by itself reveals which of two data sets it came from.

Mironov (CCS 2012): floating point noise does not reach every float, and which ones it reaches depends on the sum that
it was added to. So one coordinate of a release can rule a data set out, at any epsilon. Runs are those of a pair of
neighbours (`harness.verify.audits.pair`), each on one of the two by a coin. The observer knows both data sets, hence
both sums, to the bit, and asks of each released number whether it could have come of either
(`harness.verify.audits.images`). Where one world is impossible the coin is decided. It sees all noised releases, or the
final weights alone where those can be solved for the release. docs/audits.md has the argument.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from harness.dp.engines.draws import fill
from harness.dp.engines.engine import Engine
from harness.dp.gaussian import grid
from harness.dp.loss import Batch
from harness.dp.method import Method, describe
from harness.dp.noise import NoNoise
from harness.dp.random import Stream
from harness.dp.release import Bounded, Observed, Relation, Release
from harness.dp.tree import Tree
from harness.running.seeds import derive
from harness.running.train import Parts, Streams, start, step, wanted
from harness.verify.around import AroundNoise
from harness.verify.audits import pair
from harness.verify.audits.bounds import MOST, Sample, upper
from harness.verify.audits.canary import AuditTask, Refused
from harness.verify.audits.images import End, Image, Known, Mask, around, guesses, held, never_wrong
from harness.verify.audits.pair import Heard, Neighbour, Neighbours, overheard
from harness.verify.audits.verdict import RATES, TRADEOFF, AuditSetting, Claim, Verdict, needs_noise, secrets, seeds

CERTAINTY = "certainty"
REHEARSED = 1000  # numbers, at the least, of each sum
TIMES = 32  # rehearsals, at the least
SOLVED = 8  # floats on either side of a solution that are tried: those that end in the same weights
STRAIGHT = 1e-3  # how far weights may be from a line through two others, of the distance

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class SupportSetting(AuditSetting):
    """How to attack on all examples: the observer knows the batches, and no claim rests on sampling; `rate` is 1."""

    instrument: ClassVar[str] = "support"

    task: str = pair.OWN

    def trained(self) -> AuditTask:
        """The task, with the weights that all runs start from."""
        return pair.PairSetting(task=self.task, examples=self.examples, seed=self.seed).trained()


# What the observer knows ----------------------------------------------------------------------------------


def neighbours(method: Method, task: AuditTask) -> Neighbours:
    """All examples of the task, and the same without the last, or with another in its place.

    The last, since views and masks are dealt out by place: the others keep theirs. So the claim holds, at rate 1, for
    who knows them too.
    """
    if len(task.x) < 2:
        raise Refused("one example alone has no neighbours: write --examples 2 or more")
    if refused := method.engine.accepts(method.loss, method.clip, task.body):
        raise Refused(refused)
    last = len(task.x) - 1
    if method.sampler.relation is Relation.REPLACE_ONE:
        return Neighbours(task.x, task.y, task.body, task.x[:1], task.y[:1], target=last)
    return Neighbours(task.x, task.y, task.body, target=last)


class Worlds(NamedTuple):
    """One release before noise, without the target and with it, its numbers [d], and deviations `s` [d]."""

    releases: tuple[Release, Release]
    absent: Array
    present: Array
    s: Array


@dataclass(frozen=True)
class Witnessed(AroundNoise):
    """Noise that keeps what it is given: to know whether the observer's sums are those of the run."""

    given: list[Tensor] = field(default_factory=list)

    def publish(self, release: Release, rng: Stream, state: Any) -> tuple[Tree, Any]:
        self.given.append(release.value.flat.clone())
        return self.noise.publish(release, rng, state)


@dataclass
class SumObserver:
    """Knows both data sets, the batches, the views and everything public, and so the sums of both worlds to the bit."""

    method: Method
    pair: Neighbours
    model: nn.Module
    sigma: float
    batch: int

    def released(self, at: Heard, known: SimpleNamespace, present: bool) -> dict[str, Release]:
        """The releases of a step before noise, by the method's own engine. `known`: a run's seeds but that of noise."""
        m = self.method
        drawn = m.sampler.draw(self.pair.n_train, self.batch, at.step, known.sampling)
        examples = Batch(*Neighbour(self.pair, present).batch(drawn))
        batch = m.loss.prepare(examples, Stream(known.path, "views", at.step))
        fill(torch.device("cpu"), Stream(known.path, "dropout", at.step))
        state = copy.deepcopy(at.state)
        arguments = (at.w, batch, state, self.sigma, m.sampler.relation, at.step)
        return wanted(m.engine.bounded(m.loss, m.clip, self.model, *arguments).releases, at.w)

    def worlds(self, at: Heard, known: SimpleNamespace) -> dict[str, Worlds]:
        """Both sums of each release of a step, by its name."""
        absent, present = (self.released(at, known, there) for there in (False, True))
        return {
            name: Worlds((a, p), numbers(a.value), numbers(p.value), deviations(p))
            for (name, a), p in zip(absent.items(), present.values(), strict=True)
        }


def numbers(tree: Tree) -> Array:
    """The numbers of a release [d], of its own float type. Raises Refused for a type that is not looked into."""
    if tree.flat.dtype not in (torch.float32, torch.float64):
        raise Refused(f"its releases are {tree.flat.dtype}: float32 and float64 are looked into")
    return tree.flat.detach().cpu().numpy()


def deviations(release: Release) -> Array:
    """The deviation of the noise in each coordinate [d], float64."""
    whole, scale = release.sigma * release.sensitivity, release.scale or {}
    return np.concatenate([np.full(t.numel(), whole * scale.get(n, 1.0)) for n, t in release.value.items()])


def rehearsed(method: Method, worlds: Worlds, times: int, seed: int) -> Known:
    """Noise on both sums of a release, `times` on each, that the observer draws itself: the code is public."""
    stream, drawn, sums = Stream(seed, "rehearsal", 0), [], []
    for _ in range(times):
        for release in worlds.releases:
            given = release._replace(value=release.value.clone())
            noised, _ = method.noise.publish(given, stream, method.noise.init(1, 1))
            drawn.append(numbers(release._replace(value=noised).formatted))
            sums.append(numbers(release.value))
    return Known(np.stack(drawn), np.stack(sums), worlds.s)


def public_step(worlds: Worlds) -> float | None:
    """The step of the public grid for a release, in deviations; None where there is none."""
    release = worlds.releases[0]
    try:
        points = grid(release.sigma, release.sensitivity, release.value.layout.numel)
    except ValueError:
        return None
    return points.step / (release.sigma * release.sensitivity)


# What it decides ------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """Decisions, one a run: 1 present, -1 absent, 0 neither; and how often both worlds were impossible."""

    decided: list[int] = field(default_factory=list)
    both: int = 0

    def add(self, absent: bool, present: bool) -> None:
        """Note a run in which each world is possible or not."""
        self.decided.append(int(present) - int(absent))
        self.both += not (absent or present)

    def facts(self, inside: Mask) -> dict[str, int]:
        """How many coins were decided, rightly and wrongly, and how many not."""
        decided, truth = np.array(self.decided), np.where(inside, 1, -1)
        return {
            "right": int((decided == truth).sum()), "wrong": int((decided == -truth).sum()),
            "undecided": int((decided == 0).sum()), "contradictions": self.both,
        }  # fmt: skip


def possible(images: Sequence[Image], y: Array, v: Array, s: Array) -> Mask:
    """Whether each number can have come of its v by all of the images."""
    found = np.ones(y.shape, bool)
    for image in images:
        found &= image.possible(y, v, s)
    return found


# Final weights alone --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Canned(Engine):
    """An engine that releases what it is given, for everything that comes after noise."""

    release: Release

    def bounded(self, *arguments: Any) -> Bounded:
        zero = torch.zeros(())
        return Bounded({"grad": self.release}, Observed(torch.zeros(0), None, zero, zero))


@dataclass(frozen=True)
class Ending:
    """The final weights of one step as a function of its only noised release: the method's own code, and all public."""

    method: Method
    model: nn.Module
    w: Tree
    parts: Parts
    release: Release
    denominator: int
    path: int

    def weights(self, y: Array) -> Array:
        """The weights [d] that a noised release [d] ends in."""
        canned = self.release._replace(value=self.release.value.with_flat(torch.from_numpy(y.copy())))
        method = dataclasses.replace(self.method, engine=Canned(canned), noise=NoNoise())
        streams = Streams(Stream(0, "noise", 0), Stream(self.path, "path", 0))
        none = Batch(torch.zeros(0), torch.zeros(0))
        done = step(
            method, self.model, self.w, none, copy.deepcopy(self.parts), self.release.sigma, self.denominator, streams
        )
        return numbers(method.path.kept(done.w, done.parts.path))

    def line(self, s: Array, rng: np.random.Generator) -> tuple[Array, Array, Array] | None:
        """A release, its weights and their slopes [d]; None where weights are not lines in their own number alone."""
        dtype = numbers(self.release.formatted).dtype
        first, second = ((rng.normal(size=s.shape) * s).astype(dtype) for _ in range(2))
        half = rng.random(s.shape) < 0.5
        middle = ((first.astype(float) + second) / 2).astype(dtype)
        ends, mixed = (self.weights(first), self.weights(second)), self.weights(np.where(half, first, second))
        if ends[0].shape != first.shape or not np.array_equal(mixed, np.where(half, *ends)):
            return None
        start, end = (e.astype(float) for e in ends)
        off = np.abs(self.weights(middle) - (start + end) / 2)
        if not (off <= STRAIGHT * np.abs(end - start) + 4 * np.spacing(np.abs(ends[0]))).all():
            return None
        slopes = (end - start) / (second.astype(float) - first)
        return (first, start, slopes) if (np.abs(slopes) > 0).all() else None

    def solved(self, w: Array, line: tuple[Array, Array, Array]) -> tuple[Array, Mask]:
        """Releases [k, d] around the one that weights come from, and where each ends in just these weights.

        The last of each half are the ends of the range: where one of them does, there are more than were tried.
        """
        first, start, slopes = line
        guess = (first + (w.astype(float) - start) / slopes).astype(first.dtype)
        tried = np.stack(list(around(guess, SOLVED)))
        return tried, np.stack([self.weights(y) == w for y in tried])


def by_weights(
    ending: Ending, line: tuple[Array, Array, Array], w: Array, worlds: Worlds, images: Sequence[Image]
) -> tuple[bool, bool]:
    """Whether final weights are possible without the target, and with it."""
    tried, same = ending.solved(w, line)
    open_ = same[SOLVED] | same[2 * SOLVED] | ~same.any(0)
    _, at = same.nonzero()
    absent, present = open_.copy(), open_.copy()
    for can, v in ((absent, worlds.absent), (present, worlds.present)):
        can[at[possible(images, tried[same], v[at], worlds.s[at])]] = True
    return bool(absent.all()), bool(present.all())


# The audit ------------------------------------------------------------------------------------------------


@dataclass
class Attack:
    """What all runs of an audit share, and what has been decided so far.

    `images` are those that hold of each release's noise. `unseen` says why weights decide nothing, where they do not.
    """

    observer: SumObserver
    seed: int
    images: dict[str, list[Image]] = field(default_factory=dict)
    first: dict[str, Worlds] = field(default_factory=dict)
    releases: Tally = field(default_factory=Tally)
    weights: Tally = field(default_factory=Tally)
    unseen: str | None = None
    coins: list[bool] = field(default_factory=list)
    moved: bool = False

    @property
    def seen(self) -> dict[str, Tally]:
        """The decisions, by what they were made on."""
        return {"releases": self.releases} | ({} if self.unseen else {"weights": self.weights})

    def facts(self) -> dict[str, dict[str, int]]:
        """How many coins were decided, by what."""
        return {name: tally.facts(np.array(self.coins)) for name, tally in self.seen.items()}

    def holding(self, name: str, worlds: Worlds) -> list[Image]:
        """The images that hold of a release's noise, as rehearsals show. For other sums than the first, short ones."""
        method, seed = self.observer.method, derive(name, self.seed)
        if name not in self.first:
            own = rehearsed(method, worlds, max(TIMES, math.ceil(REHEARSED / max(1, len(worlds.s)))), seed)
            rng = np.random.default_rng(self.seed % 2**63)
            self.images[name], self.first[name] = held(guesses(own, public_step(worlds)), own, rng), worlds
        images, first = self.images[name], self.first[name]
        same = np.array_equal(worlds.absent, first.absent) and np.array_equal(worlds.present, first.present)
        if images and not same:
            own = rehearsed(method, worlds, TIMES, derive("again", seed, len(self.releases.decided)))
            images = [image for image in images if never_wrong(image, own)]
        return [*images, End()]

    def judge(self, steps: list[Heard], kept: Tree, given: list[Tensor], known: SimpleNamespace, present: bool) -> None:
        """Decide one run by all of its noised releases, and by its final weights alone.

        `given` are its secret sums in order, `known` its seeds, `present` its coin. Raises Refused where the observer's
        sum is not the run's own to the bit: a bit decides here.
        """
        self.coins.append(present)
        can, sums = [True, True], iter(given)
        for at in steps:
            found = self.observer.worlds(at, known)
            for release, (name, worlds) in zip(at.releases, found.items(), strict=True):
                if not np.array_equal(next(sums).numpy(), worlds.present if present else worlds.absent):
                    raise Refused("its sums are other ones when they are made again: the observer cannot know them")
                images, y = self.holding(name, worlds), numbers(release.formatted)
                for i, v in enumerate((worlds.absent, worlds.present)):
                    can[i] &= bool(possible(images, y, v, worlds.s).all())
                self.moved |= not np.array_equal(worlds.absent, worlds.present)
        self.releases.add(*can)
        if len(steps) > 1 or len(found) > 1:
            self.unseen = "there is more than one noised release in them"
        elif not self.unseen:
            self._judge_weights(at, kept, known.path, worlds, images)

    def _judge_weights(self, at: Heard, kept: Tree, path: int, worlds: Worlds, images: list[Image]) -> None:
        o = self.observer
        begun = start(o.method, o.model, 1)
        denominator = o.method.sampler.denominator(o.pair.n_train, o.batch)
        ending = Ending(o.method, o.model, begun.w, begun.parts, at.releases[0], denominator, path)
        line = ending.line(worlds.s, np.random.default_rng(self.seed % 2**63))
        if line is None:
            self.unseen = "they are not linear in the noised sum, each in its own number"
        else:
            self.weights.add(*by_weights(ending, line, numbers(kept), worlds, images))


def audit(method: Method, s: SupportSetting, sigma: float | None = None, task: AuditTask | None = None) -> Verdict:
    """Train `method` on one or the other of two neighbours, `s.repeat` times, and decide which by what floats can be.

    `sigma` is the noise multiplier, by default the one at which the plan costs `s.epsilon`. Raises Refused where the
    method claims nothing, where its sums cannot be made again to the bit, or where it writes a ledger that is not its
    plan.
    """
    needs_noise(method)
    if s.rate != 1:
        raise Refused(
            "the observer knows the batches, and a smaller epsilon is claimed for who does not: rate 1 is audited"
        )
    two = neighbours(method, task or s.trained())
    claim = Claim.of(method, s, two.n_train, sigma)
    return verdict(attacked(claim, two), claim)


def attacked(claim: Claim, two: Neighbours) -> Attack:
    """The runs of a setting, judged. Raises Refused as `audit` does."""
    method, s, model = claim.method, claim.setting, copy.deepcopy(two.body)
    witness = Witnessed(method.noise)
    watched = dataclasses.replace(method, noise=witness)
    observer = SumObserver(method, two, model, claim.sigma, claim.batch)
    attack = Attack(observer, derive("support observer", describe(method), dataclasses.asdict(s)))
    for seed in seeds("support", method, s):
        present = bool(Stream(seed, "coins", 0).uniform(1) < 0.5)
        witness.given.clear()
        steps, ended = overheard(watched, Neighbour(two, present), model, claim.sigma, claim.schedule, seed)
        claim.check(ended.ledger)
        kept = method.path.kept(ended.w, ended.parts.path)
        attack.judge(steps, kept, witness.given, secrets(seed), present)
    if not attack.moved:
        raise Refused("the example that was tried moves no release")
    return attack


def verdict(attack: Attack, claim: Claim) -> Verdict:
    """The bounds that the decisions give. The three share the level evenly, so that the largest holds too."""
    s, inside, seen = claim.setting, np.array(attack.coins), attack.seen
    sample = Sample({name: np.array(t.decided, float) for name, t in seen.items()}, inside)
    bounds = claim.bounds(sample, s.level * 2 / 3, (RATES, TRADEOFF))
    sure = {name: certainty(t, inside, s.delta, s.level / 3 / len(seen)) for name, t in seen.items()}
    best = max(sure, key=lambda name: sure[name])
    bounds[CERTAINTY] = {"epsilon": sure[best], "score": best}
    facts = attack.facts() | {
        "weights_unseen": attack.unseen,
        "images": {name: [*(i.name for i in images), End.name] for name, images in attack.images.items()},
    }
    return claim.verdict(bounds, inside, facts)


def certainty(tally: Tally, inside: Mask, delta: float, level: float) -> float:
    """The largest epsilon that is looked for, if so many coins were decided as no delta explains, none of them wrongly.

    What is possible in one world and not in the other has at most the probability delta, whatever epsilon is. It
    presumes that the images hold, as they did in all rehearsals; one wrong decision shows that they do not.
    """
    found = tally.facts(inside)
    if found["wrong"]:
        return 0.0
    decided = np.array(tally.decided)
    right = [
        (int((decided[inside] == 1).sum()), int(inside.sum())),
        (int((decided[~inside] == -1).sum()), int((~inside).sum())),
    ]
    least = max(1 - float(upper(n - k, n, level / 2)) for k, n in right)
    return MOST if least > delta else 0.0


def decisions(facts: dict[str, Any]) -> str:
    """What was decided, in one line."""
    parts = []
    for name in ("releases", "weights"):
        if found := facts.get(name):
            wrong = f", {found['wrong']} wrong" if found["wrong"] else ""
            parts.append(f"{name} decide {found['right'] + found['wrong']} of {facts['samples']}{wrong}")
    return "; ".join(parts)
