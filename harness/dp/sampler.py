"""Samplers: who is in the batch, and what that does to the privacy of a step.

A sampler is the only author of amplified events, and it owns the relation its analysis holds for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from dp_accounting import (
    DpEvent,
    GaussianDpEvent,
    NonPrivateDpEvent,
    NoOpDpEvent,
    PoissonSampledDpEvent,
    SampledWithoutReplacementDpEvent,
    TruncatedSubsampledGaussianDpEvent,
    UnsupportedDpEvent,
)
from torch import Tensor

from harness.dp.random import Stream
from harness.dp.release import Relation


@dataclass(frozen=True)
class Sampler:
    """Draws logical batches from n examples and charges a step accordingly. n and the batch size are public."""

    @property
    def relation(self) -> Relation:
        """The neighbouring relation under which `wrap` is sound."""
        return Relation.ADD_OR_REMOVE

    def amplifies(self, n: int, batch: int) -> bool:
        """Whether `wrap` charges anything but the event of the mechanism itself: who is in a batch must be secret."""
        event = GaussianDpEvent(1.0)
        return self.wrap(event, n, batch, 0) != event

    def cycle(self, n: int, batch: int) -> int:
        """For how many steps one event is charged, at the first of them: an example is used in one of them at most.

        A sampler that leaves steps free says how long its cycles are: what they are charged is the costliest step's.
        """
        return 1

    def separation(self, n: int, batch: int) -> int | None:
        """The least number of steps between two uses of an example; None where that is not said."""
        return self.cycle(n, batch)

    def unfit(self, n: int, batch: int) -> str | None:
        """Why batches of this size cannot be drawn, or None."""
        return None

    def draw(self, n: int, batch: int, step: int, seed: int) -> Tensor:
        """Indices [B] of the logical batch of this step. A function of its arguments alone: nothing to checkpoint."""
        raise NotImplementedError

    def wrap(self, event: DpEvent, n: int, batch: int, step: int) -> DpEvent:
        """The event of this step, `event` being that of the mechanism on the batch it was given."""
        raise NotImplementedError

    def denominator(self, n: int, batch: int) -> int:
        """The public number that sums are divided by: the expected batch size, never the realised one."""
        return batch

    def distribution(self, n: int, batch: int) -> str:
        """One line for the record."""
        raise NotImplementedError


@dataclass(frozen=True)
class Poisson(Sampler):
    """Every example is in with probability q = batch / n, independently of all else. A batch may be empty."""

    def draw(self, n: int, batch: int, step: int, seed: int) -> Tensor:
        return _tossed(n, batch, step, seed)

    def wrap(self, event: DpEvent, n: int, batch: int, step: int) -> DpEvent:
        return PoissonSampledDpEvent(batch / n, event)

    def distribution(self, n: int, batch: int) -> str:
        return f"Poisson, q = {batch / n:.6g}"


@dataclass(frozen=True)
class Fixed(Sampler):
    """A uniformly random subset of exactly `batch` examples, drawn afresh each step. Replace-one neighbours."""

    @property
    def relation(self) -> Relation:
        return Relation.REPLACE_ONE

    def draw(self, n: int, batch: int, step: int, seed: int) -> Tensor:
        return Stream(seed, "sampling", step).permutation(n)[:batch].sort().values

    def wrap(self, event: DpEvent, n: int, batch: int, step: int) -> DpEvent:
        return SampledWithoutReplacementDpEvent(n, batch, event)

    def distribution(self, n: int, batch: int) -> str:
        return f"fixed size without replacement, {batch} of {n}"


@dataclass(frozen=True)
class Full(Sampler):
    """All examples in every step: no amplification, and none claimed."""

    def draw(self, n: int, batch: int, step: int, seed: int) -> Tensor:
        return torch.arange(n)

    def wrap(self, event: DpEvent, n: int, batch: int, step: int) -> DpEvent:
        return event

    def denominator(self, n: int, batch: int) -> int:
        return n

    def distribution(self, n: int, batch: int) -> str:
        return f"full batch, {n}"


@dataclass(frozen=True)
class Shuffle(Sampler):
    """A new permutation each epoch, cut into batches; the remainder is dropped.

    No amplification is claimed: none is proved that is worth having (Chua et al., arXiv:2403.17673). What does hold,
    for replace-one neighbours, is that the permutation does not depend on the data, so that an example touches at most
    one step of an epoch: by parallel composition an epoch costs one un-amplified event, charged at its first step.
    """

    @property
    def relation(self) -> Relation:
        return Relation.REPLACE_ONE

    def cycle(self, n: int, batch: int) -> int:
        return max(1, math.floor(n / batch))

    def separation(self, n: int, batch: int) -> int | None:
        # The last batch of an epoch and the first of the next one may have an example in common.
        return None

    def draw(self, n: int, batch: int, step: int, seed: int) -> Tensor:
        epoch, place = divmod(step, self.cycle(n, batch))
        order = Stream(seed, "sampling", epoch).permutation(n)
        return order[place * batch : (place + 1) * batch].sort().values

    def wrap(self, event: DpEvent, n: int, batch: int, step: int) -> DpEvent:
        return event if step % self.cycle(n, batch) == 0 else NoOpDpEvent()

    def distribution(self, n: int, batch: int) -> str:
        return f"shuffled batches of {batch}, not amplified"


@dataclass(frozen=True)
class Cyclic(Sampler):
    """One order for the whole run, dealt out over floor(n / batch) steps and then again: each example once a cycle.

    The order is random and does not depend on the data. An example that contributes nothing leaves all batches as they
    are: zero-out neighbours. Nothing is amplified: each cycle is charged one event, at its first step.
    """

    @property
    def relation(self) -> Relation:
        return Relation.ZERO_OUT

    def cycle(self, n: int, batch: int) -> int:
        return max(1, n // batch)

    def draw(self, n: int, batch: int, step: int, seed: int) -> Tensor:
        cycle = self.cycle(n, batch)
        return Stream(seed, "sampling", 0).permutation(n)[step % cycle :: cycle].sort().values

    def wrap(self, event: DpEvent, n: int, batch: int, step: int) -> DpEvent:
        return event if step % self.cycle(n, batch) == 0 else NoOpDpEvent()

    def distribution(self, n: int, batch: int) -> str:
        return f"one order, in cycles of {self.cycle(n, batch)} batches, not amplified"


@dataclass(frozen=True)
class CyclicPoisson(Sampler):
    """Poisson sampling in turn from `groups` groups of examples: a step draws from its group alone.

    Each example is in a group of its own choice, at random, for the whole run. In its group's steps it is in with
    probability q = groups * batch / n. What noise has in common over fewer than `groups` steps costs nothing more: a
    cycle of so many steps is charged one event, amplified at q (Choquette-Choo et al. 2023, arXiv:2306.08153, theorem
    4), at its first step.
    """

    groups: int = 8

    def __post_init__(self) -> None:
        if self.groups < 1:
            raise ValueError(f"groups must be 1 or more, and is {self.groups}")

    def cycle(self, n: int, batch: int) -> int:
        return self.groups

    def unfit(self, n: int, batch: int) -> str | None:
        if self.groups * batch > n:
            return (
                f"{self.groups} groups of {n} examples have fewer than {batch} each, the expected batch: write groups ="
                f" {n // batch} or less"
            )
        return None

    def draw(self, n: int, batch: int, step: int, seed: int) -> Tensor:
        group = (Stream(seed, "groups", 0).uniform(n) * self.groups).long()
        drawn = _tossed(n, self.groups * batch, step, seed)
        return drawn[group[drawn] == step % self.groups]

    def wrap(self, event: DpEvent, n: int, batch: int, step: int) -> DpEvent:
        if step % self.groups:
            return NoOpDpEvent()
        return PoissonSampledDpEvent(min(1.0, self.groups * batch / n), event)

    def distribution(self, n: int, batch: int) -> str:
        return f"Poisson, q = {self.groups * batch / n:.6g}, in turn from {self.groups} groups"


@dataclass(frozen=True)
class TruncatedPoisson(Sampler):
    """Poisson sampling, cut off: of a batch of more than `cap` times the expected size, a random part is kept.

    No batch is larger, which hardware likes that compiles for one size. What is charged knows the cut
    (arXiv:2508.15089, by dp_accounting): an example may take another one's place then, and move a sum twice as far. It
    is charged as for one example more than there are, so that it holds whether one is added or removed.
    """

    cap: float = 1.25

    def __post_init__(self) -> None:
        if not self.cap > 0:
            raise ValueError(f"cap must be positive, and is {self.cap}")

    def most(self, n: int, batch: int) -> int:
        """The largest batch."""
        # Batches of one at most, nearly all cut, cost more than what is charged.
        return min(n, max(2, math.floor(self.cap * batch)))

    def draw(self, n: int, batch: int, step: int, seed: int) -> Tensor:
        drawn, most = _tossed(n, batch, step, seed), self.most(n, batch)
        if len(drawn) <= most:
            return drawn
        return drawn[Stream(seed, "left out", step).permutation(len(drawn))[:most]].sort().values

    def wrap(self, event: DpEvent, n: int, batch: int, step: int) -> DpEvent:
        if isinstance(event, GaussianDpEvent):
            return TruncatedSubsampledGaussianDpEvent(n + 1, batch / n, self.most(n, batch), event.noise_multiplier)
        # A cut moves a sum twice as far, and of other mechanisms nothing is known then.
        return event if isinstance(event, NonPrivateDpEvent) else UnsupportedDpEvent()

    def distribution(self, n: int, batch: int) -> str:
        return f"Poisson, q = {batch / n:.6g}, batches of {self.most(n, batch)} at most"


def _tossed(n: int, batch: int, step: int, seed: int) -> Tensor:
    """The examples [B] whose own coin, of probability batch / n, fell right in this step."""
    # Of the 2^53 values of a coin never a larger share than is charged, and less by 2^-53 at most.
    share = (batch * 2**53 // n) * 2.0**-53 if n else 0.0
    coins = Stream(seed, "sampling", step).uniform(n)
    return (coins < share).nonzero().squeeze(1)
