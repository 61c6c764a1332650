"""The per-example gradients of a parameter, in whatever form is cheap.

A `Gradient` need not be multiplied out. It can tell its squared norms, give its rows, or add them up with weights, each
in the cheapest way its structure allows. Engines differ only in which of these they ask for: two passes need the
squared norms, book-keeping also the weighted sum.

A product of inputs and output gradients has two ways to a norm. *Keep*: make every example's gradient; it then stands
in for the weight gradient, and the clipped sum is one pass over memory. *Gram*: take the norm from T x T Gram matrices
of the positions and make only the clipped sum. `Costs` says which is cheaper.

Shapes: B examples, T positions of a layer within one example, fan-in d, outputs p.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.dp.engines.rows import (
    AT_ONCE,
    factor_squares,
    product,
    squared_norms,
    sum_type,
    term,
    weighted_rows,
    wide,
)
from harness.dp.native import kernels

CANCELLED = (
    1024.0  # times that (sum_t |g_t| |a_t|)^2 may exceed a squared norm before its terms count as cancelled
)


def scaled(v: Tensor, g: Tensor) -> Tensor:
    """Row i of `g` [B, ...] times v[i]."""
    return g * v.to(g.dtype).view(-1, *[1] * (g.ndim - 1))


UNSEEN = 1e-7  # times a contribution's length, by which rounding may lengthen it
HUGE = 1e36  # the length of a weighted output gradient, from which float32 is not sure to hold it


def placed(value: Tensor, out: Tensor | None) -> Tensor:
    """`value`, in `out` if there is one."""
    return value if out is None else out.copy_(value)


class Costs(NamedTuple):
    """What a norm costs beyond an ordinary weight gradient, in multiply-adds for each example.

    `keep`: to write, square and sum the gradients. `gram`: to make the Gram matrices. Zero where a norm is free.
    """

    keep: float
    gram: float

    @property
    def way(self) -> str:
        """The cheaper one."""
        return "free" if self.gram == 0 else "gram" if self.gram < self.keep else "keep"


class Gradient:
    """The per-example gradients of one parameter."""

    shape: torch.Size

    @property
    def held(self) -> bool:
        """Whether the weighted sum needs no more matrix products, but one pass over memory."""
        raise NotImplementedError

    @property
    def whole(self) -> bool:
        """Whether nothing of it is held, so that another backward pass may take its place."""
        return not self.held

    @property
    def rows(self) -> Tensor:
        """The gradients [B, *shape]."""
        raise NotImplementedError

    @property
    def footprint(self) -> int:
        """Bytes of rows held for each example."""
        raise NotImplementedError

    def costs(self, again: bool = False) -> Costs:
        """What the norms cost, either way.

        `again`: whether a gradient that is not held then costs another backward pass through its layer.
        """
        return Costs(0, 0)

    def squares(self, again: bool = False) -> Tensor:
        """Squared norms [B], in float64."""
        return squared_norms(self.rows)

    def weighted(self, v: Tensor, out: Tensor | None = None) -> Tensor:
        """The sum over examples of v[i] times gradient i, of the parameter's shape; into `out` if given. `v` is [B]."""
        return weighted_rows(v, self.rows, out)

    def some(self, chosen: Tensor) -> Gradient:
        """The gradients of the examples of these numbers."""
        raise NotImplementedError

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

    def some(self, chosen: Tensor) -> Gradient:
        return Rows(self.value[chosen])


