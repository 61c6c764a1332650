"""The engine that takes per-example gradients from BackPACK, by its extension `BatchGrad`."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from torch import nn

from harness.dp.clip import Clip
from harness.dp.loss import Loss
from harness.peers.peer import MarkingPeer, tied

KNOWN = {
    *(nn.Linear, nn.Embedding, nn.RNN, nn.LSTM, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
}


class BackPack(MarkingPeer):
    """`backpack(BatchGrad())` around the backward pass of a copy of the model that `extend` prepared.

    Dangel, Kunstner and Hennig, BackPACK: Packing more into backprop, arXiv:1912.10985.
    """

    PACKAGE: ClassVar[str] = "backpack-for-pytorch"
    IMPORTS: ClassVar[str] = "backpack"
    INSTALL: ClassVar[str] = "epsbench[peers]"
    MARK: ClassVar[str] = "grad_batch"

    def refuses(self, loss: Loss, clip: Clip, model: nn.Module) -> str | None:
        if tied(model):
            return "the model has tied parameters, which BackPACK counts once"
        return super().refuses(loss, clip, model)

    def objection(self, layer: nn.Module) -> str | None:
        if type(layer) not in KNOWN:
            return "is not a layer that BatchGrad knows: it would go without per-example gradients, silently"
        if getattr(layer, "padding_mode", "zeros") != "zeros" or isinstance(getattr(layer, "padding", 0), str):
            return "has a padding that BatchGrad takes for another: it gives another gradient, silently"
        if isinstance(layer, nn.RNNBase) and (layer.num_layers > 1 or layer.bidirectional or not layer.bias):
            return "is more than the one layer with biases, in one direction, that BatchGrad serves"
        if isinstance(layer, nn.Embedding) and layer.padding_idx is not None:
            return "has a padding entry, which BatchGrad refuses"
        if isinstance(layer, nn.Embedding) and layer.weight.dtype is not torch.float32:
            return "is not in float32, and BatchGrad's rule for embeddings is"
        return None

    def wrap(self, module: nn.Module) -> nn.Module:
        from backpack import extend

        return extend(module)

    def recording(self) -> AbstractContextManager[Any]:
        from backpack import backpack
        from backpack.extensions import BatchGrad

        return backpack(BatchGrad())
