"""Clipping rules, noise, samplers and a path, each with a fault that public code had."""
# mypy: allow-untyped-defs

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from dp_accounting import PoissonSampledDpEvent

from harness.dp import (
    Automatic,
    Banded,
    BandedInverse,
    Flat,
    Gaussian,
    Poisson,
    Quantile,
    Sharp,
    Shuffle,
    TruncatedPoisson,
)
from harness.dp.random import Stream
from harness.verify.faults import HIDDEN

# Clipping rules -------------------------------------------------------------------------------------------


class TooLow(Flat):
    """Declares half of its sensitivity."""

    def sensitivity(self, state, relation):
        return super().sensitivity(state, relation) / 2


class NotDoubled(Flat):
    """Forgets that replacing an example moves the sum by two gradients."""

    def sensitivity(self, state, relation):
        return self.clip


class LargestWeight(Automatic):
    """Weighs by C / x, clips to that times C, and scales the noise by the largest weight of the private batch."""

    def weights(self, norms, state):
        bounds = self.clip * super().weights(norms, state)
        HIDDEN["weight"] = float(bounds.max()) if len(bounds) else 1.0
        return (bounds / norms).clamp(max=1.0).nan_to_num(0.0)

    def sensitivity(self, state, relation):
        return float(HIDDEN.get("weight", 1.0)) * relation.moves


class MeanOfRawNorms(Flat):
    """Clips to the mean raw norm of the last private batch."""

    def init(self, layout):
        return {"c": self.clip}

    def weights(self, norms, state):
        return Flat(state["c"]).weights(norms, None)

    def sensitivity(self, state, relation):
        return float(state["c"]) * relation.moves

    def side(self, norms, state, relation, sigma):
        if len(norms):
            state["c"] = float(norms.nan_to_num(0, 0, 0).mean()) + 1e-3
        return {}


class FreeCounts(Quantile):
    """Releases its counts and does not charge for them."""

    def split(self, sigma):
        return {"grad": sigma}

    def side(self, norms, state, relation, sigma):
        return Quantile().side(norms, state, relation, sigma)


# Noise ----------------------------------------------------------------------------------------------------


class Additive(Gaussian):
    """Adds what `drawn` gives, in units of sigma times sensitivity. What derives from it draws something wrong."""

    def add(self, release, rng):
        flat = release.value.flat
        z = self.drawn(release, rng).to(flat.dtype)
        return release.value.with_flat(flat + release.sigma * release.sensitivity * z)

    def drawn(self, release, rng):
        """Numbers [coordinates]; here what they should be."""
        return rng.normal(len(release.value.flat), torch.float64)


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


class Forgotten(Banded):
    """Leaves out the oldest of the past terms."""

    def drawn(self, rng, state, size, bits, device):
        return super().drawn(rng, {**state, "c": state["c"][:-1]}, size, bits, device)


class NotNormalised(BandedInverse):
    """Scales its noise as if a use of an example moved one number of C x alone."""

    def cost(self, steps, separation):
        return 1.0


class AnyCycle(Banded):
    """Does not say how far apart it needs uses of an example to be."""

    separation = 1

    def separate(self, steps, separation):
        return True


class KeepsSums(Banded):
    """Keeps the private sum of the last step in its state, with the past noise."""

    def publish(self, release, rng, state):
        public, after = super().publish(release, rng, state)
        return public, {**after, "last": release.value.flat.clone()}


class PrivateDeviation(Gaussian):
    """Tells optimizers the deviation that the private gradients have."""

    def deviation(self, release, state=None):
        return {name: float(t.std()) for name, t in release.value.items()}


# Samplers -------------------------------------------------------------------------------------------------


class ShuffledAsPoisson(Poisson):
    """Shuffles, and charges Poisson sampling."""

    def draw(self, n, batch, step, seed):
        return Shuffle().draw(n, batch, step, seed)


class NeverEmpty(Poisson):
    """Draws again where the batch is empty."""

    def draw(self, n, batch, step, seed):
        attempts = (super(NeverEmpty, self).draw(n, batch, step + again * 10**6, seed) for again in range(1000))
        return next(drawn for drawn in attempts if len(drawn))


class CutOffAsPoisson(TruncatedPoisson):
    """Cuts batches off, and charges plain Poisson sampling."""

    def wrap(self, event, n, batch, step):
        return PoissonSampledDpEvent(batch / n, event)


class AmplifiedTwice(Poisson):
    """Charges a rate of q^2, as where sampling is accounted for once by the loader and once more by the accountant."""

    def wrap(self, event, n, batch, step):
        return PoissonSampledDpEvent((batch / n) ** 2, event)


# Paths ----------------------------------------------------------------------------------------------------


class AscentNeverUndone(Sharp):
    """Goes uphill once for each microbatch, and comes down once: public code did. For `CountsMicrobatches`."""

    def base(self, w, state, rng):
        climbs = int(HIDDEN.get("microbatches", 1)) - 1
        return w if state is None else w + state.unit() * (self.rho * climbs)
