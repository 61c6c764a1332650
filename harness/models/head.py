"""A linear head: all that is trained on features of a frozen network."""

from __future__ import annotations

import math

from torch import nn

from harness.registry import model


@model("linear-head", paper="arXiv:2205.02973")
def linear_head(input_shape: tuple[int, ...], classes: int, bias: bool = True) -> nn.Module:
    """One linear layer on flat features, zero at the start."""
    linear = nn.Linear(math.prod(input_shape), classes, bias=bias)
    for parameter in linear.parameters():
        nn.init.zeros_(parameter)
    return nn.Sequential(nn.Flatten(), linear)
