"""Automatic clipping: every gradient scaled to about the same length (Bu et al., NeurIPS 2023)."""

from typing import Literal

from harness.dp import SGD, Automatic, Method
from harness.registry import method


@method("automatic", paper="arXiv:2206.07136", family="clipping")
def automatic(
    clip: float = 1.0,
    gamma: float = 0.01,
    form: Literal["stable", "vanilla"] = "stable",
    lr: float = 0.1,
    momentum: float = 0.9,
) -> Method:
    """AUTO-S (stable) or AUTO-V (vanilla): the clipping norm is but a factor of the learning rate."""
    return Method(clip=Automatic(clip, gamma, form), optimizer=SGD(lr, momentum))
