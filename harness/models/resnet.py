"""Residual networks with group normalisation: WRN-16-4, ResNet-20, ResNet-18 and ResNet-10.

The block layout of the first two is an option. The order of activation and normalisation is worth eight points
of accuracy under DP (Bao and Bindschaedler, arXiv:2508.15141, Table 6), so it is part of a model's name here.
Their orders are, as options of ``wrn-16-4``:

- 0, ReLU then GN everywhere (De et al., arXiv:2204.13650): the default
- 1, GN then ReLU everywhere: ``order=conv-gn-relu``
- 2, GN then ReLU, in the shortcut ReLU then GN: ``order=conv-gn-relu&shortcut=conv-relu-gn``
- 3, ReLU then GN, in the shortcut GN then ReLU: ``shortcut=conv-gn-relu``
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from harness.models.layers import WSConv2d, images, lecun_
from harness.registry import model


def _conv(inputs: int, outputs: int, kernel: int, stride: int, ws: bool, bias: bool = True) -> nn.Module:
    if ws:
        return WSConv2d(inputs, outputs, kernel, stride, kernel // 2)
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=bias)
    lecun_(conv.weight)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


def _norm(channels: int, groups: int) -> nn.GroupNorm:
    if groups < 1 or channels % groups:
        raise ValueError(f"groups={groups} does not divide {channels} channels; write a divisor, as in groups=16")
    return nn.GroupNorm(groups, channels)


def _activate(order: str, norm: nn.Module) -> nn.Sequential:
    """ReLU and the norm, in the order of the layout."""
    return nn.Sequential(nn.ReLU(), norm) if order == "conv-relu-gn" else nn.Sequential(norm, nn.ReLU())


def _stages(
    block: Callable[[int, int, int], nn.Module], before: int, width: int, stages: int, blocks: int
) -> list[nn.Module]:
    """Blocks of (inputs, outputs, stride). Every stage after the first halves the image and doubles the width."""
    layers = []
    for stage in range(stages):
        for number in range(blocks):
            layers.append(block(before, width << stage, 2 if stage and not number else 1))
            before = width << stage
    return layers


def _classifier(channels: int, classes: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)]


class WideBlock(nn.Module):
    """Two 3x3 convolutions, each behind ReLU and norm; a 1x1 shortcut, likewise, where the width changes."""

    def __init__(
        self, inputs: int, outputs: int, stride: int, groups: int, ws: bool, order: str, shortcut: str
    ) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            _activate(order, _norm(inputs, groups)),
            _conv(inputs, outputs, 3, stride, ws),
            _activate(order, _norm(outputs, groups)),
            _conv(outputs, outputs, 3, 1, ws),
        )
        self.skip: nn.Module = nn.Identity()
        if inputs != outputs or stride != 1:
            self.skip = nn.Sequential(_activate(shortcut, _norm(inputs, groups)), _conv(inputs, outputs, 1, stride, ws))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, inputs, H, W]`` to ``[B, outputs, H / stride, W / stride]``."""
        return self.skip(x) + self.branch(x)


@model("wrn-16-4", paper="arXiv:2204.13650")
def wrn_16_4(
    input_shape: tuple[int, ...],
    classes: int,
    ws: bool = False,
    groups: int = 16,
    order: Literal["conv-relu-gn", "conv-gn-relu"] = "conv-relu-gn",
    shortcut: Literal["as-order", "conv-relu-gn", "conv-gn-relu"] = "as-order",
    width: int = 4,
) -> nn.Module:
    """Wide ResNet with 16 layers and GroupNorm, as De et al. build it.

    ``ws=true`` is their weight standardisation. Pre-activation blocks, biases everywhere, truncated normal
    initialisation. ``width`` multiplies 16, 32, 64 channels.
    """
    channels, _, _ = images("wrn-16-4", input_shape, at_least=8)
    stem = _conv(channels, 16, 3, 1, ws)
    skip = order if shortcut == "as-order" else shortcut
    layers = _stages(partial(WideBlock, groups=groups, ws=ws, order=order, shortcut=skip), 16, 16 * width, 3, 2)
    head = nn.Linear(64 * width, classes)
    lecun_(head.weight)
    nn.init.zeros_(head.bias)
    last = _activate(order, _norm(64 * width, groups))
    return nn.Sequential(stem, *layers, last, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)


