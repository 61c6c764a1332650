"""P-values of statistical checks: each is exact, or a bound on the probability that a correct method gives as much.

A statistical check raises its alarm below `ALARM`, after the correction for all that it looks at (Bonferroni). So a
correct method fails one statistical check in a million, whatever the seed.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from scipy.special import bdtr, bdtrc, chdtr, chdtrc, chdtri, log_ndtr
from torch import Tensor

from harness.verify.conformance.subject import Violation

ALARM = 1e-6  # the probability that one statistical check fails a correct method


def normal(z: Tensor | float, comparisons: int = 1) -> float:
    """Bound on the probability that the largest of so many standard normal numbers exceeds all of |z|."""
    largest = float(torch.as_tensor(z, dtype=torch.float64).abs().max())
    if math.isnan(largest):
        return 0.0
    return _shared(2 * math.exp(float(log_ndtr(-largest))), comparisons)


def chi_square(total: Tensor | float, freedom: float, comparisons: int = 1) -> float:
    """Two-sided p-value of the most unlikely of the sums of `freedom` squares of standard normal numbers."""
    x = np.atleast_1d(np.asarray(total, dtype=np.float64))
    if np.isnan(x).any():
        return 0.0
    p = 2 * np.minimum(chdtr(freedom, x), chdtrc(freedom, x))
    return _shared(float(p.min()), comparisons)


def deviation_at_most(total: float, freedom: int) -> float:
    """What the standard deviation stays below, but for a probability of `ALARM`, if squares sum up to `total`."""
    least: Any = chdtri(freedom, 1 - ALARM)  # the sum of squares of standard normal numbers falls below it so rarely
    return math.sqrt(total / float(least))


def kolmogorov(z: Tensor, comparisons: int = 1) -> float:
    """P-value of numbers [n] as standard normal ones, by the largest difference of the distribution functions.

    2 exp(-2 n D^2) bounds it for every n (Massart 1990, The Annals of Probability 18(3)).
    """
    n = len(z)
    f = torch.special.ndtr(z.double()).sort().values
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    d = float(torch.maximum((f - steps[:-1]).abs().max(), (steps[1:] - f).abs().max()))
    return 0.0 if math.isnan(d) else _shared(2 * math.exp(-2 * n * d * d), comparisons)


def bernstein(deviation: Tensor | float, variance: float, largest: float, comparisons: int = 1) -> float:
    """Bound on the probability that a sum of independent terms is off its mean by |deviation|, in either direction.

    `variance` is that of the sum, `largest` the most that a term differs from its mean by (Bernstein's inequality).
    """
    t = float(torch.as_tensor(deviation, dtype=torch.float64).abs().max())
    if math.isnan(t):
        return 0.0
    return _shared(2 * math.exp(-t * t / (2 * (variance + largest * t / 3) + 1e-300)), comparisons)


def binomial(there: int, of: int, p: float, comparisons: int = 1) -> float:
    """Two-sided p-value of so many of so many independent events of probability p: exact tails, doubled."""
    below, above = float(bdtr(there, of, p)), float(bdtrc(there - 1, of, p)) if there else 1.0
    return _shared(min(1.0, 2 * min(below, above)), comparisons)


def alarm(p: float, tests: int, message: str) -> None:
    """Raise Violation where p, one of so many tests of a check, is too small for chance."""
    if p * tests < ALARM:
        raise Violation(message, evidence=f"p {shown(p)}")


def shown(p: float) -> str:
    """A p-value for a reader."""
    return "< 1e-300" if p < 1e-300 else f"= {p:.0e}"


def _shared(p: float, comparisons: int) -> float:
    return min(1.0, p * comparisons)
