"""A network as a chain of pieces, cut at the inputs of its trained products; what its layers see in a forward pass."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.dp.engines.engine import Unserved
from harness.dp.engines.taped.gradients import Gradient, Rows
from harness.dp.engines.taped.rules import convolution, linear
from harness.dp.tree import Tree

PRODUCTS = (nn.Linear, nn.Conv1d, nn.Conv2d)  # z = W a + b: a trained one starts a piece of the network
SCALINGS = (nn.GroupNorm, nn.LayerNorm)  # z = w * a + b, of normalised a: a trained one lies within a piece


class Layer(NamedTuple):
    """A module with trained parameters, and the names of its weight and bias where they are trained."""

    path: str
    module: nn.Module
    weight: str | None
    bias: str | None


def layers_of(model: nn.Module, w: Mapping[str, Any] | Tree) -> dict[str, Layer]:
    """The modules that own the parameters in `w`, by path."""
    found: dict[str, dict[str, str]] = {}
    for name in w:
        path, _, last = name.rpartition(".")
        found.setdefault(path, {})[last] = name
    return {
        path: Layer(path, model.get_submodule(path), own.get("weight"), own.get("bias")) for path, own in found.items()
    }


@dataclass
class Call:
    """A layer's call: the piece it lies in, its input `a` (normalised, for a scaling) and its output `z`, [B, ...]."""

    layer: Layer
    piece: int
    a: Tensor
    z: Tensor

    def reach(self) -> Tensor:
        """Norms [B], float64: an example's contribution is at most this times the norm of its error.

        Of a product, the norm of all features at all positions. A scaling's contribution has a row for each channel,
        the sum over positions of the channel's error times its features, so the largest norm of a channel's will do.
        """
        module = self.layer.module
        a = self.a.double()
        if type(module) in SCALINGS:
            channels = by_channel(module, a)  # [B, T, C]
            positions = channels.shape[1]
            squares = channels.square().sum(1).amax(1)
        elif isinstance(module, (nn.Conv1d, nn.Conv2d)):
            spatial = self.z.shape[2:]
            positions, squares = spatial.numel(), a.square().sum(1)
            for d in reversed(range(len(spatial))):  # how many windows see each row, and each column
                squares = squares @ windows(module, d, a.shape[2 + d], spatial[d]).to(squares)
        else:
            positions, squares = self.z[0].numel() // self.z.shape[-1], a.square().flatten(1).sum(1)
        if self.layer.weight is None:
            squares = torch.zeros_like(squares)
        return (squares + (positions if self.layer.bias else 0)).sqrt()

    def add(self, total: Mapping[str, Tensor], delta: Tensor, a: Tensor, v: Tensor) -> None:
        """Add the sum over examples of v[i] delta_i^T [a_i, 1], in float64; `v` [B] is what both were shortened by."""
        if not len(a):
            return
        module, examples = self.layer.module, len(a)
        wide = delta.double()  # which no sum over positions takes beyond its range
        if type(module) in SCALINGS:
            shared = by_channel(module, wide)
            weight: Gradient = Rows((shared * by_channel(module, a.double())).sum(1))
        elif isinstance(module, (nn.Conv1d, nn.Conv2d)):
            shared = wide.flatten(2).mT
            weight = convolution(module, a, delta, examples, ("weight",))["weight"]
        else:
            assert isinstance(module, nn.Linear)
            shared = wide.reshape(examples, -1, delta.shape[-1])
            weight = linear(module, a, delta, examples, ("weight",))["weight"]
        for name, gradient in ((self.layer.weight, weight), (self.layer.bias, Rows(shared.sum(1)))):
            if name:
                total[name].add_(gradient.weighted(v).view_as(total[name]))


def by_channel(module: nn.Module, t: Tensor) -> Tensor:
    """What a GroupNorm or LayerNorm scales, as [B, positions, channels]: one channel for each of its weights."""
    if isinstance(module, nn.GroupNorm):
        return t.reshape(*t.shape[:2], -1).transpose(1, 2)
    assert isinstance(module, nn.LayerNorm)
    return t.reshape(len(t), -1, math.prod(module.normalized_shape))


def normalised(module: nn.Module, x: Tensor) -> Tensor:
    """What a GroupNorm or LayerNorm scales and shifts."""
    if isinstance(module, nn.GroupNorm):
        return F.group_norm(x, module.num_groups, None, None, module.eps)
    assert isinstance(module, nn.LayerNorm)
    return F.layer_norm(x, module.normalized_shape, None, None, module.eps)


def windows(module: nn.Conv1d | nn.Conv2d, d: int, size: int, out: int) -> Tensor:
    """How many windows of a convolution see each of the `size` entries along its spatial dimension `d`."""
    before = module._reversed_padding_repeated_twice[-2 * (d + 1)]
    starts = torch.arange(out)[:, None] * module.stride[d] - before
    seen = starts + torch.arange(module.kernel_size[d]) * module.dilation[d]
    return torch.bincount(seen[(seen >= 0) & (seen < size)], minlength=size)


class Tape:
    """One forward pass, cut into pieces: the calls, and each piece's end, which still hangs on the piece alone."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.ends: list[Tensor] = []

    def close(self, outputs: Tensor) -> None:
        """The model's outputs end the last piece."""
        self.ends.append(outputs)


@contextmanager
def cut(layers: Mapping[str, Layer]) -> Iterator[Tape]:
    """Watch `layers` in the forward passes within. A trained product's input ends a piece; its output begins one."""
    tape = Tape()
    handles: list[Any] = []

    def watch(layer: Layer) -> None:
        product = type(layer.module) in PRODUCTS
        seen: list[Tensor] = []

        def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor] | None:
            if len(args) != 1 or not isinstance(args[0], Tensor):
                raise Unserved(f"{layer.path} is called by keyword: pass its input by position")
            if product:
                tape.ends.append(args[0])
                seen.append(args[0].detach())
                return (seen[-1],)
            with torch.no_grad():
                seen.append(normalised(module, args[0]))
            return None

        def after(module: nn.Module, args: tuple[Any, ...], z: Tensor) -> Tensor:
            if product or not z.requires_grad:
                z = z.detach().requires_grad_()
            tape.calls.append(Call(layer, len(tape.ends), seen.pop(), z))
            return z.clone()  # what follows may write into it

        handles.append(layer.module.register_forward_pre_hook(before))
        handles.append(layer.module.register_forward_hook(after))

    try:
        for layer in layers.values():
            watch(layer)
        yield tape
    finally:
        for handle in handles:
            handle.remove()
