"""ModelMix: step from a random point between the last two iterates (Xiao, Wan, Devadas 2023, arXiv:2210.03843)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from harness.dp.claim import Assumption, Claim, Run
from harness.dp.clip.refined import Refined
from harness.dp.mixture import amplified
from harness.dp.optimizer import SGD
from harness.dp.path.straight import Path
from harness.dp.random import Stream
from harness.dp.sampler import Poisson
from harness.dp.tree import Tree


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
    The gradient is taken at the unmixed iterate. The state holds the last iterate and the narrowest interval so far.
    """

    gap: float = 0.01

    def __post_init__(self) -> None:
        if not self.gap > 0:
            raise ValueError(f"gap must be positive, and is {self.gap}: without one nothing is mixed")

    def init(self, w: Tree) -> dict[str, Any]:
        return {"previous": w, "narrowest": torch.full_like(w.flat[:1], torch.inf)}

    def base(self, w: Tree, state: dict[str, Any], rng: Stream) -> Tree:
        low, high = self.interval(w, state["previous"])
        alpha = rng.uniform(len(low)).to(low)
        return w.with_flat(low + alpha * (high - low))

    def after(self, old: Tree, new: Tree, g: Tree, state: dict[str, Any]) -> dict[str, Any]:
        low, high = self.interval(old, state["previous"])
        return {"previous": old, "narrowest": torch.minimum(state["narrowest"], (high - low).amin())}

    def interval(self, w: Tree, previous: Tree) -> tuple[torch.Tensor, torch.Tensor]:
        """The lower and the upper ends of the intervals [numel] that the base is drawn from."""
        middle = (w.flat + previous.flat) / 2
        half = (w.flat - previous.flat).abs_().clamp_(min=self.gap) / 2
        return middle - half, middle + half

    def claim(self, run: Run, state: dict[str, Any]) -> Claim:
        """The amplified epsilon of methods that release iterates only, by the analysis of `harness.dp.mixture`."""
        m, optimizer = run.method, run.method.optimizer
        plain = isinstance(optimizer, SGD) and not optimizer.momentum
        refined = isinstance(m.clip, Refined)
        narrowest = float(state["narrowest"])
        assumptions = (
            Assumption(
                "no optimizer state made of noisy gradients", plain,
                "" if plain else f"{optimizer} carries past gradients into later steps: take SGD without momentum",
            ),
            Assumption(
                "every coordinate is drawn from an interval", narrowest > 0,
                f"the narrowest measured {narrowest:.4g} in units of weights, {self.gap:.4g} were asked for",
            ),
            Assumption(
                "contributions are bounded on each coordinate", refined,
                "" if refined else f"{type(m.clip).__name__} bounds the length alone: clip by Refined",
            ),
            Assumption(
                "one Poisson draw a step", type(m.sampler) is Poisson, f"{type(m.sampler).__name__} sampling"
            ),
            Assumption(
                "sums are divided by a public number", m.sampler.denominator(run.n, run.batch) == run.batch,
                f"{m.sampler.denominator(run.n, run.batch)}, of an expected batch of {run.batch}",
            ),
            Assumption(
                "nothing but iterates, and functions of them, is released",
                list(m.clip.split(run.sigma)) == ["grad"],
                "records hold accuracies and the last weights; checkpoints and seeds are to be kept secret",
            ),
            Assumption("no worse pair of data sets than one whose gradients differ evenly on 1 / share^2 coordinates",
                       None, "taken from the authors' accountant; not proved here"),
        )  # fmt: skip
        bound = float("inf")
        if plain and refined and narrowest > 0 and isinstance(optimizer, SGD) and isinstance(m.clip, Refined):
            bound = amplified(
                sigma=run.sigma, clip=m.clip.clip, share=m.clip.share, batch=run.batch, n=run.n, steps=run.steps,
                delta=run.delta, tau=min(self.gap, narrowest) / optimizer.lr,
            )  # fmt: skip
        return Claim(bound, "arXiv:2210.03843, the accountant of its code", assumptions)
