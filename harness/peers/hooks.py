"""The engines of Opacus and of BackPACK, which mark a copy of the model with per-example gradients or their norms.

Of Opacus: hooks, functorch and expanded weights, and its ghost clipping. Of BackPACK: its extension `BatchGrad`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from torch import nn

from harness.dp.clip import Clip, State
from harness.dp.engines.engine import Clipped, trainable
from harness.dp.loss import Batch, Loss
from harness.dp.tree import Layout, Tree
from harness.peers.peer import MarkingPeer, Peer, double, tied

EXPANDED = {
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, nn.RNN, nn.LSTM, nn.GRU, nn.GroupNorm),
    *(nn.LayerNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
}


def with_its_own_layers(module: nn.Module) -> nn.Module:
    """`module`, a copy that is ours to change, with Opacus's recurrent layers for PyTorch's."""
    from opacus.layers import DPGRU, DPLSTM

    kinds = {nn.LSTM: DPLSTM, nn.GRU: DPGRU}
    for parent in list(module.modules()):
        for name, m in parent.named_children():
            if type(m) in kinds:
                shape = m.input_size, m.hidden_size, m.num_layers, m.bias, m.batch_first, m.dropout
                new = kinds[type(m)](*shape, m.bidirectional).to(m.weight_ih_l0).train(m.training)
                new.load_state_dict(m.state_dict())
                for key, p in new.state_dict(keep_vars=True).items():
                    p.requires_grad_(m.get_parameter(key).requires_grad)
                setattr(parent, name, new)
    return module


class OpacusPeer(Peer):
    """What all four ways of Opacus share (Yousefpour et al., arXiv:2109.12298)."""

    PACKAGE: ClassVar[str] = "opacus"
    IMPORTS: ClassVar[str] = "opacus"
    INSTALL: ClassVar[str] = "opacus"


def no_hooks(layer: nn.Module) -> str | None:
    """Where Opacus's hooks do not work."""
    if not layer.training:
        return "is in eval mode, where Opacus takes no per-example gradients"
    if any(True for _ in layer.buffers()):
        return "is trained and has buffers, which Opacus refuses"
    if isinstance(layer, nn.MultiheadAttention):
        return "would have to be Opacus's own DPMultiheadAttention, whose parameters are others"
    if isinstance(layer, nn.RNNBase) and (type(layer) not in (nn.LSTM, nn.GRU) or layer.proj_size):
        return "has no counterpart among Opacus's recurrent layers: nn.LSTM and nn.GRU without projection do"
    return None


def wrong_formula(layer: nn.Module) -> str | None:
    """Where Opacus's own formulas fail or, as found by comparison with the loop, give another gradient."""
    if getattr(layer, "padding_mode", "zeros") != "zeros":
        return "pads other than with zeros, and Opacus's gradients ignore that: norms are underestimated"
    if type(layer) is nn.LayerNorm and layer.bias is None:
        return "has no bias, and Opacus's formula fails without one"
    return padded(layer)


def padded(layer: nn.Module) -> str | None:
    """An embedding whose padding entry is not trained, by PyTorch's definition."""
    if type(layer) is nn.Embedding and layer.padding_idx is not None:
        return "has a padding entry, to which Opacus gives a gradient"
    return None


class Hooks(OpacusPeer, MarkingPeer):
    """`GradSampleModule`: hooks on each layer compute its per-example gradients from its input and output gradient."""

    MARK: ClassVar[str] = "grad_sample"
    FUNCTORCH: ClassVar[bool] = False

    def objection(self, layer: nn.Module) -> str | None:
        return no_hooks(layer) or (None if self.FUNCTORCH else wrong_formula(layer))

    def wrap(self, module: nn.Module) -> nn.Module:
        from opacus.grad_sample import GradSampleModule

        return GradSampleModule(with_its_own_layers(module), loss_reduction="sum", force_functorch=self.FUNCTORCH)


class Functorch(Hooks):
    """The same hooks, with `torch.func` through each layer instead of Opacus's formulas."""

    FUNCTORCH: ClassVar[bool] = True


class ExpandedWeights(Hooks):
    """`GradSampleModuleExpandedWeights`: PyTorch's own per-example gradients, by parameters that know the batch."""

    def objection(self, layer: nn.Module) -> str | None:
        if type(layer) not in EXPANDED:
            return "is not a layer that expanded weights support"
        if type(layer) is nn.LSTM and layer.weight_ih_l0.dtype is torch.float32 and layer.weight_ih_l0.is_cpu:
            return "runs in oneDNN in float32 on a CPU, where expanded weights do not follow"
        return padded(layer)

    def wrap(self, module: nn.Module) -> nn.Module:
        from opacus.grad_sample import GradSampleModuleExpandedWeights

        return GradSampleModuleExpandedWeights(module, loss_reduction="sum")


class Ghost(OpacusPeer):
    """`GradSampleModuleFastGradientClipping`: norms by hooks, then a second backward pass of the reweighted loss.

    The norms are Opacus's own. In float32 they are too small on large layers (by 2e-5 for a convolution of a million
    weights as measured), so a clipped gradient may exceed its bound by as much.
    """

    def wrap(self, module: nn.Module) -> nn.Module:
        from opacus.grad_sample import GradSampleModuleFastGradientClipping

        return GradSampleModuleFastGradientClipping(with_its_own_layers(module), loss_reduction="sum")

    def objection(self, layer: nn.Module) -> str | None:
        return no_hooks(layer) or wrong_formula(layer)

    def refuses(self, loss: Loss, clip: Clip, model: nn.Module) -> str | None:
        if tied(model):
            return "the model has tied parameters, which Opacus's ghost clipping refuses"
        if max(clip.groups(Layout.of(trainable(model))).values(), default=0):
            return f"{type(clip).__name__} has several clipping groups, and Opacus's two passes serve one"
        return super().refuses(loss, clip, model)

    def clipped_sum(
        self, loss: Loss, clip: Clip, groups: Mapping[str, int], model: nn.Module, w: Tree, batch: Batch, state: State
    ) -> Clipped:
        module: Any
        with double(self, model, w) as (module, parameters):
            losses = loss.per_example(module(batch.x), batch.y)
            for p in parameters.values():  # one that no layer uses keeps this norm
                p._norm_sample = losses.new_zeros(len(batch))
            losses.sum().backward(retain_graph=True)
            for p in parameters.values():
                p.grad = None
            norms = module.get_norm_sample()[:, None]
            weights, good = clip.weights(norms, state), norms.isfinite().all(1)
            module.disable_hooks()
            (weights[:, 0].to(losses.dtype) * losses).sum().backward()
            module.enable_hooks()
            flat = torch.cat(
                [torch.zeros_like(p).view(-1) if p.grad is None else p.grad.reshape(-1) for p in parameters.values()]
            )
        if not good.all():  # weight 0 would not do: 0 * inf is not a number
            flat = torch.zeros_like(w.flat)
            if good.any():
                few = Batch(batch.x[good], batch.y[good])
                flat = self.clipped_sum(loss, clip, groups, model, w, few, state).total.flat
        return Clipped(w.with_flat(flat), norms, weights, losses.detach())


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
