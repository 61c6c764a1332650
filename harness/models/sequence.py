"""Sequence models: a small transformer over tokens, and recurrent networks over the rows of an image."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.registry import model


class Attention(nn.Module):
    """Multi-head self-attention by two projections: every parameter lives in an ``nn.Linear``."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"heads={heads} does not divide width={width}; write a divisor, as in heads=4")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, width]`` to the same shape; every position attends to all."""
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=2))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class EncoderLayer(nn.Module):
    """A pre-norm layer: attention, then two linear layers with GELU between, each added to what came in."""

    def __init__(self, width: int, heads: int, feedforward: int) -> None:
        super().__init__()
        self.attend = nn.Sequential(nn.LayerNorm(width), Attention(width, heads))
        self.think = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, feedforward), nn.GELU(), nn.Linear(feedforward, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, width]`` to the same shape."""
        x = x + self.attend(x)
        return x + self.think(x)


class Embedded(nn.Module):
    """Tokens to vectors: an entry for the token plus an entry for its position."""

    def __init__(self, vocabulary: int, length: int, width: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T]`` to ``[B, T, width]``.

        Data sets hold token numbers as floats; a number outside the vocabulary counts as its nearest entry.
        """
        x = x.long().clamp(0, self.tokens.num_embeddings - 1)
        # One row of positions for each example: engines take a layer's first dimension for the examples.
        positions = torch.arange(x.shape[1], device=x.device).expand_as(x).contiguous()
        return self.tokens(x) + self.positions(positions)


@model("transformer", paper="arXiv:1706.03762")
def transformer(
    input_shape: tuple[int, ...],
    classes: int,
    vocabulary: int = 1000,
    width: int = 128,
    layers: int = 4,
    heads: int = 4,
    feedforward: int = 512,
) -> nn.Module:
    """A pre-norm transformer encoder over token numbers, averaged over positions, with a linear head."""
    if len(input_shape) != 1:
        raise ValueError(
            'model "transformer" takes sequences [length] of token numbers; the data has examples of shape '
            f"{list(input_shape)}."
        )
    body = [EncoderLayer(width, heads, feedforward) for _ in range(layers)]
    return nn.Sequential(Embedded(vocabulary, input_shape[0], width), *body, Mean(), nn.Linear(width, classes))


class Mean(nn.Module):
    """The mean over positions."""

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, width]`` to ``[B, width]``."""
        return x.mean(1)


class Recurrent(nn.Module):
    """A recurrent layer over the rows of an image, or the steps of a sequence, and a linear head on the last."""

    def __init__(self, cell: type[nn.LSTM] | type[nn.GRU], inputs: int, hidden: int, layers: int, classes: int) -> None:
        super().__init__()
        self.rnn = cell(inputs, hidden, layers, batch_first=True)
        self.head = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, d]``, or images ``[B, C, T, W]`` with C * W = d, to ``[B, classes]``."""
        if x.ndim == 4:
            x = x.transpose(1, 2).flatten(2)
        steps, _ = self.rnn(x)
        return self.head(steps[:, -1])


def _recurrent(
    name: str, cell: type[nn.LSTM] | type[nn.GRU], shape: tuple[int, ...], classes: int, hidden: int, layers: int
) -> nn.Module:
    if len(shape) not in (2, 3):
        raise ValueError(
            f'model "{name}" takes images [channels, height, width] or sequences [length, features]; the data has '
            f"examples of shape {list(shape)}."
        )
    return Recurrent(cell, math.prod(shape) // shape[-2], hidden, layers, classes)


@model("lstm", paper="doi:10.1162/neco.1997.9.8.1735")
def lstm(input_shape: tuple[int, ...], classes: int, hidden: int = 128, layers: int = 1) -> nn.Module:
    """An LSTM over the rows of an image or the steps of a sequence; the last state goes to a linear head."""
    return _recurrent("lstm", nn.LSTM, input_shape, classes, hidden, layers)


@model("gru", paper="arXiv:1406.1078")
def gru(input_shape: tuple[int, ...], classes: int, hidden: int = 128, layers: int = 2) -> nn.Module:
    """The same with gated recurrent units, two layers of them."""
    return _recurrent("gru", nn.GRU, input_shape, classes, hidden, layers)
