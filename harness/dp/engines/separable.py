"""Whether the gradient of a batch is the sum of its examples' own, whatever they are weighed by."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from harness.dp.loss import Batch

# Batches that are tried: a batch with its weights, with their opposites, its opposite, and others. What turns gradients
# by the sign of a sum over the batch, of gradients or of inputs, turns one of the first three.
DRAWS = 4

# The share of the whole, squared, that a parameter's gradient may be wrong by, times the tolerance. What is zero but
# for rounding, like the gradient of a bias before a normalisation, has no relative accuracy.
SMALL = 1 / 400


def mixed(
    values: Callable[[Batch], Tensor],
    leaves: Mapping[str, Tensor],
    batch: Batch,
    tolerance: float,
    size: int = 1,
    draws: int = DRAWS,
) -> str | None:
    """The first parameter whose gradient of weighted `values` [B] is not the sum of those of `size` examples each.

    None where there is none. Norms and outputs may be right all the same: a hook that turns gradients by the sign of
    their sum over a batch leaves both alone. The batch is tried as it is and varied, with random weights. `tolerance`
    is relative to what a parameter's gradients amount to. A gradient that is rounding beside the values says nothing.
    """
    rng = torch.Generator().manual_seed(0)
    each = list(leaves.values())

    weights = math.sqrt(sum(float(p.detach().double().square().sum()) for p in each)) or 1.0
    negligible = 0.0

    def gradients(few: Batch, c: Tensor) -> list[Tensor]:
        nonlocal negligible
        found = values(few)
        total = (found * c).sum()
        size = float((found.detach() * c).abs().sum())
        negligible = max(negligible, 1e3 * torch.finfo(found.dtype).eps * size / weights)
        grads = torch.autograd.grad(total, each, allow_unused=True, materialize_grads=True)
        return [g.detach().double().cpu() for g in grads]

    few, c = batch, torch.randn(len(batch), generator=rng).to(batch.x.device)
    for k in range(draws):
        if k == 1:
            c = -c
        elif k:
            few = Batch(-few.x, few.y) if k == 2 and continuous(few.x) else varied(batch, rng)
            c = torch.randn(len(few), generator=rng).to(few.x.device)
        together = gradients(few, c)
        parts = [gradients(Batch(*one), own) for *one, own in zip(*(t.split(size) for t in (*few, c)), strict=True)]
        sums = [sum(own[1:], own[0]) for own in zip(*parts, strict=True)]
        scales = [sum(float(g.square().sum()) for g in own) for own in zip(*parts, strict=True)]
        # A kink, or a number beyond all others, says nothing.
        if not math.isfinite(sum(scales)):
            continue
        for name, a, b, scale in zip(leaves, together, sums, scales, strict=True):
            allowed = tolerance**2 * (scale + SMALL * sum(scales)) + negligible**2
            if not float((a - b).square().sum()) <= allowed:
                return name
    return None


def continuous(x: Tensor) -> bool:
    """Whether inputs are numbers that may be scaled: no tokens, also where these are held as floats."""
    return x.is_floating_point() and not bool((x == x.round()).all())


def varied(batch: Batch, rng: torch.Generator) -> Batch:
    """Other examples: turned, stretched and in another order with their labels, or made of each other's tokens."""
    order = torch.randperm(len(batch), generator=rng).to(batch.x.device)
    x = batch.x[order]
    if continuous(x):
        factors = torch.randn(len(x), generator=rng).to(x)
        return Batch(x * factors.view(-1, *(1,) * (x.ndim - 1)), batch.y[order])
    other = batch.x[torch.randperm(len(batch), generator=rng).to(x.device)]
    taken = (torch.rand(x.shape, generator=rng) < 0.5).to(x.device)
    return Batch(torch.where(taken, x, other), batch.y[order])
