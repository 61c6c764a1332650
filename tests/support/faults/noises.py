"""Noise with a planted fault: in its distribution, its size, its independence, or the event that is charged for it."""

from __future__ import annotations

import copy
import math

import torch
from dp_accounting import GaussianDpEvent, LaplaceDpEvent

from harness.dp import Gaussian
from harness.verify.faults import HIDDEN
from harness.verify.faults.parts import Additive

# Size -----------------------------------------------------------------------------------------------------


class Quiet(Gaussian):
    """Forgets to scale the noise by the sensitivity."""

    def add(self, release, rng):
        return super().add(release._replace(sensitivity=1.0, scale=None), rng)


class Scaleless(Gaussian):
    """Forgets the scales."""

    def add(self, release, rng):
        return super().add(release._replace(scale=None), rng)


class OneScaleShort(Gaussian):
    """Takes one tensor's scale for half of what it is."""

    def add(self, release, rng):
        scale = {**release.scale, "1.bias": release.scale["1.bias"] / 2}
        return super().add(release._replace(scale=scale), rng)


class Bare(Additive):
    """Leaves the last tensor without noise and adds a little more to the others."""

    def drawn(self, release, rng):
        z, last = super().drawn(release, rng), math.prod(release.value.layout.shapes[-1])
        z[-last:] = 0
        return z * (len(z) / max(1, len(z) - last)) ** 0.5


class Uneven(Additive):
    """Adds half the noise to one coordinate."""

    def drawn(self, release, rng):
        z = super().drawn(release, rng)
        z[5 % len(z)] /= 2
        return z


# Distribution ---------------------------------------------------------------------------------------------


class Uniform(Additive):
    """Noise of the right deviation and the wrong distribution."""

    def drawn(self, release, rng):
        return (rng.uniform(len(release.value.flat)) - 0.5) * 12**0.5


class Clamped(Additive):
    """No noise beyond four standard deviations."""

    def drawn(self, release, rng):
        return super().drawn(release, rng).clamp(-4, 4)


class InHalf(Additive):
    """Noise of half precision on sums of single precision."""

    def drawn(self, release, rng):
        return super().drawn(release, rng).half()


class FirstThousands(Additive):
    """A buffer of 4096 numbers, and zeros after them."""

    def drawn(self, release, rng):
        z = super().drawn(release, rng)
        z[4096:] = 0
        return z


# Independence ---------------------------------------------------------------------------------------------


class Paired(Additive):
    """Every second coordinate repeats its neighbour's noise."""

    def drawn(self, release, rng):
        z = super().drawn(release, rng)
        return z.repeat_interleave(2)[: len(z)]


class Mirrored(Additive):
    """The second half of long noise is the first with the other sign."""

    def drawn(self, release, rng):
        z = super().drawn(release, rng)
        return torch.cat([z[: -(len(z) // 2)], -z[: len(z) // 2]]) if len(z) > 1000 else z


class Shared(Additive):
    """A small part of the noise is common to all coordinates."""

    def drawn(self, release, rng):
        z = super().drawn(release, rng)
        return 0.99**0.5 * z + 0.1 * z.sum() / len(z) ** 0.5


class Cancelling(Additive):
    """Every second step takes away the noise of the one before."""

    def drawn(self, release, rng):
        if "added" in HIDDEN:
            return -HIDDEN.pop("added")
        HIDDEN["added"] = super().drawn(release, rng)
        return HIDDEN["added"]


class Restarting(Gaussian):
    """The stream starts anew for each release of a step."""

    def add(self, release, rng):
        return super().add(release, copy.copy(rng))


# What is charged ------------------------------------------------------------------------------------------


class Overstated(Gaussian):
    """Claims twice the noise that it adds."""

    def event(self, sigmas):
        return GaussianDpEvent(2 * super().event(sigmas).noise_multiplier)


class OneOfSeveral(Gaussian):
    """Charges the first release of a step only."""

    def event(self, sigmas):
        return GaussianDpEvent(next(iter(sigmas)))


class AsLaplace(Gaussian):
    """Charges another mechanism."""

    def event(self, sigmas):
        return LaplaceDpEvent(1.0)
