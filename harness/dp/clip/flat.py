"""One norm, one bound: no clipping, and the clipping of DP-SGD."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from harness.dp.clip.rule import Clip, State, usable, within_reach
from harness.dp.release import Relation


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
        within_reach(clipping_norm=self.clip)

    def weights(self, norms: Tensor, state: State) -> Tensor:
        return shortened(norms, self.clip)

    def sensitivity(self, state: State, relation: Relation) -> float:
        return self.clip * relation.moves


def shortened(norms: Tensor, bound: float | Tensor) -> Tensor:
    """min(1, bound / norm), and 0 where the norm is not finite: the weight that leaves no norm above `bound` > 0."""
    # 0/0 cannot arise: the bound is positive, so a zero norm gives inf, then 1. An infinite norm gives 0, NaN gives NaN
    return usable((bound / norms).clamp_(max=1.0))
