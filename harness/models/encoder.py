"""A small convolutional encoder: images to embeddings, for losses that need no labels."""

from __future__ import annotations

from typing import Literal

from torch import nn

from harness.models.layers import ACTIVATIONS, images
from harness.registry import model


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
    inputs, height, width_ = images("encoder", input_shape, at_least=2)
    try:
        outputs = [int(c) for c in channels.split(",")]
    except ValueError:
        outputs = []
    if not outputs or min(outputs) < 1 or width < 1:
        raise ValueError(
            f'encoder?channels={channels}&width={width}: write channels as in "channels=8,16,32", width >= 1'
        )
    layers: list[nn.Module] = []
    for c in outputs:
        layers += [nn.Conv2d(inputs, c, 3, stride=2, padding=1), ACTIVATIONS[activation]()]
        inputs, height, width_ = c, (height + 1) // 2, (width_ + 1) // 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(inputs * height * width_, width))
