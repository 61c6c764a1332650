"""Losses that ask of each class by itself whether an example belongs to it."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from harness.dp.loss.loss import Loss


@dataclass(frozen=True)
class Sigmoid(Loss):
    """Sigmoid cross-entropy summed over the classes, as Mehta et al. (arXiv:2211.13403) train their heads.

    `shift` is added to every output: at -10 a head of zeros answers no to all classes, so that an example's first
    gradient is that of its own class, and the other classes' rows are 5e-5 of it.
    """

    shift: float = -10.0

    def per_example(self, outputs: Tensor, y: Tensor) -> Tensor:
        logits = outputs + self.shift
        return -F.logsigmoid(-logits).sum(-1) - logits.gather(-1, y[:, None]).squeeze(-1)


@dataclass(frozen=True)
class Squares(Loss):
    """1/2 (o_y - 1)^2 + alpha/2 sum_l o_l^2 for outputs o [K]: what DP-LS minimises (arXiv:2211.13403).

    For outputs o = W f the gradient at W = 0 is -f in the row of the label and 0 in the others, and the Hessian of row
    l is f f^T times alpha, plus f f^T where l is the label: sums of these are all that the minimum depends on.
    """

    alpha: float = 1.0

    def per_example(self, outputs: Tensor, y: Tensor) -> Tensor:
        own = outputs.gather(-1, y[:, None]).squeeze(-1)
        return 0.5 * (own - 1).square() + 0.5 * self.alpha * outputs.square().sum(-1)
