"""The accountant of ModelMix (arXiv:2210.03843): uniform plus Gaussian noise on each coordinate, by Renyi divergence.

In units of gradients (weights over the learning rate), a released iterate is, given the two before it, a uniform draw
of width tau plus a Gaussian of standard deviation sigma * C / B plus the mean clipped gradient, on every coordinate and
independently. An example moves p = 1 / share^2 of the coordinates by C / (sqrt(p) * B) each: no clipped gradient can
move fewer by more, and a more even spread costs less. (That no uneven spread costs more is the authors' assumption.)

With P and Q the laws of one coordinate with and without the example, K(k) = E_Q[(P / Q)^k] to the p-th power is the
moment for all of them, and of a step under Poisson sampling with rate q

    A(a) = sum over k of binomial(a, k) (1 - q)^(a - k) q^k K(k),    a = 2, 3, ...

so that T steps cost epsilon = min over a of (T log A(a) + log(1 / delta)) / (a - 1), which is the classical conversion.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

ORDERS = range(2, 20)  # those of the authors' code
POINTS = 200_001

Array = NDArray[np.float64]


@lru_cache(maxsize=256)
def amplified(
    *, sigma: float, clip: float, share: float, batch: float, n: int, steps: int, delta: float, tau: float
) -> float:
    """The claimed epsilon; inf where no order of `ORDERS` gives one.

    `tau` is the least width of the uniform draws in units of gradients, `clip` * `share` the bound on a coordinate.
    """
    p = 1 / share**2
    deviation, shift, q = sigma * clip / batch, clip * share / batch, batch / n
    logs = {k: p * _log_moment(k, shift, deviation, tau) for k in range(2, max(ORDERS) + 1)}
    best = math.inf
    for a in ORDERS:
        terms = [
            math.log(math.comb(a, k)) + (a - k) * math.log1p(-q) + k * math.log(q) + logs.get(k, 0.0)
            for k in range(a + 1)
        ]
        top = max(terms)
        step = top + math.log(math.fsum(math.exp(term - top) for term in terms))
        best = min(best, (steps * step + math.log(1 / delta)) / (a - 1))
    return best


def _log_moment(k: int, shift: float, deviation: float, tau: float) -> float:
    """log E_Q[(P / Q)^k], Q the law of uniform plus Gaussian noise on a coordinate, P the same moved by `shift`.

    By the trapezoidal rule on a grid that holds all of both laws' mass that counts: k times the shift beyond the
    uniform's ends, for the integrand has its mode there where the Gaussian tails rule, and 12 deviations more.
    """
    edge = tau / 2 + k * shift + 12 * deviation
    x = np.linspace(-edge, edge, POINTS)
    integrand = k * _log_density(x - shift, deviation, tau) + (1 - k) * _log_density(x, deviation, tau)
    top = float(integrand.max())
    heights = np.exp(integrand - top)
    area = (heights.sum() - (heights[0] + heights[-1]) / 2) * (x[1] - x[0])
    return top + math.log(float(area))


def _log_density(x: Array, deviation: float, tau: float) -> Array:
    """log of the density of U[-tau / 2, tau / 2] + N(0, deviation^2) at x: (Phi(b) - Phi(a)) / tau, by tails."""
    from scipy.special import log_ndtr  # imports half of SciPy, for methods that mix

    x = np.abs(
        x
    )  # symmetric; so both ends are on the upper side where it matters, and tails subtract without loss
    near, far = log_ndtr((tau / 2 - x) / deviation), log_ndtr((-tau / 2 - x) / deviation)
    result: Array = near + np.log1p(-np.exp(far - near)) - math.log(tau)
    return result
