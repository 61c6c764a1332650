"""Per-layer rules: from a layer's input and output gradient to the per-example gradients of its parameters.

A rule does not have to multiply a gradient out. It returns a `Gradient`: an object that can tell its squared norms,
give its rows, or add them up with weights, each in the cheapest way its structure allows. Engines differ only in which
of these they ask for: two passes need the squared norms, book-keeping also the weighted sum.

Shapes: B examples, T positions of a layer within one example, fan-in d, outputs p. An input arrives as [B * k, ...],
the k rows of one example next to each other (k is 1 unless a model folds windows or frames into the batch), the output
gradient likewise; it is the gradient of the SUM of the examples' losses, so row i belongs to example i alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.dp.engines.rows import squared_norms, weighted_rows, wide

ROW_COST = (
    41  # writing, squaring and summing one element of a per-example gradient, in multiply-adds (measured)
)
LARGE = (
    1 << 18
)  # elements of a per-example gradient beyond which a CPU's allocator makes rows four times dearer
MARGIN = 4.0  # rounding units added to a squared norm from Gram matrices; 2.6 were seen at d = 64, 5.4 at d = 16384
CANCELLED = 1e4  # rounding units below which a squared norm is not taken from Gram matrices at all


def scaled(v: Tensor, g: Tensor) -> Tensor:
    """Row i of `g` [B, ...] times v[i]."""
    return g * v.to(g.dtype).view(-1, *[1] * (g.ndim - 1))


def gram_squares(a: Tensor, g: Tensor) -> Tensor:
    """Squared norms [B], in float64, of sum_t g_t a_t^T from a [B, T, d] and g [B, T, p], without the products.

    |sum_t g_t a_t^T|^2 = sum_{s,t} (a_s . a_t) (g_s . g_t). The terms may cancel, so rounding is relative not to the
    result but to the bound (sum_t |a_t| |g_t|)^2. A margin is added, so that a norm errs upwards; and where the terms
    cancel so far that rounding would count, the products are made after all: a norm that reads low would let an
    example contribute more than its bound.
    """
    product = torch.bmm(a, a.mT).mul_(torch.bmm(g, g.mT))
    unit = torch.finfo(a.dtype).eps * product.diagonal(dim1=1, dim2=2).double().sqrt().sum(1).square()
    total = product.sum(2).double().sum(1) + MARGIN * unit
    if a.shape[1] > 1:
        cancelled = (total < CANCELLED * unit).nonzero().squeeze(1)
        for some in cancelled.split(8) if len(cancelled) else ():
            total[some] = squared_norms(torch.bmm(g[some].mT.double(), a[some].double()))
    return total


class Gradient:
    """The per-example gradients of one parameter, in whatever form is cheap."""

    shape: torch.Size

    @property
    def held(self) -> bool:
        """Whether the weighted sum needs no more matrix products, but one pass over memory."""
        raise NotImplementedError

    @property
    def rows(self) -> Tensor:
        """The gradients [B, *shape]."""
        raise NotImplementedError

    @property
    def footprint(self) -> int:
        """Bytes of rows held for each example."""
        raise NotImplementedError

    def squares(self, again: bool = False) -> Tensor:
        """Squared norms [B], in float64.

        `again`: whether a gradient that is not held then costs another backward pass through its layer, which a form
        with a choice takes into account.
        """
        return squared_norms(self.rows)

    def weighted(self, v: Tensor) -> Tensor:
        """The sum over examples of v[i] times gradient i, of the parameter's shape. `v` is [B]."""
        return weighted_rows(v, self.rows)

    def __add__(self, other: Gradient) -> Gradient:
        """The gradients of a parameter used in two places: the rows add, and their squared norms do not."""
        return Rows(self.rows + other.rows)


@dataclass
class Rows(Gradient):
    """Gradients that are simply there."""

    value: Tensor

    def __post_init__(self) -> None:
        self.shape = self.value.shape[1:]

    @property
    def held(self) -> bool:
        return True

    @property
    def rows(self) -> Tensor:
        return self.value

    @property
    def footprint(self) -> int:
        return self.shape.numel() * self.value.element_size()


class Implied(Gradient):
    """Gradients that other tensors imply, multiplied out on demand and then kept."""

    @property
    def held(self) -> bool:
        return "rows" in self.__dict__

    @cached_property
    def rows(self) -> Tensor:
        return self._multiply_out()

    def _multiply_out(self) -> Tensor:
        raise NotImplementedError

    @property
    def footprint(self) -> int:
        return self.shape.numel() * self.rows.element_size() if "rows" in self.__dict__ else 0


