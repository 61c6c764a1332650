"""The conformance checks: what every method must pass, ours and yours, on a problem small enough for seconds.

A check returns nothing where the method conforms, and raises `Violation` saying what is wrong and what to change.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from dp_accounting import DpEvent
from torch import Tensor, nn

from harness import registry
from harness.dp.account import epsilon, epsilons, ranking
from harness.dp.calibrate import calibrate
from harness.dp.engines.engine import Engine, PerExample
from harness.dp.engines.loop import Loop
from harness.dp.loss import Batch
from harness.dp.method import Method, describe
from harness.dp.noise import Noise
from harness.dp.release import Bounded, Release
from harness.dp.sampler import generator
from harness.dp.tree import Tree
from harness.train import Progress, Schedule, Streams, read_checkpoint, start, step, train, write_checkpoint

N, BATCH, STEPS, SIGMA, DELTA = 48, 16, 8, 1.5, 1e-5
SEEDS = SimpleNamespace(sampling=101, noise=202, path=303)


class Check(NamedTuple):
    """One line of the verdict."""

    name: str
    ok: bool
    detail: str


class Violation(Exception):
    """What is wrong and what to change."""


class Toy:
    """Forty-eight small one-channel images in three classes, float64."""

    n_train = n_test = N

    def __init__(self) -> None:
        rng = torch.Generator().manual_seed(4)
        self.y = torch.arange(N) % 3
        self.x = torch.randn(N, 1, 6, 6, generator=rng, dtype=torch.float64) + self.y.view(-1, 1, 1, 1)

    def batch(self, indices: Tensor, split: str = "train") -> tuple[Tensor, Tensor]:
        return self.x[indices], self.y[indices]


def toy_model() -> nn.Module:
    """A convolution, a normalisation and a linear layer, smooth everywhere, so that float64 agrees to 1e-9."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(9)
        layers = [
            nn.Conv2d(1, 4, 3, padding=1),
            nn.GroupNorm(2, 4),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(144, 3),
        ]
        return nn.Sequential(*layers).double()


@dataclass(frozen=True)
class Subject:
    """A method under examination, on the toy problem."""

    method: Method
    model: nn.Module
    data: Toy

    def releases(self, x: Tensor, y: Tensor, method: Method | None = None) -> dict[str, Release]:
        """The bounded releases of one batch, at the start."""
        m = method or self.method
        p = start(m, self.model)
        args = (p.w, Batch(x, y), p.parts.clip, SIGMA, m.sampler.relation)
        return m.engine.bounded(m.loss, m.clip, self.model, *args).releases

    def run(self, method: Method | None = None, progress: Progress | None = None, **hooks: Any) -> Progress:
        """A short training."""
        m = method or self.method
        schedule = Schedule(STEPS, BATCH, 2, save_seconds=-1.0)
        return train(
            m, self.model, self.data, SIGMA, schedule, SEEDS, progress or start(m, self.model), **hooks
        )


def described(s: Subject) -> None:
    """every part is a value that JSON can hold"""
    text = json.dumps(describe(s.method), allow_nan=False)
    if json.loads(text) != describe(s.method):
        raise Violation(
            "a part holds a value that JSON does not give back: use numbers, strings, lists and parts"
        )


def equals_loop(s: Subject) -> None:
    """the engine's releases are those of the naive loop"""
    if not isinstance(s.method.engine, PerExample):
        return
    judge = dataclasses.replace(s.method, engine=Loop())
    ours, theirs = s.releases(s.data.x, s.data.y), s.releases(s.data.x, s.data.y, judge)
    for name in theirs:
        off = float((ours[name].value - theirs[name].value).norm() / (theirs[name].value.norm() + 1e-12))
        if off > 1e-6:
            raise Violation(
                f"the engine's release \"{name}\" differs from the naive loop's by {off:.1e} relative"
            )


def microbatch_free(s: Subject) -> None:
    """the size of the microbatch changes nothing"""
    if not isinstance(s.method.engine, PerExample):
        return
    reference = s.run().w
    for size in (1, 5):
        small = dataclasses.replace(s.method, engine=dataclasses.replace(s.method.engine, microbatch=size))
        off = float((s.run(small).w - reference).norm() / reference.norm())
        if off > 1e-9:
            raise Violation(
                f"microbatches of {size} move the final weights by {off:.1e} relative: keep state per logical step"
            )


