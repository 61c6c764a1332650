"""Noise: the only door between a private value and a public one."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from dp_accounting import DpEvent, GaussianDpEvent, NonPrivateDpEvent

from harness.dp.gaussian import grid
from harness.dp.random import Stream
from harness.dp.release import Release
from harness.dp.tree import Tree


@dataclass(frozen=True)
class Noise:
    """Makes releases public and says what that costs."""

    @property
    def private(self) -> bool:
        """Whether anything is protected at all."""
        return True

    def add(self, release: Release, rng: Stream) -> Tree:
        """The public version of `release`. `rng` gives fresh draws for every release of every step."""
        raise NotImplementedError

    def event(self, sigmas: Iterable[float]) -> DpEvent:
        """The event of releasing together, from one sample, values with these noise multipliers."""
        raise NotImplementedError


@dataclass(frozen=True)
class NoNoise(Noise):
    """Releases the private value itself."""

    @property
    def private(self) -> bool:
        return False

    def add(self, release: Release, rng: Stream) -> Tree:
        return release.value

    def event(self, sigmas: Iterable[float]) -> DpEvent:
        return NonPrivateDpEvent()


@dataclass(frozen=True)
class Gaussian(Noise):
    """Independent N(0, (sigma * sensitivity * scale)^2) on every coordinate of every release.

    Releases computed from the same sample are one Gaussian mechanism on the concatenation, each block scaled by its
    own sensitivity and multiplier: the joint multiplier is (sum of sigma_i^-2)^(-1/2).

    What is released is a function of integers: the value is rounded to a public grid, and so is the noise
    (`harness.dp.gaussian`). Rounding the value moves it a little further between neighbours; sensitivity and
    deviation are larger by up to one part in a million for that. Rounding the noise, their sum on the grid, and the
    float that it becomes are post-processing.
    """

    def add(self, release: Release, rng: Stream) -> Tree:
        if not (math.isfinite(release.sensitivity) and release.sensitivity > 0):
            raise ValueError(f"Gaussian noise needs a finite sensitivity, and this release has {release.sensitivity}")
        value = release.value
        points = grid(release.sigma, release.sensitivity, value.layout.numel)
        if release.scale is None:
            return value.with_flat(rng.noised(value.flat, points, release.dtype))
        if not all(scale > 0 and math.isfinite(scale) for scale in release.scale.values()):
            raise ValueError(f"Gaussian noise needs positive, finite scales, and this release has {release.scale}")
        noised = [
            rng.noised(t.reshape(-1), points.in_units(release.scale[name]), release.dtype) for name, t in value.items()
        ]
        return value.with_flat(torch.cat(noised))

    def event(self, sigmas: Iterable[float]) -> DpEvent:
        sigmas = list(sigmas)
        if len(sigmas) == 1:
            return GaussianDpEvent(sigmas[0])  # not through a power and back: the ledger holds sigma to the last bit
        return GaussianDpEvent(sum(s**-2 for s in sigmas) ** -0.5)
