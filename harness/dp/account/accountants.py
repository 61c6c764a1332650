"""Accountants that dp_accounting does not have as they are needed here: each knows some events and refuses the rest.

A noise multiplier is a standard deviation over the sensitivity *under the relation stated*: a release carries 2C under
replace-one already. So a plain Gaussian is one of sensitivity 1 under either relation.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from typing import Any

import numpy as np
from dp_accounting import (
    ComposedDpEvent,
    DpEvent,
    GaussianDpEvent,
    NeighboringRelation,
    NonPrivateDpEvent,
    NoOpDpEvent,
    PoissonSampledDpEvent,
    PrivacyAccountant,
    SelfComposedDpEvent,
    TruncatedSubsampledGaussianDpEvent,
    get_epsilon_gaussian,
)
from dp_accounting.pld import PLDAccountant
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution
from dp_accounting.rdp import RdpAccountant

from harness.dp.account import arrays
from harness.dp.release import Relation

_NEIGHBOURS = {
    Relation.ADD_OR_REMOVE: NeighboringRelation.ADD_OR_REMOVE_ONE,
    Relation.REPLACE_ONE: NeighboringRelation.REPLACE_ONE,
    Relation.ZERO_OUT: NeighboringRelation.REPLACE_SPECIAL,
}


ROUNDING = 2.0**-48
"""What is charged to delta for every composed release where losses are added up by a Fourier transform, whose rounding
may hide as much of the tail: over 60 times the largest error found beside sums that keep their digits there."""


_ANY_RELATION = (GaussianDpEvent, NoOpDpEvent, NonPrivateDpEvent, ComposedDpEvent, SelfComposedDpEvent)
"""Events that mean the same under any relation."""


class Unproved(ArithmeticError):
    """An accountant knows every event and yet has no number: what went wrong."""


class Pld(PLDAccountant):
    """Privacy loss distributions, on a grid of `interval`, rounded against the claim.

    dp_accounting's own PLD code doubles the sensitivity of a Gaussian itself under replace-one (its RDP code does not).
    So a plain Gaussian is given to it as one under add-or-remove, whatever the relation, and sampled events, whose
    analysis does depend on the relation, are refused outside add-or-remove. `ROUNDING` is charged to delta.
    """

    def __init__(self, relation: Relation, interval: float = 1e-4) -> None:
        super().__init__(NeighboringRelation.ADD_OR_REMOVE_ONE, interval)
        self._stated = relation
        self._count = 0

    def _maybe_compose(self, event: DpEvent, count: int, do_compose: bool) -> Any:
        sampled = isinstance(event, (PoissonSampledDpEvent, TruncatedSubsampledGaussianDpEvent))
        if sampled and self._stated is not Relation.ADD_OR_REMOVE:
            return self.CompositionErrorDetails(
                invalid_event=event, error_message="Poisson sampling needs add-or-remove"
            )
        if self._stated is not Relation.ADD_OR_REMOVE and not isinstance(event, _ANY_RELATION):
            return self.CompositionErrorDetails(
                invalid_event=event, error_message=f"nothing is known of it under {self._stated.value}"
            )
        if do_compose and isinstance(event, GaussianDpEvent) and event.noise_multiplier > 0:
            return self._compose(event.noise_multiplier / math.sqrt(count), 1.0, 1)
        if do_compose and _sampled_gaussian(event):
            return self._compose(event.event.noise_multiplier, event.sampling_probability, count)
        if do_compose and not isinstance(event, (ComposedDpEvent, SelfComposedDpEvent)):
            self._count += count
        return super()._maybe_compose(event, count, do_compose)

    def _compose(self, sigma: float, rate: float, count: int) -> None:
        self._count += count
        steps = arrays.gaussian_pld(sigma, rate, count, self._value_discretization_interval)
        # A single release is composed with nothing, not even with the distribution of none.
        alone = self._count == 1
        self._pld: PrivacyLossDistribution = steps if alone else self._pld.compose(steps)

    def get_epsilon(self, target_delta: float) -> float:
        """The larger epsilon of the two directions. Raises `Unproved` where delta is below what rounding may hide."""
        if self._contains_non_dp_event:
            return math.inf
        left = _left(target_delta, self._count)
        pmfs = [self._pld._pmf_remove] + ([] if self._pld._symmetric else [self._pld._pmf_add])
        return max(arrays.epsilon_of(pmf, left) for pmf in pmfs)


def _left(delta: float, count: int) -> float:
    """`delta` without what rounding may hide where `count` releases are composed; nothing is where there is one."""
    left = delta - ROUNDING * (count if count > 1 else 0)
    if left <= 0:
        raise Unproved(f"delta is below what rounding may hide, {ROUNDING * count:.2g}, in {count} composed releases")
    return left


def _sampled_gaussian(event: DpEvent) -> bool:
    known = isinstance(event, PoissonSampledDpEvent) and isinstance(event.event, GaussianDpEvent)
    return known and event.sampling_probability > 0 and event.event.noise_multiplier > 0


class Rdp(RdpAccountant):
    """Rényi divergences at dp_accounting's orders, with today's conversion to epsilon."""

    def __init__(self, relation: Relation) -> None:
        super().__init__(neighboring_relation=_NEIGHBOURS[relation])

    def _maybe_compose(self, event: DpEvent, count: int, do_compose: bool) -> Any:
        known = do_compose and self.neighboring_relation is NeighboringRelation.ADD_OR_REMOVE_ONE
        if known and _sampled_gaussian(event) and event.sampling_probability < 1:
            step = arrays.sampled_rdp(event.sampling_probability, event.event.noise_multiplier, self._orders)
            self._rdp += count * step
            return None
        return super()._maybe_compose(event, count, do_compose)

    def note(self, delta: float) -> str:
        """The order that binds, and those that count for nothing: they overflowed, or their series did not converge."""
        _, order = self.get_epsilon_and_optimal_order(delta)
        lost = np.isinf(self.rdp)
        if lost.all():
            return "no order has a finite divergence"
        found = f"order {order:g} binds" if self.rdp.any() else "nothing was released"
        return found + (f"; without a finite divergence: {_ranges(self.orders, lost)}" if lost.any() else "")


def _ranges(orders: np.ndarray[Any, Any], chosen: np.ndarray[Any, Any]) -> str:
    """The chosen orders, neighbours as ranges: ``1.1, 20 to 63``."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], chosen.astype(int), [0]))))
    pairs = [(orders[a], orders[b - 1]) for a, b in edges.reshape(-1, 2)]
    return ", ".join(f"{a:g}" if a == b else f"{a:g} to {b:g}" for a, b in pairs)


