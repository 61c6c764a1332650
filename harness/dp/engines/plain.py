"""The ordinary backward pass, for training without privacy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from harness.dp.clip import Clip, State
from harness.dp.engines.engine import SPEED, Clipped, PerExample, Unserved, laid_out, losses_of
from harness.dp.engines.weights import held
from harness.dp.loss import Batch, Loss
from harness.dp.tree import Tree


@dataclass(frozen=True)
class Plain(PerExample):
    """One backward pass of the summed loss: what a step costs when nobody clips. Serves only rules without norms.

    `channels_last`: lay images out with channels last, which some networks are faster with.
    """

    channels_last: bool = field(default=False, metadata=SPEED)

    def chunk(self, loss: Loss, model: nn.Module, w: Tree, batch: Batch) -> int:
        return len(batch) if loss.coupled else super().chunk(loss, model, w, batch)

    def accepts(self, loss: Loss, clip: Clip, model: nn.Module) -> str | None:
        return (
            f"{type(clip).__name__} clips each example, and one plain backward pass cannot"
            if clip.needs_norms
            else None
        )

    def clipped_sum(
        self, loss: Loss, clip: Clip, groups: Mapping[str, int], model: nn.Module, w: Tree, batch: Batch, state: State
    ) -> Clipped:
        if reason := self.accepts(loss, clip, model):
            raise Unserved(reason)
        values, batch = laid_out(w, batch, self.channels_last)
        with held(model, values) as leaves:
            losses = losses_of(loss, model, batch)
            grads = torch.autograd.grad(losses.sum(), list(leaves.values()), allow_unused=True, materialize_grads=True)
        total = torch.cat([g.reshape(-1) for g in grads])
        return Clipped(w.with_flat(total), None, None, losses.detach())
