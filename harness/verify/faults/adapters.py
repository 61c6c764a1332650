"""The planted faults: parts that are wrong on purpose, as small as they can be, so that what is caught is the fault.

Each is what public code or a paper really had. Nothing that trains may use them, and none is registered.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from dp_accounting import PoissonSampledDpEvent
from torch import Tensor, nn

from harness.dp import (
    Automatic,
    Batch,
    Bounded,
    Flat,
    Gaussian,
    Poisson,
    Quantile,
    Relation,
    Release,
    Sharp,
    Shuffle,
    Tree,
    Vmap,
)
from harness.dp.clip import Clip, State
from harness.dp.engines.engine import Clipped, PerExample, group_norms, losses_of
from harness.dp.engines.pairs import Pairs
from harness.dp.engines.vmap import per_example_gradients
from harness.dp.engines.weights import held
from harness.dp.loss import Loss
from harness.dp.random import Stream

# Norms and gradients --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Naive(PerExample):
    """Per-example gradients, weighed by norms that subclasses get wrong."""

    def clipped_sum(
        self, loss: Loss, clip: Clip, groups: Mapping[str, int], model: nn.Module, w: Tree, batch: Batch, state: State
    ) -> Clipped:
        grads, losses = self.gradients(loss, model, w, batch)
        norms = group_norms(self.squares(grads), groups, losses)
        weights = clip.weights(norms, state)
        total = [self.weighed(weights[:, groups[name]].to(g.dtype), g).flatten() for name, g in grads.items()]
        return Clipped(w.with_flat(torch.cat(total)), norms, weights, losses.detach())

    def gradients(self, loss: Loss, model: nn.Module, w: Tree, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """Gradients [B, *shape] by name, and losses [B]."""
        return per_example_gradients(loss, model, w.views, w.names, batch)

    def squares(self, grads: dict[str, Tensor]) -> dict[str, Tensor]:
        """Squared norms [B] by name."""
        return {name: g.double().flatten(1).square().sum(1) for name, g in grads.items()}

    def weighed(self, weights: Tensor, g: Tensor) -> Tensor:
        """The weighted sum of one parameter's gradients; what is not finite counts as zero."""
        finite = g.flatten(1).isfinite().all(1)
        return torch.tensordot(weights[finite], g[finite], 1)


@dataclass(frozen=True)
class NormsWithoutBias(Naive):
    """Counts weights and forgets biases."""

    def squares(self, grads: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: square for name, square in super().squares(grads).items() if "bias" not in name}


@dataclass(frozen=True)
class NormsOfMeanLoss(Naive):
    """Differentiates the mean loss, and takes that back in linear layers and not in convolutions."""

    def squares(self, grads: dict[str, Tensor]) -> dict[str, Tensor]:
        found = super().squares(grads)
        return {name: s / len(s) ** 2 if grads[name].ndim > 3 else s for name, s in found.items()}


@dataclass(frozen=True)
class KeepsNonFinite(Naive):
    """Weighs an example whose gradient is not finite like any other: NaN for all."""

    def weighed(self, weights: Tensor, g: Tensor) -> Tensor:
        return torch.tensordot(weights, g, 1)


