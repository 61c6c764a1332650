"""A method is a value made of seven parts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dp_accounting import DpEvent, GaussianDpEvent, NoOpDpEvent

from harness.dp.account import Ledger
from harness.dp.clip import Clip, Flat
from harness.dp.engines.engine import Engine
from harness.dp.engines.taped.bookkeeping import BookKeeping
from harness.dp.loss import CrossEntropy, Loss
from harness.dp.noise import Gaussian, Noise
from harness.dp.optimizer import SGD, Optimizer
from harness.dp.path import Path
from harness.dp.sampler import Poisson, Sampler

CHARGED = 3000
"""Steps of which it is looked at whether they are charged."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """What one training method is. Every part has a default, and `Method()` is DP-SGD.

    The accountant is no part: it reads the ledger afterwards, so no method can choose the one that flatters it.
    """

    loss: Loss = field(default_factory=CrossEntropy)
    engine: Engine = field(default_factory=BookKeeping)
    clip: Clip = field(default_factory=Flat)
    noise: Noise = field(default_factory=Gaussian)
    sampler: Sampler = field(default_factory=Poisson)
    optimizer: Optimizer = field(default_factory=SGD)
    path: Path = field(default_factory=Path)

    def unfit(self, n: int, batch: int, steps: int) -> str | None:
        """Why these parts do not fit each other in a run of so many steps, or None."""
        if reason := self.sampler.unfit(n, batch):
            return reason
        noise, sampler = type(self.noise).__name__, type(self.sampler).__name__
        apart, needed = self.sampler.separation(n, batch), min(self.noise.separation, steps)
        probe = GaussianDpEvent(1.0)
        free = (isinstance(self.sampler.wrap(probe, n, batch, t), NoOpDpEvent) for t in range(min(steps, CHARGED)))
        if self.sampler.cycle(n, batch) == 1 and any(free):
            return f"{sampler} sampling leaves steps free: say in its `cycle` how many steps one event is charged for"
        if self.noise.remembers and len({self._split(step) for step in range(steps)}) > 1:
            return (
                f"{noise} noise goes on from step to step, and {type(self.engine).__name__} releases other things, or"
                " with other multipliers, in some steps: take noise that is afresh in every step"
            )
        if apart is None and self.noise.remembers:
            return f"{noise} noise needs to know how many steps apart an example is used, and {sampler} does not say"
        if apart is not None and needed > apart:
            return (
                f"{noise} noise needs uses of an example to be {needed} steps apart or more, and {sampler} sampling of"
                f" {batch} of {n} keeps them {apart} apart: write a separation of {apart} or less for the noise, or"
                " take another sampler"
            )
        if self.sampler.amplifies(n, batch) and not self.noise.separate(steps, apart or 1):
            return (
                f"{sampler} sampling amplifies privacy where uses of an example have no noise in common, and those of"
                f" {noise} noise have: take a sampler that claims no amplification (cyclic), or banded noise"
            )
        return None

    def event(self, sigma: float, n: int, batch: int, step: int) -> DpEvent:
        """What one step will be charged: the noise's event on all releases, amended by the path, amplified by the
        sampler. Known before any data is seen."""
        event = self.path.amend(self.noise.event(self.charged(sigma, n, batch, step)))
        return self.sampler.wrap(event, n, batch, step)

    def _split(self, step: int) -> tuple[Any, ...]:
        """What a step releases, and with which multipliers, at two that every clipping rule serves."""
        most = min(1.0, self.clip.ceiling / 2)
        return tuple(tuple(self.engine.split(self.clip, sigma, step).items()) for sigma in (most, most / 3))

    def charged(self, sigma: float, n: int, batch: int, step: int) -> tuple[float, ...]:
        """The multipliers that a step is charged for: its own, or those of the costliest step of a cycle it begins."""
        cycle = self.sampler.cycle(n, batch)
        steps = range(step, step + cycle) if cycle > 1 and step % cycle == 0 else (step,)
        found = (tuple(self.engine.split(self.clip, sigma, one).values()) for one in steps)
        return max(found, key=lambda multipliers: sum(one**-2 if one else math.inf for one in multipliers))

    def plan(self, sigma: float, n: int, batch: int, steps: int) -> Ledger:
        """The ledger that `steps` steps will have written. Calibration solves on it; a run must match it."""
        ledger = Ledger()
        for step in range(steps):
            ledger.add(self.event(sigma, n, batch, step))
        return ledger


class Stage(NamedTuple):
    """One method for some steps of a run, in batches of an expected size.

    The stages of a run train one after the other on the same data: one noise multiplier serves them all, and one ledger
    charges them.
    """

    method: Method
    batch: int
    steps: int


def plan(stages: Sequence[Stage], sigma: float, n: int) -> Ledger:
    """The ledger that all stages together will have written."""
    whole = Ledger()
    for stage in stages:
        for event, count in stage.method.plan(sigma, n, stage.batch, stage.steps):
            whole.add(event, count)
    return whole


def parts(method: Method) -> dict[str, Any]:
    """The seven parts by name."""
    return {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}


def describe(method: Method) -> dict[str, dict[str, Any]]:
    """The parts as JSON values, with defaults expanded and without what changes only speed: identity is made of it."""
    return {name: _describe(part) for name, part in parts(method).items()}


def _describe(part: Any) -> Any:
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        fields = [f for f in dataclasses.fields(part) if not f.metadata.get("speed")]
        return {"type": type(part).__name__} | {f.name: _describe(getattr(part, f.name)) for f in fields}
    if isinstance(part, (list, tuple)):
        return [_describe(item) for item in part]
    if isinstance(part, dict):
        return {str(key): _describe(value) for key, value in part.items()}
    if part is None or isinstance(part, (bool, int, float, str)):
        return part
    raise TypeError(f"a part holds numbers, strings, collections of them and parts, not a {type(part).__name__}")
