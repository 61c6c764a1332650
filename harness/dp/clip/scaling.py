"""Rules that scale every gradient, short ones too, so that the clipping norm becomes part of the learning rate.

Each contributes weight(x) * x for a gradient of norm x, and its sensitivity is the supremum of that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from harness.dp.clip.rule import Clip, State, positive, usable, within_reach
from harness.dp.release import Relation

SHORTEST = 1e-12  # norms below count as this where the weight is their inverse


@dataclass(frozen=True)
class Automatic(Clip):
    """Bu et al. 2023 (arXiv:2206.07136). "stable" (AUTO-S): weight R / (x + gamma); "vanilla" (AUTO-V): R / x.

    The contribution is R x / (x + gamma), below R, or R itself: sensitivity R. Under SGD, R is but a factor of the
    learning rate. An x + gamma below 1e-12 counts as 1e-12: squares of gradients so short vanish in float32, and a norm
    that reads too low must not weigh its gradient up beyond R.
    """

    clip: float = 1.0
    gamma: float = 0.01
    form: Literal["stable", "vanilla"] = "stable"

    def __post_init__(self) -> None:
        within_reach(clipping_norm=self.clip)
        positive(gamma=self.gamma)
        if self.form not in ("stable", "vanilla"):
            raise ValueError(f'form must be "stable" or "vanilla", not "{self.form}"')

    def weights(self, norms: Tensor, state: State) -> Tensor:
        return usable(self.clip / ((norms + (self.gamma if self.form == "stable" else 0.0)).clamp(min=SHORTEST)))

    def sensitivity(self, state: State, relation: Relation) -> float:
        return self.clip * relation.moves


@dataclass(frozen=True)
class PSAC(Clip):
    """DP-PSAC, Xia et al. 2023 (arXiv:2212.00328): weight C / (x + r / (x + r)), sensitivity C.

    The contribution C x / (x + r / (x + r)) is below C. Short gradients weigh about C, not C / gamma as in AUTO-S; the
    weight is largest in between, where it is taken to be at most that of a gradient of length 1e-12.
    """

    clip: float = 1.0
    r: float = 0.1

    def __post_init__(self) -> None:
        within_reach(clipping_norm=self.clip)
        positive(r=self.r)

    @property
    def slope(self) -> float:
        """What x is multiplied by in the weight's denominator."""
        return 1.0

    def weights(self, norms: Tensor, state: State) -> Tensor:
        size = self.slope * norms + self.r / (norms + self.r)
        return usable(self.clip / size.clamp(min=self.slope * SHORTEST))

    def sensitivity(self, state: State, relation: Relation) -> float:
        return self.clip / self.slope * relation.moves


@dataclass(frozen=True)
class PSASC(PSAC):
    """DP-PSASC (arXiv:2411.03059): weight C / (s x + r / (x + r)) with s at most 1, sensitivity C / s.

    The contribution is C / (s + r / (x (x + r))): it grows with x towards C / s.
    """

    s: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.s <= 1:
            raise ValueError(f"s must lie in (0, 1], and is {self.s}")
        within_reach(clipping_norm_over_s=self.clip / self.s)

    @property
    def slope(self) -> float:
        return self.s
