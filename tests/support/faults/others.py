"""Losses, optimizers and paths with a planted fault."""

from __future__ import annotations

import math

import torch
from dp_accounting import GaussianDpEvent

from harness.dp import SGD, Batch, CrossEntropy, Path
from harness.verify.faults import HIDDEN

# Losses ---------------------------------------------------------------------------------------------------


class Balanced(CrossEntropy):
    """Weighs classes by the labels seen so far."""

    def prepare(self, batch, rng):
        seen = HIDDEN.get("labels", torch.ones(3, dtype=torch.float64))
        HIDDEN["labels"] = 0.9 * seen + 0.1 * torch.bincount(batch.y, minlength=3)
        return batch

    def per_example(self, outputs, y):
        return super().per_example(outputs, y) / (HIDDEN["labels"][y] + 0.1)


class Mixup(CrossEntropy):
    """Mixes examples before they are clipped."""

    def prepare(self, batch, rng):
        return Batch(0.7 * batch.x + 0.3 * batch.x[rng.permutation(len(batch))], batch.y)


class Doubled(CrossEntropy):
    """Makes two examples of one."""

    def prepare(self, batch, rng):
        return Batch(batch.x.repeat_interleave(2, 0), batch.y.repeat_interleave(2))


# Optimizers; what an engine of `engines` kept of the private values is in `HIDDEN` ------------------------


class UsesSum(SGD):
    """Steps along the private sum that the engine kept."""

    def update(self, g, state, w):
        return w - self.lr * (g * 0.001 + HIDDEN["sum"] / 16), None


class RemembersSum(SGD):
    """Leaves the weights alone and keeps the private sum in its state."""

    def update(self, g, state, w):
        return super().update(g, None, w)[0], HIDDEN["sum"]


class Warming(SGD):
    """Counts its steps outside its state: a run that is continued starts anew."""

    def init(self, w, steps):
        HIDDEN["calls"] = 0
        return super().init(w, steps)

    def update(self, g, state, w):
        HIDDEN["calls"] += 1
        return super().update(g * (1 / HIDDEN["calls"]), state, w)


class Plateau(SGD):
    """Halves the learning rate once the private loss has not improved for ten steps."""

    def init(self, w, steps):
        HIDDEN.update(best=math.inf, bad=0, lr=self.lr, loss=0.0)

    def update(self, g, state, w):
        HIDDEN["bad"] = 0 if HIDDEN["loss"] < HIDDEN["best"] else HIDDEN["bad"] + 1
        HIDDEN["best"] = min(HIDDEN["best"], HIDDEN["loss"])
        if HIDDEN["bad"] >= 10:
            HIDDEN.update(bad=0, lr=HIDDEN["lr"] / 2)
        return w - HIDDEN["lr"] * g, None


class LateMomentum(SGD):
    """Mixes in private gradients after the hundredth step."""

    def init(self, w, steps):
        return {"t": 0}

    def update(self, g, state, w):
        g = g * 0.9 + HIDDEN["sum"] / 160 if state["t"] > 100 else g
        return w - self.lr * g, {"t": state["t"] + 1}


# Paths ----------------------------------------------------------------------------------------------------


class Drift(Path):
    """Moves the weights by itself."""

    def base(self, w, state, rng):
        return w * 1.001


class BestByLoss(Path):
    """Hands out the weights of the least private loss."""

    def init(self, w):
        HIDDEN.update(least=math.inf, kept=w)

    def after(self, old, new, g, state):
        if HIDDEN["loss"] < HIDDEN["least"]:
            HIDDEN.update(least=HIDDEN["loss"], kept=old)

    def kept(self, w, state):
        return HIDDEN["kept"]


class Discount(Path):
    """Charges for ten times the noise."""

    def amend(self, event):
        return GaussianDpEvent(10 * event.noise_multiplier) if isinstance(event, GaussianDpEvent) else event


class DiscountsLarge(Path):
    """Charges less where the multiplier is large."""

    def amend(self, event):
        large = isinstance(event, GaussianDpEvent) and event.noise_multiplier > 3
        return GaussianDpEvent(1.5 * event.noise_multiplier) if large else event