@dataclass
class Outer(Implied):
    """sum_t g_t a_t^T, from a [B, T, d] and g [B, T, p]: the weight [p, d] of a linear layer."""

    a: Tensor
    g: Tensor

    def __post_init__(self) -> None:
        self.shape = torch.Size((self.g.shape[2], self.a.shape[2]))

    def _multiply_out(self) -> Tensor:
        a, g = wide(self.a), wide(self.g)
        return torch.bmm(g.mT, a)

    def squares(self, again: bool = False) -> Tensor:
        p, d = self.shape
        if self.a.shape[1] == 1:
            return squared_norms(self.a) * squared_norms(self.g)
        if gram_is_cheaper(self.a.shape[1], d, p, again, self.a.device):
            return gram_squares(wide(self.a), wide(self.g))
        return squared_norms(self.rows)

    def weighted(self, v: Tensor) -> Tensor:
        if self.held:
            return weighted_rows(v, self.rows)
        a, g = wide(self.a), wide(self.g)
        return scaled(v, g).flatten(0, 1).mT @ a.flatten(0, 1)

    def __add__(self, other: Gradient) -> Gradient:
        if isinstance(other, Outer) and not (self.held or other.held):
            return Outer(torch.cat([self.a, other.a], 1), torch.cat([self.g, other.g], 1))
        return super().__add__(other)


def gram_is_cheaper(positions: int, fan_in: int, outputs: int, again: bool, device: torch.device) -> bool:
    """Whether T x T Gram matrices give a norm for less than the rows do.

    In multiply-adds: the Gram matrices take T^2 (d + p), and the weighted sum T d p after them, or twice that if it
    takes another backward pass. Rows take T d p, and are then written, squared and summed.
    """
    elements = fan_in * outputs
    row_cost = ROW_COST * (4 if elements > LARGE and device.type == "cpu" else 1)
    return positions**2 * (fan_in + outputs) + again * positions * elements < row_cost * elements


