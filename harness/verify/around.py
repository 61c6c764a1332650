"""A method's own noise or engine, with something around it: to overhear it, or to spoil what must not be used again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dp_accounting import DpEvent
from torch import nn

from harness.dp.clip import Clip
from harness.dp.engines.engine import Engine
from harness.dp.loss import Loss
from harness.dp.noise import Noise
from harness.dp.random import Stream
from harness.dp.release import Bounded, Release
from harness.dp.tree import Tree


@dataclass(frozen=True)
class AroundNoise(Noise):
    """The noise that it is given, in all that a derived class leaves as it is."""

    noise: Noise

    @property
    def private(self) -> bool:
        return self.noise.private

    @property
    def remembers(self) -> bool:
        return self.noise.remembers

    @property
    def separation(self) -> int:
        return self.noise.separation

    def separate(self, steps: int, separation: int) -> bool:
        return self.noise.separate(steps, separation)

    def init(self, steps: int, separation: int) -> Any:
        return self.noise.init(steps, separation)

    def publish(self, release: Release, rng: Stream, state: Any) -> tuple[Tree, Any]:
        return self.noise.publish(release, rng, state)

    def deviation(self, release: Release, state: Any = None) -> dict[str, float]:
        return self.noise.deviation(release, state)

    def covariance(self, steps: int, separation: int) -> Any:
        return self.noise.covariance(steps, separation)

    def event(self, sigmas: Iterable[float]) -> DpEvent:
        return self.noise.event(sigmas)


@dataclass(frozen=True)
class AroundEngine(Engine):
    """The engine that it is given, in all that a derived class leaves as it is."""

    engine: Engine

    @property
    def role(self) -> str:
        return self.engine.role

    def accepts(self, loss: Loss, clip: Clip, model: nn.Module) -> str | None:
        return self.engine.accepts(loss, clip, model)

    def split(self, clip: Clip, sigma: float, step: int = 0) -> dict[str, float]:
        return self.engine.split(clip, sigma, step)

    def bounded(self, *args: Any) -> Bounded:
        return self.engine.bounded(*args)