class Gdp(PrivacyAccountant):
    """Exact, for plain Gaussians: together they are one, of mu = sqrt(sum of sigma^-2), under either relation.

    Dong, Roth and Su 2022 (arXiv:1905.02383, corollary 3.3); epsilon by Balle and Wang 2018 (arXiv:1805.06530,
    theorem 8).
    What is amplified by sampling is refused: the central limit theorem for it (arXiv:1911.11607) is no bound.
    """

    unknown = "only plain Gaussians are exact"

    def __init__(self, relation: Relation) -> None:
        super().__init__(_NEIGHBOURS[relation])
        self._precision = 0.0

    def _maybe_compose(self, event: DpEvent, count: int, do_compose: bool) -> Any:
        if isinstance(event, NoOpDpEvent):
            return None
        if isinstance(event, SelfComposedDpEvent):
            return self._maybe_compose(event.event, count * event.count, do_compose)
        if isinstance(event, ComposedDpEvent):
            errors = (self._maybe_compose(one, count, do_compose) for one in event.events)
            return next((error for error in errors if error is not None), None)
        if isinstance(event, GaussianDpEvent):
            if do_compose:
                sigma = event.noise_multiplier
                self._precision += count * sigma**-2 if sigma else math.inf
            return None
        return self._other(event, count, do_compose)

    def _other(self, event: DpEvent, count: int, do_compose: bool) -> Any:
        return self.CompositionErrorDetails(invalid_event=event, error_message=self.unknown)

    @property
    def sigma(self) -> float:
        """The multiplier of the one Gaussian that all plain ones amount to; infinite where there is none."""
        return self._precision**-0.5 if self._precision else math.inf

    def get_epsilon(self, target_delta: float) -> float:
        """The epsilon at `target_delta`, exactly."""
        return float(get_epsilon_gaussian(self.sigma, target_delta))


