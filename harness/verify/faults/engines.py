"""Engines with a planted fault: in the norms and gradients that they compute, or in what they keep of them."""
# mypy: allow-untyped-defs

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from harness.dp import Batch, Flat, Vmap
from harness.dp.engines.engine import Clipped, PerExample, group_norms, losses_of
from harness.dp.engines.pairs import Pairs
from harness.dp.engines.vmap import per_example_gradients
from harness.dp.engines.weights import held
from harness.dp.random import Stream
from harness.verify.faults import HIDDEN

# Norms and gradients, as public code had them -------------------------------------------------------------


class Naive(PerExample):
    """Per-example gradients and their norms, without a fault. What derives from it gets one of its steps wrong."""

    def clipped_sum(self, loss, clip, groups, model, w, batch, state):
        grads, losses = self.gradients(loss, model, w, batch)
        norms = group_norms(self.squares(grads), groups, losses)
        weights = clip.weights(norms, state)
        total = [self.weighed(weights[:, groups[name]].to(g.dtype), g).flatten() for name, g in grads.items()]
        return Clipped(w.with_flat(torch.cat(total)), norms, weights, losses.detach())

    def gradients(self, loss, model, w, batch):
        """Gradients [B, *shape] by name, and losses [B]."""
        return per_example_gradients(loss, model, w.views, w.names, batch)

    def squares(self, grads):
        """Squared norms [B] by name."""
        return {name: g.double().flatten(1).square().sum(1) for name, g in grads.items()}

    def weighed(self, weights, g):
        """The weighted sum of one parameter's gradients; what is not finite counts as zero."""
        finite = g.flatten(1).isfinite().all(1)
        return torch.tensordot(weights[finite], g[finite], 1)


class NormsWithoutBias(Naive):
    """Counts weights and forgets biases."""

    def squares(self, grads):
        return {name: square for name, square in super().squares(grads).items() if "bias" not in name}


class NormsOfMeanLoss(Naive):
    """Differentiates the mean loss, and corrects for that in linear layers and not in convolutions."""

    def squares(self, grads):
        squares = super().squares(grads)
        return {name: s / len(s) ** 2 if grads[name].ndim > 3 else s for name, s in squares.items()}


class KeepsNonFinite(Naive):
    """Weighs an example whose gradient is not finite like any other: NaN for all."""

    def weighed(self, weights, g):
        return torch.tensordot(weights, g, 1)


class InBatchStatistics(Naive):
    """Takes each example's loss from one pass of the whole batch, with statistics of the batch."""

    def gradients(self, loss, model, w, batch):
        with held(model, w.views) as own:
            losses = losses_of(loss, model, batch)
            rows = [torch.autograd.grad(one, list(own.values()), retain_graph=True) for one in losses]
        return {name: torch.stack(g) for name, g in zip(own, zip(*rows, strict=True), strict=True)}, losses


class TwoPasses(Naive):
    """Sums the gradient of the weighted losses: another one than it measured, where a hook changes gradients."""

    def clipped_sum(self, loss, clip, groups, model, w, batch, state):
        out = super().clipped_sum(loss, clip, groups, model, w, batch, state)
        with held(model, w.views) as own:
            weighted = (out.weights[:, 0].nan_to_num(0).to(out.losses) * losses_of(loss, model, batch)).sum()
            grads = torch.autograd.grad(weighted, list(own.values()), materialize_grads=True)
        return out._replace(total=w.with_flat(torch.cat([g.flatten() for g in grads])))


class PassedAgain(Naive):
    """Where an example is not finite, passes the others once more, and draws their dropout anew."""

    def gradients(self, loss, model, w, batch):
        grads, losses = super().gradients(loss, model, w, batch)
        good = torch.stack([g.flatten(1).isfinite().all(1) for g in grads.values()]).all(0)
        if not good.all() and good.any():
            again, _ = super().gradients(loss, model, w, Batch(batch.x[good], batch.y[good]))
            for name, g in grads.items():
                g[good] = again[name]
        return grads, losses


class LeftOut(Naive):
    """A plan of one random pass, in which the first layer was skipped: it gets no gradient."""

    def gradients(self, loss, model, w, batch):
        grads, losses = super().gradients(loss, model, w, batch)
        first = w.names[0]
        return grads | {first: torch.zeros_like(grads[first])}, losses


# Sums and what is declared of them, as public code had them -----------------------------------------------


def altered(out, change):
    """`out` with the release of the gradient that `change` makes of its own."""
    out.releases["grad"] = change(out.releases["grad"])
    return out


class WholeBatch(Vmap):
    """Clips the gradient of the whole batch to C and declares C: one example can turn it round."""

    def bounded(self, loss, clip, model, w, batch, state, sigma, relation, step=0):
        bound = clip.sensitivity(state, relation)

        def clipped(g):
            short = min(1.0, bound / relation.moves / max(float(g.value.norm()), 1e-300))
            return g._replace(value=g.value * short, sensitivity=bound)

        return altered(super().bounded(loss, Flat(1e6), model, w, batch, state, sigma, relation, step), clipped)


class ViewByView(Vmap):
    """Clips each view's gradient and adds them up, so that an example contributes as many as it has views."""

    def bounded(self, loss, clip, model, w, batch, *rest):
        rows = Batch(batch.x.flatten(0, 1), batch.y.repeat_interleave(loss.views))
        return super().bounded(loss.of_view, clip, model, w, rows, *rest)


class ClippedBeforeTemperature(Pairs):
    """Clips the gradients of similarities and divides by the temperature later: the noise is that much too small."""

    def bounded(self, loss, clip, *rest):
        out = super().bounded(loss, Flat(clip.clip / loss.temperature), *rest)
        return altered(out, lambda g: g._replace(sensitivity=g.sensitivity * loss.temperature))


class RealisedBatch(Vmap):
    """Divides sum and noise by the size that the batch turned out to have."""

    def bounded(self, loss, clip, model, w, batch, *rest):
        out, size = super().bounded(loss, clip, model, w, batch, *rest), max(len(batch), 1)
        return altered(out, lambda g: g._replace(value=g.value / size, sensitivity=g.sensitivity / size))


class NoisyMicrobatches(Vmap):
    """Adds noise to each microbatch, so that there is more of it where memory is short."""

    def clipped_sum(self, *args):
        out = super().clipped_sum(*args)
        flat = out.total.flat
        noise = Stream(len(flat), "noise", 0).normal(len(flat), flat.dtype)
        return out._replace(total=out.total.with_flat(flat + noise))


@dataclass(frozen=True)
class CountsMicrobatches(Vmap):
    """Counts its microbatches, for `AscentNeverUndone`; no fault by itself."""

    microbatch: int | None = field(default=8, metadata={"speed": True})

    def bounded(self, loss, clip, model, w, batch, *rest):
        HIDDEN["microbatches"] = max(1, math.ceil(len(batch) / (self.microbatch or len(batch) or 1)))
        return super().bounded(loss, clip, model, w, batch, *rest)
