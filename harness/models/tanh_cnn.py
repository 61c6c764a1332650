"""The small tanh networks of Papernot et al. (arXiv:2007.14191).

Layer by layer they are the end-to-end CNNs of Tramer and Boneh (arXiv:2011.11660), as their public code has
them.
"""

from __future__ import annotations

from torch import nn

from harness.models.layers import images
from harness.registry import model


@model("tanh-cnn", paper="arXiv:2011.11660")
def tanh_cnn(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """``tanh-cnn-28`` for 28x28 images, ``tanh-cnn-32`` for all other sizes."""
    if tuple(input_shape[1:]) == (28, 28):
        return tanh_cnn_28(input_shape, classes)
    return tanh_cnn_32(input_shape, classes)


@model("tanh-cnn-28", paper="arXiv:2011.11660")
def tanh_cnn_28(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Two convolutions (16 of 8x8, 32 of 4x4) and a hidden layer of 32: 26,010 parameters on MNIST."""
    channels, height, width = images("tanh-cnn-28", input_shape, at_least=18)
    # 8x8 stride 2 padding 2, pool; 4x4 stride 2, pool: 28 -> 13 -> 12 -> 5 -> 4.
    rows, columns = ((((side - 4) // 2 + 1) - 1 - 4) // 2 for side in (height, width))
    return nn.Sequential(
        nn.Conv2d(channels, 16, 8, stride=2, padding=2),
        nn.Tanh(),
        nn.MaxPool2d(2, stride=1),
        nn.Conv2d(16, 32, 4, stride=2),
        nn.Tanh(),
        nn.MaxPool2d(2, stride=1),
        nn.Flatten(),
        nn.Linear(32 * rows * columns, 32),
        nn.Tanh(),
        nn.Linear(32, classes),
    )


@model("tanh-cnn-32", paper="arXiv:2011.11660")
def tanh_cnn_32(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Six 3x3 convolutions (32, 64, 128, twice each) and a hidden layer: 550,570 parameters on CIFAR-10."""
    channels, height, width = images("tanh-cnn-32", input_shape, at_least=8)
    layers: list[nn.Module] = []
    for wide in (32, 64, 128):
        for inputs in (channels, wide):
            layers += [nn.Conv2d(inputs, wide, 3, padding=1), nn.Tanh()]
        layers.append(nn.MaxPool2d(2))
        channels = wide
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(128 * (height // 8) * (width // 8), 128), nn.Tanh(), nn.Linear(128, classes)
    )
