"""A linear classifier on top of a network that was trained for something else."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Headed(nn.Module):
    """A network and, on its outputs [B, width], a linear layer of zeros with `classes` outputs.

    With `frozen` the network is taken as it is and only the head is trained. A head that starts at zero makes the first
    outputs, and so the first gradient of the head, the same for every seed.
    """

    def __init__(self, body: nn.Module, input_shape: tuple[int, ...], classes: int, frozen: bool) -> None:
        super().__init__()
        some = next(body.parameters())
        with torch.no_grad():
            probe = torch.zeros(1, *input_shape, dtype=some.dtype, device=some.device)
            width = body.eval()(probe).shape[-1]
        self.frozen = frozen
        self.body = body.requires_grad_(not frozen)
        self.head = nn.Linear(width, classes, dtype=some.dtype, device=some.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def train(self, mode: bool = True) -> Headed:
        """As for any module, but that a frozen network stays in evaluation mode: its outputs are features."""
        super().train(mode)
        if self.frozen:
            self.body.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Class scores [B, classes]."""
        scores: Tensor = self.head(self.body(x))
        return scores
