"""The noise multiplier that a target epsilon asks for."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from dp_accounting import NoOpDpEvent, mechanism_calibration
from dp_accounting.mechanism_calibration import (
    BracketInterval,
    ExplicitBracketInterval,
    LowerEndpointAndGuess,
    calibrate_dp_mechanism,
)

from harness.dp import cache as kept
from harness.dp.account import ACCOUNTANTS, Ledger, epsilon
from harness.dp.clip import Flat
from harness.dp.method import Method, Stage, plan

LEAST = 0.05  # noise multipliers below are not looked for


def calibrate(
    method: Method,
    n: int,
    batch: int,
    steps: int,
    target: float,
    delta: float,
    accountant: str = "pld",
    cache: Path | None = None,
) -> float:
    """The smallest noise multiplier, to 1e-4 relative, at which `steps` steps cost at most `target` at `delta`.

    See `calibrate_stages`.
    """
    return calibrate_stages([Stage(method, batch, steps)], n, target, delta, accountant, cache)


def calibrate_stages(
    stages: Sequence[Stage], n: int, target: float, delta: float, accountant: str = "pld", cache: Path | None = None
) -> float:
    """The smallest noise multiplier, to 1e-4 relative, at which all stages together cost at most `target` at `delta`.

    `accountant` is used where it knows every planned event, else the first one that does. Results are kept as small
    files under `cache`, at best. Raises ValueError where no accountant can bound the plan, or no multiplier will do.
    """
    relations = {stage.method.sampler.relation for stage in stages}
    if len(relations) > 1:
        raise ValueError("the stages are analysed for different neighbours, and one epsilon cannot hold for both")
    (relation,) = relations
    lowest = min(stages, key=lambda stage: stage.method.clip.ceiling).method.clip
    ceiling = lowest.ceiling * (1 - 1e-9)

    def ledger(sigma: float) -> Ledger:
        return plan(stages, sigma, n)

    tight = math.isfinite(ceiling) and epsilon(ledger(ceiling), delta, relation, "rdp") > target
    if tight:
        # Not by PLD at the ceiling, which takes minutes where that is far too low, and before the cache is read, where
        # a plan that looks the same may be that of a rule without a ceiling.
        free = [stage._replace(method=replace(stage.method, clip=Flat())) for stage in stages]
        needed = calibrate_stages(free, n, target, delta, accountant, cache)
        if needed >= ceiling:
            raise ValueError(
                f"epsilon = {target:g} at delta = {delta:g} needs a noise multiplier of {needed:.4g}, and the noise"
                f" of {type(lowest).__name__}'s side releases serves none of {lowest.ceiling:g} or more:"
                f" write a count_noise above {needed / 2:.4g}"
            )
    some = ledger(min(8.0, ceiling))
    able = (a for a in (accountant, *ACCOUNTANTS) if math.isfinite(epsilon(some, delta, relation, a)))
    known = next(able, None)  # those after it are not asked: some take seconds
    if known is None:
        raise ValueError(f"no accountant knows the events of this plan: {some.composed()}")
    trials = [ledger(min(s, ceiling / 2)).to_json() for s in (1.0, 2.0)]
    key = json.dumps([*trials, known, relation.value, target, delta, _version()])
    name = hashlib.sha256(key.encode()).hexdigest()
    file = cache / f"{name[:24]}.json" if cache else None
    known_before = _remembered(file, name) if file else None
    if known_before is not None:
        return known_before
    # RDP's epsilon is quick to compute and never below PLD's, so its multiplier brackets PLD's from above. From below,
    # and where RDP does not know an event, we go by steps: at a multiplier far too small PLD's grid takes minutes.
    quick = math.isfinite(epsilon(some, delta, relation, "rdp"))
    if quick and epsilon(ledger(LEAST), delta, relation, "rdp") <= target:
        raise ValueError(
            f"epsilon = {target:g} at delta = {delta:g} is met with less noise than a multiplier of {LEAST}, the"
            " smallest that is looked for: write a smaller epsilon, or train without privacy"
        )

    def spent(sigma: float, name: str = known) -> float:
        return epsilon(ledger(sigma), delta, relation, name)

    def solve(name: str, bracket: BracketInterval, tol: float) -> float:
        # In the place of an accountant, which would compute again what `epsilon` knows; of an event, its multiplier.
        account: Any = SimpleNamespace(
            ledger=NoOpDpEvent(), compose=lambda sigma: SimpleNamespace(get_epsilon=lambda _: spent(sigma, name))
        )
        multiplier: Any = float
        return float(calibrate_dp_mechanism(lambda: account, multiplier, target, delta, bracket, tol=tol))

    try:
        if not quick:
            upper = next((sigma for k in range(40) if spent(sigma := 2.0**k) <= target), math.inf)
            if math.isinf(upper):
                raise mechanism_calibration.NoBracketIntervalFoundError
        elif math.isinf(ceiling):
            upper = solve("rdp", LowerEndpointAndGuess(LEAST, 1.0), 1e-4 if known == "rdp" else 1e-2)
        elif tight:
            upper = ceiling
        else:
            upper = solve("rdp", ExplicitBracketInterval(LEAST, ceiling), 1e-4 if known == "rdp" else 1e-2)
    except mechanism_calibration.NoBracketIntervalFoundError as error:
        raise ValueError(
            f"no noise multiplier from {LEAST} up meets epsilon = {target} at delta = {delta}: take fewer steps or a"
            " smaller batch"
        ) from error
    sigma = upper
    if known != "rdp":
        lower = 0.85 * upper
        while spent(lower) <= target:
            lower, upper = 0.85 * lower, lower
        sigma = solve(known, ExplicitBracketInterval(lower, upper), 1e-4 * min(1.0, upper))
    if file:
        found = {"noise_multiplier": sigma, "epsilon": target, "delta": delta, "accountant": known}
        kept.dump(file, found | {"key": name})
    return sigma


def _version() -> str:
    return version("dp-accounting")


def _remembered(file: Path, key: str) -> float | None:
    """The noise multiplier in a file, if it is one and of this key."""
    held = kept.load(file)
    sigma = held.get("noise_multiplier") if isinstance(held, dict) and held.get("key") == key else None
    sound = isinstance(sigma, float) and math.isfinite(sigma) and sigma >= LEAST
    return sigma if sound else None
