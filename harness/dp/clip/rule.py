"""Clipping rules: from per-example gradient norms to the weights of the clipped sum.

A rule never sees a gradient. It maps norms [B, G] (G clipping groups) to weights [B, G]; an engine sums the weighted
gradients. The sensitivity is the rule's own claim about that sum, and travels with the release.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from harness.dp.release import Relation, Release
from harness.dp.tree import Tree

State = Any  # None, numbers, tensors, trees, and dicts or tuples of them


@dataclass(frozen=True)
class Clip:
    """The identity of a clipping rule: one group, no state, no side release. Rules override what they change."""

    @property
    def needs_norms(self) -> bool:
        """Whether the weights depend on the norms; where not, an engine may skip them."""
        return True

    def init(self) -> State:
        """State before the first step."""
        return None

    def groups(self, names: Sequence[str]) -> Mapping[str, int]:
        """The clipping group of each parameter, numbered from 0 without gaps."""
        return dict.fromkeys(names, 0)

    def weights(self, norms: Tensor, state: State) -> Tensor:
        """Weights [B, G] from norms [B, G]. A non-finite norm gets weight 0: that example contributes nothing."""
        raise NotImplementedError

    def sensitivity(self, state: State, relation: Relation) -> float:
        """l2 bound on how far the weighted sum moves between neighbours."""
        raise NotImplementedError

    def split(self, sigma: float) -> dict[str, float]:
        """The multiplier of each release, given the multiplier of them all taken jointly."""
        return {"grad": sigma}

    def side(self, norms: Tensor, state: State, relation: Relation, sigma: float) -> dict[str, Release]:
        """Further releases that the rule asks for; `sigma` is the joint multiplier."""
        return {}

    def update(self, state: State, public: Mapping[str, Tree]) -> State:
        """The next state, from privatised side releases (already divided by the public denominator)."""
        return state


@dataclass(frozen=True)
class Unclipped(Clip):
    """No bound at all: weight 1 for every finite example, infinite sensitivity. For non-private training."""

    @property
    def needs_norms(self) -> bool:
        return False

    def weights(self, norms: Tensor, state: State) -> Tensor:
        return norms.isfinite().to(norms.dtype)

    def sensitivity(self, state: State, relation: Relation) -> float:
        return math.inf


@dataclass(frozen=True)
class Flat(Clip):
    """Abadi et al. 2016 (arXiv:1607.00133): weight min(1, C / norm) on the whole gradient, sensitivity C.

    Between neighbours by addition or removal one clipped gradient of norm at most C appears or goes; by replacement
    one goes and one appears: 2C.
    """

    clip: float = 1.0

    def __post_init__(self) -> None:
        if not (self.clip > 0 and math.isfinite(self.clip)):
            raise ValueError(f"the clipping norm must be positive and finite, not {self.clip}")

    def weights(self, norms: Tensor, state: State) -> Tensor:
        # 0/0 cannot arise: clip > 0, so a zero norm gives inf, then 1. An infinite norm gives 0, and NaN is made 0.
        return (self.clip / norms).clamp_(max=1.0).nan_to_num_(0.0)

    def sensitivity(self, state: State, relation: Relation) -> float:
        return self.clip * relation.moves
