"""Fast clipping by two passes: norms without gradients, then one backward pass of the reweighted loss.

Lee and Kifer, "Scaling up differentially private deep learning with fast per-example gradient clipping"
(arXiv:2009.03106), with the rules of `harness.dp.engines.rules` in place of theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from harness.dp.clip import Clip, Flat, State
from harness.dp.engines.engine import Clipped, PerExample, group_norms
from harness.dp.engines.loop import Loop
from harness.dp.engines.rules import Gradient
from harness.dp.engines.tape import gradients, plan_for, run, untouched
from harness.dp.engines.vmap import chunk_within, plain_sum, refusal
from harness.dp.loss import Batch, Loss
from harness.dp.release import Bounded, Relation
from harness.dp.tree import Tree

AUDITED = 4  # examples taken together in an audit
SLACK = 0.02  # by how much a norm may read low before it is a fault: kinks alone make float32 norms differ by 0.5 %
AUDIT_EVERY = 16  # logical batches, for each model
_batches: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


@dataclass(frozen=True)
class Ghost(PerExample):
    """Norms from each layer's input and output gradient; then a second backward pass, weighted.

    The first pass stops at the layers' outputs and computes no weight gradient. Where a norm needs a layer's
    per-example gradients after all, because that is cheaper than its Gram matrices, they are kept and added up, and
    the second pass leaves that layer out. With several clipping groups there is no second pass, which would be one for
    each group: the weighted sums come from the tape.

    What it takes for granted, where `Vmap` and `Loop` take nothing: that entry i of every layer's input belongs to
    example i, whatever the data. A plan is tried on a few examples before it is used, and audited against the loop
    as training goes on; a model that sorts or regroups its examples by their content belongs to the other engines.
    """

    def accepts(self, loss: Loss, clip: Clip, model: nn.Module) -> str | None:
        return refusal(model)

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
    ) -> Bounded:
        if self.microbatch is None and len(batch):  # the best microbatch depends on what the plan keeps
            plan = plan_for(loss, model, w.views, batch)
            chunk = chunk_within(len(batch), batch.x.device, plan.footprints, plan.activations)
            return replace(self, microbatch=chunk).bounded(
                loss, clip, model, w, batch, state, sigma, relation
            )
        if clip.needs_norms and len(batch) and _due(model):
            with untouched(model, batch.x.device):
                audit(self, loss, model, w, batch)
        return super().bounded(loss, clip, model, w, batch, state, sigma, relation)

    def clipped_sum(
        self,
        loss: Loss,
        clip: Clip,
        groups: Mapping[str, int],
        model: nn.Module,
        w: Tree,
        batch: Batch,
        state: State,
    ) -> Clipped:
        if not clip.needs_norms:
            total, losses = plain_sum(loss, model, w, batch)
            if total.isfinite().all():
                return Clipped(w.with_flat(total), None, None, losses)
        plan = plan_for(loss, model, w.views, batch)
        leaves = {name: t.detach().requires_grad_() for name, t in w.items()}
        taped, _ = run(loss, model, leaves, batch, plan.paths, plan.copy)
        found = gradients(plan, model, w.views, taped, loss, batch)
        losses = taped.losses.detach()
        zero = losses.new_zeros(len(batch), dtype=torch.float64)
        again = max(groups.values()) == 0
        norms = group_norms({n: found[n].squares(again) if n in found else zero for n in w.names}, groups)
        weights = clip.weights(norms, state)
        good = norms.isfinite().all(1)
        if good.all():
            total = self.weighted_sum(w, groups, weights, taped.losses, leaves, found)
        else:  # weight 0 would not do: 0 * inf is not a number
            total = torch.zeros_like(w.flat)
            if good.any():
                part = self.clipped_sum(
                    loss, clip, groups, model, w, Batch(batch.x[good], batch.y[good]), state
                )
                total = part.total.flat
                if (
                    part.norms is not None and part.weights is not None
                ):  # other numbers if the model draws any
                    norms[good], weights[good] = part.norms, part.weights
        if not clip.needs_norms:
            return Clipped(w.with_flat(total), None, None, losses)
        return Clipped(w.with_flat(total), norms, weights, losses)

    def weighted_sum(
        self,
        w: Tree,
        groups: Mapping[str, int],
        weights: Tensor,
        losses: Tensor,
        leaves: Mapping[str, Tensor],
        found: Mapping[str, Gradient],
    ) -> Tensor:
        """The flat sum of all gradients, each example's weighted by `weights` [B, G]."""
        one_group = weights.shape[1] == 1
        again = [n for n in w.names if one_group and n in found and not found[n].held]
        second = {}
        if again:
            # A scalar, not a vector of losses with `weights` as its gradient, which would import all of sympy.
            reweighted = (weights[:, 0].to(losses.dtype) * losses).sum()
            second = dict(
                zip(again, torch.autograd.grad(reweighted, [leaves[n] for n in again]), strict=True)
            )
        parts = []
        for name, t in w.items():
            if name in second:
                part = second[name]
            elif name in found:
                part = found[name].weighted(weights[:, groups[name]])
            else:
                part = torch.zeros_like(t)
            parts.append(part.to(t.dtype).reshape(-1))
        return torch.cat(parts)


def _due(model: nn.Module) -> bool:
    """Whether this logical batch is audited: the first of a model, and every sixteenth from then on."""
    seen = _batches.get(model, 0)
    _batches[model] = seen + 1
    return seen % AUDIT_EVERY == 0


def audit(engine: Ghost, loss: Loss, model: nn.Module, w: Tree, batch: Batch) -> None:
    """Compare norms that the engine reads inside a batch with those of the same examples by themselves.

    Takes a few examples of the batch together, and then one of them alone by the loop. Raises RuntimeError if the norm
    reads low, for then the example could contribute more than its bound. Models that draw random numbers cannot be
    compared and are let through.
    """
    few = Batch(batch.x[:AUDITED], batch.y[:AUDITED])
    rule, groups = Flat(), dict.fromkeys(w.names, 0)
    read = engine.clipped_sum(loss, rule, groups, model, w, few, None).norms
    chosen = _batches[model] // AUDIT_EVERY % len(few)
    one = Batch(few.x[chosen : chosen + 1], few.y[chosen : chosen + 1])
    true, again = (Loop().clipped_sum(loss, rule, groups, model, w, one, None).norms for _ in range(2))
    if read is None or true is None or again is None or not torch.equal(true, again):
        return
    if not true.isfinite().all() or not read[chosen].isfinite().all():
        return
    if float(read[chosen]) < float(true) * (1 - SLACK):
        raise RuntimeError(
            f"a gradient of norm {float(true):.6g} reads {float(read[chosen]):.6g} inside a batch: the model regroups"
            " its examples by their content, or uses parameters where no layer shows it. Use the engine Vmap or Loop"
        )
