"""Intervals over seeds, paired differences and the ranking rule.

All intervals are two-sided 95 % Student t-intervals with n - 1 degrees of freedom: they say how the mean over
seeds would vary if the seeds were drawn again, on this data and this split. They are not corrected for the
number of rows.

An accuracy is a count over n examples: what is seen of a model's is rounded to 1/n. Rounding has the variance
1 / (12 n²) (Sheppard 1898), that of two accuracies together 1 / (6 n²), and the variance over seeds is never taken to
be less: otherwise two seeds whose differences happen to round to the same count would leave an interval without width,
and two equal methods would seem to differ far more often than in 5 % of cases (up to 12 % with two seeds and without
this floor; `tests/report/test_report.py` sums it up exactly).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

LEVEL = 0.95
ROUNDING = 1 / 12
"""Variance of a value that is rounded to whole numbers, in units of them."""
MOST_EXAMPLES = 10**7

RULE = (
    "Rows are ordered by their mean paired difference to the baseline on common seeds. The first row leads "
    "rank 1. Each next row shares the leader's rank when the 95 % paired t-interval of their difference on "
    "common seeds contains 0; otherwise its place in the order is its rank, and it leads in turn. Only runs "
    "with status ok count. A row is unranked (–) with fewer than two seeds in common with the baseline or "
    "with the leader, and when one of its seeds diverged: leaving that seed out would flatter the rest. "
    "So is one with merged runs whose privacy could not be computed again here. "
    "An interval is never narrower than rounding to whole test examples leaves it. "
    "Intervals are not corrected for the number of rows."
)


@dataclass(frozen=True)
class Interval:
    """A mean over `n` values; `low` and `high` are None for a single value."""

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def half(self) -> float | None:
        """Half the width of the interval."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2

    def contains(self, value: float) -> bool | None:
        """Whether `value` lies inside; None without an interval."""
        return None if self.low is None or self.high is None else self.low <= value <= self.high


@dataclass(frozen=True)
class Entrant:
    """What the ranking looks at: accuracy by seed, the baseline's by seed, and why the row cannot rank.

    `examples` is how many examples accuracies are counted on, None where that is not known.
    """

    scores: Mapping[int, float]
    baseline: Mapping[int, float] | None
    barred: str = ""
    examples: int | None = None


@dataclass(frozen=True)
class Standing:
    """The outcome for one entrant: `rank`, or None and the reason in `why`; `difference` to the baseline."""

    rank: int | None
    tied: bool
    difference: Interval | None
    why: str = ""


@lru_cache(maxsize=1024)
def _quantile(degrees: int) -> float:
    from scipy.special import stdtrit  # what scipy.stats.t.ppf calls, at a tenth of the import time

    return float(stdtrit(degrees, 0.5 + LEVEL / 2))


def rounding(examples: int | None) -> float:
    """The variance that an accuracy on so many examples has by being a count; 0 where they are not known."""
    return ROUNDING / examples**2 if examples else 0.0


def counted_on(accuracies: Iterable[float]) -> int | None:
    """The fewest examples on which all these accuracies are counts; None where they are not counts.

    For records that do not say how many there were. It divides their number, so what is rounded is never taken to be
    finer than it is.
    """
    least = 1
    for accuracy in accuracies:
        near = Fraction(accuracy).limit_denominator(10**6)
        if float(near) != accuracy:  # a quotient of whole numbers is rounded to this float, and few others are
            return None
        least = math.lcm(least, near.denominator)
        if least > MOST_EXAMPLES:
            return None
    return least if least > 1 else None


def mean_interval(values: Iterable[float], least: float = 0.0) -> Interval | None:
    """Mean and t-interval of `values`, None when there are none. Sums are exact: order does not matter.

    Their variance is taken to be `least` at least.
    """
    x = list(values)
    n = len(x)
    if n == 0:
        return None
    mean = math.fsum(x) / n
    if n == 1:
        return Interval(mean, None, None, 1)
    # A product, which is infinite where a power would raise: damaged numbers have no finite interval.
    variance = max(least, math.fsum((v - mean) * (v - mean) for v in x) / (n - 1))
    half = _quantile(n - 1) * math.sqrt(variance / n)
    return Interval(mean, mean - half, mean + half, n)


def paired_interval(a: Mapping[int, float], b: Mapping[int, float], examples: int | None = None) -> Interval | None:
    """Interval of ``a - b`` over the seeds that both have; None without a common seed.

    `examples` is how many examples both are counts on: their difference has the rounding of two counts, if not more.
    """
    return mean_interval((a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())), 2 * rounding(examples))


def rank(entrants: Sequence[Entrant]) -> tuple[list[int], list[Standing]]:
    """Rank `entrants` by `RULE`.

    Returns the order to show them in (indices: ranked, then those with a mean, then the rest, each
    keeping the order given among equals) and one `Standing` for each entrant. Where no entrant has a baseline,
    the order is by mean accuracy and the rest of the rule is the same.
    """
    paired = any(e.baseline for e in entrants)
    means = [mean_interval(e.scores.values(), rounding(e.examples)) for e in entrants]
    differences = [paired_interval(e.scores, e.baseline, e.examples) if e.baseline else None for e in entrants]
    keys = differences if paired else means

    def descending(i: int) -> tuple[bool, float, int]:
        key = keys[i] or means[i]
        return (key is None, -key.mean if key else 0.0, i)

    why: dict[int, str] = {}
    for i, entrant in enumerate(entrants):
        key = keys[i]
        if means[i] is None:
            why[i] = "no finished run"
        elif entrant.barred:
            why[i] = entrant.barred
        elif key is None or key.n < 2:
            why[i] = "fewer than two seeds in common with the baseline" if paired else "fewer than two seeds"

    leader: int | None = None
    ranks: dict[int, int] = {}
    for i in sorted((i for i in range(len(entrants)) if i not in why), key=descending):
        if leader is None:
            leader, ranks[i] = i, 1
            continue
        gap = paired_interval(entrants[leader].scores, entrants[i].scores, entrants[i].examples)
        if gap is None or gap.n < 2:
            why[i] = "fewer than two seeds in common with the row that leads the rank above"
        elif gap.contains(0.0):
            ranks[i] = ranks[leader]
        else:
            leader, ranks[i] = i, len(ranks) + 1
    shared = list(ranks.values())
    places = [
        Standing(ranks.get(i), i in ranks and shared.count(ranks[i]) > 1, differences[i], why.get(i, ""))
        for i in range(len(entrants))
    ]
    return sorted(range(len(entrants)), key=lambda i: (i not in ranks, descending(i))), places
