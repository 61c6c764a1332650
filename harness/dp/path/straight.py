"""The straight path, and the average along any path."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dp_accounting import DpEvent

from harness.dp.random import Stream
from harness.dp.tree import Tree

if TYPE_CHECKING:
    from harness.dp.claim import Claim, Run


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

    def claim(self, run: Run, state: Any) -> Claim | None:
        """An epsilon that holds under assumptions of the path's own, from the `state` at the end of `run`.

        It is recorded beside the one that ranks and never takes its place.
        """
        return None


@dataclass(frozen=True)
class EMA(Path):
    """Another path whose weights are averaged exponentially: free of privacy cost, being post-processing.

    The decay warms up as min(decay, (1 + t) / (10 + t)), so that the average forgets its start.
    """

    decay: float = 0.999
    along: Path = field(default_factory=Path)

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must lie in [0, 1), and is {self.decay}")

    def init(self, w: Tree) -> dict[str, Any]:
        return {"t": 0, "mean": w, "along": self.along.init(w)}

    def probe(self, w: Tree, state: dict[str, Any]) -> Tree:
        return self.along.probe(w, state["along"])

    def base(self, w: Tree, state: dict[str, Any], rng: Stream) -> Tree:
        return self.along.base(w, state["along"], rng)

    def after(self, old: Tree, new: Tree, g: Tree, state: dict[str, Any]) -> dict[str, Any]:
        t = state["t"] + 1
        decay = min(self.decay, (1 + t) / (10 + t))
        along = self.along.after(old, new, g, state["along"])
        mean = new.with_flat(self.along.kept(new, along).flat.lerp(state["mean"].flat, decay))
        return {"t": t, "mean": mean, "along": along}

    def kept(self, w: Tree, state: dict[str, Any]) -> Tree:
        mean: Tree = state["mean"]
        return mean

    def amend(self, event: DpEvent) -> DpEvent:
        return self.along.amend(event)

    def claim(self, run: Run, state: dict[str, Any]) -> Claim | None:
        return self.along.claim(run, state["along"])  # an average of iterates is a function of them
