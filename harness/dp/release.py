"""What leaves the private world: a number, its sensitivity, and the noise it is owed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from harness.dp.tree import Tree


class Relation(Enum):
    """Which pairs of data sets are neighbours. An epsilon without its relation means nothing."""

    ADD_OR_REMOVE = "add-or-remove"
    REPLACE_ONE = "replace-one"
    ZERO_OUT = "zero-out"
    """Of equal size, an example of one contributing nothing in the other: its place stays, and so do all others."""

    @property
    def moves(self) -> int:
        """How many contributions of norm C a sum of clipped contributions can move by: one in or out, or both."""
        return 2 if self is Relation.REPLACE_ONE else 1


class Release(NamedTuple):
    """A private value on its way out.

    `value` is the exact private sum; `sensitivity` bounds the l2 distance between its values on neighbouring data
    sets; `sigma` is the noise multiplier: the noise part adds N(0, (sigma * sensitivity)^2) to every coordinate.

    `scale` gives tensors units of their own: the sensitivity is then that of the value with each tensor divided by its
    scale, and the noise on a tensor is multiplied by it. None is 1 for all.

    `dtype` is the format that the public value is wanted in; None is the private one's.
    """

    value: Tree
    sensitivity: float
    sigma: float
    scale: Mapping[str, float] | None = None
    dtype: torch.dtype | None = None

    @property
    def formatted(self) -> Tree:
        """The private value in the format that is wanted: what libraries add noise to."""
        return self.value.with_flat(self.value.flat.to(self.dtype or self.value.flat.dtype))

    @property
    def digest(self) -> str:
        """64 hex digits over all that is released and how: two releases that differ in a bit have different ones."""
        value = self.value
        facts = value.layout, value.flat.dtype, self.sensitivity, self.sigma, self.scale, self.dtype
        found = hashlib.sha256(repr(facts).encode())
        held: Any = value.flat.detach().contiguous().cpu().view(torch.uint8).numpy()
        found.update(held)
        return found.hexdigest()

    def in_units(self, tree: Tree) -> Tree:
        """`tree`, of the value's layout, with each tensor divided by its scale."""
        if self.scale is None:
            return tree
        return Tree.of({name: t / self.scale[name] for name, t in tree.items()})


@dataclass(frozen=True)
class Observed:
    """What an engine saw while it worked: for diagnosis only, computed from private values and never released.

    `losses` [B] per-example losses, `norms` [B, G] gradient norms per clipping group (None where nothing was
    clipped), `clipped` and `non_finite` counts of examples, as scalar tensors. `engine`: who worked,
    and `microbatch`: on how many examples at once ("" and 0 where that means nothing).
    """

    losses: Tensor
    norms: Tensor | None
    clipped: Tensor
    non_finite: Tensor
    engine: str = ""
    microbatch: int = 0


class Bounded(NamedTuple):
    """What an engine returns: the releases by name (always one called "grad"), and what it observed."""

    releases: dict[str, Release]
    observed: Observed
