"""Optimizers as pure functions of public values: everything here is post-processing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from harness.dp.tree import Tree

Deviations = Mapping[str, Mapping[str, float]]
"""A number for each tensor of each release."""


@dataclass(frozen=True)
class Optimizer:
    """`update` maps a privatised gradient to the next weights."""

    def init(self, w: Tree, steps: int) -> Any:
        """State before the first of `steps` updates."""
        return None

    def receive(self, state: Any, public: Mapping[str, Tree], deviations: Deviations) -> Any:
        """The state, given a step's privatised side releases (divided by the public denominator, as "grad" is).

        And the standard deviation of the noise on a number of each release, "grad" included, after the division.
        """
        return state

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

    def init(self, w: Tree, steps: int) -> Tree | None:
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

    def init(self, w: Tree, steps: int) -> dict[str, Any]:
        return {"t": 0, "m": w.zeros_like(), "v": w.zeros_like()}

    def update(self, g: Tree, state: dict[str, Any], w: Tree) -> tuple[Tree, dict[str, Any]]:
        t = state["t"] + 1
        m = state["m"].flat.lerp(g.flat, 1 - self.beta1)
        v = state["v"].flat.mul(self.beta2).addcmul_(g.flat, g.flat, value=1 - self.beta2)
        root = math.sqrt(1 - self.beta2**t)  # of v's bias correction, taken out of the passes over the weights
        decayed = w.flat.mul(1 - self.lr * self.weight_decay) if self.weight_decay else w.flat
        new = decayed.addcdiv(m, v.sqrt().add_(self.eps * root), value=-self.lr * root / (1 - self.beta1**t))
        return w.with_flat(new), {"t": t, "m": w.with_flat(m), "v": w.with_flat(v)}


@dataclass(frozen=True)
class LAMB(Adam):
    """You et al. 2020 (arXiv:1904.00962), as Mehta et al. (arXiv:2205.02973) use it on privatised gradients.

    Adam's direction r, plus weight_decay * w, is scaled tensor by tensor to the length of the tensor's weights: each
    tensor w moves by lr * |w| / |r| * r, by lr * r where either norm is zero (so that zeros can leave zero).
    """

    eps: float = 1e-6

    def update(self, g: Tree, state: dict[str, Any], w: Tree) -> tuple[Tree, dict[str, Any]]:
        t = state["t"] + 1
        m = state["m"].flat.lerp(g.flat, 1 - self.beta1)
        v = state["v"].flat.mul(self.beta2).addcmul_(g.flat, g.flat, value=1 - self.beta2)
        root = v.div(1 - self.beta2**t).sqrt_().add_(self.eps)
        r = w.with_flat(m.div(1 - self.beta1**t).div_(root).add_(w.flat, alpha=self.weight_decay))
        steps = [d * trust(w[name], d) for name, d in r.items()]
        new = w.flat.sub(torch.cat([d.reshape(-1) for d in steps]), alpha=self.lr)
        return w.with_flat(new), {"t": t, "m": w.with_flat(m), "v": w.with_flat(v)}


def trust(weights: Tensor, direction: Tensor) -> Tensor:
    """LAMB's trust ratio: the norm of the weights over that of the direction; 1 where either is zero."""
    long, step = weights.norm(), direction.norm()
    return torch.where((long > 0) & (step > 0), long / step.clamp(min=torch.finfo(step.dtype).tiny), 1.0)


@dataclass(frozen=True)
class Scheduled(Optimizer):
    """Another optimizer, its learning rate multiplied by a factor of the step t of T.

    The factor rises linearly over the first `warmup` of all steps, is 1 at the next one, and then is constant, or
    falls: "cosine" to `floor` as half a cosine wave, "step" by `drop` at each of the fractions `at` of all steps.
    """

    optimizer: Optimizer = field(default_factory=SGD)
    decay: Literal["constant", "cosine", "step"] = "cosine"
    warmup: float = 0.0
    floor: float = 0.0
    drop: float = 0.1
    at: tuple[float, ...] = (0.5, 0.75)

    def __post_init__(self) -> None:
        if not hasattr(self.optimizer, "lr"):
            raise ValueError(f"{type(self.optimizer).__name__} has no learning rate to schedule")
        if self.decay not in ("constant", "cosine", "step"):
            raise ValueError(f'decay must be "constant", "cosine" or "step", not "{self.decay}"')
        for name, values in {
            "warmup": (self.warmup,),
            "floor": (self.floor,),
            "drop": (self.drop,),
            "at": self.at,
        }.items():
            if not all(0 <= value <= 1 for value in values):
                raise ValueError(f"{name} must lie in [0, 1], and is {getattr(self, name)}")

    def factor(self, t: int, steps: int) -> float:
        """What the learning rate of step t = 0, 1, ... of `steps` is multiplied by."""
        rising = round(self.warmup * steps)
        if t < rising:
            return (t + 1) / (rising + 1)
        if self.decay == "step":
            return float(self.drop ** sum(t >= share * steps - 1e-9 for share in self.at))
        if self.decay == "constant":
            return 1.0
        along = min(1.0, (t - rising) / max(1, steps - rising))
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * along)) / 2

    def init(self, w: Tree, steps: int) -> dict[str, Any]:
        return {"t": 0, "steps": steps, "inner": self.optimizer.init(w, steps)}

    def receive(self, state: dict[str, Any], public: Mapping[str, Tree], deviations: Deviations) -> dict[str, Any]:
        return {**state, "inner": self.optimizer.receive(state["inner"], public, deviations)}

    def update(self, g: Tree, state: dict[str, Any], w: Tree) -> tuple[Tree, dict[str, Any]]:
        optimizer: Any = self.optimizer
        scaled = replace(optimizer, lr=optimizer.lr * self.factor(state["t"], state["steps"]))
        new, inner = scaled.update(g, state["inner"], w)
        return new, {**state, "t": state["t"] + 1, "inner": inner}


@dataclass(frozen=True)
class EverySecond(Optimizer):
    """Another optimizer that moves by every second gradient only: the first, third and so on served to look ahead."""

    optimizer: Optimizer = field(default_factory=SGD)

    def init(self, w: Tree, steps: int) -> dict[str, Any]:
        return {"moves": False, "inner": self.optimizer.init(w, steps // 2)}

    def receive(self, state: dict[str, Any], public: Mapping[str, Tree], deviations: Deviations) -> dict[str, Any]:
        return {**state, "inner": self.optimizer.receive(state["inner"], public, deviations)}

    def update(self, g: Tree, state: dict[str, Any], w: Tree) -> tuple[Tree, dict[str, Any]]:
        if not state["moves"]:
            return w, {**state, "moves": True}
        new, inner = self.optimizer.update(g, state["inner"], w)
        return new, {"moves": False, "inner": inner}
