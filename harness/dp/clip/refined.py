"""Clipping in two norms at once."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from harness.dp.clip.flat import Flat
from harness.dp.clip.rule import State


@dataclass(frozen=True)
class Refined(Flat):
    """Xiao, Wan and Devadas 2023 (arXiv:2210.03843), as their code has it: no coordinate above `share` * C either.

    An example's coordinates are cut off at `share` * max(norm, C), and then weighed by min(1, C / norm) with the norm
    from before. So the contribution is shorter than C, its coordinates are at most `share` * C, and the sensitivity is
    that of flat clipping. A gradient spread evenly over 1 / share^2 coordinates meets both bounds.
    """

    share: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share <= 1:
            raise ValueError(f"share must lie in (0, 1], and is {self.share}")

    @property
    def cuts_coordinates(self) -> bool:
        return True

    def limit(self, norms: Tensor, state: State) -> Tensor:
        return self.share * norms.amax(1).clamp(min=self.clip)
