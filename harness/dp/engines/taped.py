"""What the engines that read gradients off a tape share: the pass, the norms, the weights, and an audit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from harness.dp.clip import Clip, Flat, State
from harness.dp.engines.engine import SPEED, Clipped, PerExample, group_norms, laid_out
from harness.dp.engines.gradients import Gradient
from harness.dp.engines.loop import Loop
from harness.dp.engines.plan import gradients, plan_for, untouched, watching
from harness.dp.engines.rows import full_precision
from harness.dp.engines.tape import Run
from harness.dp.engines.vmap import Vmap, chunk_within, plain_sum, refusal
from harness.dp.loss import Batch, Loss
from harness.dp.release import Bounded, Relation
from harness.dp.tree import Tree

AUDITED = 4  # examples taken together in an audit
SLACK = 0.02  # by how much a norm may read low before it is a fault: kinks alone make float32 norms differ by 0.5 %
FAINT = 1e-12  # the squares of shorter gradients vanish in float32: they read low, and no rule weighs them up
AUDIT_EVERY = 128  # logical batches, for each model; more often at first
_batches: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


@dataclass(frozen=True)
class Taped(PerExample):
    """One forward pass, one backward pass to the layers' outputs; norms from what the tape holds.

    What it takes for granted, where `Vmap` and `Loop` take nothing: that entry i of every layer's input belongs to
    example i, whatever the data. A plan is tried on a few examples before it is used, and audited against the loop
    as training goes on; a model that sorts or regroups its examples by their content belongs to the other engines.

    `channels_last`: lay images out with channels last, which some networks are faster with.
    """

    channels_last: bool = field(default=False, metadata=SPEED)

    second_pass: ClassVar[bool] = False  # whether gradients that are not held cost another backward pass

    def accepts(self, loss: Loss, clip: Clip, model: nn.Module) -> str | None:
        return super().accepts(loss, clip, model) or refusal(model)

    def chunk(self, loss: Loss, model: nn.Module, w: Tree, batch: Batch) -> int:
        plan = plan_for(loss, model, w.views, batch)  # the best microbatch depends on what the plan keeps
        within = chunk_within(len(batch), batch.x.device, plan.footprints, plan.activations)
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
        if (
            clip.cuts_coordinates or loss.rows > 1
        ):  # needs each example's own gradient; tapes hold rows and layers
            rows = Vmap(self.microbatch)
            return rows.bounded(loss, clip, model, w, batch, state, sigma, relation, step)
        if clip.needs_norms and len(batch) and _due(model):
            with untouched(model, batch.x.device):
                audit(self, loss, model, w, batch)
        return super().bounded(loss, clip, model, w, batch, state, sigma, relation, step)

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
        leaves, batch = laid_out(w, batch, self.channels_last)
        device = batch.x.device
        with full_precision(device, self.second_pass):  # two passes must agree to the last bit that counts
            taped = plan.run(loss, model, leaves, batch, self.second_pass)
        losses, again = taped.losses.detach(), self.second_pass and max(groups.values()) == 0
        with full_precision(device):
            found = gradients(plan, model, w.views, taped, loss, batch)
            norms = group_norms({n: found[n].squares(again) for n in w.names if n in found}, groups, losses)
            weights = clip.weights(norms, state)
            total = self.weighted_sum(w, groups, weights, taped, leaves, found)
        finite = norms.isfinite()
        if not finite.all():  # weight 0 does not do: 0 * inf is not a number
            total, good = torch.zeros_like(w.flat), finite.all(1)
            if good.any():
                rest = Batch(batch.x[good], batch.y[good])
                part = self.clipped_sum(loss, clip, groups, model, w, rest, state)
                total = part.total.flat
                if (
                    part.norms is not None and part.weights is not None
                ):  # others, if the model draws random numbers
                    norms[good], weights[good] = part.norms, part.weights
        if not clip.needs_norms:
            return Clipped(w.with_flat(total), None, None, losses)
        return Clipped(w.with_flat(total), norms, weights, losses)

    def weighted_sum(
        self,
        w: Tree,
        groups: Mapping[str, int],
        weights: Tensor,
        taped: Run,
        leaves: Mapping[str, Tensor],
        found: Mapping[str, Gradient],
    ) -> Tensor:
        """The flat sum of all gradients, each example's weighted by `weights` [B, G]."""
        total = torch.empty_like(w.flat)
        columns = weights.to(w.flat.dtype).unbind(1)
        for name, out in w.layout.views(total).items():
            if name in found:
                found[name].weighted(columns[groups[name]], out)
            else:
                out.zero_()
        return total


def _due(model: nn.Module) -> bool:
    """Whether this logical batch is audited: a model's first, second, fourth and so on, and then every 128th.

    An audit costs three small passes: at every sixteenth batch they would be a quarter of a small network's time.
    """
    seen = _batches.get(model, 0)
    _batches[model] = seen + 1
    return seen % AUDIT_EVERY == 0 or (seen < AUDIT_EVERY and seen & (seen - 1) == 0)


@contextmanager
def unaudited(model: nn.Module) -> Iterator[None]:
    """Batches that do not count among those that audits are spread over."""
    seen = _batches.get(model, 0)
    _batches[model] = AUDIT_EVERY + 1  # the next audit is far
    try:
        yield
    finally:
        _batches[model] = seen


def audit(engine: Taped, loss: Loss, model: nn.Module, w: Tree, batch: Batch) -> None:
    """Compare norms that the engine reads inside a batch with those of the same examples by themselves.

    Takes a few examples of the batch together, and then one of them alone by the loop. Raises RuntimeError if the norm
    reads low, for then the example could contribute more than its bound. Models that draw random numbers cannot be
    compared and are let through.
    """
    few = Batch(batch.x[:AUDITED], batch.y[:AUDITED])
    rule, groups = Flat(), dict.fromkeys(w.names, 0)
    read = engine.clipped_sum(loss, rule, groups, model, w, few, None).norms
    seen = _batches[model]
    chosen = (seen.bit_length() + seen // AUDIT_EVERY) % len(few)  # another one each time
    one = Batch(few.x[chosen : chosen + 1], few.y[chosen : chosen + 1])
    random: set[str] = set()
    with watching(model, random):
        true = Loop().clipped_sum(loss, rule, groups, model, w, one, None).norms
    if random or read is None or true is None:
        return
    if not true.isfinite().all() or not read[chosen].isfinite().all():
        return
    if float(true) > FAINT and float(read[chosen]) < float(true) * (1 - SLACK):
        raise RuntimeError(
            f"a gradient of norm {float(true):.6g} reads {float(read[chosen]):.6g} inside a batch: the model regroups"
            " its examples by their content, or uses parameters where no layer shows it. Use the engine Vmap or Loop"
        )