@dataclass
class Lookup(Implied):
    """g_t added to row index_t, from index [B, T] and g [B, T, d]: the weight [entries, d] of an embedding."""

    index: Tensor
    g: Tensor
    entries: int

    def __post_init__(self) -> None:
        self.shape = torch.Size((self.entries, self.g.shape[2]))

    @property
    def held(self) -> bool:
        return True

    @cached_property
    def keys(self) -> Tensor:
        """The index [B * T] into the rows of all examples."""
        first = torch.arange(len(self.index), device=self.index.device) * self.entries
        return (self.index + first[:, None]).flatten()

    def _multiply_out(self) -> Tensor:
        g = wide(self.g).flatten(0, 1)
        return (
            g.new_zeros(len(self.index) * self.entries, g.shape[1])
            .index_add_(0, self.keys, g)
            .unflatten(0, (-1, self.entries))
        )

    def squares(self, again: bool = False) -> Tensor:
        # Positions that look up the same entry in the same example add up before they are squared.
        g = wide(self.g).flatten(0, 1)
        keys, inverse = torch.unique(self.keys, return_inverse=True)
        squares = squared_norms(g.new_zeros(len(keys), g.shape[1]).index_add_(0, inverse, g))
        return squares.new_zeros(len(self.index)).index_add_(0, keys // self.entries, squares)

    def weighted(self, v: Tensor) -> Tensor:
        g = scaled(v, wide(self.g)).flatten(0, 1)
        return g.new_zeros(self.shape).index_add_(0, self.index.flatten(), g)

    def __add__(self, other: Gradient) -> Gradient:
        if isinstance(other, Lookup):
            return Lookup(
                torch.cat([self.index, other.index], 1), torch.cat([self.g, other.g], 1), self.entries
            )
        return super().__add__(other)


@dataclass(frozen=True)
class Geometry:
    """How a convolution reads its input."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


@dataclass
class Patches(Implied):
    """The weight of a convolution, from inputs x [B, k, C, ...] and output gradients g [B, k, p, ...]."""

    x: Tensor
    g: Tensor
    geometry: Geometry

    def __post_init__(self) -> None:
        fan = self.x.shape[2] // self.geometry.groups
        self.shape = torch.Size((self.g.shape[2], fan, *self.geometry.kernel))

    @property
    def footprint(self) -> int:
        return 2 * super().footprint  # the convolution reorders its result, from a copy of the same size

    def _weight_gradient(self, x: Tensor, g: Tensor, groups: int) -> Tensor:
        """The weight gradient of a convolution, from x [N, groups * c, ...] and g [N, groups * p, ...]."""
        geo, n = self.geometry, len(self.geometry.kernel)
        weight = x.new_empty(1).expand(g.shape[1], *self.shape[1:])  # only its shape matters
        return torch.ops.aten.convolution_backward(
            g,
            x,
            weight,
            None,
            geo.stride,
            geo.padding,
            geo.dilation,
            False,
            [0] * n,
            groups,
            [False, True, False],
        )[1]

    def _multiply_out(self) -> Tensor:
        # Examples become groups of channels of one convolution, whose weight gradient then holds each example's own.
        x, g = (wide(t).transpose(0, 1).flatten(1, 2) for t in (self.x, self.g))
        return self._weight_gradient(x, g, len(self.x) * self.geometry.groups).unflatten(0, (len(self.x), -1))

    def squares(self, again: bool = False) -> Tensor:
        geo = self.geometry
        positions, fan_in = self.g.shape[1] * math.prod(self.g.shape[3:]), math.prod(self.shape[1:])
        unfolds = len(geo.kernel) <= 2
        if unfolds and gram_is_cheaper(positions, fan_in, self.shape[0] // geo.groups, again, self.x.device):
            return self._gram_squares()
        return squared_norms(self.rows)

    def _gram_squares(self) -> Tensor:
        geo, groups = self.geometry, self.geometry.groups
        x, g = wide(self.x).flatten(0, 1), wide(self.g)
        line = len(geo.kernel) == 1  # unfold knows only images

        def two(sizes: tuple[int, ...], fill: int) -> tuple[int, ...]:
            return (fill, *sizes) if line else sizes

        patches = F.unfold(
            x.unsqueeze(2) if line else x,
            two(geo.kernel, 1),
            dilation=two(geo.dilation, 1),
            padding=two(geo.padding, 0),
            stride=two(geo.stride, 1),
        )

        # [B, k, groups, d, T] -> [B * groups, k * T, d], and the same for g
        def positions(t: Tensor) -> Tensor:
            return t.unflatten(2, (groups, -1)).permute(0, 2, 1, 4, 3).flatten(2, 3).flatten(0, 1)

        a = positions(patches.unflatten(0, g.shape[:2]))
        return gram_squares(a, positions(g.flatten(3))).unflatten(0, (-1, groups)).sum(1)

    def weighted(self, v: Tensor) -> Tensor:
        if self.held:
            return weighted_rows(v, self.rows)
        g = scaled(v, wide(self.g)).flatten(0, 1)
        return self._weight_gradient(wide(self.x).flatten(0, 1), g, self.geometry.groups)

    def __add__(self, other: Gradient) -> Gradient:
        if (
            isinstance(other, Patches)
            and self.geometry == other.geometry
            and self.x.shape[2:] == other.x.shape[2:]
            and not (self.held or other.held)
        ):
            return Patches(torch.cat([self.x, other.x], 1), torch.cat([self.g, other.g], 1), self.geometry)
        return super().__add__(other)


def positions_summed(g: Tensor, examples: int, keep: int) -> Tensor:
    """`g` [B * k, ..., (keep last dimensions)] summed over all positions of each example: [B, (keep last)]."""
    return g.reshape(examples, -1, *g.shape[g.ndim - keep :]).sum(1)


def channels_summed(g: Tensor, examples: int) -> Tensor:
    """`g` [B * k, C, ...] summed over all positions of each example: [B, C]."""
    return g.reshape(examples, -1, g.shape[1], math.prod(g.shape[2:])).sum((1, 3))


Rule = Callable[[Any, Tensor, Tensor, int, Collection[str]], dict[str, Gradient]]


def linear(
    module: nn.Linear, x: Tensor, g: Tensor, examples: int, wanted: Collection[str]
) -> dict[str, Gradient]:
    """Input [B * k, ..., d], output gradient [B * k, ..., p]."""
    x, g = x.reshape(examples, -1, x.shape[-1]), g.reshape(examples, -1, g.shape[-1])
    found: dict[str, Gradient] = {}
    if "weight" in wanted:
        found["weight"] = Outer(x, g)
    if "bias" in wanted:
        found["bias"] = Rows(wide(g).sum(1) if g.shape[1] > 1 else g[:, 0])
    return found


def convolution(
    module: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor, g: Tensor, examples: int, wanted: Collection[str]
) -> dict[str, Gradient]:
    """Input [B * k, C, ...], output gradient [B * k, p, ...]; any stride, padding, dilation and groups."""
    found: dict[str, Gradient] = {}
    if "weight" in wanted:
        padding = module.padding
        if isinstance(padding, str) or module.padding_mode != "zeros":
            mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
            x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
            padding = (0,) * len(module.kernel_size)
        geometry = Geometry(module.kernel_size, module.stride, padding, module.dilation, module.groups)
        found["weight"] = Patches(x.unflatten(0, (examples, -1)), g.unflatten(0, (examples, -1)), geometry)
    if "bias" in wanted:
        found["bias"] = Rows(channels_summed(wide(g), examples))
    return found


def embedding(
    module: nn.Embedding, x: Tensor, g: Tensor, examples: int, wanted: Collection[str]
) -> dict[str, Gradient]:
    """Input indices [B * k, ...], output gradient [B * k, ..., d]; the padding entry gets no gradient."""
    index, g = x.reshape(examples, -1), g.reshape(examples, -1, g.shape[-1])
    if module.padding_idx is not None:
        g = g.masked_fill((index == module.padding_idx)[:, :, None], 0)
    return {"weight": Lookup(index, g, module.num_embeddings)}


def _affine(
    normalised: Callable[[], Tensor], g: Tensor, summed: Callable[[Tensor], Tensor], wanted: Collection[str]
) -> dict[str, Gradient]:
    """Scale and shift of a normalised input: sum_t g_t * x^_t and sum_t g_t, each per feature."""
    found: dict[str, Gradient] = {}
    if "weight" in wanted:
        found["weight"] = Rows(summed(wide(g) * wide(normalised())))
    if "bias" in wanted:
        found["bias"] = Rows(summed(wide(g)))
    return found


def layer_norm(
    module: nn.LayerNorm, x: Tensor, g: Tensor, examples: int, wanted: Collection[str]
) -> dict[str, Gradient]:
    """Input and output gradient [B * k, ..., *normalized_shape]."""
    shape = module.normalized_shape
    return _affine(
        lambda: F.layer_norm(x, shape, None, None, module.eps),
        g,
        lambda t: positions_summed(t, examples, len(shape)),
        wanted,
    )


def rms_norm(
    module: nn.RMSNorm, x: Tensor, g: Tensor, examples: int, wanted: Collection[str]
) -> dict[str, Gradient]:
    """Input and output gradient [B * k, ..., *normalized_shape]."""
    shape = module.normalized_shape
    return _affine(
        lambda: F.rms_norm(x, list(shape), None, module.eps),
        g,
        lambda t: positions_summed(t, examples, len(shape)),
        wanted,
    )


def group_norm(
    module: nn.GroupNorm, x: Tensor, g: Tensor, examples: int, wanted: Collection[str]
) -> dict[str, Gradient]:
    """Input and output gradient [B * k, C, ...]. The scale has one entry per channel, not per group."""
    return _affine(
        lambda: F.group_norm(x, module.num_groups, None, None, module.eps),
        g,
        lambda t: channels_summed(t, examples),
        wanted,
    )


def instance_norm(
    module: nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d,
    x: Tensor,
    g: Tensor,
    examples: int,
    wanted: Collection[str],
) -> dict[str, Gradient]:
    """Input and output gradient [B * k, C, ...]."""
    own = module.training or not module.track_running_stats  # statistics of the input itself
    mean, var = (None, None) if own else (module.running_mean, module.running_var)
    return _affine(
        lambda: F.instance_norm(x, mean, var, None, None, own, 0.0, module.eps),
        g,
        lambda t: channels_summed(t, examples),
        wanted,
    )


RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: linear,
    nn.Conv1d: convolution,
    nn.Conv2d: convolution,
    nn.Conv3d: convolution,
    nn.Embedding: embedding,
    nn.LayerNorm: layer_norm,
    nn.RMSNorm: rms_norm,
    nn.GroupNorm: group_norm,
    nn.InstanceNorm1d: instance_norm,
    nn.InstanceNorm2d: instance_norm,
    nn.InstanceNorm3d: instance_norm,
}


def rule_for(module: nn.Module) -> Rule | None:
    """The rule of a module that computes what its class in torch.nn computes; None for any other.

    A subclass keeps the rule as long as it overrides none of the methods that compute, and holds no parameters but
    `weight` and `bias` (weight normalisation and parametrisations hold others).
    """
    if not set(module._parameters) <= {"weight", "bias"} or "forward" in vars(module):
        return None
    for base, rule in RULES.items():
        if isinstance(module, base):
            same = all(
                getattr(type(module), method, None) is getattr(base, method, None)
                for method in ("forward", "_conv_forward", "_apply_instance_norm")
            )
            return rule if same else None
    return None
