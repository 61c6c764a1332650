"""The conformance checks: what every method must pass, ours and yours, on a problem small enough for seconds.

A check returns nothing where the method conforms, and raises `Violation` saying what is wrong and what to change.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import itertools
import json
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from dp_accounting import (
    DpEvent,
    GaussianDpEvent,
    NonPrivateDpEvent,
    NoOpDpEvent,
    PoissonSampledDpEvent,
    SampledWithoutReplacementDpEvent,
)
from torch import Tensor, nn

from harness import registry
from harness.dp.account import epsilon, epsilons, ranking
from harness.dp.calibrate import calibrate
from harness.dp.clip import Clip, State
from harness.dp.engines.engine import Engine, PerExample
from harness.dp.engines.loop import Loop
from harness.dp.loss import Batch
from harness.dp.method import Method, describe
from harness.dp.noise import Noise
from harness.dp.random import Stream
from harness.dp.release import Bounded, Relation, Release
from harness.dp.sampler import Sampler
from harness.dp.tree import Tree
from harness.train import Progress, Schedule, Streams, read_checkpoint, start, step, train, write_checkpoint

N, BATCH, STEPS, SIGMA, DELTA = 48, 16, 8, 1.5, 1e-5
DRAWS = 2000  # of noise: a correlation of 0.2 between two coordinates, or of 0.01 between all, stands out
SIX = 6.0  # standard deviations that a single statistic may be off; the largest of thousands gets NINE
NINE = 9.0
SEEDS = SimpleNamespace(sampling=101, noise=202, path=303)


class Check(NamedTuple):
    """One line of the verdict."""

    name: str
    ok: bool
    detail: str


class Violation(Exception):
    """What is wrong and what to change."""


class Toy:
    """Forty-eight small one-channel images in three classes."""

    n_train = n_test = N

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        rng = torch.Generator().manual_seed(4)
        self.y = torch.arange(N) % 3
        self.x = torch.randn(N, 1, 6, 6, generator=rng, dtype=torch.float64) + self.y.view(-1, 1, 1, 1)
        self.x = self.x.to(dtype)

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


@dataclass(frozen=True)
class Subject:
    """A method under examination, on the toy problem."""

    method: Method
    model: nn.Module
    data: Toy

    def prepared(self, x: Tensor, y: Tensor) -> Batch:
        """Examples as the loss wants them to be trained on, by the same draws every time."""
        return self.method.loss.prepare(Batch(x, y), Stream(1, "views", 0))

    def releases(
        self, batch: Batch, method: Method | None = None, at: Progress | None = None
    ) -> dict[str, Release]:
        """The bounded releases of one prepared batch, at the start or `at` a later state."""
        m = method or self.method
        p = at or start(m, self.model, STEPS)
        args = (m.path.probe(p.w, p.parts.path), batch, p.parts.clip, SIGMA, m.sampler.relation)
        return m.engine.bounded(m.loss, m.clip, self.model, *args).releases

    @cached_property
    def whole(self) -> dict[str, Release]:
        """The releases of all examples at once, at the start."""
        return self.releases(self.prepared(self.data.x, self.data.y))

    @cached_property
    def noise(self) -> tuple[Tensor, list[str]]:
        """Noise [steps, coordinates] over its claimed standard deviation, and the coordinates' names."""
        names: list[str] = []
        releases = self.whole
        for key, r in releases.items():
            for name, size in zip(r.value.names, r.value.layout.sizes, strict=True):
                names += [f'"{key}" ({name})'] * size
        rows = []
        for t in range(DRAWS):
            rng = Stream(1, "noise", t)  # one stream for all releases of a step, as in training
            # every other step hands in zeros: noise depends on no value
            inputs = [r if t % 2 else r._replace(value=r.value.zeros_like()) for r in releases.values()]
            rows.append(
                torch.cat(
                    [
                        r.in_units(self.method.noise.add(r, rng) - r.value).flat.double()
                        / (r.sigma * r.sensitivity)
                        for r in inputs
                    ]
                )
            )
        return torch.stack(rows), names

    @cached_property
    def reached(self) -> list[Progress]:
        """The states that a short training passes through, from the start to its end."""
        states = [start(self.method, self.model, STEPS)]
        end = self.run(save=lambda p: states.append(dataclasses.replace(p)))
        return [*states, end]

    def run(self, method: Method | None = None, progress: Progress | None = None, **hooks: Any) -> Progress:
        """A short training."""
        m = method or self.method
        schedule = Schedule(STEPS, BATCH, 2, save_seconds=-1.0)
        return train(
            m, self.model, self.data, SIGMA, schedule, SEEDS, progress or start(m, self.model, STEPS), **hooks
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
    ours, theirs = s.whole, s.releases(s.prepared(s.data.x, s.data.y), judge)
    for name in theirs:
        off = float((ours[name].value - theirs[name].value).norm() / (theirs[name].value.norm() + 1e-12))
        if off > 1e-6:
            raise Violation(
                f"the engine's release \"{name}\" differs from the naive loop's by {off:.1e} relative"
            )


def microbatch_free(s: Subject) -> None:
    """the size of the microbatch changes nothing"""
    if not any(field.name == "microbatch" for field in dataclasses.fields(s.method.engine)):
        return
    reference = s.reached[-1].w
    for size in (1, 5):
        split: dict[str, Any] = {"microbatch": size}
        small = dataclasses.replace(s.method, engine=dataclasses.replace(s.method.engine, **split))
        off = float((s.run(small).w - reference).norm() / reference.norm())
        if off > 1e-9:
            raise Violation(
                f"microbatches of {size} move the final weights by {off:.1e} relative: keep state per logical step"
            )


def within_sensitivity(s: Subject) -> None:
    """no example moves a release by more than its declared sensitivity"""
    if s.method.noise.private:
        for x, y, story in _neighbourhoods(s.data):
            _removals(s, x, y, story)


def within_sensitivity_later(s: Subject) -> None:
    """nor does it after some steps of training"""
    if s.method.noise.private:
        for p in s.reached[1::2]:
            for scale in (1.0, 1e4):
                story = f"after {p.step} steps, inputs times {scale:g}"
                _removals(s, s.data.x[:6] * scale, s.data.y[:6], story, at=p)


def within_sensitivity_float32(s: Subject) -> None:
    """nor does it in float32"""
    if not s.method.noise.private:
        return
    single = dataclasses.replace(s, model=toy_model().float(), data=Toy(torch.float32))
    for x, y, story in _neighbourhoods(single.data):
        _removals(single, x, y, f"float32, {story}", slack=1e-4)


def within_sensitivity_sequence(s: Subject) -> None:
    """nor does it in a sequence model whose gradients nearly cancel"""
    m = s.method
    model = Contrast()
    if not m.noise.private or m.engine.accepts(m.loss, m.clip, model):
        return
    contrast = dataclasses.replace(s, model=model)
    try:
        contrast.prepared(torch.zeros(1, 2, 64), torch.zeros(1, dtype=torch.long))
    except ValueError:
        return  # a loss of images only
    for positions in (2, 5):
        rng = torch.Generator().manual_seed(positions)
        x = 1e4 * torch.randn(64, positions, 64, generator=rng)
        x[:, 1] = x[:, 0] + 3 * torch.randn(64, 64, generator=rng)
        # One by one: in a sum, an example that is not clipped hides behind the others.
        for i in range(len(x)):
            story = f"{positions} positions, the first two alike, float32"
            _removals(contrast, x[i : i + 1], torch.tensor([i % 3]), story, slack=1e-4)


def _removals(
    s: Subject, x: Tensor, y: Tensor, story: str, at: Progress | None = None, slack: float = 1e-6
) -> None:
    batch = s.prepared(x, y)  # before one is removed: what is drawn for the others does not depend on it
    whole = s.releases(batch, at=at)
    for i in range(len(y)):
        keep = torch.arange(len(y)) != i
        rest = Batch(batch.x[keep], batch.y[keep])
        _moved(whole, s.releases(rest, at=at), f"{story}: removing one example", slack)


def _moved(ours: dict[str, Release], theirs: dict[str, Release], story: str, slack: float = 1e-6) -> None:
    if list(ours) != list(theirs):
        raise Violation(f"{story} changes which values are released, from {list(ours)} to {list(theirs)}")
    for name, (value, sensitivity, sigma, scale) in ours.items():
        other = theirs[name]
        if (sensitivity, sigma, scale) != other[1:]:
            raise Violation(
                f'{story} changes the declared sensitivity, sigma or scale of "{name}", from {sensitivity:.6g},'
                f" {sigma:.6g} and {scale} to {other.sensitivity:.6g}, {other.sigma:.6g} and {other.scale}: compute"
                " them from public values"
            )
        if (value.layout, value.flat.dtype) != (other.value.layout, other.value.flat.dtype):
            raise Violation(
                f'{story} changes the shape or the dtype of "{name}", from {value} to {other.value}, and noise'
                " hides neither"
            )
        moved = float(ours[name].in_units(value - other.value).norm())
        if not moved <= sensitivity * (1 + slack):
            raise Violation(
                f'{story} moves the release "{name}" by {moved:.6g}, its declared sensitivity is {sensitivity:.6g}'
            )


def replaced(s: Subject) -> None:
    """replacing an example moves no release by more than its declared sensitivity"""
    m = s.method
    if not m.noise.private or m.sampler.relation is not Relation.REPLACE_ONE:
        return
    x, y = s.data.x[:6], s.data.y[:6]
    for p in s.reached[::4]:
        whole = s.releases(s.prepared(x, y), at=p)
        for i in range(len(y)):
            for scale in (1.0, -1.0, 1e4):  # the most opposite gradients: other labels, negated inputs
                for label in range(3):
                    x2, y2 = x.clone(), y.clone()
                    x2[i], y2[i] = scale * x[i], label
                    story = f"replacing an example by {scale:g} times itself with label {label}"
                    _moved(whole, s.releases(s.prepared(x2, y2), at=p), story)


def clip_rule(s: Subject) -> None:
    """at any gradient norm, the weights keep within the declared sensitivity, under either relation"""
    clip = s.method.clip
    if not s.method.noise.private:
        return
    layout = start(s.method, s.model, STEPS).w.layout
    of = clip.groups(layout)
    groups = 1 + max(of.values())
    norms = _norms(groups)
    for p in s.reached:
        state = p.parts.clip
        weights, scale = clip.weights(norms, state), clip.scale(layout, state) or {}
        units = norms.new_tensor([max(scale.get(n, 1.0) for n in of if of[n] == g) for g in range(groups)])
        if len({(of[n], scale.get(n, 1.0)) for n in of}) > groups:
            raise Violation("tensors of one clipping group have different scales: give a group one scale")
        if weights.shape != norms.shape:
            raise Violation(f"weights have shape {tuple(weights.shape)}, the norms {tuple(norms.shape)}")
        single = weights.float().double()  # as engines weigh the gradients of a float32 model
        for relation, (rounded, slack) in itertools.product(Relation, ((weights, 1e-9), (single, 1e-6))):
            reach = relation.moves * (rounded * norms / units).square().sum(1).sqrt()
            allowed, worst = clip.sensitivity(state, relation), int(reach.nan_to_num(math.inf).argmax())
            if not float(reach[worst]) <= allowed * (1 + slack):
                raise Violation(
                    f"under {relation.value}, gradients of norms {norms[worst].tolist()} move the sum by"
                    f" {float(reach[worst]):.6g} after {p.step} steps, the declared sensitivity is {allowed:.6g}:"
                    " weights times norms, over all groups, must stay below it (twice them under replace-one)"
                )
        for value in (math.inf, math.nan):
            spoilt = norms[:1].clone()
            spoilt[0, -1] = value
            if float(clip.weights(spoilt, state)[0, -1]) != 0:
                raise Violation(f"a norm of {value} has a weight that is not 0: give it 0")
        for i in range(0, len(norms), len(norms) // 20):
            if not torch.equal(clip.weights(norms[i : i + 1], state)[0], weights[i]):
                raise Violation(
                    "an example's weight depends on the other examples: compute it from its norms alone"
                )
        for relation in Relation:
            _side_rule(clip, norms, state, relation)


def _side_rule(clip: Clip, norms: Tensor, state: State, relation: Relation) -> None:
    """Judge the side releases of a batch that one example, of any norms, joins or is replaced in."""
    bad = torch.full_like(norms[:3], math.inf)
    bad[1], bad[2, :-1] = math.nan, 1.0  # all infinite, all not numbers, the last group alone infinite
    joining = torch.cat([norms[:: max(1, len(norms) // 40)], bad])
    others = norms[:: max(1, len(norms) // 5)]

    def side(*rows: Tensor) -> dict[str, Release]:
        return clip.side(torch.cat([others, *(row[None] for row in rows)]), state, relation, SIGMA)

    for ours, theirs in zip(joining, joining.roll(7, 0), strict=True):
        replaced = relation is Relation.REPLACE_ONE
        story = f"under {relation.value}, an example of norms {ours.tolist()}"
        _moved(side(ours), side(theirs) if replaced else side(), story)


def _norms(groups: int) -> Tensor:
    """Norms [B, G] from 1e-45 to 1e45 and 0: alike in all groups, in one group alone, and mixed."""
    spans = [torch.logspace(-top, top, 1201, dtype=torch.float64) for top in (45, 3)]
    grid = torch.cat([torch.zeros(1, dtype=torch.float64), *spans])
    rows = [grid[:, None].expand(-1, groups)]
    if groups > 1:
        rng = torch.Generator().manual_seed(6)
        rows += [grid[:, None] * unit for unit in torch.eye(groups, dtype=grid.dtype)]
        rows += [torch.stack([grid[torch.randperm(len(grid), generator=rng)] for _ in range(groups)], 1)]
    return torch.cat(rows)


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
    if not s.method.noise.private:
        return
    z, names = s.noise
    steps = len(z)
    for name in dict.fromkeys(names):
        mine = z[:, [n == name for n in names]]
        scale, size = float(mine.square().mean().sqrt()), mine.numel()
        if abs(scale**2 - 1) > SIX * math.sqrt(2 / size):
            raise Violation(
                f"noise on {name} has {scale:.4g} times the standard deviation sigma * sensitivity"
            )
        fourth = float(mine.pow(4).mean())
        if abs(fourth - 3) > SIX * math.sqrt(96 / size):
            raise Violation(
                f"noise on {name} is not Gaussian: its fourth moment is {fourth:.4g}, a Gaussian's 3"
            )
        off = (mine.square().mean(0) - 1).abs().amax() > NINE * math.sqrt(2 / steps)
        if off or mine.mean(0).abs().amax() > NINE / math.sqrt(steps):
            raise Violation(
                f"noise on {name} has another standard deviation, or a mean, in some coordinates: noise every"
                " coordinate alike"
            )


def independent(s: Subject) -> None:
    """the noise is independent across coordinates, releases and steps"""
    if not s.method.noise.private:
        return
    z, names = s.noise
    steps, width = z.shape
    # A generator that starts anew gives uncorrelated signs to tensors of other sizes; the sizes of the draws betray it.
    for what, v in (("", z), ("the size of ", (z.abs() - (2 / math.pi) ** 0.5) / (1 - 2 / math.pi) ** 0.5)):
        across = _off_diagonal(v.T @ v / steps)
        if across.max() > NINE / math.sqrt(steps):
            i, j = divmod(int(across.argmax()), width)
            raise Violation(
                f"{what}noise on {names[i]} and on {names[j]} is correlated: draw every coordinate of every"
                " release from the rng handed in, and never seed it anew"
            )
    common = float(z.sum(1).square().mean()) / width
    if abs(common - 1) > SIX * math.sqrt(2 / steps):
        raise Violation(
            f"coordinates share a part of their noise: their sum has {common:.3g} times its variance"
        )
    between = z @ z.T / width
    repeated = _off_diagonal(between)
    if repeated.max() > NINE / math.sqrt(width):
        i, j = divmod(int(repeated.argmax()), steps)
        raise Violation(
            f"the noise of step {j} is {float(between[i, j]):.2g} times that of step {i}: draw it from the rng"
            " handed in"
        )
    for lag in range(1, 9):
        along = float(between.diagonal(lag).mean())
        if abs(along) > SIX / math.sqrt(width * (steps - lag)):
            raise Violation(f"noise {lag} steps apart is correlated, by {along:.2g}: draw it afresh")


def _off_diagonal(square: Tensor) -> Tensor:
    return (square - square.diagonal().diag()).abs()


def noise_billed(s: Subject) -> None:
    """the event claims no more noise than there is"""
    m = s.method
    if not m.noise.private:
        return
    z, names = s.noise
    releases = s.whole
    found = []
    for release, r in releases.items():
        mine = z[:, [n.startswith(f'"{release}"') for n in names]]
        found.append(r.sigma * float(mine.square().mean().sqrt()) * (1 + SIX / math.sqrt(2 * mine.numel())))
    declared = [r.sigma for r in releases.values()]
    for sigmas, there in (
        (declared, found),
        ([0.7], [0.7]),
        ([3.0, 0.9], [3.0, 0.9]),
        ([2.0] * 3, [2.0] * 3),
    ):
        event, joint = m.noise.event(sigmas), sum(sigma**-2 for sigma in there) ** -0.5
        if isinstance(event, NonPrivateDpEvent):
            continue
        if not isinstance(event, GaussianDpEvent):
            raise Violation(
                f"noise is billed as {event}, whose law no check knows: bill a GaussianDpEvent, or keep it a claim"
            )
        if not event.noise_multiplier <= joint * (1 + 1e-9):
            raise Violation(
                f"releases with multipliers {sigmas} are billed as one of {event.noise_multiplier:.6g}, there is"
                f" noise for {joint:.6g}: the joint multiplier is (sum of sigma**-2)**-0.5"
            )


def amended(s: Subject) -> None:
    """the path leaves the bill alone"""
    for event in (GaussianDpEvent(0.8), GaussianDpEvent(2.5), NonPrivateDpEvent()):
        if s.method.path.amend(event) != event:
            raise Violation(
                f"Path.amend turns {event} into {s.method.path.amend(event)}: an amended event may only stand as"
                " a claim, so return the event as it came"
            )


def sampled(s: Subject) -> None:
    """the sampler draws by the law that it bills"""
    if s.method.noise.private:
        for n, batch in ((400, 100), (50, 7)):
            _lawful(s.method.sampler, n, batch)


def _lawful(sampler: Sampler, n: int, batch: int, steps: int = 200) -> None:
    given = GaussianDpEvent(1.7)
    events = [sampler.wrap(given, n, batch, t) for t in range(steps)]
    rates = [_rate(event, given, n, batch) for event in events]
    amplified = torch.tensor([rate is not None for rate in rates])
    forced = torch.tensor([isinstance(event, SampledWithoutReplacementDpEvent) for event in events])
    bills = torch.tensor([event == given for event in events]).cumsum(0)
    runs = []
    for seed in (11, 1_000_003):
        member = torch.stack([_members(sampler.draw(n, batch, t, seed), n) for t in range(steps)])
        if not torch.equal(_members(sampler.draw(n, batch, 3, seed), n), member[3]):
            raise Violation("two draws of one step differ: draw from (step, seed) alone")
        if ((member * ~amplified[:, None]).cumsum(0).amax(1) > bills).any():
            raise Violation(
                "without amplification an example may touch one step for each event billed so far, and one touches"
                " more: bill every step, or draw each example once until the next bill"
            )
        if (member.sum(1)[forced] != batch).any():
            raise Violation(f"batches of exactly {batch} are billed, and others are drawn")
        runs.append(member[amplified].double())
    if amplified.any():
        rate = torch.tensor([rate for rate in rates if rate is not None], dtype=torch.float64)[:, None]
        variance = rate * (1 - rate)
        blocks = [(run - rate) / variance.sqrt() for run in runs]
        excess = (1 - 6 * variance).div(n * variance).clamp(min=0).max()
        _afresh(blocks, n, None if forced.any() else float(excess))


def _rate(event: DpEvent, given: DpEvent, n: int, batch: int) -> float | None:
    """The inclusion rate that an event claims; None where it claims no amplification."""
    if isinstance(event, PoissonSampledDpEvent) and event.event == given:
        return event.sampling_probability if event.sampling_probability < 1 else None
    if isinstance(event, SampledWithoutReplacementDpEvent) and event.event == given:
        if (event.source_dataset_size, event.sample_size) == (n, batch):
            return batch / n
    elif event == given or isinstance(event, NoOpDpEvent):
        return None
    raise Violation(
        f"for {batch} of {n} examples, {given} is billed as {event}, whose law no check knows: bill the event"
        " itself, Poisson-sampled or sampled without replacement"
    )


def _members(indices: Tensor, n: int) -> Tensor:
    if len(indices) and (int(indices.min()) < 0 or int(indices.max()) >= n):
        raise Violation(f"a draw holds indices outside 0 to {n - 1}")
    counts = torch.bincount(indices, minlength=n)
    if (counts > 1).any():
        raise Violation("a draw holds an example twice: it would count twice against one sensitivity")
    return counts


def _afresh(blocks: list[Tensor], n: int, excess: float | None) -> None:
    """Judge standardised membership [steps, n], a block for each seed; `excess` kurtosis of free batch sizes."""
    z = torch.cat(blocks)
    steps = len(z)
    if z.mean(0).abs().max() > NINE / math.sqrt(steps) or abs(z.mean()) > SIX / math.sqrt(z.numel()):
        raise Violation("examples are drawn at another rate than the one billed")
    if excess is not None:
        spread = float(z.sum(1).square().mean()) / n
        if abs(spread - 1) > SIX * math.sqrt((2 + excess) / steps):
            raise Violation(
                f"batch sizes have {spread:.2g} times the variance of the Poisson sampling billed: toss an"
                " independent coin for each example"
            )
    if steps > 2 * NINE**2 and _off_diagonal(z.T @ z / steps).max() > NINE / math.sqrt(steps):
        raise Violation("some examples come together: draw each independently")
    if n > 2 * NINE**2 and _off_diagonal(z @ z.T / n).max() > NINE / math.sqrt(n):
        raise Violation("batches repeat, between steps or between seeds: draw each step afresh")
    for lag in range(1, 17):
        along = [block[lag:] * block[:-lag] for block in blocks if len(block) > lag]
        if along and abs(torch.cat(along).mean()) > SIX / math.sqrt(torch.cat(along).numel()):
            raise Violation(
                f"batches {lag} steps apart depend on each other, as in shuffled epochs: draw each step afresh,"
                " or bill without amplification"
            )


def billed(s: Subject) -> None:
    """the ledger is the plan"""
    ledger, plan = s.reached[-1].ledger, s.method.plan(SIGMA, N, BATCH, STEPS)
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
    sigma = calibrate(m, N, BATCH, STEPS, 3.0, DELTA, cache=Path(_calibrations().name))
    spent = epsilon(m.plan(sigma, N, BATCH, STEPS), DELTA, m.sampler.relation, name)
    if not 2.97 <= spent <= 3.0:
        raise Violation(f"calibrated to epsilon 3, the plan costs {spent:.4f}")


@cache
def _calibrations() -> tempfile.TemporaryDirectory[str]:
    """Plans that are alike need one calibration a process."""
    return tempfile.TemporaryDirectory()


def still(s: Subject) -> None:
    """a learning rate of 0 leaves the weights where they are"""
    optimizer = s.method.optimizer
    if not any(f.name == "lr" for f in dataclasses.fields(optimizer)):
        return
    p = s.reached[1]
    bases = [s.method.path.base(p.w, p.parts.path, Stream(seed, "path", 1)) for seed in (1, 2)]
    if not _same(*bases):
        return  # a path that steps from a random point moves the weights by itself
    stop: dict[str, Any] = {"lr": 0.0}
    frozen = dataclasses.replace(s.method, optimizer=dataclasses.replace(optimizer, **stop))
    moved = float((s.run(frozen).w - start(frozen, s.model, STEPS).w).norm())
    if moved:
        raise Violation(
            f"with lr = 0 the weights move by {moved:.1e}: something but the optimizer changes them"
        )


def empty_step(s: Subject) -> None:
    """an empty Poisson batch is a step like any other"""
    m = s.method
    p = start(m, s.model, STEPS)
    batch = s.prepared(s.data.x[:0], s.data.y[:0])
    w, parts = p.w, p.parts
    for t in range(2):  # two: the first query of a method that asks twice for a step moves nothing
        streams = Streams(Stream(1, "noise", t), Stream(1, "path", t))
        done = step(m, s.model, w, batch, parts, SIGMA, BATCH, streams)
        w, parts = done.w, done.parts
        if not w.flat.isfinite().all():
            raise Violation("an empty batch makes the weights non-finite")
    if m.noise.private and torch.equal(w.flat, p.w.flat):
        raise Violation("an empty batch adds no noise: an observer would know that it was empty")
    if m.noise.private:
        one = s.prepared(s.data.x[:1], s.data.y[:1])
        _moved(s.releases(one), s.releases(batch), "removing the only example")


def twins(s: Subject) -> None:
    """nothing but the noised releases depends on the data"""
    if not s.method.noise.private:
        return
    blind = dataclasses.replace(s.method, noise=_Blind(s.method.noise))
    other = Toy()
    other.x, other.y = -other.x, (other.y + 1) % 3
    logs: list[list[dict[str, Any]]] = []
    for data in (s.data, other):
        points: list[dict[str, Any]] = []
        end = dataclasses.replace(s, data=data).run(
            blind, log=lambda point, points=points: points.append(_public(point.progress))
        )
        logs.append([*points, _public(end)])
    for ours, theirs in zip(*logs, strict=True):
        for name, value in ours.items():
            if not _same(value, theirs[name]):
                raise Violation(
                    f"two data sets with the same public releases end in different {name}: compute it from the"
                    " noised values handed in, and nothing else"
                )


def _public(p: Progress) -> dict[str, Any]:
    states = {f"{name} state": copy.deepcopy(value) for name, value in p.parts._asdict().items()}
    return {
        "sensitivities": dict(p.sensitivity), "bills": p.ledger.to_json(), "weights": p.w.clone(), **states
    }  # fmt: skip


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tree):
        return isinstance(b, Tree) and torch.equal(a.flat, b.flat)
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)


@dataclass(frozen=True)
class _Blind(Noise):
    """Noise that never looks at the value: what is public does not depend on the data."""

    noise: Noise

    def add(self, release: Release, rng: Stream) -> Tree:
        flat = release.value.flat
        return release.value.with_flat(0.1 * rng.normal(len(flat), flat.dtype))

    def event(self, sigmas: Iterable[float]) -> DpEvent:
        return self.noise.event(sigmas)


def poisoned(s: Subject) -> None:
    """nothing private outlives its release"""
    if not s.method.noise.private:
        return
    spy = dataclasses.replace(s.method, engine=_Poison(s.method.engine), noise=_Shred(s.method.noise))
    if not torch.equal(s.run(spy).w.flat, s.reached[-1].w.flat):
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

    def add(self, release: Release, rng: Stream) -> Tree:
        public = self.noise.add(release, rng).clone()
        release.value.flat.fill_(math.nan)
        return public

    def event(self, sigmas: Iterable[float]) -> DpEvent:
        return self.noise.event(sigmas)


def resumed(s: Subject) -> None:
    """a run continued from a checkpoint ends in the same bits"""
    whole = s.reached[-1].w
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
    described, equals_loop, microbatch_free, within_sensitivity, within_sensitivity_later,
    within_sensitivity_float32, within_sensitivity_sequence, replaced, clip_rule, noised, independent, noise_billed,
    amended, sampled, billed, calibrated, still, empty_step, twins, poisoned, resumed,
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
