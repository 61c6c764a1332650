"""Fast clipping by two passes: norms without gradients, then one backward pass of the reweighted loss.

Lee and Kifer, "Scaling up differentially private deep learning with fast per-example gradient clipping"
(arXiv:2009.03106), with the rules of `harness.dp.engines.rules` in place of theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from harness.dp.engines.audit import audit
from harness.dp.engines.bookkeeping import BookKeeping
from harness.dp.engines.draws import rewind
from harness.dp.engines.engine import Unserved, Used
from harness.dp.engines.gradients import Gradient, Outer, Patches, scaled
from harness.dp.engines.rows import factor_squares, sum_type
from harness.dp.engines.survey import untouched
from harness.dp.engines.taped import Second, Taped
from harness.dp.loss import Batch
from harness.dp.tree import Tree


@dataclass(frozen=True)
class Ghost(Taped):
    """Norms from each layer's input and output gradient; then a second backward pass, weighted.

    The first pass stops at the layers' outputs and computes no weight gradient. Where a norm needs a layer's
    per-example gradients after all, because that is cheaper than its Gram matrices, they are kept and added up, and
    the second pass leaves that layer out. With several clipping groups there is no second pass, which would be one for
    each group: the weighted sums come from the tape.
    """

    second_pass: ClassVar[bool] = True

    def inspect(self, used: Used) -> None:
        plan = self.planned(used.loss, used.model, used.w, used.batch)
        if plan is not None and audit(self, used, bool(plan.random)):
            passes_agree(self, used)

    def weighted_sum(
        self,
        w: Tree,
        groups: Mapping[str, int],
        weights: Tensor,
        found: Mapping[str, Gradient],
        second: Second | None = None,
    ) -> Tensor:
        # A second pass adds up in the type of the weights.
        if second is None or weights.shape[1] > 1 or sum_type(w.flat.dtype) is not w.flat.dtype:
            return super().weighted_sum(w, groups, weights, found)
        plan = second.plan
        spread = {name for path in plan.spread for name in plan.rules.get(path, {}).values()}
        again = {
            n: g for n, g in found.items() if type(g) in (Outer, Patches) and g.whole and n not in spread
        }
        rest = {name: gradient for name, gradient in found.items() if name not in again}
        total = super().weighted_sum(w, groups, weights, rest)
        if not again:
            return total
        ends = [get_gradient_edge(second.leaves[name]) for name in again]
        ends += [edge for call in second.taped.edges for edge in call if edge is not None]
        # A scalar, not a vector of losses with `weights` as its gradient, which would import all of sympy.
        reweighted = ((weights[:, 0] * LIFT).to(second.taped.losses.dtype) * second.taped.losses).sum()
        parts = torch.autograd.grad(reweighted, ends, allow_unused=True)
        parts, passed = parts[: len(again)], iter(parts[len(again) :])
        cotangents = [
            [None if edge is None else next(passed) for edge in call] for call in second.taped.edges
        ]
        rules = {
            path: names for path, names in plan.rules.items() if not again.keys().isdisjoint(names.values())
        }
        reread = second.reread(replace(plan, rules=rules, modules={}, whole=()), cotangents)
        if not all(part.sum().isfinite() for part in parts) or strays(weights[:, 0], again, reread):
            return super().weighted_sum(w, groups, weights, found)
        views = w.layout.views(total)
        for name, part in zip(again, parts, strict=True):
            torch.div(part, LIFT, out=views[name])
        return total


def strays(v: Tensor, measured: Mapping[str, Gradient], weighed: Mapping[str, Gradient]) -> bool:
    """Whether a second pass may have added something else than was measured, times its weight `v` [B].

    Where the way back through the layers cancels, what is left is rounding, other rounding in each pass; inputs may
    make much of it. The output gradients of both passes are compared, times the length of the inputs.
    """
    lifted, off, lengths = v * LIFT, torch.zeros_like(v), torch.zeros_like(v)
    for name, first in measured.items():
        other = weighed[name]
        assert isinstance(first, Outer | Patches)
        assert isinstance(other, Outer | Patches)
        factors = first.factors()
        windows = factors.spread / first.g[0].numel()
        off += factor_squares(other.g - scaled(lifted, first.g)) * factors.other * windows
        if first.measured is not None:
            lengths += v.square() * first.measured
    return not bool(off.sqrt().amax() <= STRAY * LIFT * lengths.sqrt().amax())


STRAY = 1e-5  # times the longest contribution, by which a second pass may differ from the first
# A power of two, which changes no digit: what a small weight leaves of a gradient may be too small for float32 on its
# way back through the layers. Where it then overflows, the sum is taken from the tape.
LIFT = 2.0**64
UNLIKE = 1e-3  # times the sum of all contributions' norms by which the two sums of a step may differ


def passes_agree(engine: Ghost, used: Used) -> None:
    """Compare the sum of the second pass with that of the tape which gave the norms, on a step's first microbatch.

    Raises Unserved where they differ: gradients are then changed on their way, and what is summed is not what was
    measured. The trial compares them on tame examples; here they are those of the run.
    """
    part = Batch(*(t[: used.chunk] for t in used.batch))
    given = (used.loss, used.clip, used.groups, used.model, used.w, part, used.state)
    with untouched(used.model, part.x.device):
        sums = []
        for one in (engine, BookKeeping(channels_last=engine.channels_last)):
            rewind(part.x.device, used.draws)
            sums.append(one.clipped_sum(*given))
    ours, theirs = sums
    assert theirs.norms is not None
    assert theirs.weights is not None
    finite = theirs.norms.isfinite().all(1)
    size = float((theirs.norms * theirs.weights)[finite].sum())
    unlike = max(UNLIKE, 10 * torch.finfo(theirs.total.flat.dtype).eps)
    if float((ours.total - theirs.total).norm()) > unlike * size:
        raise Unserved(
            f"{type(engine).__name__} sums other gradients in its second backward pass than it measured in its first: a"
            ' hook or a function of the model\'s own changes gradients on the way. Use engine = "bookkeeping"'
        )
