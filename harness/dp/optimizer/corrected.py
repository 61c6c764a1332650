"""Adam that knows the noise on its gradients, and takes it out of their second moment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from harness.dp.optimizer.optimizer import Adam, Deviations
from harness.dp.tree import Tree


@dataclass(frozen=True)
class AdamBC(Adam):
    """DP-AdamBC (Tang, Shpilevskiy and Lecuyer 2024, arXiv:2312.14334, algorithm 1).

    Noise of variance Phi on every gradient adds Phi to its second moment, which makes Adam nearly SGD with momentum:
    the noise hides by how much coordinates differ. Phi is public, so it is subtracted: a step is lr * m / sqrt(max(v -
    Phi, floor)), m and v with Adam's own bias corrections. Where the noise changes from step to step, Phi is the
    average that v makes of it. `eps` is not used.
    """

    floor: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.floor > 0:
            raise ValueError(f"floor must be positive, and is {self.floor}")

    def init(self, w: Tree, steps: int) -> dict[str, Any]:
        return {**super().init(w, steps), "noise": dict.fromkeys(w.names, 0.0), "average": dict.fromkeys(w.names, 0.0)}

    def receive(self, state: dict[str, Any], public: Mapping[str, Tree], deviations: Deviations) -> dict[str, Any]:
        return {**state, "noise": dict(deviations["grad"])}

    def update(self, g: Tree, state: dict[str, Any], w: Tree) -> tuple[Tree, dict[str, Any]]:
        t = state["t"] + 1
        m = state["m"].flat.lerp(g.flat, 1 - self.beta1)
        v = state["v"].flat.mul(self.beta2).addcmul_(g.flat, g.flat, value=1 - self.beta2)
        average = {
            name: self.beta2 * state["average"][name] + (1 - self.beta2) * deviation**2
            for name, deviation in state["noise"].items()
        }
        correction = 1 - self.beta2**t
        without = w.with_flat(v / correction)
        for name, one in without.items():
            one.sub_(average[name] / correction)
        decayed = w.flat.mul(1 - self.lr * self.weight_decay) if self.weight_decay else w.flat
        root = without.flat.clamp_(min=self.floor).sqrt_()
        new = decayed.addcdiv(m, root, value=-self.lr / (1 - self.beta1**t))
        return w.with_flat(new), {**state, "t": t, "m": w.with_flat(m), "v": w.with_flat(v), "average": average}
