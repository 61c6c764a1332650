"""Engines with a planted fault: in the norms and gradients that they compute, or in what they keep of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from harness.dp import Batch, Flat, Vmap
from harness.dp.engines.whole import Whole
from harness.verify.faults import HIDDEN
from harness.verify.faults.engines import Naive, ViewByView, altered


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
