"""Sharpness-aware paths: differentiate a little way up the hill, step from its foot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from harness.dp.path.straight import Path
from harness.dp.tree import Tree


@dataclass(frozen=True)
class Sharp(Path):
    """DP-SAT, Park et al. 2023 (arXiv:2306.05651): differentiate at w + rho * d / |d|, d a direction already public.

    d is the last privatised gradient, or with `along` "step" the last step back, w_{t-1} - w_t (their momentum form).
    It costs no privacy, being made of what was released before. The first step differentiates at w.
    """

    rho: float = 0.05
    along: Literal["gradient", "step"] = "gradient"

    def __post_init__(self) -> None:
        if self.rho < 0:
            raise ValueError(f"rho must not be negative, and is {self.rho}")
        if self.along not in ("gradient", "step"):
            raise ValueError(f'along must be "gradient" or "step", not "{self.along}"')

    def probe(self, w: Tree, state: Tree | None) -> Tree:
        if state is None or not self.rho:
            return w
        return w + state.unit() * self.rho

    def after(self, old: Tree, new: Tree, g: Tree, state: Tree | None) -> Tree:
        return g if self.along == "gradient" else old - new


@dataclass(frozen=True)
class LookAhead(Path):
    """DP-SAM (the control of arXiv:2306.05651): two private gradients for one step, each charged as a step of its own.

    One logical step takes the gradient g at w and goes nowhere; the next, on a batch of its own, differentiates at
    w + rho * g / |g| and moves from w. Belongs with the optimizer EverySecond.
    """

    rho: float = 0.05

    def __post_init__(self) -> None:
        if self.rho < 0:
            raise ValueError(f"rho must not be negative, and is {self.rho}")

    def probe(self, w: Tree, state: Tree | None) -> Tree:
        return w if state is None else w + state.unit() * self.rho

    def after(self, old: Tree, new: Tree, g: Tree, state: Tree | None) -> Any:
        return g if state is None else None
