"""What a clipping rule is.

A rule never sees a gradient. It maps norms [B, G] (G clipping groups) to weights [B, G]; an engine sums the weighted
gradients. The sensitivity is the rule's own claim about that sum, and travels with the release.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from harness.dp.release import Relation, Release
from harness.dp.tree import Layout, Tree

State = Any  # None, numbers, tensors, trees, and dicts or tuples of them


@dataclass(frozen=True)
class Clip:
    """The identity of a clipping rule: one group, no state, no side release. Rules override what they change."""

    @property
    def needs_norms(self) -> bool:
        """Whether the weights depend on the norms; where not, an engine may skip them."""
        return True

    @property
    def ceiling(self) -> float:
        """The joint noise multiplier that the rule stays below, whatever is asked of it: infinite but for rules whose
        side releases have noise of a size of their own."""
        return math.inf

    def init(self, layout: Layout) -> State:
        """State before the first step, for gradients of this layout."""
        return None

    def groups(self, layout: Layout) -> Mapping[str, int]:
        """The clipping group of each parameter, numbered from 0 without gaps."""
        return dict.fromkeys(layout.names, 0)

    def weights(self, norms: Tensor, state: State) -> Tensor:
        """Weights [B, G] from norms [B, G]. A non-finite norm gets weight 0: that example contributes nothing.

        Engines round weights to the model's dtype: give 0 for those that it cannot hold (see `usable`).
        """
        raise NotImplementedError

    def limit(self, norms: Tensor, state: State) -> Tensor | None:
        """Where each example's coordinates are cut off, [B], before they are weighed; None where they are not."""
        return None

    @property
    def cuts_coordinates(self) -> bool:
        """Whether `limit` gives limits: then only engines that hold per-example gradients can serve the rule."""
        return False

    def sensitivity(self, state: State, relation: Relation) -> float:
        """l2 bound on how far the weighted sum, in units of `scale`, moves between neighbours."""
        raise NotImplementedError

    def scale(self, layout: Layout, state: State) -> Mapping[str, float] | None:
        """The unit in which each tensor is noised (see `Release`); None where all are noised alike."""
        return None

    def split(self, sigma: float) -> dict[str, float]:
        """The multiplier of each release, given the multiplier of them all taken jointly.

        Raises ValueError where `sigma` is not below `ceiling`.
        """
        return {"grad": sigma}

    def side(self, norms: Tensor, state: State, relation: Relation, sigma: float) -> dict[str, Release]:
        """Further releases that the rule asks for; `sigma` is the joint multiplier."""
        return {}

    def update(self, state: State, public: Mapping[str, Tree]) -> State:
        """The next state, from privatised side releases (already divided by the public denominator)."""
        return state


FAINTEST = 2.0**-126  # the smallest number that float32 holds to full precision


def usable(weights: Tensor) -> Tensor:
    """`weights`, in place, with 0 for what float32 would hold too coarsely to bound a gradient, and for what is NaN.

    1e-44 becomes 1.1e-44 or 0.98e-44 in float32, and 1e-45 becomes 1.4e-45: a gradient of 1e36 would exceed a bound of
    1e-9 by as much. It contributes nothing instead, which keeps every bound. Up to twice the smallest weight it
    contributes less and less: at a step, rounding of a norm would decide between all and nothing.
    """
    weights = weights.nan_to_num_(0.0)
    faint = (weights / FAINTEST - 1).clamp_(0.0, 1.0)
    return weights.mul_(faint)


SMALLEST, LARGEST = 1e-6, 1e6  # clipping norms that float32 can keep


def within_reach(**values: float) -> None:
    """Raise ValueError for the first of `values` that is no clipping norm from `SMALLEST` to `LARGEST`.

    Squares lose digits in float32 below 1e-38, those of entries below 1e-19: in a gradient as long as `SMALLEST` a
    million million of these make up less than a millionth of its length. And a sum of a million gradients as long as
    `LARGEST` is far from the largest float32.
    """
    positive(**values)
    for name, value in values.items():
        if not SMALLEST <= value <= LARGEST:
            remedy = (
                f"write {SMALLEST:g} or more"
                if value < SMALLEST
                else f"write {LARGEST:g} or less, or Unclipped() where nothing is to be clipped"
            )
            raise ValueError(
                f"{name.replace('_', ' ')} {value:g} lies outside {SMALLEST:g} to {LARGEST:g}, where float32 keeps"
                f" gradients within their bound: {remedy}"
            )


def positive(**values: float) -> None:
    """Raise ValueError for the first of `values` that is not positive and finite."""
    for name, value in values.items():
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name.replace('_', ' ')} must be positive and finite, not {value}")
