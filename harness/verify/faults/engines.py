"""Engines with a planted fault: in the norms and gradients that they compute, or in what they keep of them."""
# mypy: allow-untyped-defs

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from harness.dp import Batch, Flat, Vmap
from harness.dp.engines.engine import Clipped, PerExample, group_norms, losses_of
from harness.dp.engines.pairs import Pairs
from harness.dp.engines.vmap import per_example_gradients
from harness.dp.engines.weights import held
from harness.dp.engines.whole import Whole
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


# More of the kind -----------------------------------------------------------------------------------------


class ViewsAveragedLate(ViewByView):
    """Clips each view's gradient and averages: within the bound, and not what was asked for."""

    def bounded(self, loss, *rest):
        return altered(super().bounded(loss, *rest), lambda g: g._replace(value=g.value / loss.views))


class OneForWhole(Whole):
    """Declares C for 2C, which holds between a gradient and none, and not between two of a whole batch."""

    def bounded(self, *args):
        return altered(super().bounded(*args), lambda g: g._replace(sensitivity=g.sensitivity / 2))


class Uncut(Vmap):
    """Leaves the coordinates as they are, whatever the rule's limit."""

    def bounded(self, loss, clip, *rest):
        return super().bounded(loss, Flat(clip.clip), *rest)


@dataclass(frozen=True)
class Coarse(Vmap):
    """Underestimates norms in float32, as a cancelling sum of squares does, if inputs are `sequences` or not."""

    sequences: bool = False

    def bounded(self, loss, clip, model, w, batch, *rest):
        out = super().bounded(loss, clip, model, w, batch, *rest)
        if w.flat.dtype != torch.float64 and self.sequences == (batch.x.ndim == 3):
            wide = super().bounded(loss, Flat(2 * clip.clip), model, w, batch, *rest)
            altered(out, lambda g: g._replace(value=wide.releases["grad"].value))
        return out


@dataclass(frozen=True)
class ChangesLate(Vmap):
    """Another bound, or other noise than is planned, from the hundredth step on."""

    clips: float = 1.0
    noises: float = 1.0

    def bounded(self, loss, clip, model, w, batch, state, sigma, relation, step=0):
        late = step >= 100
        rest = (model, w, batch, state, sigma * (self.noises if late else 1), relation, step)
        out = super().bounded(loss, clip, *rest)
        if late:
            wide = super().bounded(loss, Flat(self.clips * clip.clip), *rest)
            altered(out, lambda g: g._replace(value=wide.releases["grad"].value))
        return out


class LastPiece(Vmap):
    """Takes the mean over pieces of 64 for a sum: the last piece counts as 64."""

    def bounded(self, loss, clip, model, w, batch, *rest):
        out, last = super().bounded(loss, clip, model, w, batch, *rest), len(batch) % 64
        if len(batch) > 64 and last:
            piece = Batch(batch.x[-last:], batch.y[-last:])
            more = super().bounded(loss, clip, model, w, piece, *rest).releases["grad"].value
            altered(out, lambda g: g._replace(value=g.value + more * (64 / last - 1)))
        return out


@dataclass(frozen=True)
class NormsBy(Naive):
    """Norms with one rule wrong: of an embedding's rows, of a layer used often, of a weight that two layers share."""

    fault: str = "rows"

    def gradients(self, loss, model, w, batch):
        HIDDEN["wrong"] = self.wrong(model)
        return super().gradients(loss, model, w, batch)

    def squares(self, grads):
        return {n: square / 4 if n in HIDDEN["wrong"] else square for n, square in super().squares(grads).items()}

    def wrong(self, model):
        """The parameters whose norms are taken for half of what they are."""
        names = [n for n, _ in model.named_parameters(remove_duplicate=False)]
        if self.fault == "tied":
            return ["inner.weight"] if "again.weight" in names else []
        if self.fault == "frozen":
            return names if not all(p.requires_grad for p in model.parameters()) else []
        layers = [path for path, module in model.named_modules() if isinstance(module, WRONG_IN[self.fault])]
        return [n for n in names if n.rpartition(".")[0] in layers]


WRONG_IN: dict[str, Any] = {
    "rows": nn.Embedding,
    "recurrent": nn.RNNBase,
    "gains": nn.LayerNorm,
    "tied": (),
    "frozen": (),
}


class ByThreads(Vmap):
    """A sum for each thread, and one of them forgotten."""

    def bounded(self, *args):
        return altered(super().bounded(*args), lambda g: g._replace(value=g.value * (1 / torch.get_num_threads())))


@dataclass(frozen=True)
class Unmarked(Vmap):
    """Its microbatch is a part of what a run is."""

    microbatch: int | None = 4


# What is kept of private values ---------------------------------------------------------------------------


class Watching(Vmap):
    """Keeps the private loss and sum."""

    def bounded(self, *args):
        out = super().bounded(*args)
        if len(out.observed.losses):
            HIDDEN["loss"] = float(out.observed.losses.mean())
        HIDDEN["sum"] = out.releases["grad"].value.clone()
        return out


class Borrows(Vmap):
    """Keeps the private sum itself, not a copy."""

    def bounded(self, *args):
        out = super().bounded(*args)
        HIDDEN["sum"] = out.releases["grad"].value
        return out


class PrivateMomentum(Vmap):
    """Adds up clipped sums before they are noised."""

    def bounded(self, *args):
        def added(g):
            last = HIDDEN.get("sum")
            value = g.value + 0.9 * last if last is not None and last.layout == g.value.layout else g.value
            HIDDEN["sum"] = value.clone()
            return g._replace(value=value)

        return altered(super().bounded(*args), added)