class BasicBlock(nn.Module):
    """ResNet-20's block: two 3x3 convolutions and a shortcut without parameters.

    The shortcut is subsampled and padded with zero channels. ``conv-gn-relu`` is He et al.'s block with GN
    for BN, ReLU after the sum. ``conv-relu-gn`` puts ReLU before the norm after both convolutions, and
    nothing after the sum.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int, ws: bool, order: str) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, outputs, 3, stride, ws, bias=False)
        self.norm1 = _norm(outputs, groups)
        self.conv2 = _conv(outputs, outputs, 3, 1, ws, bias=False)
        self.norm2 = _norm(outputs, groups)
        self.stride, self.extra, self.order = stride, outputs - inputs, order

    def forward(self, x: Tensor) -> Tensor:
        """``[B, inputs, H, W]`` to ``[B, outputs, H / stride, W / stride]``."""
        skip = x[:, :, :: self.stride, :: self.stride]
        if self.extra:
            skip = F.pad(skip, (0, 0, 0, 0, self.extra // 2, self.extra - self.extra // 2))
        if self.order == "conv-relu-gn":
            out = self.norm1(F.relu(self.conv1(x)))
            return skip + self.norm2(F.relu(self.conv2(out)))
        out = F.relu(self.norm1(self.conv1(x)))
        return F.relu(skip + self.norm2(self.conv2(out)))


@model("resnet20", paper="arXiv:1512.03385")
def resnet20(
    input_shape: tuple[int, ...],
    classes: int,
    ws: bool = False,
    groups: int = 16,
    order: Literal["conv-relu-gn", "conv-gn-relu"] = "conv-relu-gn",
    width: int = 16,
) -> nn.Module:
    """He et al.'s CIFAR ResNet-20 with GroupNorm: 16, 32 and 64 channels, 269,722 parameters on CIFAR-10.

    ``order=conv-gn-relu`` is the layout of the paper with GN for BN. ``width`` is the number of channels of
    the first stage.
    """
    channels, _, _ = images("resnet20", input_shape, at_least=8)
    first = _activate(order, _norm(width, groups))
    stem = [_conv(channels, width, 3, 1, ws, bias=False), first]
    layers = _stages(partial(BasicBlock, groups=groups, ws=ws, order=order), width, width, 3, 3)
    return nn.Sequential(*stem, *layers, *_classifier(4 * width, classes))


class ProjectedBlock(nn.Module):
    """He et al.'s block with a 1x1 convolution as shortcut where the shape changes; ReLU after the sum."""

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            _conv(inputs, outputs, 3, stride, ws=False, bias=False),
            _activate("conv-gn-relu", _norm(outputs, groups)),
            _conv(outputs, outputs, 3, 1, ws=False, bias=False),
            _norm(outputs, groups),
        )
        self.skip: nn.Module = nn.Identity()
        if inputs != outputs or stride != 1:
            self.skip = nn.Sequential(_conv(inputs, outputs, 1, stride, ws=False, bias=False), _norm(outputs, groups))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, inputs, H, W]`` to ``[B, outputs, H / stride, W / stride]``."""
        return F.relu(self.skip(x) + self.branch(x))


@model("resnet18", paper="arXiv:1512.03385")
def resnet18(input_shape: tuple[int, ...], classes: int, groups: int = 16, width: int = 64) -> nn.Module:
    """ResNet-18 for small images: a 3x3 stem for the 7x7 one and its pooling, GroupNorm, 11.2 M parameters.

    Four stages of two blocks, of ``width`` times 1, 2, 4 and 8 channels.
    """
    channels, _, _ = images("resnet18", input_shape, at_least=8)
    stem = _conv(channels, width, 3, 1, ws=False, bias=False)
    first = _activate("conv-gn-relu", _norm(width, groups))
    return nn.Sequential(stem, first, *_projected(2, groups, width, classes))


@model("resnet10", paper="arXiv:2306.05651")
def resnet10(input_shape: tuple[int, ...], classes: int, groups: int = 32, width: int = 64) -> nn.Module:
    """ResNet-18 for small images with one block a stage for two: 4,902,090 parameters on MNIST.

    The MNIST network of DP-SAT's public code. Its notebooks train it with a GroupNorm of 32 groups for every BatchNorm,
    as Opacus's validator puts them; they print 4.9021 M parameters.

    Images of 8x8 and more. Raises ``ValueError`` for other shapes, or where ``groups`` does not divide ``width``.
    """
    channels, _, _ = images("resnet10", input_shape, at_least=8)
    stem = _conv(channels, width, 3, 1, ws=False, bias=False)
    return nn.Sequential(stem, _norm(width, groups), nn.ReLU(), *_projected(1, groups, width, classes))


def _projected(blocks: int, groups: int, width: int, classes: int) -> list[nn.Module]:
    """Four stages and the classifier."""
    layers = _stages(partial(ProjectedBlock, groups=groups), width, width, 4, blocks)
    return [*layers, *_classifier(8 * width, classes)]
