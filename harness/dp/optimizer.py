"""Optimizers as pure functions of public values: everything here is post-processing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from harness.dp.tree import Tree


@dataclass(frozen=True)
class Optimizer:
    """`update` maps a privatised gradient to the next weights."""

    def init(self, w: Tree) -> Any:
        """State before the first step."""
        return None

    def update(self, g: Tree, state: Any, w: Tree) -> tuple[Tree, Any]:
        """The next weights and state, from the mean gradient `g` at or near `w`."""
        raise NotImplementedError


@dataclass(frozen=True)
class SGD(Optimizer):
    """torch.optim.SGD's recursion: v = momentum * v + g (v = g at first), w -= lr * v, or lr * (g + momentum * v).

    Weight decay is the coupled kind: g + weight_decay * w.
    """

    lr: float = 0.1
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if self.lr < 0:
            raise ValueError(f"lr must not be negative, and is {self.lr}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must lie in [0, 1), and is {self.momentum}")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0")

    def init(self, w: Tree) -> Tree | None:
        return w.zeros_like() if self.momentum else None

    def update(self, g: Tree, state: Tree | None, w: Tree) -> tuple[Tree, Tree | None]:
        if self.weight_decay:
            g = g.with_flat(g.flat.add(w.flat, alpha=self.weight_decay))
        if state is None:
            return w.with_flat(w.flat.sub(g.flat, alpha=self.lr)), None
        v = g.with_flat(g.flat.add(state.flat, alpha=self.momentum))
        direction = g.flat.add(v.flat, alpha=self.momentum) if self.nesterov else v.flat
        return w.with_flat(w.flat.sub(direction, alpha=self.lr)), v


@dataclass(frozen=True)
class Adam(Optimizer):
    """Kingma and Ba 2015 (arXiv:1412.6980) with bias correction; weight decay decoupled (AdamW, arXiv:1711.05101)."""

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if self.lr < 0:
            raise ValueError(f"lr must not be negative, and is {self.lr}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), and is {getattr(self, name)}")

    def init(self, w: Tree) -> dict[str, Any]:
        return {"t": 0, "m": w.zeros_like(), "v": w.zeros_like()}

    def update(self, g: Tree, state: dict[str, Any], w: Tree) -> tuple[Tree, dict[str, Any]]:
        t = state["t"] + 1
        m = state["m"].flat.lerp(g.flat, 1 - self.beta1)
        v = state["v"].flat.mul(self.beta2).addcmul_(g.flat, g.flat, value=1 - self.beta2)
        root = math.sqrt(
            1 - self.beta2**t
        )  # of v's bias correction, taken out of the passes over the weights
        decayed = w.flat.mul(1 - self.lr * self.weight_decay) if self.weight_decay else w.flat
        new = decayed.addcdiv(m, v.sqrt().add_(self.eps * root), value=-self.lr * root / (1 - self.beta1**t))
        return w.with_flat(new), {"t": t, "m": w.with_flat(m), "v": w.with_flat(v)}