class Product(Gradient):
    """Gradients that are products of other tensors, multiplied out on demand and then kept.

    They are kept as `made`, with their channels last if that is how they came.

    Where Gram matrices give the norms, an example whose positions cancel needs care: its clipped sum is made of terms
    far larger than itself, and their rounding, which no norm sees, could exceed its bound. Such examples are set
    `apart`: their gradients are made after all, and weighed and added as they are.
    """

    channels_last = False
    apart: tuple[Tensor, Product] | None = None
    measured: Tensor | None = None  # squared norms [B], where they were read off Gram matrices

    @cached_property
    def made(self) -> tuple[Tensor, Tensor]:
        """The gradients [B, *shape], or [B, p, ..., C] where channels are last, and squared norms [B] in float64."""
        raise NotImplementedError

    @property
    def held(self) -> bool:
        return "made" in self.__dict__

    @property
    def whole(self) -> bool:
        return not self.held and self.apart is None

    @property
    def rows(self) -> Tensor:
        made = self.made[0]  # which settles where the channels are
        return made.movedim(-1, 2) if self.channels_last else made

    @property
    def footprint(self) -> int:
        return self.shape.numel() * self.made[0].element_size() if self.held else 0

    def squares(self, again: bool = False) -> Tensor:
        if self.held or self.costs(again).way == "keep":
            return self.made[1]
        total, bound = self._gram()
        cancelled = (~(CANCELLED * total >= bound)).nonzero().squeeze(1)  # or not a number
        if len(cancelled):
            self.set_apart(cancelled)
            assert self.apart is not None
            total[cancelled] = self.apart[1].made[1]
        self.measured = total
        return total

    def set_apart(self, chosen: Tensor) -> None:
        """Make the gradients of the examples of these numbers after all, beside those that are made already."""
        if self.apart is not None:
            chosen = torch.cat([self.apart[0], chosen]).unique()
            if len(chosen) == len(self.apart[0]):
                return
        if len(chosen) and not self.held:
            self.apart = chosen, self.some(chosen)

    def factors(self) -> Factors:
        """Of the two whose product the gradients are; most often the output gradients are weighed."""
        raise NotImplementedError

    def _gram(self) -> tuple[Tensor, Tensor]:
        """Squared norms [B] without the products, and (sum_t |g_t| |a_t|)^2 [B], to which rounding is relative.

        Both in float64, and the squares of no factor in anything less: it could vanish, and the product would not.
        """
        raise NotImplementedError

    def some(self, chosen: Tensor) -> Product:
        raise NotImplementedError

    def weighted(self, v: Tensor, out: Tensor | None = None) -> Tensor:
        if not self.held:
            if self.apart is None:
                return self._weighted(v, out)
            chosen, gradients = self.apart
            total = self._weighted(v.index_fill(0, chosen, 0), out)
            weights, squares = v[chosen], gradients.made[1]
            good = squares.isfinite()  # what float32 cannot hold contributes nothing
            if not good.all():
                if not good.any():
                    return total
                gradients, weights = gradients.some(good.nonzero().squeeze(1)), weights[good]
                assert gradients.made
            return total.add_(gradients.weighted(weights.contiguous()))
        if self.channels_last and sum_type(torch.float32) is torch.float32:
            return kernels.weighted_rows(v, self.made[0], out, swap=True)
        return weighted_rows(v, self.rows, out)

    def _weighted(self, v: Tensor, out: Tensor | None) -> Tensor:
        """The weighted sum without the single products."""
        raise NotImplementedError