def within_sensitivity(s: Subject) -> None:
    """no example moves a release by more than its declared sensitivity"""
    if not s.method.noise.private:
        return
    for x, y, story in _neighbourhoods(s.data):
        whole = s.releases(x, y)
        for i in range(len(y)):
            keep = torch.arange(len(y)) != i
            rest = s.releases(x[keep], y[keep])
            for name, release in whole.items():
                moved = float((release.value - rest[name].value).norm())
                if not moved <= release.sensitivity * (1 + 1e-6):
                    raise Violation(
                        f'{story}: removing one example moves the release "{name}" by {moved:.6g}, its declared'
                        f" sensitivity is {release.sensitivity:.6g}"
                    )


def _neighbourhoods(data: Toy) -> Iterator[tuple[Tensor, Tensor, str]]:
    x, y = data.x[:6], data.y[:6]
    yield x, y, "ordinary examples"
    yield x[:1].repeat(6, 1, 1, 1), y[:1].repeat(6), "six copies of one example"
    for scale in (1e-30, 1e4, 1e30):
        yield x * scale, y, f"inputs times {scale:g}"
    for value in (math.nan, math.inf):
        spoilt = x.clone()
        spoilt[2, 0, 0, 0] = value
        yield spoilt, y, f"an example with a pixel of {value}"


