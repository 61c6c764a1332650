"""DPNASNet: networks found by a search for what DP-SGD trains well (Cheng et al., AAAI 2022, arXiv:2110.08557).

The cells are those of the public code, github.com/TheSunWillRise/DPNAS, as DP-SAT's code repeats them; this module
is written from their description. The numbers of parameters are those that DP-SAT's notebooks print.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from harness.models.layers import images
from harness.registry import model

# A cell: for each of its nodes 1 to 5 the operations that are added up there, each with the node it reads. Node 0 is
# the cell's input behind a 1x1 convolution. The search's "none" edges add nothing and are left out.
CELLS = {
    "cifar": ("selu 0", "max 0, selu 1", "tanh 0, max 1", "selu 0, skip 3",
              "selu 0, selu 1, tanh 2, max 3, tanh 4"),
    "fashion": ("skip 0", "selu 1", "relu 0, selu 1, skip 2", "tanh 2, skip 3",
                "selu 0, tanh 1, max 2, relu 3, max 4"),
    "mnist": ("selu 0", "tanh 0, skip 1", "selu 1, relu 2", "tanh 1, skip 3", "max 0, max 2, max 3, relu 4"),
}  # fmt: skip
ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "selu": nn.SELU, "tanh": nn.Tanh}


def _norm(channels: int) -> nn.GroupNorm:
    """Groups of an eighth of the channels, without scale and shift."""
    return nn.GroupNorm(8, channels, affine=False)


def _conv(inputs: int, outputs: int, kernel: int, groups: int = 1) -> nn.Conv2d:
    """A convolution without bias, of normals with variance 2 / (kernel^2 * outputs)."""
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False)
    nn.init.normal_(conv.weight, std=math.sqrt(2.0 / (kernel * kernel * outputs)))
    return conv


def _operation(name: str, channels: int) -> nn.Module:
    """``skip``, ``max`` (3x3), or a depthwise 3x3 convolution, its norm and the activation of that name."""
    if name == "skip":
        return nn.Identity()
    if name == "max":
        return nn.MaxPool2d(3, stride=1, padding=1)
    return nn.Sequential(_conv(channels, channels, 3, groups=channels), _norm(channels), ACTIVATIONS[name]())


class Cell(nn.Module):
    """A directed graph of five nodes behind a 1x1 convolution; the nodes' values are concatenated."""

    def __init__(self, nodes: tuple[str, ...], inputs: int, channels: int) -> None:
        super().__init__()
        self.before = nn.Sequential(_conv(inputs, channels, 1), _norm(channels))
        # Each edge is the node it leads to, counted from 1, and the node it reads; operations are in the same order.
        self.edges: list[tuple[int, int]] = []
        self.operations = nn.ModuleList()
        for target, node in enumerate(nodes, 1):
            for name, source in (edge.split() for edge in node.split(", ")):
                self.edges.append((target, int(source)))
                self.operations.append(_operation(name, channels))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, inputs, H, W]`` to ``[B, 5 * channels, H, W]``."""
        values = [self.before(x)]
        for (target, source), operation in zip(self.edges, self.operations, strict=True):
            term = operation(values[source])
            if target == len(values):
                values.append(term)
            else:
                values[target] = values[target] + term
        return torch.cat(values[1:], dim=1)


@model("dpnas", paper="arXiv:2110.08557")
def dpnas(
    input_shape: tuple[int, ...], classes: int, cell: Literal["cifar", "fashion", "mnist"] = "cifar", width: int = 16
) -> nn.Module:
    """DPNASNet: 529,434 parameters on CIFAR-10, 214,570 on 28x28 grey with ``cell=fashion``.

    Three cells, of 3, 6 and 12 times ``width`` channels (``fashion`` and ``mnist``: 2, 2 and 4), each followed by
    pooling, then a 1x1 convolution to 8 ``width`` and a hidden layer as wide. GroupNorm of 8 groups without
    parameters; SELU in the head of ``cifar``, tanh in the others'.

    Images of 8x8 and more. Raises ``ValueError`` for other shapes, or where ``width`` is no multiple of 8.
    """
    channels, height, breadth = images("dpnas", input_shape, at_least=8)
    if width < 8 or width % 8:
        raise ValueError(f"dpnas?width={width}: write a multiple of 8, for the 8 groups of its norms")
    colour = cell == "cifar"
    widths = [3 * width, 6 * width, 12 * width] if colour else [2 * width, 2 * width, 4 * width]
    layers: list[nn.Module] = [_conv(channels, widths[0], 3), _norm(widths[0])]
    before = widths[0]
    for wide in widths:
        layers += [Cell(CELLS[cell], before, wide), nn.MaxPool2d(2)]
        before = 5 * wide
    last = 8 * width
    return nn.Sequential(
        *layers,
        _conv(before, last, 1),
        _norm(last),
        nn.Flatten(),
        nn.Linear(last * (height // 8) * (breadth // 8), last),
        nn.SELU() if colour else nn.Tanh(),
        nn.Linear(last, classes),
    )
