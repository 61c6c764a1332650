"""Per-example losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class Batch(NamedTuple):
    """A logical batch: inputs `x` [B, ...] and targets `y` [B]. B may be zero: an empty Poisson draw is a step."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:  # a batch is as long as its examples, not as its two fields
        return self.x.shape[0]


@dataclass(frozen=True)
class Loss:
    """A loss that is a sum over examples, so that one example's gradient is its own."""

    def per_example(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Losses [B] from model outputs [B, ...] and targets [B]."""
        raise NotImplementedError


@dataclass(frozen=True)
class CrossEntropy(Loss):
    """Softmax cross-entropy. Outputs [B, K] are logits; outputs [B, T, K] are averaged over the T positions."""

    def per_example(self, outputs: Tensor, y: Tensor) -> Tensor:
        if outputs.ndim == 2:
            return F.cross_entropy(outputs, y, reduction="none")
        return F.cross_entropy(outputs.movedim(-1, 1), y, reduction="none").flatten(1).mean(1)
