"""The naive way to a private loss that couples its examples: the gradient of the whole batch, clipped as one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from harness.dp.clip import Clip, State
from harness.dp.engines.engine import Engine, Unserved, losses_of, trainable
from harness.dp.engines.memory import refuse_memory_once
from harness.dp.engines.rows import squared_norms
from harness.dp.engines.weights import held
from harness.dp.loss import Batch, Loss
from harness.dp.release import Bounded, Observed, Relation, Release
from harness.dp.tree import Layout, Tree


def refusal(clip: Clip, model: nn.Module) -> str | None:
    """Why `clip` cannot bound single vectors by their norm: groups, side releases, cut coordinates or other units."""
    layout = Layout.of(trainable(model))
    name = type(clip).__name__
    if clip.cuts_coordinates:
        return f"{name} cuts coordinates off, and here there are norms alone"
    if max(clip.groups(layout).values(), default=0) or clip.scale(layout, clip.init(layout)) is not None:
        return f"{name} clips several groups of parameters, and here there is one"
    if set(clip.split(min(1.0, clip.ceiling / 2))) != {"grad"}:
        return f"{name} releases more than a gradient, with a sensitivity that holds for sums over examples"
    return None


@dataclass(frozen=True)
class Whole(Engine):
    """Clips the gradient of the batch's summed loss to C, as one vector.

    Whatever one example does, the vector stays within the ball of radius C, and it may go from any point of it to any
    other: the sensitivity is 2C, whether examples are added, removed or replaced. (C alone, as public code has it,
    holds only between a vector and nothing.) A batch has one gradient, so that more examples lower no noise.
    """

    def accepts(self, loss: Loss, clip: Clip, model: nn.Module) -> str | None:
        return refusal(clip, model)

    def bounded(
        self,
        loss: Loss,
        clip: Clip,
        model: nn.Module,
        w: Tree,
        batch: Batch,
        state: State,
        sigma: float,
        relation: Relation,
        step: int = 0,
    ) -> Bounded:
        if reason := self.accepts(loss, clip, model):
            raise Unserved(reason)
        total, losses = torch.zeros_like(w.flat, dtype=torch.float64), w.flat.new_zeros(0)
        clipped = bad = torch.zeros((), dtype=torch.long, device=w.flat.device)
        if len(batch):
            refuse_memory_once(loss, model, w.views, batch)
            with held(model, w.views) as own:
                losses = losses_of(loss, model, batch)
                grads = torch.autograd.grad(losses.sum(), list(own.values()), allow_unused=True, materialize_grads=True)
            g, losses = torch.cat([g.reshape(-1) for g in grads]), losses.detach()
            norm = squared_norms(g[None]).sqrt()
            if norm.isfinite():  # else nothing is released: 0 * inf is not a number
                weight = clip.weights(norm[:, None], state)[0, 0]
                total, clipped = g.double() * weight, (weight < 1).long() * len(batch)
            else:
                bad = bad + len(batch)
        bound = 2 * clip.sensitivity(state, Relation.ADD_OR_REMOVE)
        release = Release(w.with_flat(total), bound, clip.split(sigma)["grad"])
        return Bounded({"grad": release}, Observed(losses, None, clipped, bad, "Whole"))
