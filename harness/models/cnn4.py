"""The four-layer network of Opacus's MNIST example: two convolutions and two linear layers."""

from __future__ import annotations

from typing import Literal

from torch import nn

from harness.models.layers import ACTIVATIONS, images
from harness.registry import model


@model("cnn4", paper="arXiv:2206.07136")
def cnn4(
    input_shape: tuple[int, ...], classes: int, activation: Literal["tanh", "relu", "gelu", "silu"] = "relu"
) -> nn.Module:
    """Opacus's MNIST example: two convolutions (16 of 8x8, 32 of 4x4), a hidden layer of 32; 26,010 parameters.

    The automatic-clipping paper names its network "4-layer CNN"; its layers could not be read, and
    this one has four layers with parameters. Unlike ``tanh-cnn-28`` it pads by 3 in the first layer (Opacus,
    ``examples/mnist.py``), so that 28 becomes 14, 13, 5 and 4; the sizes of the weights are the same.

    Images of 14x14 and more. Raises ``ValueError`` for other shapes.
    """
    channels, height, width = images("cnn4", input_shape, at_least=14)
    act = ACTIVATIONS[activation]
    # 8x8 stride 2 padding 3, pool; 4x4 stride 2, pool: 28 -> 14 -> 13 -> 5 -> 4.
    rows, columns = (((side - 2) // 2 + 1 - 1 - 4) // 2 for side in (height, width))
    return nn.Sequential(
        nn.Conv2d(channels, 16, 8, stride=2, padding=3),
        act(),
        nn.MaxPool2d(2, stride=1),
        nn.Conv2d(16, 32, 4, stride=2),
        act(),
        nn.MaxPool2d(2, stride=1),
        nn.Flatten(),
        nn.Linear(32 * rows * columns, 32),
        act(),
        nn.Linear(32, classes),
    )
