"""ResNet-10 with group normalisation, the MNIST network of DP-SAT's public code."""

from __future__ import annotations

from torch import nn

from harness.models.layers import images, lecun_
from harness.models.resnet import ProjectedBlock
from harness.registry import model


@model("resnet10", paper="arXiv:2306.05651")
def resnet10(input_shape: tuple[int, ...], classes: int, groups: int = 32, width: int = 64) -> nn.Module:
    """ResNet-18 for small images with one block a stage for two: 4,902,090 parameters on MNIST.

    Four stages of ``width`` times 1, 2, 4 and 8 channels after a 3x3 stem. DP-SAT's notebooks train it with a
    GroupNorm of 32 groups for every BatchNorm, as Opacus's validator puts them; they print 4.9021 M parameters.

    Images of 8x8 and more. Raises ``ValueError`` for other shapes, or where ``groups`` does not divide ``width``.
    """
    channels, _, _ = images("resnet10", input_shape, at_least=8)
    if groups < 1 or width % groups:
        raise ValueError(f"groups={groups} does not divide width {width}; write a divisor, as in groups=16")
    stem = nn.Conv2d(channels, width, 3, padding=1, bias=False)
    lecun_(stem.weight)
    layers: list[nn.Module] = [stem, nn.GroupNorm(groups, width), nn.ReLU()]
    before = width
    for stage in range(4):
        layers.append(ProjectedBlock(before, width << stage, 2 if stage else 1, groups))
        before = width << stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))
