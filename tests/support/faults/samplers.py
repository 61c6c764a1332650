"""Samplers with a planted fault: batches that are not distributed as the event that is charged says."""

from __future__ import annotations

import math

import torch
from dp_accounting import GaussianDpEvent, NoOpDpEvent, PoissonSampledDpEvent

from harness.dp import Fixed, Poisson, Relation, Shuffle

# What a step draws ----------------------------------------------------------------------------------------


class FixedAsPoisson(Poisson):
    """Draws batches of one size, and charges Poisson sampling."""

    def draw(self, n, batch, step, seed):
        return Fixed().draw(n, batch, step, seed)


class OneBatch(Poisson):
    """Draws the same batch in every step."""

    def draw(self, n, batch, step, seed):
        return super().draw(n, batch, 0, seed)


class OneSeed(Poisson):
    """Draws the same batches in every run."""

    def draw(self, n, batch, step, seed):
        return super().draw(n, batch, step, 7)


class Together(Poisson):
    """Draws each example together with the next one."""

    def draw(self, n, batch, step, seed):
        half = super().draw(n // 2, batch // 2, step, seed)
        return torch.cat([2 * half, 2 * half + 1])


class CutShort(Poisson):
    """Keeps three times the expected batch at most."""

    def draw(self, n, batch, step, seed):
        return super().draw(n, batch, step, seed)[: 3 * batch]


class CoarseCoins(Poisson):
    """Rounds the rate up to a multiple of 1/256."""

    def draw(self, n, batch, step, seed):
        return super().draw(n, math.ceil(256 * batch / n) * n / 256, step, seed)


class WithReplacement(Fixed):
    """Draws with replacement, and charges for draws without."""

    def draw(self, n, batch, step, seed):
        return torch.randint(n, (batch,), generator=torch.Generator().manual_seed(seed + step))


class NeverShuffles(Fixed):
    """Cycles through the data in one order, and charges fresh subsets."""

    def draw(self, n, batch, step, seed):
        return (torch.arange(batch) + step * batch) % n


class HalfEpochs(Shuffle):
    """Shuffles anew in mid-epoch, and charges whole epochs."""

    def draw(self, n, batch, step, seed):
        return super().draw(n, batch, 2 * step, seed)


class ShufflesMany(Poisson):
    """Shuffles where there are many examples."""

    def draw(self, n, batch, step, seed):
        return Shuffle().draw(n, batch, step, seed) if n >= 10_000 else super().draw(n, batch, step, seed)


class Recycled(Poisson):
    """Draws a thousand batches, and starts over."""

    def draw(self, n, batch, step, seed):
        return super().draw(n, batch, step % 1000, seed)


class DrawsMoreLater(Poisson):
    """Draws twice as often after 300 steps."""

    def draw(self, n, batch, step, seed):
        return super().draw(n, 2 * batch if step >= 300 else batch, step, seed)


# What a step charges --------------------------------------------------------------------------------------


class SometimesFree(Poisson):
    """Charges one step in four."""

    def wrap(self, event, n, batch, step):
        return super().wrap(event, n, batch, step) if step % 4 == 0 else NoOpDpEvent()


class FreeLater(Poisson):
    """Charges five hundred steps, and none after them."""

    def wrap(self, event, n, batch, step):
        return super().wrap(event, n, batch, step) if step < 500 else NoOpDpEvent()


class Amplifies(Poisson):
    """Charges more noise than there is."""

    def wrap(self, event, n, batch, step):
        return PoissonSampledDpEvent(batch / n, GaussianDpEvent(2 * event.noise_multiplier))


class ShufflesApart(Shuffle):
    """Claims add-or-remove neighbours for batches of one size."""

    @property
    def relation(self):
        return Relation.ADD_OR_REMOVE
