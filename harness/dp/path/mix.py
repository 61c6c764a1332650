"""ModelMix: step from a random point between the last two iterates (Xiao, Wan, Devadas 2023, arXiv:2210.03843)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from harness.dp.account.mixture import amplified, worst
from harness.dp.claim import Assumption, Claim, Run
from harness.dp.clip.refined import Refined
from harness.dp.noise import Gaussian
from harness.dp.optimizer import SGD
from harness.dp.path.straight import Path
from harness.dp.random import Stream
from harness.dp.sampler import Poisson
from harness.dp.tree import Tree

RESOLVED = 64  # steps of a number format that an interval must span for a draw from it to pass for uniform


@dataclass(frozen=True)
class Midpoint(Path):
    """Step from the middle between the last two iterates: what mixing does on average, without its randomness."""

    def init(self, w: Tree) -> dict[str, Any]:
        return {"previous": w}

    def base(self, w: Tree, state: dict[str, Any], rng: Stream) -> Tree:
        return w.with_flat(w.flat.lerp(state["previous"].flat, 0.5))

    def after(self, old: Tree, new: Tree, g: Tree, state: dict[str, Any]) -> dict[str, Any]:
        return {"previous": old}


@dataclass(frozen=True)
class Mix(Path):
    """Step from alpha * a + (1 - alpha) * b, alpha uniform in [0, 1] and drawn afresh for each coordinate.

    a and b are the last two iterates, pushed apart symmetrically to a distance of `gap` on every coordinate where they
    are nearer (at the first step they coincide). `gap` is in units of weights: the paper's tau times the learning rate.
    The gradient is taken at the unmixed iterate. The state holds the last iterate, the narrowest interval so far, which
    is 0 where the number format has too few values in it, and the widest spacing of that format at any weight.
    """

    gap: float = 0.01

    def __post_init__(self) -> None:
        if not self.gap > 0:
            raise ValueError(f"gap must be positive, and is {self.gap}: without one nothing is mixed")

    def init(self, w: Tree) -> dict[str, Any]:
        none = w.flat[:1]
        return {"previous": w, "narrowest": torch.full_like(none, torch.inf), "coarsest": torch.zeros_like(none)}

    def base(self, w: Tree, state: dict[str, Any], rng: Stream) -> Tree:
        low, high = self.interval(w, state["previous"])
        alpha = rng.uniform(len(low)).to(low)
        return w.with_flat(low + alpha * (high - low))

    def after(self, old: Tree, new: Tree, g: Tree, state: dict[str, Any]) -> dict[str, Any]:
        low, high = self.interval(old, state["previous"])
        width, spacing = high - low, torch.finfo(low.dtype).eps * torch.maximum(low.abs(), high.abs())
        drawn = torch.where(width < RESOLVED * spacing, 0.0, width)
        return {
            "previous": old,
            "narrowest": torch.minimum(state["narrowest"], drawn.amin()),
            "coarsest": torch.maximum(state["coarsest"], spacing.amax()),
        }

    def interval(self, w: Tree, previous: Tree) -> tuple[torch.Tensor, torch.Tensor]:
        """The lower and the upper ends of the intervals [numel] that the base is drawn from."""
        middle = (w.flat + previous.flat) / 2
        half = (w.flat - previous.flat).abs_().clamp_(min=self.gap) / 2
        return middle - half, middle + half

    def claim(self, run: Run, state: dict[str, Any]) -> Claim:
        """The amplified epsilon of methods that release iterates only, by the analysis of
        `harness.dp.account.mixture`."""
        m, narrowest = run.method, float(state["narrowest"])
        clip, optimizer = m.clip, m.optimizer
        plain = type(optimizer) is SGD and not optimizer.momentum and optimizer.lr > 0
        refined, gaussian = type(clip) is Refined, type(m.noise) is Gaussian and run.sigma > 0
        denominator = m.sampler.denominator(run.n, run.batch)
        bound, excess = math.inf, None
        deviation, spacing = 0.0, float(state["coarsest"])
        if plain and refined and gaussian and narrowest > 0 and run.batch > 0:
            assert isinstance(optimizer, SGD) and isinstance(clip, Refined)
            deviation = optimizer.lr * run.sigma * clip.clip / denominator
            kept = abs(1 - optimizer.lr * optimizer.weight_decay)  # of the width: the mixed base decays
            measured = math.floor(min(1.0, narrowest / self.gap) * 100) / 100  # in whole percents all seeds agree
            tau = self.gap * measured * kept / optimizer.lr
            noise = dict(sigma=run.sigma, clip=clip.clip, share=clip.share, batch=run.batch, tau=tau)  # noqa: C408
            bound = amplified(n=run.n, steps=run.steps, delta=run.delta, **noise)
            excess = worst(**noise) - 1
        assumptions = (
            Assumption(
                "no optimizer state made of noisy gradients", plain,
                "" if plain else f"{optimizer}: only SGD without momentum, at one learning rate above 0, is analysed",
            ),
            Assumption(
                "every coordinate is drawn from an interval", narrowest > 0,
                f"the narrowest measured {narrowest:.4g} in units of weights, {self.gap:.4g} were asked for"
                + ("" if narrowest > 0 else f"; one of less than {RESOLVED} steps of its number format counts as 0"),
            ),
            Assumption(
                "contributions are bounded on each coordinate", refined,
                "" if refined else f"{type(clip).__name__} clipping: only Refined is analysed",
            ),
            Assumption("Gaussian noise", gaussian, f"{type(m.noise).__name__}, noise multiplier {run.sigma:.6g}"),
            Assumption(
                "the number format resolves the noise on weights",
                deviation > RESOLVED * spacing if deviation else None,
                f"its deviation is {deviation:.4g}, and neighbouring numbers are up to {spacing:.4g} apart",
            ),
            Assumption(
                "one Poisson draw a step", type(m.sampler) is Poisson, f"{type(m.sampler).__name__} sampling"
            ),
            Assumption(
                "sums are divided by a public number", denominator == run.batch,
                f"{denominator}, of an expected batch of {run.batch}",
            ),
            Assumption(
                "nothing but iterates, and functions of them, is released",
                None if list(clip.split(run.sigma)) == ["grad"] else False,
                "accuracies and the last weights are; losses, checkpoints and seeds are to be kept secret",
            ),
            Assumption(
                "no worse pair of data sets than one whose gradients differ evenly on 1 / share^2 coordinates",
                None if excess is None or excess <= 1e-6 else False,
                "taken from the authors' accountant, not proved" + (
                    "" if excess is None else
                    "; no smaller shift and no wider interval on a grid costs more" if excess <= 1e-6 else
                    f"; a smaller shift or a wider interval costs {excess:.3g} of it more"
                ),
            ),
        )  # fmt: skip
        return Claim(bound, "arXiv:2210.03843, the accountant of its code", assumptions)