def noised(s: Subject) -> None:
    """the noise has its standard deviation, afresh in every step"""
    m = s.method
    if not m.noise.private:
        return
    # Twin steps that differ in nothing but the noise stream: their difference is noise alone.
    empty = {
        name: Release(r.value.zeros_like(), r.sensitivity, r.sigma)
        for name, r in s.releases(s.data.x, s.data.y).items()
    }
    for name, release in empty.items():
        draws = torch.stack(
            [
                m.noise.add(release, generator(1, t)).flat
                for t in range(max(2, 4000 // len(release.value.flat)))
            ]
        )
        wanted, found = release.sigma * release.sensitivity, float(draws.std())
        if abs(found / wanted - 1) > 6 / math.sqrt(2 * draws.numel()):
            raise Violation(
                f'noise on "{name}" has standard deviation {found:.4g}, sigma times sensitivity is {wanted:.4g}'
            )
        if torch.equal(draws[0], draws[1]):
            raise Violation(f'two steps add the same noise to "{name}"')


def billed(s: Subject) -> None:
    """the ledger is the plan"""
    ledger, plan = s.run().ledger, s.method.plan(SIGMA, N, BATCH, STEPS)
    if ledger != plan:
        raise Violation(
            f"the run billed {ledger}, the plan said {plan}: Clip.split must name every release's multiplier"
        )


def calibrated(s: Subject) -> None:
    """the calibrated noise meets the target and wastes under 1 %"""
    m = s.method
    bounds = epsilons(m.plan(SIGMA, N, BATCH, STEPS), DELTA, m.sampler.relation)
    name = ranking(bounds)
    if not m.noise.private:
        if math.isfinite(bounds[name]):
            raise Violation("nothing is noised, and yet the epsilon is finite")
        return
    sigma = calibrate(m, N, BATCH, STEPS, 3.0, DELTA)
    spent = epsilon(m.plan(sigma, N, BATCH, STEPS), DELTA, m.sampler.relation, name)
    if not 2.97 <= spent <= 3.0:
        raise Violation(f"calibrated to epsilon 3, the plan costs {spent:.4f}")


def still(s: Subject) -> None:
    """a learning rate of 0 leaves the weights where they are"""
    optimizer = s.method.optimizer
    if not any(f.name == "lr" for f in dataclasses.fields(optimizer)):
        return
    stop: dict[str, Any] = {"lr": 0.0}
    frozen = dataclasses.replace(s.method, optimizer=dataclasses.replace(optimizer, lr=0.0))
    moved = float((s.run(frozen).w - start(frozen, s.model).w).norm())
    if moved:
        raise Violation(
            f"with lr = 0 the weights move by {moved:.1e}: something but the optimizer changes them"
        )


def empty_step(s: Subject) -> None:
    """an empty Poisson batch is a step like any other"""
    m = s.method
    p = start(m, s.model)
    batch = Batch(s.data.x[:0], s.data.y[:0])
    done = step(m, s.model, p.w, batch, p.parts, SIGMA, BATCH, Streams(generator(1, 1), generator(2, 2)))
    if not done.w.flat.isfinite().all():
        raise Violation("an empty batch makes the weights non-finite")
    if m.noise.private and torch.equal(done.w.flat, p.w.flat):
        raise Violation("an empty batch adds no noise: an observer would know that it was empty")


def poisoned(s: Subject) -> None:
    """nothing private outlives its release"""
    if not s.method.noise.private:
        return
    spy = dataclasses.replace(s.method, engine=_Poison(s.method.engine), noise=_Shred(s.method.noise))
    if not torch.equal(s.run(spy).w.flat, s.run().w.flat):
        raise Violation("weights depend on a private value after it was released: use the noised one")


@dataclass(frozen=True)
class _Poison(Engine):
    """An engine whose observations are ruined: a loop that used them would show it."""

    engine: Engine

    def bounded(self, *args: Any) -> Bounded:
        releases, seen = self.engine.bounded(*args)
        losses = torch.full_like(seen.losses, math.nan)
        norms = None if seen.norms is None else torch.full_like(seen.norms, math.nan)
        return Bounded(releases, dataclasses.replace(seen, losses=losses, norms=norms))


@dataclass(frozen=True)
class _Shred(Noise):
    """Noise that ruins the private value as soon as the public one is made."""

    noise: Noise

    def add(self, release: Release, rng: torch.Generator) -> Tree:
        public = self.noise.add(release, rng).clone()
        release.value.flat.fill_(math.nan)
        return public

    def event(self, sigmas: Iterable[float]) -> DpEvent:
        return self.noise.event(sigmas)


def resumed(s: Subject) -> None:
    """a run continued from a checkpoint ends in the same bits"""
    whole = s.run().w
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "checkpoint.safetensors"

        def save(p: Progress) -> None:
            if p.step <= STEPS // 2:
                write_checkpoint(file, p)

        s.run(save=save)
        again = s.run(progress=read_checkpoint(file)).w
    if not torch.equal(again.flat, whole.flat):
        raise Violation(
            "a resumed run differs: keep state in the parts' states, and draw randomness from the rng handed in"
        )


CHECKS: tuple[Callable[[Subject], None], ...] = (
    described, equals_loop, microbatch_free, within_sensitivity, noised, billed, calibrated, still, empty_step,
    poisoned, resumed,
)  # fmt: skip


def check(method: str) -> list[Check]:
    """Every check on one method, named as in the registry or by a file that registers one or more.

    Raises registry.RegistryError where there is no such method.
    """
    if method.endswith(".py"):
        registry.add_file(Path(method))
        here = Path(method).resolve()
        names = [
            name for name, entry in registry.index("method").items() if Path(entry.file).resolve() == here
        ]
    else:
        names = [method]
    several = len(names) > 1
    return [
        Check(f"{name}: {line.name}" if several else line.name, line.ok, line.detail)
        for name in names
        for line in examine(registry.load(registry.resolve("method", name))())
    ]


def examine(method: Method) -> list[Check]:
    """Every check on a method value."""
    subject = Subject(method, toy_model(), Toy())
    refusal = method.engine.accepts(method.loss, method.clip, subject.model)
    if refusal:
        return [Check("the engine accepts a small convolutional net", False, refusal)]
    return [_verdict(each, subject) for each in CHECKS]


def _verdict(each: Callable[[Subject], None], subject: Subject) -> Check:
    name = inspect.getdoc(each) or each.__name__
    try:
        each(subject)
    except Violation as violation:
        return Check(name, False, str(violation))
    except (
        Exception
    ) as error:  # an adapter may fail in any way; the verdict says how, and the other checks still run
        return Check(name, False, f"{type(error).__name__}: {error}")
    return Check(name, True, "")
