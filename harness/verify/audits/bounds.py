"""Lower bounds on epsilon from the scores of canaries that were in or out.

Each is a test of a hypothesis on privacy at a level of significance; the bound is the largest epsilon that the test
rejects, so that it exceeds the true one with at most that probability. Half of the canaries or fewer, drawn at random,
choose thresholds and scores; the rest are tested. A choice made on other canaries costs no confidence: given
their coins, the mechanism is as private in those of the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import bdtrc, expit
from scipy.stats import beta, norm

from harness.dp.account import ACCOUNTANTS, Ledger, quiet
from harness.dp.account.accountants import Pld
from harness.dp.release import Relation

GRID = 1e-2  # of privacy losses, where many ledgers are tried: 0.2 % of an epsilon of 1.5, less of larger ones
CHOOSING = 0.25  # the share of canaries that thresholds and scores are chosen on
CANDIDATES = 400  # thresholds tried
SMALLEST = 16  # guesses fewer than this prove little
MOST = 50.0  # epsilon beyond which nothing is looked for

Floats = NDArray[np.float64]


class Sample(NamedTuple):
    """Scores of canaries, higher where they look in, by the name of the score; and `inside`, the coins."""

    scores: dict[str, Floats]
    inside: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.inside)

    def part(self, rows: NDArray[Any]) -> Sample:
        """Some of the canaries."""
        return Sample({name: s[rows] for name, s in self.scores.items()}, self.inside[rows])

    def split(self, share: float, seed: int) -> tuple[Sample, Sample]:
        """A random `share` to choose on, and the rest to test."""
        order = np.random.default_rng(seed).permutation(len(self))
        cut = int(share * len(self))
        return self.part(order[:cut]), self.part(order[cut:])


def upper(k: Any, n: Any, significance: float) -> Floats:
    """The upper confidence limit of Clopper and Pearson (1934) on a rate, `k` of `n` seen; 1 where n is 0."""
    k, n = np.asarray(k), np.asarray(n)
    limit = beta.ppf(1 - significance, k + 1, np.maximum(n - k, 1))
    return np.where(k < n, limit, 1.0)


class Rates(NamedTuple):
    """Upper confidence limits on the rates of false positives and of false negatives, holding together."""

    false_positive: Floats
    false_negative: Floats

    def apart(self) -> Floats:
        """How far apart two unit normals of these error rates are: what a test of a trade-off is chosen by."""
        return norm.isf(self.false_positive) - norm.ppf(self.false_negative)

    def refutes(self, delta: Callable[[float], float]) -> bool:
        """Whether error rates as low as these are impossible where `delta` of epsilon is a privacy profile.

        With a, b the rates of false positives and negatives: 1 - b <= e^epsilon a + delta(epsilon) for every epsilon,
        and with a and b exchanged (Wasserman and Zhou 2010; as f-DP, Dong et al. 2019, arXiv:1905.02383).
        """
        a, b = float(self.false_positive[0]), float(self.false_negative[0])
        return any(1 - b > math.exp(e) * a + delta(e) or 1 - a > math.exp(e) * b + delta(e) for e in EPSILONS)


class Mistakes(NamedTuple):
    """The upper confidence limit on the rate of mistakes in guessing fair coins: the mean of the two rates above.

    One limit instead of two is closer to what was seen; it does not show how the two differ.
    """

    rate: Floats

    def apart(self) -> Floats:
        """As for `Rates`: the two normals that a threshold half way between them confuses so often."""
        return 2 * norm.isf(self.rate)

    def refutes(self, delta: Callable[[float], float]) -> bool:
        """As for `Rates`, at epsilon = 0: a + b >= 1 - delta(0)."""
        return 2 * float(self.rate[0]) < 1 - delta(0.0)


def rates(sample: Sample, score: str, thresholds: Floats, significance: float) -> Rates:
    """Of calling a canary in where its score is at least a threshold; half of `significance` for each limit."""
    positive, negative, outs, ins = _errors(sample, score, thresholds)
    return Rates(upper(positive, outs, significance / 2), upper(negative, ins, significance / 2))


def mistakes(sample: Sample, score: str, thresholds: Floats, significance: float) -> Mistakes:
    """Of calling a canary in where its score is at least a threshold, its coin being fair."""
    positive, negative, outs, ins = _errors(sample, score, thresholds)
    return Mistakes(upper(positive + negative, outs + ins, significance))


def _errors(sample: Sample, score: str, thresholds: Floats) -> tuple[Any, Any, int, int]:
    values, inside = sample.scores[score], sample.inside
    outs, ins = np.sort(values[~inside]), np.sort(values[inside])
    return (len(outs) - np.searchsorted(outs, thresholds), np.searchsorted(ins, thresholds), len(outs), len(ins))


def by_rates(found: Limits, delta: float) -> Floats:
    """Epsilon from error rates alone: log((1 - delta - FNR) / FPR) and the reverse (Kairouz et al. 2015)."""
    assert isinstance(found, Rates)
    a, b = found
    with np.errstate(divide="ignore", invalid="ignore"):
        both = np.stack([np.log((1 - delta - b) / a), np.log((1 - delta - a) / b)])
    return np.nan_to_num(both, nan=0.0, neginf=0.0).max(0).clip(min=0)


Limits = Rates | Mistakes
Measure = Callable[[Sample, str, Floats, float], Limits]


def chosen(
    choosing: Sample, testing: Sample, measures: Sequence[Measure], worth: Callable[[Limits], Floats], level: float
) -> tuple[Limits, str]:
    """Error rates on `testing` by the measure, score and threshold that were worth most on `choosing`; the score."""
    best: tuple[float, Measure, str, float] | None = None
    for measure in measures:
        for name, values in choosing.scores.items():
            thresholds = np.unique(np.quantile(values, np.linspace(0, 1, CANDIDATES), method="nearest"))
            gains = worth(measure(choosing, name, thresholds, level))
            at = int(gains.argmax())
            if best is None or gains[at] > best[0]:
                best = float(gains[at]), measure, name, float(thresholds[at])
    assert best is not None
    _, measure, name, threshold = best
    return measure(testing, name, np.array([threshold]), level), name


# One run --------------------------------------------------------------------------------------------------


def p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """The probability of so many correct guesses or more if the mechanism is (epsilon, delta)-private; an upper bound.

    Steinke, Nasr and Jagielski 2023 (arXiv:2305.08846), theorem 5.2: with W binomial of `guesses` trials at rate
    e^epsilon / (1 + e^epsilon) and f(v) = P[W >= v], it is f(v) + 2 m delta max over i of (f(v - i) - f(v)) / i. The
    proof reveals coins one after the other: given the output and the coins before it, a coin is guessed no better than
    by randomised response, but for an event whose probability delta bounds; i guesses more cost at least i such events.
    Nothing is assumed of how canaries depend on each other. At most `guesses` of the `canaries` coins are guessed.
    """
    rate = float(expit(epsilon))
    tail = float(bdtrc(correct - 1, guesses, rate))  # P[W >= correct]
    i = np.arange(1, correct + 1)
    extra = ((bdtrc(correct - i - 1, guesses, rate) - tail) / i).max(initial=0.0)
    return min(1.0, tail + 2 * canaries * delta * float(extra))


def one_run(canaries: int, guesses: int, correct: int, delta: float, level: float) -> float:
    """The largest epsilon that so many correct guesses reject at `level`; 0 where none is."""

    def excess(epsilon: float) -> float:
        return p_value(canaries, guesses, correct, epsilon, delta) - level

    if excess(0.0) > 0:
        return 0.0
    return MOST if excess(MOST) < 0 else float(brentq(excess, 0.0, MOST, xtol=1e-4))


class Guess(NamedTuple):
    """How to guess: the `share` of the canaries with the highest scores are in, and as many of the lowest out."""

    score: str
    share: float
    both: bool

    def outcome(self, sample: Sample) -> tuple[int, int]:
        """Guesses made, and how many are right."""
        order = np.argsort(sample.scores[self.score], kind="stable")
        each = int(self.share * len(sample) / (2 if self.both else 1))
        right = int(sample.inside[order[len(order) - each :]].sum())
        if self.both:
            right += int((~sample.inside[order[:each]]).sum())
        return (2 if self.both else 1) * each, right


def guessed(choosing: Sample, testing: Sample, delta: float, level: float) -> tuple[float, int, int, str]:
    """Epsilon by guesses on `testing`, chosen on `choosing`; guesses, how many are right, and the score."""
    plans = [
        Guess(name, 2.0**-k, both) for name in choosing.scores for k in range(8) for both in (False, True)
        if 2.0**-k * len(testing) >= SMALLEST and (both or k)
    ]  # fmt: skip
    # Canaries to choose on are fewer than those to test: scaled up, as if there were as many.
    scale = len(testing) / max(1, len(choosing))

    def worth(plan: Guess) -> float:
        guesses, right = (round(v * scale) for v in plan.outcome(choosing))
        return one_run(len(testing), guesses, min(right, guesses), delta, level)

    best = max(plans, key=worth)
    guesses, right = best.outcome(testing)
    return one_run(len(testing), guesses, right, delta, level), guesses, right, best.score


# Trade-offs -----------------------------------------------------------------------------------------------


class Profile:
    """All (epsilon, delta) that an accountant proves for a ledger: PLD on a grid of `GRID` where it knows all events,
    else RDP. Raises ValueError where neither does.

    A coarse grid makes a search over many multipliers fast. It only adds to what is proved, so that what refutes this
    curve refutes the true one.
    """

    def __init__(self, ledger: Ledger, relation: Relation) -> None:
        event = ledger.total()
        self.accountant = next((n for n, make in ACCOUNTANTS.items() if make(relation).supports(event)), "")
        if not self.accountant:
            raise ValueError(f"no accountant knows the events of the ledger: {ledger.composed()}")
        make = ACCOUNTANTS[self.accountant]
        self._account: Any = Pld(relation, GRID) if make is Pld else make(relation)
        with quiet():
            self._account.compose(event)

    def epsilon(self, delta: float) -> float:
        """The least epsilon at `delta`."""
        with quiet():
            return float(self._account.get_epsilon(delta))

    def refuted(self, found: Limits) -> bool:
        """Whether error rates as low as these are impossible for what has this profile."""

        def delta(epsilon: float) -> float:
            with quiet():
                return float(self._account.get_delta(epsilon))

        return found.refutes(delta)


EPSILONS: Sequence[float] = [*np.linspace(0, 3, 31), *np.linspace(3.25, 12, 36)]


def by_tradeoff(
    plan: Callable[[float], Ledger],
    relation: Relation,
    sigma: float,
    ceiling: float,
    found: Limits,
    delta: float,
    price: Callable[[float], float],
) -> float:
    """Epsilon of the plan with the least noise that error rates refute: a bound for mechanisms of the plan's form.

    `plan` gives the ledger at a noise multiplier, `price` its epsilon at `delta`, `sigma` is the one claimed. Errors
    below the trade-off curve of the claimed ledger refute it as it stands, whatever the mechanism is. How much privacy
    there is instead is given in the units of the same plan with less noise, as Nasr et al. do (2023, arXiv:2302.07956,
    section 5). The search ends at a third of sigma: more is known to be at least the epsilon there. 0 where nothing is
    refuted up to 8 sigma. Only where the claim is refuted does the number come from `Profile`, which is a little above
    the claim's at sigma itself.
    """

    def refuted(multiplier: float) -> bool:
        return Profile(plan(multiplier), relation).refuted(found)

    low, high = sigma / 3, min(8 * sigma, ceiling * (1 - 1e-6))
    if not refuted(high):
        return 0.0
    if refuted(sigma):
        high = sigma
        if refuted(low):
            return Profile(plan(low), relation).epsilon(delta)
    else:
        low = sigma
    while high / low > 1.005:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if refuted(middle) else (middle, high)
    if high > sigma:
        return price(high)
    return Profile(plan(high), relation).epsilon(delta)
