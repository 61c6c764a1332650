"""The per-example gradients of a parameter, in whatever form is cheap.

A `Gradient` need not be multiplied out. It can tell its squared norms, give its rows, or add them up with weights, each
in the cheapest way its structure allows. Engines differ only in the way to a norm that they ask for.

A product of inputs and output gradients has two ways to a norm. *Keep*: make every example's gradient; it then stands
in for the weight gradient, and the clipped sum is one pass over memory. *Gram*: take the norm from T x T Gram matrices
of the positions and make only the clipped sum. `Costs` says which is cheaper.

Shapes: B examples, T positions of a layer within one example, fan-in d, outputs p.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from harness.dp.engines.rows import factor_squares, squared_norms, weighted_rows, wide
from harness.dp.native import kernels

# Times that (sum_t |g_t| |a_t|)^2 may exceed a squared norm before its terms count as cancelled.
CANCELLED = 1024.0
SMALL, LARGE = 2.0**-300, 2.0**600  # squares between which products of squares are exact in float64


def scaled(v: Tensor, g: Tensor) -> Tensor:
    """Row i of `g` [B, ...] times v[i]."""
    return g * v.to(g.dtype).view(-1, *[1] * (g.ndim - 1))


def places(chosen: Tensor, examples: int) -> Tensor:
    """Where each of so many examples is among the `chosen`, [examples]; -1 for the others."""
    found = torch.full((examples,), -1, device=chosen.device)
    found[chosen] = torch.arange(len(chosen), device=chosen.device)
    return found


def placed(value: Tensor, out: Tensor | None) -> Tensor:
    """`value`, in `out` if there is one."""
    return value if out is None else out.copy_(value)


class Costs(NamedTuple):
    """What a norm costs beyond an ordinary weight gradient, in multiply-adds for each example.

    `keep`: to write, square and sum the gradients. `gram`: to make the Gram matrices. Zero where a norm is free.
    `kept` and `grams`: the numbers that a gradient has, and that its Gram matrices have.
    """

    keep: float
    gram: float
    kept: float = 0
    grams: float = 0

    @property
    def way(self) -> str:
        """The cheaper one."""
        return "free" if self.gram == 0 else "gram" if self.gram < self.keep else "keep"

    @property
    def small(self) -> bool:
        """Whether Gram matrices, or no work at all, take less memory than gradients."""
        return self.gram == 0 or self.grams < self.kept


class Gradient:
    """The per-example gradients of one parameter."""

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

    def costs(self) -> Costs:
        """What the norms cost, either way."""
        return Costs(0, 0)

    def squares(self, lean: bool = False) -> Tensor:
        """Squared norms [B], in float64; `lean`: in the way that takes less memory."""
        return squared_norms(self.rows)

    def weighted(self, v: Tensor, out: Tensor | None = None) -> Tensor:
        """The sum over examples of v[i] times gradient i, in float64, of the parameter's shape; into `out` if given.

        `v` is [B], and float64: what float32 could not hold of v[i] or of a product with it is not lost.
        """
        return weighted_rows(v, self.rows, out)

    def some(self, chosen: Tensor) -> Gradient:
        """The gradients of the examples of these numbers."""
        raise NotImplementedError

    def kept(self, chosen: Tensor) -> Gradient:
        """The same of these examples, to the bit: rows that were measured are not made again, in another way."""
        return self.some(chosen)

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

    @cached_property
    def made(self) -> tuple[Tensor, Tensor]:
        """The gradients [B, *shape], or [B, p, ..., C] where channels are last, and squared norms [B] in float64."""
        raise NotImplementedError

    @property
    def held(self) -> bool:
        return "made" in self.__dict__

    @property
    def rows(self) -> Tensor:
        made = self.made[0]  # which settles where the channels are
        return made.movedim(-1, 2) if self.channels_last else made

    @property
    def footprint(self) -> int:
        return self.shape.numel() * self.made[0].element_size() if self.held else 0

    def squares(self, lean: bool = False) -> Tensor:
        costs = self.costs()
        if self.held or not (costs.small if lean else costs.way != "keep"):
            return self.made[1]
        total, bound = self._gram()
        doubtful = ~(CANCELLED * total >= bound)  # or not a number
        a, g = self.factors
        if g.dtype is torch.float64:
            doubtful |= (total < SMALL) | (factor_squares(a) > LARGE) | (factor_squares(g) > LARGE)
        chosen = doubtful.nonzero().squeeze(1)
        if len(chosen):
            self.apart = chosen, self.some(chosen)
            total[chosen] = self.apart[1].made[1]
        return total

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """What the gradients are products of, [B, ...] each."""
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
                gradients, weights = gradients.kept(good.nonzero().squeeze(1)), weights[good]
            return total.add_(gradients.weighted(weights.contiguous()))
        if self.channels_last:
            return kernels.weighted_rows(v.double(), self.made[0], out, swap=True)
        return weighted_rows(v, self.rows, out)

    def _weighted(self, v: Tensor, out: Tensor | None) -> Tensor:
        """The weighted sum without the single products, in float64 from its factors on."""
        raise NotImplementedError

    def kept(self, chosen: Tensor) -> Product:
        found = self.some(chosen)
        if self.held:
            found.__dict__["made"] = tuple(t[chosen] for t in self.made)
            found.channels_last = self.channels_last
        elif self.apart is not None:
            at = places(chosen, len(self.factors[0]))[self.apart[0]]
            there = (at >= 0).nonzero().squeeze(1)
            if len(there):
                found.apart = at[there], self.apart[1].kept(there)
        return found


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

    def __post_init__(self) -> None:
        self.shape = torch.Size((self.g.shape[2], self.a.shape[2]))

    @cached_property
    def made(self) -> tuple[Tensor, Tensor]:
        a, g = wide(self.a), wide(self.g)
        if kernels.serve(a, g):
            return kernels.outer_rows(a, g)
        rows = torch.bmm(g.mT, a)
        return rows, squared_norms(rows)

    def costs(self) -> Costs:
        positions, (p, d) = self.a.shape[1], self.shape
        gram = gram_cost(positions**2 * (p + d), self.a, self.g) if positions > 1 else 0
        return Costs(row_cost(p * d, self.a), gram, p * d, 2 * positions**2)

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        return self.a, self.g

    def _gram(self) -> tuple[Tensor, Tensor]:
        a, g = wide(self.a), wide(self.g)
        if a.shape[1] > 1:
            return gram_squares(a, g)
        total = factor_squares(a[:, 0]) * factor_squares(g[:, 0])
        return total, total

    def some(self, chosen: Tensor) -> Product:
        return Outer(self.a[chosen], self.g[chosen])

    def _weighted(self, v: Tensor, out: Tensor | None) -> Tensor:
        return placed(scaled(v, self.g.double()).flatten(0, 1).mT @ self.a.double().flatten(0, 1), out)

    def __add__(self, other: Gradient) -> Gradient:
        if isinstance(other, Outer) and not (self.held or other.held):
            return Outer(torch.cat([self.a, other.a], 1), torch.cat([self.g, other.g], 1))
        return super().__add__(other)


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

    def squares(self, lean: bool = False) -> Tensor:
        keys, sums = self.summed
        squares = squared_norms(sums)
        return squares.new_zeros(len(self.index)).index_add_(0, keys // self.entries, squares)

    def weighted(self, v: Tensor, out: Tensor | None = None) -> Tensor:
        keys, sums = self.summed
        sums = sums.double()
        total = sums.new_zeros(self.shape)
        total.index_add_(0, keys % self.entries, scaled(v[keys // self.entries], sums))
        return placed(total, out)

    def some(self, chosen: Tensor) -> Gradient:
        return Lookup(self.index[chosen], self.g[chosen], self.entries)

    def kept(self, chosen: Tensor) -> Gradient:
        found, (keys, sums) = Lookup(self.index[chosen], self.g[chosen], self.entries), self.summed
        at = places(chosen, len(self.index))[keys // self.entries]
        found.__dict__["summed"] = (at * self.entries + keys % self.entries)[at >= 0], sums[at >= 0]
        return found

    def __add__(self, other: Gradient) -> Gradient:
        if isinstance(other, Lookup):
            return Lookup(torch.cat([self.index, other.index], 1), torch.cat([self.g, other.g], 1), self.entries)
        return super().__add__(other)
