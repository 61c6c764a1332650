"""A method under examination, on a problem small enough for seconds, and the verdict on it."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from harness.dp.loss import Batch
from harness.dp.method import Method
from harness.dp.random import Stream
from harness.dp.release import Observed, Relation, Release
from harness.dp.tree import Tree
from harness.running.train import Progress, Schedule, Streams, start, step, train

N, BATCH, STEPS, SIGMA, DELTA = 48, 16, 8, 1.5, 1e-5
AGES = (119, 1019)  # in steps, of what counts them: the next is one of every tenth, twentieth and so on
AFTER = 64  # steps that are taken then, at most
DRAWS = 2000  # of noise: a correlation of 0.2 between two coordinates, or of 0.01 between all, stands out
SEEDS = SimpleNamespace(sampling=101, noise=202, path=303)


class Check(NamedTuple):
    """One line of the verdict: `detail` says what to change, or why the check does not apply.

    `function` is the check's name in the code; `failures` are the repetitions that failed, of repeated checks.
    """

    name: str
    ok: bool
    detail: str
    applies: bool = True
    seconds: float = 0.0
    function: str = ""
    failures: int | None = None


class Violation(Exception):
    """What is wrong and what to change. `evidence` is what was measured, `ratio` how far apart neighbours lie."""

    def __init__(self, message: str, evidence: str = "", ratio: float = math.nan) -> None:
        super().__init__(message)
        self.evidence, self.ratio = evidence, ratio


class Inapplicable(Exception):
    """A check has nothing to look at in a method; the message says why."""


# Problems -------------------------------------------------------------------------------------------------


class Toy:
    """Forty-eight small inputs in three classes: images [1, 6, 6] unless `shape` says otherwise."""

    n_train = n_test = N

    def __init__(self, dtype: torch.dtype = torch.float64, shape: tuple[int, ...] = (1, 6, 6)) -> None:
        rng = torch.Generator().manual_seed(4)
        self.y = torch.arange(N) % 3
        self.x = torch.randn(N, *shape, generator=rng, dtype=torch.float64)
        self.x = (self.x + self.y.view(-1, *[1] * len(shape))).to(dtype)

    def batch(self, indices: Tensor, split: str = "train") -> tuple[Tensor, Tensor]:
        return self.x[indices], self.y[indices]

    def to(self, dtype: torch.dtype) -> Toy:
        """The same inputs in another precision."""
        other = copy.copy(self)
        other.x = self.x.to(dtype)
        return other


class Alike(Streams):
    """One noise for a release of a step, whatever it holds: two runs can then be compared to the last bits of sums."""

    def own(self, name: str, release: Release, observed: Observed) -> Stream:
        return self.noise.under(name)


def toy_model(outputs: int = 3) -> nn.Module:
    """A convolution, a normalisation and a linear layer, smooth everywhere, so that float64 agrees to 1e-9."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(9)
        layers = [nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(144, outputs)]
        return nn.Sequential(*layers).double()


def linear_model() -> nn.Module:
    """One linear layer on eight features."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(9)
        return nn.Linear(8, 3).double()


class Contrast(nn.Module):
    """A sequence model that looks at the difference of two positions: where they are alike, gradients nearly cancel."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.inner, self.head = nn.Linear(64, 64), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        return self.head(h[:, 0] - h[:, 1])


class SmallProblem(NamedTuple):
    """A network and the shape of its inputs. A method is examined on the first problem that its engine accepts."""

    name: str
    model: Callable[[], nn.Module]
    shape: tuple[int, ...]


PROBLEMS = (
    SmallProblem("a small convolutional net", toy_model, (1, 6, 6)),
    SmallProblem("one with four outputs", lambda: toy_model(4), (1, 6, 6)),
    SmallProblem("a linear layer on features", linear_model, (8,)),
    SmallProblem("a linear layer in a Sequential", lambda: nn.Sequential(linear_model()), (8,)),
    SmallProblem("a net on sequences", lambda: Contrast().double(), (2, 64)),
)


# The subject ----------------------------------------------------------------------------------------------