@dataclass(frozen=True)
class InBatchStatistics(Naive):
    """Takes each example's loss from one pass of the whole batch, statistics of the batch and all."""

    def gradients(self, loss: Loss, model: nn.Module, w: Tree, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        with held(model, w.views) as own:
            losses = losses_of(loss, model, batch)
            rows = [torch.autograd.grad(one, list(own.values()), retain_graph=True) for one in losses]
        return {name: torch.stack(g) for name, g in zip(own, zip(*rows, strict=True), strict=True)}, losses


@dataclass(frozen=True)
class TwoPasses(Naive):
    """Sums the gradient of the weighted losses: another one than it measured, where a hook changes gradients."""

    def clipped_sum(self, loss: Loss, clip: Clip, groups: Any, model: nn.Module, w: Tree, *rest: Any) -> Clipped:
        out, (batch, _) = super().clipped_sum(loss, clip, groups, model, w, *rest), rest
        assert out.weights is not None
        with held(model, w.views) as own:
            weighted = (out.weights[:, 0].nan_to_num(0).to(out.losses) * losses_of(loss, model, batch)).sum()
            grads = torch.autograd.grad(weighted, list(own.values()), materialize_grads=True)
        return out._replace(total=w.with_flat(torch.cat([g.flatten() for g in grads])))


@dataclass(frozen=True)
class WholeBatch(Vmap):
    """Clips the gradient of the whole batch to C and declares C: it can turn round."""

    def bounded(self, loss: Loss, clip: Clip, model: nn.Module, w: Tree, batch: Batch, *rest: Any) -> Bounded:
        out = super().bounded(loss, Flat(1e6), model, w, batch, *rest)
        grad = out.releases["grad"]
        state, _, relation, *_ = rest
        bound = clip.sensitivity(state, relation)
        short = min(1.0, bound / relation.moves / max(float(grad.value.norm()), 1e-300))
        out.releases["grad"] = grad._replace(value=grad.value * short, sensitivity=bound)
        return out


@dataclass(frozen=True)
class ViewByView(Vmap):
    """Clips each view's gradient and adds them up, so that an example contributes as many as it has views."""

    def bounded(self, loss: Any, clip: Clip, model: nn.Module, w: Tree, batch: Batch, *rest: Any) -> Bounded:
        rows = Batch(batch.x.flatten(0, 1), batch.y.repeat_interleave(loss.views))
        return super().bounded(loss.of_view, clip, model, w, rows, *rest)


@dataclass(frozen=True)
class ClippedBeforeTemperature(Pairs):
    """Clips the gradients of similarities and divides by the temperature later: the noise is that much too small."""

    def bounded(self, loss: Any, clip: Any, *rest: Any) -> Bounded:
        out = super().bounded(loss, Flat(clip.clip / loss.temperature), *rest)
        grad = out.releases["grad"]
        out.releases["grad"] = grad._replace(sensitivity=grad.sensitivity * loss.temperature)
        return out


# Bounds and noise levels ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class TooLow(Flat):
    """Declares half of its sensitivity."""

    def sensitivity(self, state: State, relation: Relation) -> float:
        return super().sensitivity(state, relation) / 2


@dataclass(frozen=True)
class NotDoubled(Flat):
    """Forgets that replacing an example moves the sum by two gradients."""

    def sensitivity(self, state: State, relation: Relation) -> float:
        return self.clip


LAST: dict[str, Any] = {}  # what a stateful class would keep in an attribute


@dataclass(frozen=True)
class LargestWeight(Automatic):
    """Weighs by C / x, then clips to that times C, with noise for the largest weight of the batch: of the batch!"""

    def weights(self, norms: Tensor, state: State) -> Tensor:
        bounds = self.clip * super().weights(norms, state)
        LAST["weight"] = float(bounds.max()) if len(bounds) else 1.0
        return (bounds / norms).clamp(max=1.0).nan_to_num(0.0)

    def sensitivity(self, state: State, relation: Relation) -> float:
        return float(LAST.get("weight", 1.0)) * relation.moves


@dataclass(frozen=True)
class MeanOfRawNorms(Flat):
    """Clips to the mean raw norm of the last private batch."""

    def init(self, layout: Any) -> State:
        return {"c": self.clip}

    def weights(self, norms: Tensor, state: State) -> Tensor:
        return Flat(state["c"]).weights(norms, None)

    def sensitivity(self, state: State, relation: Relation) -> float:
        return float(state["c"]) * relation.moves

    def side(self, norms: Tensor, state: State, relation: Relation, sigma: float) -> dict[str, Release]:
        if len(norms):
            state["c"] = float(norms.nan_to_num(0, 0, 0).mean()) + 1e-3
        return {}


@dataclass(frozen=True)
class FreeCounts(Quantile):
    """Releases its counts and does not bill them."""

    def split(self, sigma: float) -> dict[str, float]:
        return {"grad": sigma}

    def side(self, norms: Tensor, state: State, relation: Relation, sigma: float) -> dict[str, Release]:
        return Quantile().side(norms, state, relation, sigma)


@dataclass(frozen=True)
class RealisedBatch(Vmap):
    """Divides sum and noise by the size that the batch turned out to have."""

    def bounded(self, loss: Loss, clip: Clip, model: nn.Module, w: Tree, batch: Batch, *rest: Any) -> Bounded:
        out = super().bounded(loss, clip, model, w, batch, *rest)
        grad, size = out.releases["grad"], max(len(batch), 1)
        out.releases["grad"] = grad._replace(value=grad.value / size, sensitivity=grad.sensitivity / size)
        return out


# Noise ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NoisyMicrobatches(Vmap):
    """Adds noise to each microbatch, so that there is more of it where memory is short."""

    def clipped_sum(self, *args: Any) -> Clipped:
        out = super().clipped_sum(*args)
        flat = out.total.flat
        return out._replace(
            total=out.total.with_flat(flat + Stream(len(flat), "noise", 0).normal(len(flat), flat.dtype))
        )


@dataclass(frozen=True)
class OneKey(Gaussian):
    """Draws the noise of every tensor by one key: tensors begin with the same numbers."""

    def add(self, release: Release, rng: Stream) -> Tree:
        key = rng.seed64()
        added = [self._drawn(t, key) * release.sigma * release.sensitivity for _, t in release.value.items()]
        return release.value.with_flat(release.value.flat + torch.cat(added))

    @staticmethod
    def _drawn(t: Tensor, key: int) -> Tensor:
        rng = torch.Generator().manual_seed(key % 2**63)
        return torch.randn(math.ceil(t.numel() / 16) * 16, generator=rng, dtype=t.dtype)[: t.numel()]


@dataclass(frozen=True)
class SharedRows(Gaussian):
    """Draws one row of noise for all classes: differences of rows carry none."""

    def add(self, release: Release, rng: Stream) -> Tree:
        added = [self._drawn(t, rng) * release.sigma * release.sensitivity for _, t in release.value.items()]
        return release.value.with_flat(release.value.flat + torch.cat(added))

    @staticmethod
    def _drawn(t: Tensor, rng: Stream) -> Tensor:
        if t.ndim != 2:
            return rng.normal(t.numel(), t.dtype)
        return rng.normal(t.shape[1], t.dtype).expand_as(t).flatten()


@dataclass(frozen=True)
class Repeated(Gaussian):
    """Adds the same noise in every step, as a key does that is taken when a function is compiled."""

    def add(self, release: Release, rng: Stream) -> Tree:
        return super().add(release, Stream(7, "noise", 0))


@dataclass(frozen=True)
class Reduced(Gaussian):
    """Takes 2 % off the noise that calibration asked for."""

    def add(self, release: Release, rng: Stream) -> Tree:
        return super().add(release._replace(sigma=0.98 * release.sigma), rng)


@dataclass(frozen=True)
class FloatSum(Gaussian):
    """Draws floats, scales them and adds them to floats: which ones can come out depends on the sum."""

    def add(self, release: Release, rng: Stream) -> Tree:
        draws, whole, scale = torch.Generator(), release.sigma * release.sensitivity, release.scale or {}
        draws.manual_seed(rng.seed64() % 2**63)
        noised = [
            t + torch.randn(t.shape, generator=draws, dtype=t.dtype) * (whole * scale.get(name, 1.0))
            for name, t in release.formatted.items()
        ]
        return release.value.with_flat(torch.cat([t.reshape(-1) for t in noised]))


@dataclass(frozen=True)
class QuietWhenEmpty(Gaussian):
    """Leaves an empty batch alone."""

    def add(self, release: Release, rng: Stream) -> Tree:
        return super().add(release, rng) if release.value.flat.any() else release.value


# Samplers and paths ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShuffledAsPoisson(Poisson):
    """Shuffles, and bills Poisson sampling."""

    def draw(self, n: int, batch: int, step: int, seed: int) -> Tensor:
        return Shuffle().draw(n, batch, step, seed)


@dataclass(frozen=True)
class NeverEmpty(Poisson):
    """Draws again where nobody came."""

    def draw(self, n: int, batch: int, step: int, seed: int) -> Tensor:
        attempts = (super(NeverEmpty, self).draw(n, batch, step + again * 10**6, seed) for again in range(1000))
        return next(drawn for drawn in attempts if len(drawn))


@dataclass(frozen=True)
class AmplifiedTwice(Poisson):
    """Bills a rate of q^2, as where sampling is accounted for once by the loader and once more by the accountant."""

    def wrap(self, event: Any, n: int, batch: int, step: int) -> Any:
        return PoissonSampledDpEvent((batch / n) ** 2, event)


@dataclass(frozen=True)
class AscentNeverUndone(Sharp):
    """Goes uphill once for each microbatch, and comes down once."""

    def base(self, w: Tree, state: Tree | None, rng: Stream) -> Tree:
        climbs = int(LAST.get("microbatches", 1)) - 1
        return w if state is None else w + state.unit() * (self.rho * climbs)


@dataclass(frozen=True)
class Counting(Vmap):
    """Counts its microbatches, for the path above."""

    microbatch: int | None = field(default=8, metadata={"speed": True})

    def bounded(self, loss: Loss, clip: Clip, model: nn.Module, w: Tree, batch: Batch, *rest: Any) -> Bounded:
        LAST["microbatches"] = max(1, math.ceil(len(batch) / (self.microbatch or len(batch) or 1)))
        return super().bounded(loss, clip, model, w, batch, *rest)


@dataclass(frozen=True)
class PassedAgain(Naive):
    """Where an example is not finite, passes the others once more, and draws their dropout anew."""

    def gradients(self, loss: Loss, model: nn.Module, w: Tree, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        found, losses = super().gradients(loss, model, w, batch)
        good = torch.stack([g.flatten(1).isfinite().all(1) for g in found.values()]).all(0)
        if not good.all() and good.any():
            again, _ = super().gradients(loss, model, w, Batch(batch.x[good], batch.y[good]))
            for name, g in found.items():
                g[good] = again[name]
        return found, losses


@dataclass(frozen=True)
class LeftOut(Naive):
    """A plan of one random pass, in which the first layer was skipped: it gets no gradient."""

    def gradients(self, loss: Loss, model: nn.Module, w: Tree, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        found, losses = super().gradients(loss, model, w, batch)
        first = w.names[0]
        return found | {first: torch.zeros_like(found[first])}, losses
