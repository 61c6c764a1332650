"""Logistic regression, a linear head on features, multi-layer perceptron and a 1-D convolutional network."""

from __future__ import annotations

import math
from typing import Literal

from torch import nn

from harness.models.layers import ACTIVATIONS, numbers
from harness.registry import model


@model("logistic")
def logistic(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Multinomial logistic regression on the flattened input."""
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(input_shape), classes))


@model("linear-head", paper="arXiv:2205.02973")
def linear_head(input_shape: tuple[int, ...], classes: int, bias: bool = True) -> nn.Module:
    """One linear layer on flat features, zero at the start."""
    linear = nn.Linear(math.prod(input_shape), classes, bias=bias)
    for parameter in linear.parameters():
        nn.init.zeros_(parameter)
    return nn.Sequential(nn.Flatten(), linear)


@model("mlp")
def mlp(
    input_shape: tuple[int, ...],
    classes: int,
    hidden: str = "256,256",
    activation: Literal["tanh", "relu", "gelu", "silu"] = "tanh",
) -> nn.Module:
    """Fully connected layers on the flattened input; ``hidden`` lists their widths."""
    widths = numbers(hidden)
    if not widths:
        raise ValueError(f'mlp?hidden={hidden}: write widths joined by commas, as in "hidden=256,256"')
    layers: list[nn.Module] = [nn.Flatten()]
    before = math.prod(input_shape)
    for width in widths:
        layers += [nn.Linear(before, width), ACTIVATIONS[activation]()]
        before = width
    return nn.Sequential(*layers, nn.Linear(before, classes))


@model("cnn1d", paper="arXiv:2011.14439")
def cnn1d(
    input_shape: tuple[int, ...],
    classes: int,
    channels: int = 25,
    activation: Literal["tanh", "relu", "gelu", "silu"] = "tanh",
) -> nn.Module:
    """MNIST-1D's three strided convolutions and linear layer (5,210 parameters), with tanh for ReLU."""
    if len(input_shape) != 2 or input_shape[1] < 8:
        raise ValueError(
            'model "cnn1d" takes signals [channels, length] of length 8 or more; the data has examples of '
            f'shape {list(input_shape)}. Use "tanh-cnn" for images, "mlp" or "logistic" for anything.'
        )
    act = ACTIVATIONS[activation]
    length = (input_shape[1] - 3) // 2 + 1
    for _ in range(2):
        length = (length - 1) // 2 + 1
    return nn.Sequential(
        nn.Conv1d(input_shape[0], channels, 5, stride=2, padding=1),
        act(),
        nn.Conv1d(channels, channels, 3, stride=2, padding=1),
        act(),
        nn.Conv1d(channels, channels, 3, stride=2, padding=1),
        act(),
        nn.Flatten(),
        nn.Linear(channels * length, classes),
    )
