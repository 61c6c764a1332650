"""Noise with a planted fault: in its distribution, its size, its independence, or the event that is charged for it."""
# mypy: allow-untyped-defs

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from dp_accounting import GaussianDpEvent, LaplaceDpEvent

from harness.dp import Gaussian
from harness.dp.random import Stream
from harness.verify.faults import HIDDEN


class Additive(Gaussian):
    """Adds what `drawn` gives, in units of sigma times sensitivity. What derives from it draws something wrong."""

    def add(self, release, rng):
        flat = release.value.flat
        z = self.drawn(release, rng).to(flat.dtype)
        return release.value.with_flat(flat + release.sigma * release.sensitivity * z)

    def drawn(self, release, rng):
        """Numbers [coordinates]; here what they should be."""
        return rng.normal(len(release.value.flat), torch.float64)


# Faults that public code had ------------------------------------------------------------------------------


class OneKey(Additive):
    """Draws the noise of every tensor by one key: tensors begin with the same numbers."""

    def drawn(self, release, rng):
        key = rng.seed64() % 2**63
        return torch.cat([self._of(t, torch.Generator().manual_seed(key)) for _, t in release.value.items()])

    @staticmethod
    def _of(t, generator):
        return torch.randn(math.ceil(t.numel() / 16) * 16, generator=generator, dtype=t.dtype)[: t.numel()]


@dataclass(frozen=True)
class SharedRows(Additive):
    """Draws a share of the noise on a class as one row for all classes: differences of rows have less of it."""

    share: float = 1.0

    def drawn(self, release, rng):
        parts = []
        for _, t in release.value.items():
            z = rng.normal(t.numel(), torch.float64)
            if t.ndim == 2:
                row = rng.normal(t.shape[1], torch.float64).repeat(t.shape[0])
                z = (1 - self.share) ** 0.5 * z + self.share**0.5 * row
            parts.append(z)
        return torch.cat(parts)


class Repeated(Gaussian):
    """Adds the same noise in every step, as a key does that is taken when a function is compiled."""

    def add(self, release, rng):
        return super().add(release, Stream(7, "noise", 0))


@dataclass(frozen=True)
class Less(Gaussian):
    """Adds a share of the noise that calibration asked for."""

    share: float = 0.98

    def add(self, release, rng):
        return super().add(release._replace(sigma=self.share * release.sigma), rng)


class FloatSum(Gaussian):
    """Draws floats, scales them and adds them to floats: which ones can come out depends on the sum."""

    def add(self, release, rng):
        draws, whole, scale = torch.Generator(), release.sigma * release.sensitivity, release.scale or {}
        draws.manual_seed(rng.seed64() % 2**63)
        noised = [
            t + torch.randn(t.shape, generator=draws, dtype=t.dtype) * (whole * scale.get(name, 1.0))
            for name, t in release.formatted.items()
        ]
        return release.value.with_flat(torch.cat([t.reshape(-1) for t in noised]))


class QuietWhenEmpty(Gaussian):
    """Leaves an empty batch without noise."""

    def add(self, release, rng):
        return super().add(release, rng) if release.value.flat.any() else release.value


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
