"""What the engines that read a tape share: the pass, the norms, the weights, and the sum from the same tape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from harness.dp.clip import Clip, State
from harness.dp.engines.audit import audit
from harness.dp.engines.audit import unaudited as unaudited
from harness.dp.engines.engine import SPEED, Clipped, PerExample, Used, group_norms, laid_out
from harness.dp.engines.loop import Loop
from harness.dp.engines.rows import full_precision
from harness.dp.engines.survey import NoProbe
from harness.dp.engines.taped.gradients import Gradient
from harness.dp.engines.taped.plan import Plan, gradients
from harness.dp.engines.taped.trial import plan_for
from harness.dp.engines.vmap import Vmap, chunk_within, plain_sum, refusal
from harness.dp.engines.weights import held
from harness.dp.loss import Batch, Loss
from harness.dp.release import Bounded, Relation
from harness.dp.tree import Tree


@dataclass(frozen=True)
class Taped(PerExample):
    """One forward pass, one backward pass to the layers' outputs; norms from what the tape holds.

    What it takes for granted, where `Vmap` and `Loop` take nothing: that entry i of every layer's input belongs to
    example i, whatever the data. A plan is tried on a few examples before it is used, and audited against the loop
    as training goes on; a model that sorts or regroups its examples by their content belongs to the other engines.

    `channels_last`: lay images out with channels last, which some networks are faster with.
    """

    channels_last: bool = field(default=False, metadata=SPEED)

    lean: ClassVar[bool] = False  # whether norms are taken in the way that needs less memory

    def accepts(self, loss: Loss, clip: Clip, model: nn.Module) -> str | None:
        return super().accepts(loss, clip, model) or refusal(model)

    def planned(self, loss: Loss, model: nn.Module, w: Tree, batch: Batch) -> Plan | None:
        """The plan for a batch; None where none of its examples has a finite gradient, so that nothing can be tried."""
        try:
            return plan_for(loss, model, w.views, batch)
        except NoProbe:
            return None

    def chunk(self, loss: Loss, model: nn.Module, w: Tree, batch: Batch) -> int:
        plan = self.planned(loss, model, w, batch) or Plan()  # the best microbatch depends on what it keeps
        kept = plan.lean if self.lean else plan.footprints
        within = chunk_within(len(batch), batch.x.device, kept, plan.activations)
        return self.microbatch or within

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
        # Cutting coordinates, and several rows, need each example's own gradient; tapes hold rows and layers.
        if clip.cuts_coordinates or loss.rows > 1:
            rows = Vmap(self.microbatch)
            return rows.bounded(loss, clip, model, w, batch, state, sigma, relation, step)
        return super().bounded(loss, clip, model, w, batch, state, sigma, relation, step)

    def inspect(self, used: Used) -> None:
        plan = self.planned(used.loss, used.model, used.w, used.batch)
        if plan is not None:
            audit(self, used, bool(plan.random))

    def clipped_sum(
        self, loss: Loss, clip: Clip, groups: Mapping[str, int], model: nn.Module, w: Tree, batch: Batch, state: State
    ) -> Clipped:
        if not clip.needs_norms:
            total, losses = plain_sum(loss, model, w, batch)
            if total.isfinite().all():
                return Clipped(w.with_flat(total), None, None, losses)
        plan = self.planned(loss, model, w, batch)
        if plan is None:
            return Loop().clipped_sum(loss, clip, groups, model, w, batch, state)
        values, batch = laid_out(w, batch, self.channels_last)
        device = batch.x.device
        with held(model, values) as leaves:
            taped = plan.run(loss, model, leaves, batch)
            losses = taped.losses.detach()
            with full_precision(device):
                found = gradients(plan, model, w.views, taped, loss, batch)
                norms = group_norms({n: found[n].squares(self.lean) for n in w.names if n in found}, groups, losses)
                weights = clip.weights(norms, state)
                finite = norms.isfinite().all(1)
                if finite.all():
                    total = self.weighted_sum(w, groups, weights, found)
                else:
                    total = self.finite_sum(w, groups, weights, found, finite)
        if not clip.needs_norms:
            return Clipped(w.with_flat(total), None, None, losses)
        return Clipped(w.with_flat(total), norms, weights, losses)

    def finite_sum(
        self, w: Tree, groups: Mapping[str, int], weights: Tensor, found: Mapping[str, Gradient], finite: Tensor
    ) -> Tensor:
        """The flat weighted sum over the examples that are `finite` [B]. Weight 0 would not do: 0 * inf is no number.

        From the same tape. Another pass would draw other random numbers, and one example would move all others.
        """
        chosen = finite.nonzero().squeeze(1)
        if not len(chosen):
            return torch.zeros_like(w.flat, dtype=torch.float64)
        rest = {name: gradient.kept(chosen) for name, gradient in found.items()}
        return self.weighted_sum(w, groups, weights[chosen], rest)

    def weighted_sum(
        self, w: Tree, groups: Mapping[str, int], weights: Tensor, found: Mapping[str, Gradient]
    ) -> Tensor:
        """The flat sum of all gradients, each example's weighted by `weights` [B, G]."""
        total = torch.empty_like(w.flat, dtype=torch.float64)
        columns = weights.double().unbind(1)
        for name, out in w.layout.views(total).items():
            if name in found:
                found[name].weighted(columns[groups[name]], out)
            else:
                out.zero_()
        return total
