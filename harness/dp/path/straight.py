"""Paths: where to differentiate, where to step from, and which weights to keep. Public values only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dp_accounting import DpEvent

from harness.dp.random import Stream
from harness.dp.tree import Tree


@dataclass(frozen=True)
class Path:
    """The straight path: differentiate at the weights, step from them, keep them."""

    def init(self, w: Tree) -> Any:
        """State before the first step."""
        return None

    def probe(self, w: Tree, state: Any) -> Tree:
        """Where this step differentiates."""
        return w

    def base(self, w: Tree, state: Any, rng: Stream) -> Tree:
        """Where the optimizer steps from. `rng` is the path's own secret stream."""
        return w

    def after(self, old: Tree, new: Tree, g: Tree, state: Any) -> Any:
        """The next state, from the weights before and after the step and its privatised gradient."""
        return state

    def kept(self, w: Tree, state: Any) -> Tree:
        """The weights that are evaluated and handed out."""
        return w

    def amend(self, event: DpEvent) -> DpEvent:
        """The step's event, where the path changes it."""
        return event


@dataclass(frozen=True)
class EMA(Path):
    """Keeps an exponential moving average of the weights: free of privacy cost, being post-processing.

    The decay warms up as min(decay, (1 + t) / (10 + t)), so that the average forgets its start.
    """

    decay: float = 0.999

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must lie in [0, 1), and is {self.decay}")

    def init(self, w: Tree) -> dict[str, Any]:
        return {"t": 0, "mean": w}

    def after(self, old: Tree, new: Tree, g: Tree, state: dict[str, Any]) -> dict[str, Any]:
        t = state["t"] + 1
        decay = min(self.decay, (1 + t) / (10 + t))
        return {"t": t, "mean": new.with_flat(new.flat.lerp(state["mean"].flat, decay))}

    def kept(self, w: Tree, state: dict[str, Any]) -> Tree:
        return state["mean"]
