"""Noise that is afresh in every step, and what every noise is."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from dp_accounting import DpEvent, GaussianDpEvent, NonPrivateDpEvent

from harness.dp.gaussian import grid
from harness.dp.random import Stream
from harness.dp.release import Release
from harness.dp.tree import Tree

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Noise:
    """Makes releases public and says what that costs."""

    @property
    def private(self) -> bool:
        """Whether anything is protected at all."""
        return True

    @property
    def remembers(self) -> bool:
        """Whether the noise of a step has anything in common with that of earlier ones."""
        return False

    @property
    def separation(self) -> int:
        """The least number of steps between two uses of an example that the analysis of this noise needs."""
        return 1

    def separate(self, steps: int, separation: int) -> bool:
        """Whether uses of an example that are `separation` steps apart have no noise in common.

        Then each costs what it would cost alone, and sampling at random may amplify it.
        """
        return True

    def init(self, steps: int, separation: int) -> Any:
        """The state before the first release of a name, for a run in which uses of an example are so far apart.

        **It is secret**: what was released less its noise is the private value.
        """
        return None

    def add(self, release: Release, rng: Stream) -> Tree:
        """The public version of `release`. `rng` gives fresh draws for every release of every step."""
        raise NotImplementedError

    def publish(self, release: Release, rng: Stream, state: Any) -> tuple[Tree, Any]:
        """The public version of `release`, and the next state of its name: for noise that remembers."""
        return self.add(release, rng), state

    def deviation(self, release: Release, state: Any = None) -> dict[str, float]:
        """The standard deviation of what `add` adds to a number, by tensor: public, up to one part in a million."""
        return dict.fromkeys(release.value.names, 0.0)

    def covariance(self, steps: int, separation: int) -> Array:
        """The covariance [steps, steps] of the noise on a coordinate, in units of (sigma * sensitivity)^2."""
        return np.eye(steps)

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

    def deviation(self, release: Release, state: Any = None) -> dict[str, float]:
        plain = release.sigma * release.sensitivity
        return {name: plain * (release.scale or {}).get(name, 1.0) for name in release.value.names}

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
