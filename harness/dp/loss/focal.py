"""A loss that weighs examples by how badly they are classified."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from harness.dp.loss.loss import CrossEntropy


@dataclass(frozen=True)
class Focal(CrossEntropy):
    """Cross-entropy times (1 - p)^gamma, p the probability of the right class (Lin et al. 2017, arXiv:1708.02002).

    Examples that are classified well hardly count. It is bounded where p is near 1, which Shamsabadi and Papernot
    (arXiv:2108.01624) found to lose less to clipping and noise.
    """

    gamma: float = 1.0

    def __post_init__(self) -> None:
        if self.gamma < 0:
            raise ValueError(f"gamma must not be negative, and is {self.gamma}")

    def per_example(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Losses [B] of logits [B, K]; of [B, T, K] the mean over positions."""
        flat = outputs.flatten(0, -2)
        logs = F.cross_entropy(flat, y.reshape(-1), reduction="none")
        weighed = (1 - (-logs).exp()).clamp(min=0) ** self.gamma * logs
        return weighed.view(*outputs.shape[:-1]).flatten(1).mean(1) if outputs.ndim > 2 else weighed
