"""Small convolutional networks: those of DP papers, and an encoder for losses that need no labels.

The tanh networks are those of Papernot et al. (arXiv:2007.14191), layer by layer the end-to-end CNNs of Tramer and
Boneh (arXiv:2011.11660), as their public code has them.
"""

from __future__ import annotations

from typing import Literal

from torch import nn

from harness.models.layers import ACTIVATIONS, images, numbers
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
    return _four_layers(images("tanh-cnn-28", input_shape, at_least=18), classes, 2, nn.Tanh)


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
    return _four_layers(images("cnn4", input_shape, at_least=14), classes, 3, ACTIVATIONS[activation])


def _four_layers(shape: tuple[int, int, int], classes: int, padding: int, act: type[nn.Module]) -> nn.Module:
    channels, height, width = shape
    # 8x8 stride 2, pool; 4x4 stride 2, pool. With a padding of 2: 28 -> 13 -> 12 -> 5 -> 4.
    rows, columns = (((side + 2 * padding - 8) // 2 - 4) // 2 for side in (height, width))
    return nn.Sequential(
        nn.Conv2d(channels, 16, 8, stride=2, padding=padding),
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


@model("encoder", paper="arXiv:2310.03104", embedding=True)
def encoder(
    input_shape: tuple[int, ...],
    channels: str = "8,16,32",
    width: int = 8,
    activation: Literal["tanh", "relu", "gelu", "silu"] = "tanh",
) -> nn.Module:
    """3x3 convolutions of stride 2 (``channels`` lists their outputs) and a linear layer to ``width`` numbers.

    The defaults are the small encoder of the Logit-DP paper, with tanh for its ReLU: 9,992 parameters on 28x28 images.
    The output is an embedding, not normalised, and has nothing to do with the classes of the data.
    """
    inputs, height, breadth = images("encoder", input_shape, at_least=2)
    outputs = numbers(channels)
    if not outputs or width < 1:
        raise ValueError(
            f'encoder?channels={channels}&width={width}: write channels as in "channels=8,16,32", width >= 1'
        )
    layers: list[nn.Module] = []
    for c in outputs:
        layers += [nn.Conv2d(inputs, c, 3, stride=2, padding=1), ACTIVATIONS[activation]()]
        inputs, height, breadth = c, (height + 1) // 2, (breadth + 1) // 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(inputs * height * breadth, width))