class Prv(Gdp):
    """Privacy random variables, by Opacus's code (Gopi, Lee and Wutschitz 2021, arXiv:2106.02848): plain and
    Poisson-sampled Gaussians, these under add-or-remove.

    The epsilon is the upper end of the algorithm's error: `ERROR` and a thousandth of delta. The proof of that is for
    exact arithmetic, and the code looks at one of the two directions, an example removed. So this is a cross-check.
    """

    unknown = "only plain and Poisson-sampled Gaussians are known, these under add-or-remove"
    ERROR = 0.01
    POINTS = 2**21  # of all grids together: some seconds

    def __init__(self, relation: Relation) -> None:
        super().__init__(relation)
        self._sampled: Counter[tuple[float, float]] = Counter()

    def _other(self, event: DpEvent, count: int, do_compose: bool) -> Any:
        known = isinstance(event, PoissonSampledDpEvent) and isinstance(event.event, GaussianDpEvent)
        if not known or self.neighboring_relation is not NeighboringRelation.ADD_OR_REMOVE_ONE:
            return super()._other(event, count, do_compose)
        if event.sampling_probability == 1:
            return self._maybe_compose(event.event, count, do_compose)
        if do_compose:
            self._sampled[event.sampling_probability, event.event.noise_multiplier] += count
        return None

    def get_epsilon(self, target_delta: float) -> float:
        """An upper bound, to `ERROR`. Raises `Unproved` where the grid would be too large or Opacus's code gives up."""
        plain = {(1.0, self.sigma): 1} if self._precision else {}
        steps = {one: count for one, count in self._sampled.items() if one[0] > 0} | plain
        if not steps:
            return 0.0
        if any(sigma == 0 for _, sigma in steps):
            return math.inf
        try:
            with warnings.catch_warnings(), np.errstate(all="ignore"):
                warnings.simplefilter("ignore")
                found = self._composed(steps, _left(target_delta, sum(steps.values())))
        except (ArithmeticError, RuntimeError, ValueError) as error:
            raise Unproved(str(error) or type(error).__name__) from error
        if not math.isfinite(found):
            raise Unproved(f"Opacus's code gives {found}")
        return max(0.0, found)  # its error reaches below zero where delta is large

    def _composed(self, steps: dict[tuple[float, float], int], delta: float) -> float:
        from opacus.accountants.analysis import prv  # takes most of a second, and plans need none of it

        variables = [prv.PoissonSubsampledGaussianPRV(q, sigma) for q, sigma in steps]
        counts, slack = list(steps.values()), delta / 1000
        # Theorem 5.5 and remark 5.6 of the paper, with the constants of Opacus's accountant.
        mesh = self.ERROR / math.sqrt(sum(counts) * math.log(12 / slack) / 2)
        self._affordable(len(counts) * 2 * (self.ERROR + 3) / mesh)
        reach = self._reach(steps, slack)
        self._affordable(len(counts) * 2 * reach / mesh)
        grid = prv.Domain.create_aligned(-reach, reach, mesh)
        cut = (prv.TruncatedPrivacyRandomVariable(one, grid.t_min, grid.t_max) for one in variables)
        whole = prv.compose_heterogeneous([prv.discretize(one, grid) for one in cut], counts)
        return float(whole.compute_epsilon(delta, slack, self.ERROR)[2])

    def _reach(self, steps: dict[tuple[float, float], int], slack: float) -> float:
        """The end of the grid, remark 5.6, as Opacus's `compute_safe_domain_size` has it, by Rényi divergences."""

        def bound(some: dict[tuple[float, float], int], delta: float) -> float:
            account = Rdp(Relation.ADD_OR_REMOVE)
            for (q, sigma), count in some.items():
                account.compose(PoissonSampledDpEvent(q, GaussianDpEvent(sigma)), count)
            return account.get_epsilon(delta)

        each = slack / (8 * sum(steps.values()))
        return max(self.ERROR, bound(steps, slack / 4), *(bound({one: 1}, each) for one in steps)) + 3

    def _affordable(self, points: float) -> None:
        if not points <= self.POINTS:
            raise Unproved(f"to an error of {self.ERROR:g} it needs {points:.2g} grid points, over {self.POINTS}")
