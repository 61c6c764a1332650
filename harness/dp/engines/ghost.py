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

from harness.dp.engines.gradients import Gradient
from harness.dp.engines.tape import Run
from harness.dp.engines.taped import Taped
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

    def weighted_sum(
        self,
        w: Tree,
        groups: Mapping[str, int],
        weights: Tensor,
        taped: Run,
        leaves: Mapping[str, Tensor],
        found: Mapping[str, Gradient],
    ) -> Tensor:
        again = [n for n in w.names if weights.shape[1] == 1 and n in found and found[n].whole]
        rest = {name: gradient for name, gradient in found.items() if name not in again}
        total = super().weighted_sum(w, groups, weights, taped, leaves, rest)
        if again:
            # A scalar, not a vector of losses with `weights` as its gradient, which would import all of sympy.
            reweighted = (weights[:, 0].to(taped.losses.dtype) * taped.losses).sum()
            views = w.layout.views(total)
            for name, part in zip(
                again, torch.autograd.grad(reweighted, [leaves[n] for n in again]), strict=True
            ):
                views[name].copy_(part)
        return total