class Noised(NamedTuple):
    """Noise drawn for the releases of one step, over its claimed standard deviation."""

    z: Tensor  # [draws, coordinates]
    releases: dict[str, Release]
    blocks: list[tuple[str, str, tuple[int, ...]]]  # release, label and shape of each tensor, in order

    @property
    def names(self) -> list[str]:
        """The label of each coordinate."""
        return [label for _, label, shape in self.blocks for _ in range(torch.Size(shape).numel())]

    def tensors(self) -> list[tuple[str, str, Tensor]]:
        """Release, label and noise [draws, *shape] of each tensor."""
        parts = self.z.split([torch.Size(shape).numel() for _, _, shape in self.blocks], 1)
        return [
            (release, label, part.reshape(len(part), *shape))
            for (release, label, shape), part in zip(self.blocks, parts, strict=True)
        ]


@dataclass(frozen=True)
class Subject:
    """A method under examination. `seed` gives the statistical checks other draws; `identity` is its name and file."""

    method: Method
    model: nn.Module
    data: Toy
    seed: int = 0
    identity: tuple[str, str] | None = None

    @cached_property
    def batch(self) -> int:
        """The expected batch size, as large as the sampler can make it: the groups that it draws from may be many."""
        fits = (batch for batch in (BATCH, BATCH // 2, BATCH // 4) if self.method.unfit(N, batch, STEPS) is None)
        return next(fits, BATCH)

    @property
    def apart(self) -> int:
        """How many steps apart an example is used."""
        return self.method.sampler.separation(N, self.batch) or 1

    def prepared(self, x: Tensor, y: Tensor) -> Batch:
        """Examples as the loss wants them to be trained on, by the same draws every time."""
        return self.method.loss.prepare(Batch(x, y), Stream(1, "views", 0))

    def releases(
        self, batch: Batch, method: Method | None = None, at: Progress | None = None, relation: Relation | None = None
    ) -> dict[str, Release]:
        """The bounded releases of one prepared batch, at the start or `at` a later state."""
        m = method or self.method
        p = at or start(m, self.model, STEPS, self.apart)
        probe = m.path.probe(p.w, p.parts.path)
        args = (probe, batch, p.parts.clip, SIGMA, relation or m.sampler.relation, p.step)
        return m.engine.bounded(m.loss, m.clip, self.model, *args).releases

    def single(self) -> Subject:
        """The same in float32."""
        model = copy.deepcopy(self.model).float()
        return dataclasses.replace(self, model=model, data=self.data.to(torch.float32))

    @cached_property
    def whole(self) -> dict[str, Release]:
        """The releases of all examples at once, at the start."""
        return self.releases(self.prepared(self.data.x, self.data.y))

    @cached_property
    def noise(self) -> list[Noised]:
        """Noise on the first step's releases, and on a later step's where those are others; in float32, as trained."""
        s = self.single()
        later = s.releases(s.prepared(s.data.x, s.data.y), at=s.reached[1])
        kinds = [s.whole]
        if [(k, r.value.layout) for k, r in later.items()] != [(k, r.value.layout) for k, r in s.whole.items()]:
            kinds.append(later)
        return [self._noised(releases) for releases in kinds]

    def _noised(self, releases: dict[str, Release]) -> Noised:
        blocks = [
            (key, f'"{key}" ({name})', tuple(shape))
            for key, r in releases.items()
            for name, shape in zip(r.value.names, r.value.layout.shapes, strict=True)
        ]
        given, noise = list(releases.values()), self.method.noise
        zero = [r._replace(value=r.value.zeros_like()) for r in given]
        drawn: list[list[Tensor]] = [[] for _ in given]
        states = [noise.init(DRAWS, self.apart) for _ in given]
        for t in range(DRAWS):
            rng = Stream(1 + self.seed, "noise", t)  # one stream for all releases of a step, as in training
            # every other step hands in zeros: noise depends on no value
            for i, r in enumerate(given if t % 2 else zero):
                # Noise that remembers is known by its stream, and two releases have noise of their own.
                stream = rng.under(str(i)) if noise.remembers else rng
                public, states[i] = noise.publish(r, stream, states[i])
                drawn[i].append(public.flat - r.value.flat)
        z = [
            torch.stack(rows).double() * r.in_units(r.value.zeros_like() + 1.0).flat / (r.sigma * r.sensitivity)
            for r, rows in zip(given, drawn, strict=True)
        ]
        if noise.remembers:
            # By what it states it has in common with earlier steps, it is made independent.
            factor = torch.from_numpy(np.linalg.cholesky(noise.covariance(DRAWS, self.apart)))
            z = [torch.linalg.solve_triangular(factor, rows, upper=False) for rows in z]
        return Noised(torch.cat(z, 1), releases, blocks)

    def wide_noise(self, width: int, draws: int) -> Tensor:
        """Noise [draws, coordinates], in its claimed deviation, on tensors with more rows: `width` in all or more."""
        name, r = max(self.single().whole.items(), key=lambda item: item[1].value.layout.numel)
        times = -(-width // r.value.layout.numel)
        wide = {
            label: t.new_zeros(times * max(1, len(t) if t.ndim else 1), *t.shape[1:]) for label, t in r.value.items()
        }
        zero = r._replace(value=Tree.of(wide))
        rows = []
        for draw in range(draws):
            # Each a first step: nothing came before it.
            state = self.method.noise.init(1, 1)
            noised, _ = self.method.noise.publish(zero, Stream(1 + self.seed, f"wide {name}", draw), state)
            rows.append(zero.in_units(noised).flat.double() / (r.sigma * r.sensitivity))
        return torch.stack(rows)

    @cached_property
    def reached(self) -> list[Progress]:
        """The states that a short training passes through, from the start to its end."""
        states = [start(self.method, self.model, STEPS, self.apart)]
        end = self.run(save=lambda p: states.append(dataclasses.replace(p, ledger=copy.deepcopy(p.ledger))))
        return [*states, end]

    @cached_property
    def aged(self) -> list[Progress]:
        """The first weights, and the parts' states after `AGES` empty batches: steps like any other, and cheap."""
        m, empty = self.method, self.prepared(self.data.x[:0], self.data.y[:0])
        first = start(m, self.model, AGES[-1] + AFTER, self.apart)
        w, parts, states = first.w, first.parts, []
        for t in range(AGES[-1]):
            streams = Alike(Stream(SEEDS.noise, "noise", t), Stream(SEEDS.path, "path", t))
            done = step(m, self.model, w, empty, parts, SIGMA, self.batch, streams, t)
            w, parts = done.w, done.parts
            if t + 1 in AGES:
                states.append(Progress(t + 1, first.w, copy.deepcopy(parts)))
        return states

    def run(
        self,
        method: Method | None = None,
        progress: Progress | None = None,
        sigma: float = SIGMA,
        until: int = STEPS,
        **hooks: Any,
    ) -> Progress:
        """A short training, or its first steps."""
        m = method or self.method
        schedule = Schedule(until, self.batch, 2, save_seconds=-1.0)
        begun = progress or start(m, self.model, STEPS, self.apart)
        return train(m, self.model, self.data, sigma, schedule, SEEDS, begun, streams=Alike, **hooks)

    def noises(self) -> None:
        """Raise Inapplicable where the method adds no noise: then nothing is promised."""
        if not self.method.noise.private:
            raise Inapplicable("it adds no noise and promises nothing")


def subject(method: Method, problems: Sequence[SmallProblem] = PROBLEMS) -> Subject:
    """`method` on the first problem that its engine and loss accept. Raises Violation where they accept none."""
    reasons = []
    for problem in problems:
        s = Subject(method, problem.model(), Toy(shape=problem.shape))
        reason = method.engine.accepts(method.loss, method.clip, s.model)
        if not reason:
            try:  # some things only a pass can show
                s.releases(s.prepared(s.data.x[:2], s.data.y[:2]))
                return dataclasses.replace(s, model=problem.model())
            except ValueError as error:
                reason = str(error)
        reasons.append(f"{problem.name}: {reason}")
    raise Violation("; ".join(reasons))
