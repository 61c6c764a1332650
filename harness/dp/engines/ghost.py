"""Fast clipping by two passes: norms without gradients, then one backward pass of the reweighted loss.

Lee and Kifer, "Scaling up differentially private deep learning with fast per-example gradient clipping"
(arXiv:2009.03106), with the rules of `harness.dp.engines.rules` in place of theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from harness.dp.engines.audit import audit
from harness.dp.engines.bookkeeping import BookKeeping
from harness.dp.engines.draws import rewind
from harness.dp.engines.engine import Unserved, Used
from harness.dp.engines.gradients import Gradient
from harness.dp.engines.rows import sum_type
from harness.dp.engines.survey import untouched
from harness.dp.engines.tape import Run
from harness.dp.engines.taped import Taped
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
        taped: Run | None,
        leaves: Mapping[str, Tensor],
        found: Mapping[str, Gradient],
    ) -> Tensor:
        # A second pass adds up in the type of the weights.
        served = weights.shape[1] == 1 and sum_type(w.flat.dtype) is w.flat.dtype
        again = [n for n in w.names if served and n in found and found[n].whole]
        rest = {name: gradient for name, gradient in found.items() if name not in again}
        total = super().weighted_sum(w, groups, weights, taped, leaves, rest)
        if again and taped is not None:
            # A scalar, not a vector of losses with `weights` as its gradient, which would import all of sympy.
            reweighted = ((weights[:, 0] * LIFT).to(taped.losses.dtype) * taped.losses).sum()
            parts = torch.autograd.grad(reweighted, [leaves[n] for n in again])
            if not all(part.sum().isfinite() for part in parts):
                return super().weighted_sum(w, groups, weights, taped, leaves, found)
            views = w.layout.views(total)
            for name, part in zip(again, parts, strict=True):
                torch.div(part, LIFT, out=views[name])
        return total


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
