"""The accountant of ModelMix (arXiv:2210.03843): uniform plus Gaussian noise on each coordinate, by Renyi divergence.

In units of gradients (weights over the learning rate), a released iterate is, given the two before it, a uniform draw
of width tau plus a Gaussian of standard deviation sigma * C / B plus the mean clipped gradient, on every coordinate and
independently. An example moves p = 1 / share^2 of the coordinates by C / (sqrt(p) * B) each: no clipped gradient can
move fewer by more. (That no uneven spread, and no wider uniform draw, costs more is the authors' assumption: `worst`
looks for a counter-example.)

With P and Q the distributions of one coordinate with and without the example, K(k) = E_Q[(P / Q)^k] to the p-th power
is the moment for all of them, and of a step under Poisson sampling with rate q

    A(a) = sum over k of binomial(a, k) (1 - q)^(a - k) q^k K(k),    a = 2, 3, ...

so that T steps cost epsilon = min over a of (T log A(a) + log(1 / delta)) / (a - 1), which is the classical conversion.
A(a) belongs to adding an example. Removing one costs no more: a reflection swaps P and Q (Mironov, Talwar and Zhang
2019, arXiv:1908.10530, theorem 5).
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

ORDERS = range(2, 20)  # those of the authors' code
REACH = 12.0  # standard deviations beyond which a normal distribution counts for nothing: exp(-72)
STEP = 1 / 32  # of the quadrature, in standard deviations
NARROWEST, FARTHEST = 1e-3, 100.0  # beyond them the uniform noise is not made use of
WIDER = (1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0, 100.0)
NEARER = tuple(i / 12 for i in range(1, 13))

Array = NDArray[np.float64]


@lru_cache(maxsize=256)
def amplified(
    *, sigma: float, clip: float, share: float, batch: float, n: int, steps: int, delta: float, tau: float
) -> float:
    """The claimed epsilon; inf where there is no noise. Never above what the Gaussian noise alone gives at `ORDERS`.

    `tau` is the least width of the uniform draws in units of gradients, `clip` * `share` the bound on a coordinate.
    """
    if not sigma > 0:
        return math.inf
    p, q = 1 / share**2, batch / n
    logs = {k: p * log_moment(k, share / sigma, tau * batch / (sigma * clip)) for k in ORDERS}
    best = math.inf
    for a in ORDERS:
        terms = [
            math.log(math.comb(a, k)) + _log_power(1 - q, a - k) + k * math.log(q) + logs.get(k, 0.0)
            for k in range(a + 1)
        ]
        top = max(terms)
        step = top + math.log(math.fsum(math.exp(term - top) for term in terms))
        best = min(best, (steps * step + math.log(1 / delta)) / (a - 1))
    return best


@lru_cache(maxsize=256)
def worst(*, sigma: float, clip: float, share: float, batch: float, tau: float) -> float:
    """The largest cost found, as a multiple of the one assumed, of a shift that is smaller or a draw that is wider.

    A coordinate that moves by s costs log K(s). If log K(s) / s^2, at any width of `tau` or more, is never above its
    value at the largest shift and the width `tau`, then no gradient within the two norms costs more than the even one:
    the sum of s^2 is bounded. It is compared on the grid `WIDER` x `NEARER` at all `ORDERS`, which is no proof.
    """
    shift, width = share / sigma, tau * batch / (sigma * clip)
    most = 0.0
    for k in ORDERS:
        assumed = log_moment(k, shift, width)
        slack = 1e-12  # of the quadrature: a log moment near zero is known to so much
        for wider in WIDER:
            for nearer in NEARER:
                cost = log_moment(k, shift * nearer, width * wider) / nearer**2
                most = max(most, cost / (assumed + slack / nearer**2))
    return most


def log_moment(k: int, shift: float, width: float) -> float:
    """log E_Q[(P / Q)^k], Q the distribution of U[-width / 2, width / 2] + N(0, 1), P the same moved by `shift` >= 0.

    At most k (k - 1) shift^2 / 2, that of the Gaussian alone: the uniform noise is added to both distributions alike.

    By the trapezoidal rule, which converges faster than any power of its step on smooth functions that vanish or are
    flat at both ends. Where the ends of the uniform draw are far apart each has a grid of its own, in distances from
    that end, and between them P = Q. The grids hold all that counts: above the upper end (P / Q)^k Q has its mode at a
    distance of k * shift, and below the lower end P < Q.
    """
    gaussian = k * (k - 1) * shift**2 / 2
    if width < NARROWEST or shift > FARTHEST:
        return gaussian
    pieces = []
    if width > shift + 2 * REACH:
        x = _grid(-REACH, shift + REACH)  # upwards from the lower end; the density is that of a mirror image
        pieces.append((x[1] - x[0], k * _log_density(shift - x, width) + (1 - k) * _log_density(-x, width)))
        x, flat = _grid(-REACH, k * shift + REACH), width - shift - 2 * REACH
    else:
        x, flat = _grid(-width - REACH, k * shift + REACH), 0.0
    pieces.append((x[1] - x[0], k * _log_density(x - shift, width) + (1 - k) * _log_density(x, width)))
    top = max(0.0, *(float(integrand.max()) for _, integrand in pieces))
    area = flat * math.exp(-top)
    for spacing, integrand in pieces:
        heights = np.exp(integrand - top)
        area += float(heights.sum() - (heights[0] + heights[-1]) / 2) * spacing
    return max(0.0, min(gaussian, top + math.log(area / width)))


def _grid(start: float, stop: float) -> Array:
    return np.linspace(start, stop, math.ceil((stop - start) / STEP) + 1)


def _log_density(x: Array, width: float) -> Array:
    """log of `width` times the density of U[-width, 0] + N(0, 1) at x: log(Phi(-x) - Phi(-x - width)), by tails."""
    from scipy.special import log_ndtr  # imports half of SciPy, for methods that mix

    x = np.where(x < -width / 2, -width - x, x)  # symmetric; on the upper side tails subtract without loss
    near, far = log_ndtr(-x), log_ndtr(-x - width)
    result: Array = near + np.log(-np.expm1(far - near))
    return result


def _log_power(x: float, n: int) -> float:
    """n * log(x), and 0 where n is 0, whatever x."""
    return 0.0 if n == 0 else n * math.log(x) if x > 0 else -math.inf
