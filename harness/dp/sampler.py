"""Samplers: who is in the batch, and what that does to the privacy of a step.

A sampler is the only author of amplified events, and it owns the relation its analysis holds for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from dp_accounting import DpEvent, NoOpDpEvent, PoissonSampledDpEvent, SampledWithoutReplacementDpEvent
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
        # Of the 2^53 values of a coin never a larger share than is charged, and less by 2^-53 at most.
        share = (batch * 2**53 // n) * 2.0**-53 if n else 0.0
        coins = Stream(seed, "sampling", step).uniform(n)
        return (coins < share).nonzero().squeeze(1)

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

    def draw(self, n: int, batch: int, step: int, seed: int) -> Tensor:
        epoch, place = divmod(step, self.steps_per_epoch(n, batch))
        order = Stream(seed, "sampling", epoch).permutation(n)
        return order[place * batch : (place + 1) * batch].sort().values

    def wrap(self, event: DpEvent, n: int, batch: int, step: int) -> DpEvent:
        return event if step % self.steps_per_epoch(n, batch) == 0 else NoOpDpEvent()

    @staticmethod
    def steps_per_epoch(n: int, batch: int) -> int:
        """Whole batches in an epoch, at least one."""
        return max(1, math.floor(n / batch))

    def distribution(self, n: int, batch: int) -> str:
        return f"shuffled batches of {batch}, not amplified"
