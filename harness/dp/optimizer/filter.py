"""Filters: what is made of the gradients released so far before an optimizer takes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from harness.dp.optimizer.optimizer import SGD, Deviations, Optimizer
from harness.dp.tree import Tree


@dataclass(frozen=True)
class LowPass(Optimizer):
    """DOPPLER (Zhang et al. 2024, arXiv:2408.13460): a linear filter before another optimizer.

    Gradients change slowly from step to step and noise does not, so low frequencies hold more of the gradient. With
    `feedback` a_1, a_2, ... and `forward` b_0, b_1, ...

        f_t = sum of b_k g_{t-k} - sum of a_k f_{t-k}

    divided by what it would make of a constant 1 since the first step: without this the first steps would be short. It
    is made of what was released, and costs no privacy. The optimizer is given the deviation of a single gradient's
    noise, not of the filtered one.
    """

    optimizer: Optimizer = field(default_factory=SGD)
    feedback: tuple[float, ...] = (-0.9,)
    forward: tuple[float, ...] = (0.1,)

    def __post_init__(self) -> None:
        if not self.forward or sum(self.forward) == 0:
            raise ValueError("forward must hold numbers that do not add up to 0: a constant would become 0")

    def init(self, w: Tree, steps: int) -> dict[str, Any]:
        inner = self.optimizer.init(w, steps)
        return {"inner": inner, "given": (), "filtered": (), "ones": (), "gains": ()}

    def receive(self, state: dict[str, Any], public: Mapping[str, Tree], deviations: Deviations) -> dict[str, Any]:
        return {**state, "inner": self.optimizer.receive(state["inner"], public, deviations)}

    def update(self, g: Tree, state: dict[str, Any], w: Tree) -> tuple[Tree, dict[str, Any]]:
        given, ones = (g, *state["given"])[: len(self.forward)], (1.0, *state["ones"])[: len(self.forward)]
        found, gain = g * 0.0, 0.0
        for b, one, unit in zip(self.forward, given, ones, strict=False):
            found, gain = found + one * b, gain + unit * b
        for a, one, unit in zip(self.feedback, state["filtered"], state["gains"], strict=False):
            found, gain = found - one * a, gain - unit * a
        new, inner = self.optimizer.update(found / gain if gain else found, state["inner"], w)
        back = len(self.feedback)
        return new, {
            "inner": inner,
            "given": given[: len(self.forward) - 1],
            "ones": ones[: len(self.forward) - 1],
            "filtered": (found, *state["filtered"])[:back],
            "gains": (gain, *state["gains"])[:back],
        }