def gram_squares(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Squared norms [B] of sum_t g_t a_t^T from a [B, T, d] and g [B, T, p], and (sum_t |a_t| |g_t|)^2 [B].

    |sum_t g_t a_t^T|^2 = sum_{s,t} (a_s . a_t) (g_s . g_t), in float64: in float32 a dot product of d like terms can
    read low by d / 2 rounding units.
    """
    if kernels.serve(a, g):
        return kernels.outer_gram(a, g)
    a, g = a.double(), g.double()
    product = torch.bmm(a, a.mT).mul_(torch.bmm(g, g.mT))
    bound = product.diagonal(dim1=1, dim2=2).sqrt().sum(1).square()
    return product.sum((1, 2)), bound


def row_cost(elements: int, like: Tensor) -> int:
    """Writing, squaring and summing the elements of a per-example gradient, in multiply-adds (measured)."""
    if not kernels.serve(like):
        return 40 * elements
    return (20 if elements > 1 << 20 else 12) * elements


def gram_cost(terms: int, *like: Tensor) -> int:
    """So many multiply-adds of float64 Gram matrices, of which kernels make half, in those of a weight gradient."""
    return (3 if kernels.serve(*like) else 4) * terms


@dataclass
class Outer(Product):
    """sum_t g_t a_t^T, from a [B, T, d] and g [B, T, p]: the weight [p, d] of a linear layer."""

    a: Tensor
    g: Tensor
    lengths: tuple[Tensor, Tensor] | None = None  # squares [B] of both, where they make the norm

    def __post_init__(self) -> None:
        self.shape = torch.Size((self.g.shape[2], self.a.shape[2]))

    @cached_property
    def made(self) -> tuple[Tensor, Tensor]:
        a, g = wide(self.a), wide(self.g)
        if kernels.serve(a, g):
            return kernels.outer_rows(a, g)
        rows = torch.bmm(g.mT, a)
        return rows, squared_norms(rows)

    def costs(self, again: bool = False) -> Costs:
        positions, (p, d) = self.a.shape[1], self.shape
        if positions == 1:
            return Costs(row_cost(p * d, self.a), 0)
        gram = gram_cost(positions**2 * (p + d), self.a, self.g)
        return Costs(row_cost(p * d, self.a), gram + again * positions * p * d)

    def _gram(self) -> tuple[Tensor, Tensor]:
        a, g = wide(self.a), wide(self.g)
        if a.shape[1] > 1:
            return gram_squares(a, g)
        self.lengths = factor_squares(a[:, 0]), factor_squares(g[:, 0])
        total = self.lengths[0] * self.lengths[1]
        return total, total

    def factors(self) -> Factors:
        a, g = self.lengths or (factor_squares(wide(self.a)), factor_squares(wide(self.g)))
        return Factors(g, a, self.g.shape[1] * self.g.shape[2])

    def some(self, chosen: Tensor) -> Product:
        return Outer(self.a[chosen], self.g[chosen])

    def _weighted(self, v: Tensor, out: Tensor | None) -> Tensor:
        a, g = term(wide(self.a)).flatten(0, 1), scaled(v, term(wide(self.g))).flatten(0, 1)
        return placed(product(g.mT, a.mT), out)

    def __add__(self, other: Gradient) -> Gradient:
        if isinstance(other, Outer) and not (self.held or other.held):
            return Outer(torch.cat([self.a, other.a], 1), torch.cat([self.g, other.g], 1))
        return super().__add__(other)


def settle(weighed: Iterable[tuple[Gradient, Tensor]], dtype: torch.dtype) -> None:
    """Set apart, in each gradient, the examples of which no factor can be multiplied by their weights [B].

    The weighted sum of a product is formed from weighted output gradients. In `dtype` these may be too small to keep
    their digits, which inputs of 1e37 make large again, or too large, which inputs of 1e-37 make small again. The
    gradients of such examples are made first and weighed then.
    """
    given = [(g, v, g.measured) for g, v in weighed if isinstance(g, Product) and g.measured is not None]
    if not given:
        return
    narrow = torch.finfo(torch.float32 if dtype.itemsize < 4 else dtype)
    lost = (narrow.tiny * narrow.eps / UNSEEN) ** 2
    factors = [g.factors() for g, *_ in given]
    all_of = [
        t for (_, v, measured), f in zip(given, factors, strict=True) for t in (v, measured, f.other, f.own)
    ]
    least, most = (t.unflatten(0, (-1, 4)).tolist() for t in torch.stack(all_of).aminmax(dim=1))
    for (g, v, measured), f, low, high in zip(given, factors, least, most, strict=True):
        if f.spread * high[2] * lost <= low[0] ** 2 * low[1] and high[0] ** 2 * high[3] <= HUGE**2:
            continue
        squares = v.square()
        bad = (f.other * (f.spread * lost) > squares * measured) & (measured > 0)
        bad = (bad | (squares * f.own > HUGE**2)) & (v > 0)
        g.set_apart(bad.nonzero().squeeze(1))


class Factors(NamedTuple):
    """Squared lengths [B], in float64, of the factor that is weighed and of the other, by what its entries count.

    An error of one in each entry of the weighed factor moves the gradient by at most (other * spread)^(1/2).
    """

    own: Tensor
    other: Tensor
    spread: float


@dataclass
class Lookup(Gradient):
    """g_t added to row index_t, from index [B, T] and g [B, T, d]: the weight [entries, d] of an embedding."""

    index: Tensor
    g: Tensor
    entries: int

    def __post_init__(self) -> None:
        self.shape = torch.Size((self.entries, self.g.shape[2]))

    @property
    def held(self) -> bool:
        return True

    @property
    def footprint(self) -> int:
        return 0

    @cached_property
    def summed(self) -> tuple[Tensor, Tensor]:
        """Which rows of which examples are not zero [R], as example * entries + entry, and these rows [R, d].

        Positions that look up the same entry in the same example add up before they are squared or added to others.
        """
        g = wide(self.g).flatten(0, 1)
        first = torch.arange(len(self.index), device=self.index.device) * self.entries
        keys, inverse = torch.unique((self.index + first[:, None]).flatten(), return_inverse=True)
        return keys, g.new_zeros(len(keys), g.shape[1]).index_add_(0, inverse, g)

    @property
    def rows(self) -> Tensor:
        keys, sums = self.summed
        whole = sums.new_zeros(len(self.index) * self.entries, sums.shape[1])
        return whole.index_copy_(0, keys, sums).unflatten(0, (-1, self.entries))

    def squares(self, again: bool = False) -> Tensor:
        keys, sums = self.summed
        squares = squared_norms(sums)
        return squares.new_zeros(len(self.index)).index_add_(0, keys // self.entries, squares)

    def weighted(self, v: Tensor, out: Tensor | None = None) -> Tensor:
        keys, sums = self.summed
        sums = term(sums)
        total = sums.new_zeros(self.shape)
        total.index_add_(0, keys % self.entries, scaled(v[keys // self.entries], sums))
        return placed(total, out)

    def some(self, chosen: Tensor) -> Gradient:
        return Lookup(self.index[chosen], self.g[chosen], self.entries)

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

    def as_image(self) -> Geometry:
        """The same for images of one row, where it is for lines: some operators know only images."""
        if len(self.kernel) > 1:
            return self
        return Geometry(
            (1, *self.kernel), (1, *self.stride), (0, *self.padding), (1, *self.dilation), self.groups
        )


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
            return kernels.convolution_rows(
                x[:, 0], g[:, 0], geo.kernel, geo.stride, geo.padding, geo.dilation
            )
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

    def costs(self, again: bool = False) -> Costs:
        geo, elements = self.geometry, self.shape.numel()
        keep = row_cost(elements, self.x)
        positions = self.g.shape[1] * math.prod(self.g.shape[3:])
        if len(geo.kernel) > 2:
            return Costs(keep, math.inf)
        once_more = again * positions * elements
        if self.served:
            pixels = math.prod(n + 2 * p for n, p in zip(self.x.shape[3:], geo.padding, strict=True))
            offsets = math.prod(geo.kernel)
            terms = pixels**2 * self.shape[1] + positions**2 * (self.shape[0] + 2 * offsets)
        else:
            terms = positions**2 * (math.prod(self.shape[1:]) + self.shape[0] // geo.groups)
        return Costs(keep, gram_cost(terms, self.x, self.g) + once_more)

    def _gram(self) -> tuple[Tensor, Tensor]:
        geo = self.geometry
        if self.served:
            return kernels.convolution_gram(
                self.x[:, 0], self.g[:, 0], geo.kernel, geo.stride, geo.padding, geo.dilation
            )
        geo, groups, x, g = geo.as_image(), geo.groups, wide(self.x).flatten(0, 1), wide(self.g)
        patches = F.unfold(
            x if x.ndim == 4 else x.unsqueeze(2), geo.kernel, geo.dilation, geo.padding, geo.stride
        )

        # [B, k, groups, d, T] -> [B * groups, k * T, d], and the same for g
        def positions(t: Tensor) -> Tensor:
            return t.unflatten(2, (groups, -1)).permute(0, 2, 1, 4, 3).flatten(2, 3).flatten(0, 1)

        total, bound = gram_squares(positions(patches.unflatten(0, g.shape[:2])), positions(g.flatten(3)))
        return total.unflatten(0, (-1, groups)).sum(1), bound.sqrt().unflatten(0, (-1, groups)).sum(
            1
        ).square()

    def factors(self) -> Factors:
        # An input lies in at most as many windows as a kernel has entries.
        spread = self.g[0].numel() * math.prod(self.geometry.kernel)
        return Factors(factor_squares(wide(self.g)), factor_squares(wide(self.x)), spread)

    def some(self, chosen: Tensor) -> Product:
        return Patches(self.x[chosen], self.g[chosen], self.geometry)

    def _weighted(self, v: Tensor, out: Tensor | None) -> Tensor:
        if sum_type(self.x.dtype) is not self.x.dtype:
            # There is no fast convolution in float64: the gradients are made in float32 and added.
            total = v.new_zeros(self.shape, dtype=torch.float64)
            for chosen in torch.arange(len(v), device=v.device).split(AT_ONCE):
                total += weighted_rows(v[chosen], self.some(chosen).rows)
            return placed(total, out)
        g = scaled(v, wide(self.g)).flatten(0, 1)
        return placed(self._weight_gradient(wide(self.x).flatten(0, 1), g, self.geometry.groups), out)

    def __add__(self, other: Gradient) -> Gradient:
        if (
            isinstance(other, Patches)
            and self.geometry == other.geometry
            and self.x.shape[2:] == other.x.shape[2:]
            and not (self.held or other.held)
        ):
            return Patches(torch.cat([self.x, other.x], 1), torch.cat([self.g, other.g], 1), self.geometry)
        return super().__add__(other)
