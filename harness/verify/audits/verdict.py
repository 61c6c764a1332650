"""What audits share: their settings, the claim, its runs, the bounds that guesses of coins give, and the verdict."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import nn

from harness.dp import cache
from harness.dp.account import ACCOUNTANTS, Ledger
from harness.dp.account import epsilon as cost
from harness.dp.calibrate import calibrate
from harness.dp.method import Method, describe
from harness.running.seeds import derive
from harness.running.train import Data, Diverged, Progress, Schedule, start, train
from harness.verify.audits.bounds import (
    CHOOSING,
    Sample,
    by_rates,
    by_tradeoff,
    chosen,
    guessed,
    mistakes,
    rates,
)
from harness.verify.audits.canary import AuditTask, Refused

ONE_RUN, RATES, TRADEOFF = INSTRUMENTS = ("one-run", "error rates", "trade-off")


@dataclass(frozen=True)
class AuditSetting:
    """How to audit: `repeat` runs of `steps` steps on the first `examples` of the task (0 for all), at this `epsilon`.

    `rate` is the expected batch over n, `level` the probability of refuting a true claim. Each instrument has defaults
    of its own.
    """

    instrument: ClassVar[str]

    epsilon: float = 3.0
    delta: float = 1e-5
    task: str = ""
    examples: int = 16
    rate: float = 1.0
    steps: int = 1
    repeat: int = 1000
    seed: int = 0
    level: float = 0.01

    def targets(self, task: AuditTask) -> int:
        """How many examples are looked for."""
        return 1

    def trained(self) -> AuditTask:
        """The task, with a model whose weights depend on nothing but it and the seed."""
        raise NotImplementedError


@dataclass(frozen=True)
class Verdict:
    """What an audit found. `bounds` are by instrument; all of them hold together, with confidence 1 - level.

    The last three are None of a method without noise, which claims nothing.
    """

    bounds: dict[str, dict[str, Any]]
    planted: dict[str, Any]
    claimed: float | None = None
    accountant: str | None = None
    sigma: float | None = None

    @property
    def audited(self) -> float:
        """The largest of the bounds."""
        return max(float(bound["epsilon"]) for bound in self.bounds.values())

    @property
    def instrument(self) -> str:
        """Whose it is."""
        return max(self.bounds, key=lambda name: float(self.bounds[name]["epsilon"]))

    @property
    def refuted(self) -> bool:
        """Whether the claim cannot be true."""
        return self.claimed is not None and self.audited > self.claimed


@dataclass(frozen=True)
class Claim:
    """What a method says that runs of a setting cost on `n` examples, `batch` of them expected in a step.

    `accountant` is the one that ranks in records, on its own grid; `sigma` the noise multiplier of the runs.
    """

    method: Method
    setting: AuditSetting
    n: int
    batch: int
    sigma: float
    accountant: str

    @classmethod
    def of(cls, method: Method, s: AuditSetting, n: int, sigma: float | None = None) -> Claim:
        """`sigma` is by default the one that runs would use. Raises Refused where no accountant knows the plan."""
        batch, relation = max(1, round(s.rate * n)), method.sampler.relation
        try:
            if sigma is None:
                folder = cache.root() / "calibration"
                sigma = calibrate(method, n, batch, s.steps, s.epsilon, s.delta, cache=folder)
            plan = method.plan(sigma, n, batch, s.steps)
        except ValueError as error:
            raise Refused(str(error)) from error
        accountant = next((a for a in ACCOUNTANTS if math.isfinite(cost(plan, s.delta, relation, a))), None)
        if accountant is None:
            raise Refused(f"no accountant knows the events of its plan: {plan.composed()}")
        return cls(method, s, n, batch, sigma, accountant)

    @property
    def schedule(self) -> Schedule:
        """That of every run."""
        return Schedule(self.setting.steps, self.batch, self.setting.steps)

    def plan(self, sigma: float) -> Ledger:
        """The ledger of a run at a noise multiplier."""
        return self.method.plan(sigma, self.n, self.batch, self.setting.steps)

    def price(self, sigma: float) -> float:
        """Epsilon at a noise multiplier."""
        return cost(self.plan(sigma), self.setting.delta, self.method.sampler.relation, self.accountant)

    def check(self, ledger: Ledger) -> None:
        """Raise Refused where a run wrote a ledger that is not its plan."""
        if ledger != (planned := self.plan(self.sigma)):
            raise Refused(f"the run charged {ledger}, its plan says {planned}")

    def bounds(
        self, sample: Sample, level: float, instruments: Collection[str] = INSTRUMENTS
    ) -> dict[str, dict[str, Any]]:
        """The bound of each instrument. They share the level evenly, so that the largest holds too."""
        s, method = self.setting, self.method
        level = level / len(instruments)
        choosing, testing = sample.split(CHOOSING, s.seed)
        if min(int(part.inside.sum()) for part in (choosing, testing)) < 1 or choosing.inside.all():
            raise Refused(f"{len(sample)} coins are too few to choose a threshold and test it: toss 64 or more")

        def found(name: str) -> dict[str, Any]:
            if name == ONE_RUN:
                return by_guesses(choosing, testing, s.delta, level)
            if name == RATES:
                limits, score = chosen(choosing, testing, [rates], lambda one: by_rates(one, s.delta), level)
                epsilon = float(by_rates(limits, s.delta)[0])
            else:
                limits, score = chosen(choosing, testing, [rates, mistakes], lambda one: one.apart(), level)
                relation, ceiling = method.sampler.relation, method.clip.ceiling
                epsilon = by_tradeoff(self.plan, relation, self.sigma, ceiling, limits, s.delta, self.price)
            below = {f"{key}_below": float(value[0]) for key, value in limits._asdict().items()}
            return {"epsilon": epsilon, **below, "score": score}

        return {name: found(name) for name in instruments}

    def verdict(self, bounds: dict[str, dict[str, Any]], inside: NDArray[np.bool_], facts: dict[str, Any]) -> Verdict:
        """What was found by coins that fell `inside`, with what else a record says of it."""
        facts = facts | {
            "in": int(inside.sum()), "samples": len(inside), "n": self.n, "batch": self.batch,
            "sampling": self.method.sampler.distribution(self.n, self.batch),
        }  # fmt: skip
        return Verdict(bounds, facts, self.price(self.sigma), self.accountant, self.sigma)


def by_guesses(choosing: Sample, testing: Sample, delta: float, level: float) -> dict[str, Any]:
    """The bound of guesses, chosen on some of the coins and tested on the others."""
    epsilon, guesses, right, score = guessed(choosing, testing, delta, level)
    return {"epsilon": epsilon, "guesses": guesses, "correct": right, "score": score}


# Runs -----------------------------------------------------------------------------------------------------


def needs_noise(method: Method) -> None:
    """Raise Refused where a method claims nothing."""
    if not method.noise.private:
        raise Refused("it trains without noise and claims no epsilon: there is nothing to audit")


def seeds(what: str, method: Method, s: AuditSetting) -> list[int]:
    """One for each run of an audit."""
    asked = describe(method), dataclasses.asdict(s)
    return [derive(what, *asked, run) for run in range(s.repeat)]


def secrets(seed: int, what: str = "audit") -> SimpleNamespace:
    """The seeds by role of a run that is named by a seed."""
    return SimpleNamespace(**{role: derive(f"{what} {role}", seed) for role in ("sampling", "noise", "path")})


def trained(
    method: Method, model: nn.Module, data: Data, sigma: float, schedule: Schedule, secret: SimpleNamespace,
    where: str,
) -> Progress:  # fmt: skip
    """One run from the start to its end. Raises Refused where the method cannot be trained so."""
    try:
        apart = method.sampler.separation(data.n_train, schedule.batch) or 1
        return train(method, model, data, sigma, schedule, secret, start(method, model, schedule.steps, apart))
    except (ValueError, RuntimeError, Diverged) as error:
        raise Refused(f"it cannot be trained {where}: {error}") from error
