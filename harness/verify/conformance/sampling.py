"""Checks of the sampler: whether batches are distributed as the event that is charged says."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from dp_accounting import (
    DpEvent,
    GaussianDpEvent,
    NoOpDpEvent,
    PoissonSampledDpEvent,
    SampledWithoutReplacementDpEvent,
    TruncatedSubsampledGaussianDpEvent,
)
from scipy.special import bdtrc
from torch import Tensor

from harness.dp.release import Relation
from harness.dp.sampler import Sampler
from harness.verify.conformance.evidence import alarm, bernstein, binomial, chi_square
from harness.verify.conformance.subject import Inapplicable, Subject, Violation

GIVEN = GaussianDpEvent(1.7)
MOST = 400  # examples whose pairs are compared

SIZES = ((400, 100), (50, 7), (30, 1))  # n and batch; a third of the Poisson batches of the last are empty
LARGE = (40_000, 400)  # like a real data set: a sampler may treat many examples in another way
DRAWN, DRAWN_LARGE, LAGS = 200, 48, 16  # steps of each of two seeds; how far apart they are compared
LATER = 50_400  # a step in the long run, at the start of an epoch of many lengths
# Steps that are multiples of many lengths of an epoch, or of a table of batches.
PERIODS = tuple(
    sorted({base * 2**k for base in (1, 3, 5, 7, 9, 25, 27, 49, 125, 189, 315, 625, 945, 3125) for k in range(5, 15)})
)
CHARGED = 3000  # first steps whose events are compared
TINY, TINIES = (20, 1), 5000  # n and batch, of which one in sixty holds four or more; and how many are drawn
TESTS = (2 * len(SIZES) + 1) * (6 + LAGS) + 6


def sampled(s: Subject) -> None:
    """batches are distributed as the event that the sampler charges: rate, independence, sizes, empty batches"""
    s.noises()
    sampler, seeds = s.method.sampler, (11 + 2 * s.seed, 1_000_003 + 2 * s.seed)
    for n, batch in SIZES:
        event = sampler.wrap(GIVEN, n, batch, 0)
        if isinstance(event, TruncatedSubsampledGaussianDpEvent):
            _cut_off(sampler, event, n, batch, seeds)
        else:
            _follows(sampler, n, batch, seeds)


def sampled_at_large(s: Subject) -> None:
    """so are they with 40,000 examples and after 50,000 steps: no batch comes again, is free of charge or cut short"""
    s.noises()
    sampler, seeds = s.method.sampler, (23 + 2 * s.seed, 2_000_003 + 2 * s.seed)
    _exchanged(sampler, seeds[0])
    events = [sampler.wrap(GIVEN, *SIZES[0], t) for t in range(CHARGED)]
    if any(event == GIVEN for event in events):
        raise Inapplicable("it claims no amplification")
    if isinstance(events[0], TruncatedSubsampledGaussianDpEvent):
        _fresh(sampler, seeds[0])
        return
    free = [t for t, event in enumerate(events) if isinstance(event, NoOpDpEvent)]
    for t in free[:50] if sampler.cycle(*SIZES[0]) == 1 else ():
        if len(sampler.draw(*SIZES[0], t, seeds[0])):
            raise Violation(f"step {t} draws examples and charges nothing: charge every step")
    for n, batch in SIZES:
        _follows(sampler, n, batch, seeds, first=LATER)
    _follows(sampler, *LARGE, seeds, DRAWN_LARGE)
    _fresh(sampler, seeds[0])
    _sized(sampler, seeds)


def _exchanged(sampler: Sampler, seed: int) -> None:
    """Whether another example takes the place of one that is removed: that moves a release twice as far."""
    if sampler.relation is not Relation.ADD_OR_REMOVE:
        return
    n, batch = next(size for size in SIZES if not sampler.unfit(*size))
    sizes = {len(sampler.draw(m, batch, t, seed)) for m in (n, n - 1) for t in range(60)}
    if len(sizes) == 1:
        raise Violation(
            f"batches always hold {sizes.pop()} examples, with {n} and with {n - 1}: another example"
            " takes the place of one that is removed, so neighbours are replace-one. Say so in Sampler.relation"
        )


def _fresh(sampler: Sampler, seed: int) -> None:
    """Whether batches come again after some period: two of 400 examples are alike once in 10^81."""
    n, batch = LARGE if sampler.unfit(*SIZES[0]) else SIZES[0]
    seen: dict[tuple[int, ...], int] = {}
    for t in (0, *PERIODS):
        drawn = tuple(sampler.draw(n, batch, t, seed).tolist())
        if drawn in seen and drawn:
            raise Violation(
                f"the batch of step {seen[drawn]} comes again at step {t}, so that its examples are known to come"
                " together: draw each step afresh"
            )
        seen[drawn] = t


def _sized(sampler: Sampler, seeds: tuple[int, int]) -> None:
    """How many batches hold k examples or more, for each k: a largest size shows in the upper tail."""
    n, batch = TINY
    rates = {_rate(sampler.wrap(GIVEN, n, batch, t), GIVEN, n, batch) for t in range(TINIES)}
    (rate,) = rates if len(rates) == 1 else (None,)
    if rate is None or isinstance(sampler.wrap(GIVEN, n, batch, 0), SampledWithoutReplacementDpEvent):
        return
    sizes = torch.tensor([len(sampler.draw(n, batch, t, seeds[t % 2])) for t in range(TINIES)])
    most = 7
    for k in range(1, most + 1):
        p = float(bdtrc(k - 1, n, rate))
        there = int((sizes >= k).sum())
        alarm(
            binomial(there, TINIES, p, most), TESTS,
            f"of {TINIES} batches {there} hold {k} examples of {n} or more, under the Poisson sampling charged it would"
            f" be {p * TINIES:.0f}: a batch has no largest size",
        )  # fmt: skip


def _follows(sampler: Sampler, n: int, batch: int, seeds: tuple[int, int], count: int = DRAWN, first: int = 0) -> None:
    if sampler.unfit(n, batch):
        return
    cycle = sampler.cycle(n, batch)
    if sampler.amplifies(n, batch) and cycle > 1:
        sampler, count, first = _Cycles(sampler, cycle), max(count // cycle, LAGS + 4), first // cycle
    given, steps = GIVEN, range(first, first + count)
    events = [sampler.wrap(given, n, batch, t) for t in steps]
    rates = [_rate(event, given, n, batch) for event in events]
    amplified = torch.tensor([rate is not None for rate in rates])
    forced = torch.tensor([isinstance(event, SampledWithoutReplacementDpEvent) for event in events])
    charged = torch.tensor([event == given for event in events]).cumsum(0)
    runs = []
    for seed in seeds:
        member = torch.stack([_members(sampler.draw(n, batch, t, seed), n) for t in steps])
        if not torch.equal(_members(sampler.draw(n, batch, first + 3, seed), n), member[3]):
            raise Violation("two draws of one step differ: draw from (step, seed) alone")
        if ((member * ~amplified[:, None]).cumsum(0).amax(1) > charged).any():
            raise Violation(
                "without amplification an example may touch one step for each event charged so far, and one touches"
                " more: charge every step, or draw each example once until the next event"
            )
        if (member.sum(1)[forced] != batch).any():
            raise Violation(f"batches of exactly {batch} are charged, and others are drawn")
        runs.append(member[amplified].double())
    if amplified.any():
        rate = torch.tensor([rate for rate in rates if rate is not None], dtype=torch.float64)[:, None]
        _Draws([run - rate for run in runs], torch.cat([rate] * 2), not forced.any()).judge()


@dataclass(frozen=True)
class _Cycles(Sampler):
    """A sampler that charges one event for a cycle, by whole cycles: who is drawn in one, each example at most once."""

    sampler: Sampler
    length: int

    def draw(self, n: int, batch: int, step: int, seed: int) -> Tensor:
        drawn = [self.sampler.draw(n, batch, self.length * step + i, seed) for i in range(self.length)]
        again = [self.sampler.draw(n, batch, self.length * (step + 1) + i, seed) for i in range(self.length)]
        for i, one in enumerate(drawn):
            others = torch.cat([*again[:i], *again[i + 1 :]])
            if torch.isin(one, others).any():
                raise Violation("an example is used in another step of the next cycle: uses must be a cycle apart")
        return torch.cat(drawn)

    def wrap(self, event: DpEvent, n: int, batch: int, step: int) -> DpEvent:
        events = [self.sampler.wrap(event, n, batch, self.length * step + i) for i in range(self.length)]
        if not all(isinstance(one, NoOpDpEvent) for one in events[1:]):
            raise Violation("a cycle is charged more than one event: say its length in Sampler.cycle")
        return events[0]


def _cut_off(
    sampler: Sampler, event: TruncatedSubsampledGaussianDpEvent, n: int, batch: int, seeds: tuple[int, int]
) -> None:
    """Whether batches are those of Poisson sampling, cut off where the event says: by size, and by who is in."""
    most, rate = event.truncated_batch_size, event.sampling_probability
    drawn = [sampler.draw(n, batch, t, seed) for seed in seeds for t in range(DRAWN)]
    sizes = torch.tensor([len(one) for one in drawn])
    if (sizes > most).any() or event.dataset_size < n + 1 or not math.isclose(rate, batch / n):
        raise Violation(f"batches of {int(sizes.max())} are drawn, and {event} is charged for {batch} of {n}")
    for k in range(1, most + 1):
        p = float(bdtrc(k - 1, n, rate))
        alarm(
            binomial(int((sizes >= k).sum()), len(sizes), p, most), TESTS,
            f"of {len(sizes)} batches {int((sizes >= k).sum())} hold {k} examples or more, where Poisson sampling that"
            f" is cut off at {most} has {p * len(sizes):.0f}",
        )  # fmt: skip
    counts = torch.bincount(torch.cat([_members(one, n).nonzero().squeeze(1) for one in drawn]), minlength=n).double()
    mean = sum(float(bdtrc(k - 1, n, rate)) for k in range(1, most + 1)) / n
    alarm(
        bernstein((counts - len(drawn) * mean).abs(), len(drawn) * mean * (1 - mean), 1.0, n), TESTS,
        "some examples are drawn more often than others: leave out any of a batch that is too large, at random",
    )  # fmt: skip


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
        f"for {batch} of {n} examples, {given} is charged as {event}, which no check knows: charge the event"
        " itself, Poisson-sampled or sampled without replacement"
    )


def _members(indices: Tensor, n: int) -> Tensor:
    if len(indices) and (int(indices.min()) < 0 or int(indices.max()) >= n):
        raise Violation(f"a draw holds indices outside 0 to {n - 1}")
    counts = torch.bincount(indices, minlength=n)
    if (counts > 1).any():
        raise Violation("a draw holds an example twice: it would count twice against one sensitivity")
    return counts


class _Draws:
    """Membership less its `rate` [steps, 1], a block [steps, n] for each seed; `free`: batches have no fixed size."""

    def __init__(self, blocks: list[Tensor], rate: Tensor, free: bool) -> None:
        self.blocks, self.rate, self.free = blocks, rate, free
        self.off = torch.cat(blocks)
        # Of one coin: its variance [steps], and the most that it may be off its mean by.
        self.variance = (rate * (1 - rate)).squeeze(1)
        self.largest = float(torch.maximum(rate, 1 - rate).max())

    def judge(self) -> None:
        """Raise Violation where the draws are not those of independent steps at this rate."""
        self._rates()
        if self.free:
            self._sizes()
        self._pairs()
        self._lags()

    def _rates(self) -> None:
        n, variance = self.off.shape[1], float(self.variance.sum())
        single = bernstein(self.off.sum(0), variance, self.largest, n)
        overall = bernstein(self.off.sum(), n * variance, self.largest) if self.free else 1.0
        for p in (single, overall):
            alarm(p, TESTS, "examples are drawn at another rate than the one charged")

    def _sizes(self) -> None:
        """The variance of batch sizes, m (1 - q), and how many batches are empty, (1 - q)^n of them."""
        steps, n = self.off.shape
        scaled = self.off.sum(1).square() / (n * self.variance)
        excess = float(((1 - 6 * self.variance) / (n * self.variance)).clamp(min=0).max())
        shrink = 2 / (2 + excess)  # a sum of squares of binomial numbers, as chi square of the same variance
        alarm(
            chi_square(float(scaled.sum()) * shrink, steps * shrink), TESTS,
            f"batch sizes have {float(scaled.mean()):.2g} times the variance m (1 - q) of the Poisson sampling charged:"
            " toss an independent coin for each example",
        )  # fmt: skip
        empty = (1 - self.rate.squeeze(1)) ** n
        there = int(((self.off + self.rate).sum(1) < 0.5).sum())
        alarm(
            bernstein(there - float(empty.sum()), float((empty * (1 - empty)).sum()), 1.0), TESTS,
            f"of {steps} batches {there} are empty, under the Poisson sampling charged it would be"
            f" {float(empty.sum()):.1f}: an empty batch is a step like any other",
        )  # fmt: skip

    def _pairs(self) -> None:
        """Whether two examples come together, and whether two batches are alike."""
        off, variance, largest = self.off, self.variance, self.largest**2
        steps, n = off.shape
        some = off[:, :: max(1, n // MOST)]
        examples = (some.T @ some).fill_diagonal_(0)
        alarm(
            bernstein(examples, float(variance.square().sum()), largest, some.shape[1] ** 2), TESTS,
            "some examples come together: draw each independently",
        )  # fmt: skip
        batches = (off @ off.T).fill_diagonal_(0)
        alarm(
            bernstein(batches, n * float(variance.max()) ** 2, largest, steps * steps), TESTS,
            "batches repeat, between steps or between seeds: draw each step afresh",
        )  # fmt: skip

    def _lags(self) -> None:
        n, variance = self.off.shape[1], float(self.variance.max())
        for lag in range(1, LAGS + 1):
            along = [block[lag:] * block[:-lag] for block in self.blocks if len(block) > lag]
            if along:
                terms = torch.cat(along)
                alarm(
                    bernstein(terms.sum(), len(terms) * n * variance**2, self.largest**2), TESTS,
                    f"batches {lag} steps apart depend on each other, as in shuffled epochs: draw each step afresh,"
                    " or charge without amplification",
                )  # fmt: skip
