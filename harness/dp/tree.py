"""Named tensors on one flat buffer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Where each named tensor lies in the flat buffer: names in order, and a shape for each."""

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Layout:
        """The layout of `tensors`, in their order."""
        return cls(tuple(tensors), tuple(t.shape for t in tensors.values()))

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of elements of each tensor."""
        return tuple(shape.numel() for shape in self.shapes)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each tensor starts."""
        return (0, *accumulate(self.sizes))[:-1]

    @property
    def numel(self) -> int:
        """Number of elements in all."""
        return sum(self.sizes)

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """`flat` [numel] cut into its named tensors: views, no copy."""
        pieces = flat.split(self.sizes) if self.names else ()
        return {name: piece.view(shape) for name, piece, shape in zip(self.names, pieces, self.shapes, strict=True)}


class Tree:
    """Named tensors of one dtype and device, kept in one flat buffer, with the arithmetic of a vector space.

    One buffer makes noise, optimizer and norm single kernels instead of one per tensor. A tree is a value: arithmetic
    returns a new tree, and nobody writes into a tree that someone else may hold.
    """

    __slots__ = ("_views", "flat", "layout")

    def __init__(self, layout: Layout, flat: Tensor) -> None:
        if flat.shape != (layout.numel,):
            raise ValueError(f"flat buffer of shape {tuple(flat.shape)}, the layout holds {layout.numel} elements")
        self.layout = layout
        self.flat = flat
        self._views: dict[str, Tensor] | None = None

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Tree:
        """A tree of copies of `tensors`, which must share dtype and device."""
        if not tensors:
            return cls(Layout((), ()), torch.empty(0))
        kinds = {(t.dtype, t.device) for t in tensors.values()}
        if complex_ := [name for name, t in tensors.items() if t.is_complex()]:
            raise ValueError(f"{', '.join(complex_)}: a tree holds real numbers; give torch.view_as_real of them")
        if len(kinds) > 1:
            raise ValueError(f"a tree holds one dtype on one device, not {sorted(map(str, kinds))}")
        return cls(Layout.of(tensors), torch.cat([t.detach().reshape(-1) for t in tensors.values()]))

    @property
    def names(self) -> tuple[str, ...]:
        """The names, in order."""
        return self.layout.names

    @property
    def views(self) -> dict[str, Tensor]:
        """The named tensors: views of the flat buffer."""
        if self._views is None:
            self._views = self.layout.views(self.flat)
        return self._views

    def __getitem__(self, name: str) -> Tensor:
        return self.views[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        return f"Tree({len(self.names)} tensors, {self.layout.numel} elements, {self.flat.dtype})"

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Pairs of name and view."""
        return iter(self.views.items())

    def with_flat(self, flat: Tensor) -> Tree:
        """A tree of the same layout on another buffer."""
        return Tree(self.layout, flat)

    def zeros_like(self) -> Tree:
        """The zero of this space."""
        return self.with_flat(torch.zeros_like(self.flat))

    def clone(self) -> Tree:
        """A copy that shares no memory."""
        return self.with_flat(self.flat.clone())

    def _other(self, other: Tree | Tensor | float) -> Tensor | float:
        if not isinstance(other, Tree):
            return other
        if other.layout is not self.layout and other.layout != self.layout:
            raise ValueError("trees of different layouts do not add up")
        return other.flat

    def __add__(self, other: Tree | Tensor | float) -> Tree:
        return self.with_flat(self.flat + self._other(other))

    def __sub__(self, other: Tree | Tensor | float) -> Tree:
        return self.with_flat(self.flat - self._other(other))

    def __mul__(self, other: Tree | Tensor | float) -> Tree:
        return self.with_flat(self.flat * self._other(other))

    def __truediv__(self, other: Tree | Tensor | float) -> Tree:
        return self.with_flat(self.flat / self._other(other))

    def __neg__(self) -> Tree:
        return self.with_flat(-self.flat)

    __radd__ = __add__
    __rmul__ = __mul__

    def norm(self) -> Tensor:
        """The l2 norm, a scalar of the tree's dtype.

        Accumulated in float64: `Tensor.norm` in float32 reads low by more than 1e-4 at a million elements.
        """
        return self.flat.double().square().sum().sqrt().to(self.flat.dtype)

    def unit(self, tiny: float = 1e-12) -> Tree:
        """This vector divided by its norm; the zero vector stays zero."""
        return self / (self.norm() + tiny)
