"""Views of an image, and mixtures of these: more of one example before its gradient is clipped."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from harness.dp.loss.loss import Batch, Views
from harness.dp.random import Stream


@dataclass(frozen=True)
class Mixed(Views):
    """DP-MixSelf (Bao et al. 2023, arXiv:2311.01295): also `mixtures` of pairs of an example's own views.

    A mixture is l a + (1 - l) b, a and b two views of one image, l from Beta(alpha, alpha); its label is theirs. Views
    and mixtures together make one gradient, the mean of all, which is clipped once: other examples are never mixed in,
    so that the sensitivity is that of any other loss.
    """

    mixtures: int = 4
    alpha: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mixtures < 1 or self.views < 2 or not self.alpha > 0:
            raise ValueError(
                f"views = {self.views}, mixtures = {self.mixtures}, alpha = {self.alpha:g}: two views or more, one"
                " mixture or more, alpha above 0"
            )

    @property
    def rows(self) -> int:
        return self.views + self.mixtures

    def prepare(self, batch: Batch, rng: Stream) -> Batch:
        """Images [B, C, H, W] to views and mixtures [B, K, C, H, W]."""
        from scipy.special import betaincinv

        seen = super().prepare(batch, rng).x
        first, second, share = rng.uniform(3 * len(batch) * self.mixtures).view(3, len(batch), self.mixtures)
        one = (first * self.views).long()
        # Another one than the first.
        other = (one + 1 + (second * (self.views - 1)).long()) % self.views
        share = torch.from_numpy(betaincinv(self.alpha, self.alpha, share.numpy())).to(seen)
        rows = torch.arange(len(batch))[:, None]
        weight = share.view(*share.shape, 1, 1, 1)
        mixed = weight * seen[rows, one] + (1 - weight) * seen[rows, other]
        return Batch(torch.cat([seen, mixed], 1), batch.y)
