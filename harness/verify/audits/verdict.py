"""What audits share: their settings, the claim, the bounds that guesses of coins give, and the verdict."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, ClassVar

from harness.dp import cache
from harness.dp.account import ACCOUNTANTS, Ledger
from harness.dp.account import epsilon as cost
from harness.dp.calibrate import calibrate
from harness.dp.method import Method
from harness.verify.audits.bounds import (
    CHOOSING,
    Mistakes,
    Rates,
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
    """What an audit found. `bounds` are by instrument; all of them hold together, with confidence 1 - level."""

    claimed: float
    accountant: str
    sigma: float
    bounds: dict[str, dict[str, Any]]
    planted: dict[str, Any]

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
        return self.audited > self.claimed


def claim(
    method: Method, n: int, batch: int, steps: int, target: float, delta: float, sigma: float | None = None
) -> tuple[float, str, Callable[[float], float]]:
    """A noise multiplier (by default the one that runs would use), the accountant, and epsilon by it at a multiplier.

    The accountant is the one that ranks in records, on its own grid. Raises Refused where none knows the plan.
    """
    relation = method.sampler.relation
    try:
        if sigma is None:
            sigma = calibrate(method, n, batch, steps, target, delta, cache=cache.root() / "calibration")
        plan = method.plan(sigma, n, batch, steps)
    except ValueError as error:
        raise Refused(str(error)) from error
    accountant = next((a for a in ACCOUNTANTS if math.isfinite(cost(plan, delta, relation, a))), None)
    if accountant is None:
        raise Refused(f"no accountant knows the events of its plan: {plan.composed()}")
    return sigma, accountant, lambda s: cost(method.plan(s, n, batch, steps), delta, relation, accountant)


def bound(
    sample: Sample,
    s: AuditSetting,
    plan: Callable[[float], Ledger],
    price: Callable[[float], float],
    sigma: float,
    method: Method,
    instruments: Collection[str] = INSTRUMENTS,
) -> dict[str, dict[str, Any]]:
    """The bound of each instrument. They share the level evenly, so that the largest holds too."""
    level = s.level / len(instruments)
    choosing, testing = sample.split(CHOOSING, s.seed)
    if min(int(part.inside.sum()) for part in (choosing, testing)) < 1 or choosing.inside.all():
        raise Refused(f"{len(sample)} coins are too few to choose a threshold and test it: toss 64 or more")

    def one_run() -> dict[str, Any]:
        epsilon, guesses, right, score = guessed(choosing, testing, s.delta, level)
        return {"epsilon": epsilon, "guesses": guesses, "correct": right, "score": score}

    def error_rates() -> dict[str, Any]:
        found, score = chosen(choosing, testing, [rates], lambda found: by_rates(found, s.delta), level)
        return {"epsilon": float(by_rates(found, s.delta)[0]), **_shown(found), "score": score}

    def trade_off() -> dict[str, Any]:
        found, score = chosen(choosing, testing, [rates, mistakes], lambda found: found.apart(), level)
        relation, ceiling = method.sampler.relation, method.clip.ceiling
        epsilon = by_tradeoff(plan, relation, sigma, ceiling, found, s.delta, price)
        return {"epsilon": epsilon, **_shown(found), "score": score}

    by_name = {ONE_RUN: one_run, RATES: error_rates, TRADEOFF: trade_off}
    return {name: by_name[name]() for name in instruments}


def _shown(found: Rates | Mistakes) -> dict[str, float]:
    return {f"{name}_below": float(value[0]) for name, value in found._asdict().items()}
