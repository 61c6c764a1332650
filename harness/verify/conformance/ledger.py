"""Checks of the accounting: a run does what was planned, and calibrated noise meets the target."""

from __future__ import annotations

import math

from dp_accounting import GaussianDpEvent, NonPrivateDpEvent

from harness.dp import cache
from harness.dp.account import ACCOUNTANTS, epsilon
from harness.dp.calibrate import calibrate
from harness.verify.conformance.subject import DELTA, SIGMA, STEPS, N, Subject, Violation

TARGET = 3.0


def amended(s: Subject) -> None:
    """the path leaves events as they are"""
    for event in (*(GaussianDpEvent(2.0**k * 0.8) for k in range(-6, 11)), NonPrivateDpEvent()):
        if s.method.path.amend(event) != event:
            raise Violation(
                f"Path.amend turns {event} into {s.method.path.amend(event)}: an amended event may only stand as"
                " a claim, so return the event as it came"
            )


def billed(s: Subject) -> None:
    """the ledger is the plan"""
    ledger, plan = s.reached[-1].ledger, s.method.plan(SIGMA, N, s.batch, STEPS)
    if ledger != plan:
        raise Violation(
            f"the run charged {ledger}, the plan says {plan}: Engine.split or Clip.split must name every release's"
            " multiplier",
            evidence="the ledger is not the plan",
        )


def calibrated(s: Subject) -> None:
    """the calibrated noise meets the target and wastes under 1 %; a run charges no more"""
    m = s.method
    some = m.plan(SIGMA, N, s.batch, STEPS)
    able = (name for name in ACCOUNTANTS if math.isfinite(epsilon(some, DELTA, m.sampler.relation, name)))
    name = next(able, None)  # the one that ranks; the others take seconds
    if not m.noise.private:
        if name:
            raise Violation("nothing is noised, and yet the epsilon is finite")
        return
    # Read from the cache that runs use, so that what it holds is checked too.
    sigma = calibrate(m, N, s.batch, STEPS, TARGET, DELTA, cache=cache.root() / "calibration")
    plan = m.plan(sigma, N, s.batch, STEPS)
    name = name or next(iter(ACCOUNTANTS))
    spent = epsilon(plan, DELTA, m.sampler.relation, name)
    if not 0.99 * TARGET <= spent <= TARGET:
        raise Violation(f"calibrated to epsilon {TARGET:g}, the plan costs {spent:.4f}")
    ledger = s.run(sigma=sigma).ledger
    if ledger != plan:
        raise Violation(
            f"a run at the calibrated multiplier charged {ledger}, its plan says {plan}: an epsilon of"
            f" {epsilon(ledger, DELTA, m.sampler.relation, name):.4f} for one of {TARGET:g}"
        )
