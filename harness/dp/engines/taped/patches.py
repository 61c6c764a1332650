"""The per-example gradients of a convolution's weight: products of the patches that its windows see."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.dp.engines.rows import squared_norms, wide
from harness.dp.engines.taped.gradients import (
    Costs,
    Gradient,
    Product,
    gram_cost,
    gram_squares,
    placed,
    row_cost,
    scaled,
)
from harness.dp.native import kernels

WINDOWS = 1 << 22  # numbers of unfolded windows at a time


@dataclass(frozen=True)
class Geometry:
    """How a convolution reads its input."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def as_image(self) -> Geometry:
        """The same for images of one row, where it is for lines: some operators know only images."""
        if len(self.kernel) > 1:
            return self
        return Geometry((1, *self.kernel), (1, *self.stride), (0, *self.padding), (1, *self.dilation), self.groups)


@dataclass
class Patches(Product):
    """The weight of a convolution, from inputs x [B, k, C, ...] and output gradients g [B, k, p, ...]."""

    x: Tensor
    g: Tensor
    geometry: Geometry

    def __post_init__(self) -> None:
        fan = self.x.shape[2] // self.geometry.groups
        self.shape = torch.Size((self.g.shape[2], fan, *self.geometry.kernel))

    @property
    def served(self) -> bool:
        """Whether there are kernels for it: for one image or line to an example, and one group of channels."""
        simple = self.x.shape[1] == 1 and self.geometry.groups == 1 and len(self.geometry.kernel) <= 2
        return simple and kernels.serve(self.x, self.g) is not None

    @cached_property
    def made(self) -> tuple[Tensor, Tensor]:
        x, g, geo = wide(self.x), wide(self.g), self.geometry
        if self.served:
            self.channels_last = True
            return kernels.convolution_rows(x[:, 0], g[:, 0], geo.kernel, geo.stride, geo.padding, geo.dilation)
        # Examples become groups of channels of one convolution, whose weight gradient then holds each example's own.
        x, g = (t.transpose(0, 1).flatten(1, 2) for t in (x, g))
        rows = self._weight_gradient(x, g, len(self.x) * geo.groups).unflatten(0, (len(self.x), -1))
        return rows, squared_norms(rows)

    def _weight_gradient(self, x: Tensor, g: Tensor, groups: int) -> Tensor:
        """The weight gradient of a convolution, from x [N, groups * c, ...] and g [N, groups * p, ...]."""
        geo, n = self.geometry, len(self.geometry.kernel)
        weight = x.new_empty(1).expand(g.shape[1], *self.shape[1:])  # only its shape matters
        return torch.ops.aten.convolution_backward(
            g, x, weight, None, geo.stride, geo.padding, geo.dilation, False, [0] * n, groups, [False, True, False]
        )[1]  # fmt: skip

    def costs(self) -> Costs:
        geo, elements = self.geometry, self.shape.numel()
        keep = row_cost(elements, self.x)
        positions = self.g.shape[1] * math.prod(self.g.shape[3:])
        if len(geo.kernel) > 2:
            return Costs(keep, math.inf)
        if self.served:
            pixels = math.prod(n + 2 * p for n, p in zip(self.x.shape[3:], geo.padding, strict=True))
            offsets = math.prod(geo.kernel)
            terms = pixels**2 * self.shape[1] + positions**2 * (self.shape[0] + 2 * offsets)
        else:
            terms = positions**2 * (math.prod(self.shape[1:]) + self.shape[0] // geo.groups)
        return Costs(keep, gram_cost(terms, self.x, self.g), elements, 2 * positions**2)

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        return self.x, self.g

    def _gram(self) -> tuple[Tensor, Tensor]:
        geo = self.geometry
        if self.served:
            return kernels.convolution_gram(
                self.x[:, 0], self.g[:, 0], geo.kernel, geo.stride, geo.padding, geo.dilation
            )
        total, bound = gram_squares(*self._windows())
        split = total.unflatten(0, (-1, geo.groups)), bound.sqrt().unflatten(0, (-1, geo.groups))
        return split[0].sum(1), split[1].sum(1).square()

    def _windows(self) -> tuple[Tensor, Tensor]:
        """What each window sees, [B * groups, k * T, d], and the output gradients there, [B * groups, k * T, p]."""
        geo, groups = self.geometry.as_image(), self.geometry.groups
        x, g = wide(self.x).flatten(0, 1), wide(self.g)
        images = x if x.ndim == 4 else x.unsqueeze(2)
        patches = F.unfold(images, geo.kernel, geo.dilation, geo.padding, geo.stride)

        # [B, k, groups, d, T] -> [B * groups, k * T, d], and the same for g
        def positions(t: Tensor) -> Tensor:
            return t.unflatten(2, (groups, -1)).permute(0, 2, 1, 4, 3).flatten(2, 3).flatten(0, 1)

        return positions(patches.unflatten(0, g.shape[:2])), positions(g.flatten(3))

    def some(self, chosen: Tensor) -> Product:
        return Patches(self.x[chosen], self.g[chosen], self.geometry)

    def _weighted(self, v: Tensor, out: Tensor | None) -> Tensor:
        groups, (outputs, fan) = self.geometry.groups, (self.shape[0], self.shape[1:].numel())
        total = v.new_zeros(groups, outputs // groups, fan, dtype=torch.float64)
        positions = self.g.shape[1] * math.prod(self.g.shape[3:])
        at_once = max(1, WINDOWS // max(1, positions * fan * groups))
        for begin in range(0, len(v), at_once):
            here = slice(begin, begin + at_once)
            windows = Patches(self.x[here], self.g[here], self.geometry)._windows()
            # [B * groups, k * T, .] -> [groups, B * k * T, .]
            a, g = (t.double().unflatten(0, (-1, groups)) for t in windows)
            total.baddbmm_(scaled(v[here], g).transpose(0, 1).flatten(1, 2).mT, a.transpose(0, 1).flatten(1, 2))
        return placed(total.view(self.shape), out)

    def __add__(self, other: Gradient) -> Gradient:
        if (
            isinstance(other, Patches)
            and self.geometry == other.geometry
            and self.x.shape[2:] == other.x.shape[2:]
            and not (self.held or other.held)
        ):
            return Patches(torch.cat([self.x, other.x], 1), torch.cat([self.g, other.g], 1), self.geometry)
        return super().__add__(other)
