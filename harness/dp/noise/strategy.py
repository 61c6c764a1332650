"""Strategies of correlated noise: which matrix C the noise is drawn through, and what that costs and gains.

The noise of step t is s (C^-1 Z)_t with independent normal Z, C lower triangular. Releasing x + s C^-1 Z is
releasing C x + s Z, by a map that anybody can apply: so privacy is that of a Gaussian mechanism on C x. One example
moves x in the steps that it takes part in, and C x by as many columns of C (Denisov et al. 2022, arXiv:2202.08312; also
where later gradients depend on what was released before). What is gained: sums of the noise over steps are small.

C is a Toeplitz matrix here, given by its first column, or by the first column of its inverse. Where it is made of
integers, these are in units of 2^-10: that keeps integer noise exact (`harness.dp.noise.correlated`).
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from scipy.optimize import minimize
from scipy.signal import lfilter

from harness.dp.noise.noise import Array

UNIT = 1 << 10


def square_root(bands: int) -> tuple[int, ...]:
    """The first `bands` coefficients of C^-1 for BISR, in units of 2^-10: those of sqrt(1 - x).

    They are the inverse square root of the matrix of prefix sums, cut off (Kalinin et al. 2025, arXiv:2505.12128).
    """
    k = np.arange(1, bands, dtype=np.float64)
    return _in_units(np.cumprod(np.r_[1.0, (k - 1.5) / k], dtype=np.float64))


@lru_cache(maxsize=64)
def banded(bands: int, steps: int) -> tuple[int, ...]:
    """The first column of a banded Toeplitz C, in units of 2^-10, with the least mean error of prefix sums.

    BandMF (Choquette-Choo et al. 2023, arXiv:2306.08153), with Toeplitz matrices (McKenna 2024, arXiv:2405.15913). What
    is minimised is the mean of `errors` times the squared norm of a column of C; where bands do not overlap between
    two uses of an example, that is its cost however often it is used. The first coefficient is 1.
    """
    bands = min(bands, steps)
    if bands == 1:
        return (UNIT,)
    weights = (steps - np.arange(steps)) / steps

    def objective(free: Array) -> tuple[float, Array]:
        c = np.r_[1.0, free]
        inverse = lfilter([1.0], c, np.r_[1.0, np.zeros(steps - 1)])
        sums = np.cumsum(inverse)
        error, norm = float(weights @ sums**2), float(c @ c)
        # d sums / d c_k is minus the convolution of sums and inverse, k steps later.
        slope = lfilter([1.0], c, sums)
        back = np.correlate(2 * weights * sums, slope, "full")[steps - 1 :]
        return math.log(error * norm), -back[1:bands] / error + 2 * free / norm

    start = np.cumprod((np.arange(1, bands) - 0.5) / np.arange(1, bands))
    found = minimize(objective, start, jac=True, method="L-BFGS-B", bounds=[(0.0, 1.0)] * (bands - 1))
    # Falling coefficients: then uses as close together as may be are the worst.
    return _in_units(np.minimum.accumulate(np.r_[1.0, found.x]))


def _in_units(coefficients: Array) -> tuple[int, ...]:
    return tuple(int(c) for c in np.rint(coefficients * UNIT))


def inverse(column: Array, steps: int) -> Array:
    """The first column [steps] of the inverse of a lower triangular Toeplitz matrix with this first column."""
    found: Array = lfilter([1.0], column[:steps], np.r_[1.0, np.zeros(steps - 1)])
    return found


def sensitivity(column: Array, steps: int, separation: int) -> float:
    """By how much C x moves (l2) where an example moves x by 1 in each step that it takes part in.

    It does so at most every `separation` steps. `column` [steps] is that of C, without a negative or a rising entry:
    then the worst steps are 0, `separation`, 2 `separation` and so on (Kalinin and Lampert 2024, arXiv:2405.13763,
    theorem 2). Raises ValueError for another one.
    """
    if (column < -1e-12).any() or (np.diff(column) > 1e-12).any():
        raise ValueError("the entries of a column of C must not be negative and must not rise")
    moved = np.zeros(steps)
    for first in range(0, steps, separation):
        moved[first:] += column[: steps - first]
    return float(np.linalg.norm(moved))


def errors(noising: Array) -> Array:
    """The mean squared error [steps] of the sum of the noise up to each step, for C^-1 with this first column."""
    found: Array = np.cumsum(np.cumsum(noising) ** 2)
    return found


def tree_levels(steps: int) -> int:
    """How many levels of a binary tree over `steps` steps have a node that is ever released."""
    return steps.bit_length()


def tree_sensitivity(steps: int, separation: int) -> float:
    """By how much the released nodes of a binary tree move (l2) where an example moves every `separation` steps by 1.

    Released are the nodes that a prefix sum ever needs: those that are left children. Exact, for uses exactly so far
    apart: wider gaps put no more uses into a node.
    """
    t = np.arange(steps)
    squares = np.zeros(separation)
    for level in range(tree_levels(steps)):
        node = t >> level
        released = (node % 2 == 0) & (((node + 1) << level) <= steps)
        counts = np.zeros((separation, int(node[-1]) + 1))
        np.add.at(counts, (t[released] % separation, node[released]), 1.0)
        squares += (counts**2).sum(1)
    return float(np.sqrt(squares.max()))
